"""Scoring on several devices or machines, by Ray: ``pip install 'rmfast[ray]'``.

:func:`score_dataset` is for pipelines of Ray Data; :class:`RayScorer` stands in for a
:class:`rmfast.Scorer` where rows come one after the other, as in ``rmfast score --ray``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rmfast import loading
from rmfast.data.encoding import Conversation
from rmfast.errors import RowError, UserError
from rmfast.score.scorer import Scorer
from rmfast.score.windows import Scored, Stats, gathered

if TYPE_CHECKING:
    import pyarrow
    import ray.data

_AHEAD = 2  # windows that each actor holds, so that none waits for its next


class Worker:
    """A scorer in a process of its own.

    Args:
        model: folder or hub name.
        load: options of :func:`rmfast.loading.load`.
        options: options of :class:`rmfast.Scorer`.
    """

    def __init__(self, model: str, load: dict[str, Any], options: dict[str, Any]) -> None:
        self._arguments = model, load, options

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Made when it is used: what a constructor raises does not reach whoever called."""
        model, load, options = self._arguments
        loading.silence_transformers()
        loaded = loading.load(model, **load)
        return Scorer(loaded.model, loaded.tokenizer, **options)

    def pid(self) -> int:
        return os.getpid()

    def about(self) -> dict[str, Any]:
        return {**self.scorer.about(), "max_tokens": self.scorer.max_tokens}

    def score(self, rows: list) -> tuple[list[Scored], Stats, int]:
        """A window's scores, what it took, and the tokens of a micro-batch from now on."""
        self.scorer.stats = Stats()
        scored = [one for window in self.scorer.windows(rows) for one in window]
        return scored, self.scorer.stats, self.scorer.max_tokens


class TableWorker(Worker):
    """Scores the tables of a Ray data set."""

    def __init__(self, named: dict[str, str], stem: str, *args: Any) -> None:
        super().__init__(*args)
        self.named, self.stem = named, stem

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        import pyarrow as pa

        from rmfast.data import columns as data_columns

        layout = data_columns.choose(table.column_names, self.named, stem=self.stem)
        if layout is None:
            raise UserError(
                f"the data set has the columns {', '.join(table.column_names)}, and needs "
                f"{data_columns.needed(self.named)}"
            )
        rows = [_conversations(layout, row) for row in table.to_pylist()]
        scored, _, _ = self.score(rows)
        kind = pa.list_(pa.float32()) if layout.kind == "responses" else pa.float32()
        values = [one.scores is not None and layout.scores(one.scores) for one in scored]
        for i, name in enumerate(layout.added):
            added = [row[i] if row else None for row in values]
            table = table.append_column(name, pa.array(added, kind))
        errors = [None if one.error is None else one.error.reason for one in scored]
        return table.append_column(f"{self.stem}_error", pa.array(errors, pa.string()))


def _conversations(layout: Any, row: dict[str, Any]) -> Any:
    try:
        return layout.conversations(row)
    except RowError as error:
        return error


def score_dataset(
    dataset: ray.data.Dataset,
    model: str,
    *,
    actors: int = 1,
    rows: int = 4096,
    columns: dict[str, str] | None = None,
    reward_column: str = "reward",
    load: dict[str, Any] | None = None,
    resources: dict[str, Any] | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Add the scores of its conversations to a Ray data set, lazily.

    Args:
        dataset: with columns as for ``rmfast score``: ``messages``, ``prompt`` and ``response`` or
            ``responses``, ``chosen`` and ``rejected``, or ``text``.
        model: folder or hub name of a reward model, for the actors to load.
        actors: processes, each with a model of its own.
        rows: rows an actor gets at a time: prefixes meet among them.
        columns: names of the fields above, where they are others.
        reward_column: what the added columns are called, or end with: ``reward``; ``rewards`` for
            ``responses``; ``chosen_reward`` and ``rejected_reward``.
        load: options of :func:`rmfast.loading.load`, such as ``dtype`` and ``device``.
        resources: of an actor, for Ray; left out: a GPU where there is one.
        options: of :class:`rmfast.Scorer`.

    Returns:
        The data set with the scores, fp32, and ``reward_error``: why a row's score is null, else
        null.
    """
    _need_ray()
    import ray.data

    return dataset.map_batches(
        TableWorker,
        fn_constructor_args=(columns or {}, reward_column, model, load or {}, options),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        **(_resources(load) if resources is None else resources),
    )


class RayScorer:
    """Scores windows of rows with several actors, in the order in which the rows came.

    An actor that dies is started again, and its windows with it.

    Args:
        model: folder or hub name of a reward model, for the actors to load.
        actors: processes, each with a model of its own.
        window: as for :class:`rmfast.Scorer`, whose scores these are.
        max_tokens: as for :class:`rmfast.Scorer`; what the first actor finds is for all.
        progress: called with conversations and tokens after each window.
        load: options of :func:`rmfast.loading.load`.
        options: of :class:`rmfast.Scorer`.

    Raises:
        UserError: Ray is not installed, or has no room for so many actors.
    """

    def __init__(
        self,
        model: str,
        *,
        actors: int,
        window: int = 1024,
        max_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        load: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        _need_ray()
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        resources = _resources(load)
        for kind, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            there = ray.cluster_resources().get(name, 0)
            if actors * resources.get(kind, 0) > there:
                raise UserError(f"Ray has {there:g} {name}s, too few for {actors} actors")
        # a restarted actor does again what its predecessor was doing
        worker = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(Worker)

        def start(tokens: int | None) -> Any:
            return worker.remote(
                model, load or {}, {**options, "max_tokens": tokens, "window": window}
            )

        first = start(max_tokens)
        self._about = _words(ray, first.about.remote())
        self.max_tokens = self._about.pop("max_tokens")
        self._actors = [first, *(start(self.max_tokens) for _ in range(actors - 1))]
        self._window, self._progress = window, progress
        self.stats = Stats()

    def about(self) -> dict[str, Any]:
        return self._about

    def windows(self, rows: Iterable[Sequence[Conversation] | RowError]) -> Iterator[list[Scored]]:
        """As :meth:`rmfast.Scorer.windows`: the same windows, in order."""
        import ray

        waiting: collections.deque = collections.deque()
        busy = dict.fromkeys(range(len(self._actors)), 0)
        for window in gathered(rows, self._window):
            if len(waiting) >= _AHEAD * len(self._actors):
                yield self._next(ray, waiting, busy)
            idle = min(busy, key=busy.__getitem__)
            busy[idle] += 1
            waiting.append((idle, self._actors[idle].score.remote(window)))
        while waiting:
            yield self._next(ray, waiting, busy)

    def _next(self, ray: Any, waiting: collections.deque, busy: dict[int, int]) -> list[Scored]:
        actor, future = waiting.popleft()
        scored, stats, tokens = _words(ray, future)
        busy[actor] -= 1
        self.max_tokens = min(self.max_tokens, tokens)
        for name, value in dataclasses.asdict(stats).items():
            setattr(self.stats, name, getattr(self.stats, name) + value)
        if self._progress is not None:
            self._progress(stats.conversations, stats.tokens)
        return scored

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


def _need_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UserError("Ray is not installed: pip install 'rmfast[ray]'") from None


def _words(ray: Any, future: Any) -> Any:
    """The result; an exception as the actor raised it, not as Ray wraps it."""
    try:
        return ray.get(future)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise UserError(f"an actor could not be started: {error}") from None


def _resources(load: dict[str, Any] | None) -> dict[str, Any]:
    device = (load or {}).get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"num_cpus": 1, **({"num_gpus": 1} if device.startswith("cuda") else {})}
