"""Scoring on several devices or machines, by Ray: ``pip install 'rmfast[ray]'``."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from rmfast import loading
from rmfast.data import columns as data_columns
from rmfast.data.files import to_records
from rmfast.data.values import without_inner_nulls
from rmfast.errors import RowError, UserError
from rmfast.score.scorer import Scorer
from rmfast.score.windows import Scored, Stats, Tagged, gathered

if TYPE_CHECKING:
    import pyarrow
    import ray.data

_AHEAD = 2  # windows that each actor holds, so that none waits for its next


class Worker:
    """A scorer in a process of its own; ``named`` and ``stem`` are for tables."""

    def __init__(
        self,
        model: str,
        load: dict[str, Any],
        options: dict[str, Any],
        named: dict[str, str] | None = None,
        stem: str = "reward",
    ) -> None:
        self.model, self.load, self.options = model, load, options
        self.named, self.stem = named, stem

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Made when it is used: an error of a constructor does not reach the caller."""
        loading.silence_transformers()
        loaded = loading.load(self.model, **self.load)
        return Scorer(loaded.model, loaded.tokenizer, **self.options)

    def about(self) -> dict[str, Any]:
        return {**self.scorer.about(), "max_tokens": self.scorer.max_tokens}

    def score(self, rows: list[Any]) -> tuple[list[Scored], Stats, int]:
        """A window's scores, its figures, and the tokens of a micro-batch from now on."""
        self.scorer.stats = Stats()
        windows = self.scorer.windows(enumerate(rows))
        scored = [scored for window in windows for _, scored in window]
        return scored, self.scorer.stats, self.scorer.max_tokens

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """A table of a Ray data set, with its scores."""
        import pyarrow as pa

        layout = data_columns.choose(table.column_names, self.named, stem=self.stem)
        if layout is None:
            raise UserError(
                f"the data set has the columns {', '.join(table.column_names)}, and needs "
                f"{data_columns.needed(self.named)}"
            )
        scored, _, _ = self.score(
            [_conversations(layout, without_inner_nulls(row)) for row in to_records(table)]
        )
        kind = pa.list_(pa.float32()) if layout.kind == "responses" else pa.float32()
        values = [x.scores is not None and layout.scores(x.scores) for x in scored]
        for i, name in enumerate(layout.added):
            added = [row[i] if row else None for row in values]
            table = table.append_column(name, pa.array(added, kind))
        errors = [x.error and x.error.reason for x in scored]
        return table.append_column(f"{self.stem}_error", pa.array(errors, pa.string()))


def _conversations(layout: data_columns.Columns, row: dict[str, Any]) -> list[Any] | RowError:
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
        reward_column: name of the added column, or its end: ``reward``; ``rewards`` for
            ``responses``; ``chosen_reward`` and ``rejected_reward``.
        load: options of :func:`rmfast.loading.load`, such as ``dtype`` and ``device``.
        resources: of an actor, for Ray; when not given: a GPU where there is one.
        options: of :class:`rmfast.Scorer`.

    Returns:
        The data set with the scores, fp32, and ``reward_error``: why a row's score is null, else
        null.
    """
    ray = _ray()
    return dataset.map_batches(
        Worker,
        fn_constructor_args=(model, load or {}, options, columns, reward_column),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        **(_resources(load) if resources is None else resources),
    )


class RayScorer:
    """Scores windows of rows with several actors, in the order of the rows.

    Ray starts an actor that dies again, and its windows with it. The options are those of
    :class:`rmfast.Scorer`; ``progress`` is called after each window.

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
        ray = _ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        resources = _resources(load)
        for kind, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            available = ray.cluster_resources().get(name, 0)
            if actors * resources.get(kind, 0) > available:
                raise UserError(f"Ray has {available:g} {name}s, too few for {actors} actors")
        worker = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(Worker)
        options |= {"window": window, "max_tokens": max_tokens}
        first = worker.remote(model, load or {}, options)
        self._about = _result(first.about.remote())
        self.max_tokens = options["max_tokens"] = self._about.pop("max_tokens")
        rest = [worker.remote(model, load or {}, options) for _ in range(actors - 1)]
        self._actors = [first, *rest]
        self._window, self._progress, self.stats = window, progress, Stats()

    def about(self) -> dict[str, Any]:
        return self._about

    def windows(self, rows: Iterable[Tagged]) -> Iterator[list[tuple[Any, Scored]]]:
        """As :meth:`rmfast.Scorer.windows`: the same windows, in order."""
        waiting: collections.deque = collections.deque()
        actors = itertools.cycle(self._actors)
        for window in gathered(rows, self._window):
            if len(waiting) == _AHEAD * len(self._actors):
                yield self._next(*waiting.popleft())
            tags, conversations = zip(*window, strict=True)
            waiting.append((tags, next(actors).score.remote(list(conversations))))
        while waiting:
            yield self._next(*waiting.popleft())

    def _next(self, tags: tuple, future: Any) -> list[tuple[Any, Scored]]:
        scored, stats, tokens = _result(future)
        self.max_tokens = min(self.max_tokens, tokens)
        self.stats += stats
        if self._progress is not None:
            self._progress(stats.conversations, stats.tokens)
        return list(zip(tags, scored, strict=True))


def _ray() -> Any:
    try:
        import ray.data
    except ImportError:
        raise UserError("Ray is not installed: pip install 'rmfast[ray]'") from None
    return ray


def _result(future: Any) -> Any:
    """The result of a call; an exception as the actor raised it, not as Ray wraps it."""
    ray = _ray()
    try:
        return ray.get(future)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise UserError(f"an actor could not be started: {error}") from None


def _resources(load: dict[str, Any] | None) -> dict[str, Any]:
    device = (load or {}).get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"num_cpus": 1, **({"num_gpus": 1} if device.startswith("cuda") else {})}
