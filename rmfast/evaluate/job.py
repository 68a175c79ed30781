"""``rmfast eval``: how well a reward model tells chosen answers from rejected ones."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast import loading
from rmfast.arguments import flag
from rmfast.data.encoding import read_template
from rmfast.data.files import Reader
from rmfast.data.rows import Row, RowReader
from rmfast.errors import RowError, UserError
from rmfast.evaluate import measures, published, show
from rmfast.evaluate.options import EvalOptions
from rmfast.evaluate.output import RowFiles, all_paths, first_state
from rmfast.resume import check_paths, interrupted, locked, saving, told_to_stop, versions
from rmfast.score.windows import memory_told, progress_bar

if TYPE_CHECKING:
    from rmfast.data.encoding import Conversation
    from rmfast.score.scorer import Scorer
    from rmfast.score.start import State
    from rmfast.score.windows import Scored

Tag = tuple[int, Row | None, str | None]  # number, what it was read as, the benchmark's name

_SPLITS = {
    "allenai/reward-bench": "filtered",
    "allenai/reward-bench-2": "test",
    "ScalerLab/JudgeBench": "gpt",
}
_ATTENTION = {"eager": "sdpa", "sdpa": "sdpa", "flash_attention_2": "auto"}
_DEBUG = 10  # rows
_SHOWN = 5  # errors on the screen
_LISTED = 100  # errors in the JSON


def run(args: EvalOptions) -> int:
    """``rmfast eval``; returns the exit code, 1 if there are rows that could not be scored."""
    loading.silence_transformers()
    _read_rewardbench_names(args)
    template = _check(args)
    with contextlib.ExitStack() as stack:
        for path in all_paths(args).values():
            if path.absolute().parent.is_dir() and (path.is_file() or not path.exists()):
                stack.enter_context(locked(path))
        return _run(args, template)


def _run(args: EvalOptions, template: str | None) -> int:
    source = _Source(args)
    state = first_state(args, source.reader, template)
    goes_on = args.resume and Path(args.scores).exists()
    paths = all_paths(args)
    if goes_on:  # with files of rows; the others are written at the end
        paths = {name: paths[name] for name in ("--json", "--figure") if name in paths}
        own = json.loads(state.report or "[]")
        paths = {name: path for name, path in paths.items() if str(path) not in own}
    check_paths({}, paths, overwrite=args.overwrite)
    ends = [str(Path(path)) for path in (args.json, args.figure) if path is not None]
    state.report = json.dumps(ends)  # what this run may replace when it goes on
    try:
        with told_to_stop():
            return _evaluate(args, template, source, state)
    except KeyboardInterrupt:
        if args.scores is None:
            raise
        kept = f", {state.rows:,} rows are in {args.scores}"
        return interrupted("eval", f"{kept}; the same command with --resume continues")


def _evaluate(args: EvalOptions, template: str | None, source: _Source, state: State) -> int:
    judged, left_out = measures.Judged(), _LeftOut(args)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(unit=" answers"))
        options = args.for_scorer(template) | {"max_tokens": state.max_tokens or args.max_tokens}
        options["progress"] = lambda conversations, _: bar.update(conversations)
        scorer = _scorer(args, options)
        files = stack.enter_context(RowFiles(args, scorer.encoder, state))

        def take(tag: Tag, scored: Scored, new: bool = True) -> None:
            number, row, benchmark = tag
            if scored.error is not None:
                left_out.add(number, scored.error)
            else:
                id = row.record.get("id") if benchmark else None
                about = (len(row.chosen), row.subset, benchmark, id)
                judged.add(scored.scores, scored.lengths, *about)
            files.add(number, row, scored, new)

        rows, before = iter(source), state.stats()
        for tag, scored in files.earlier(rows):
            take(tag, scored, new=False)
        windows = stack.enter_context(contextlib.closing(scorer.windows(rows)))
        advice = "" if args.scores is None else "; --resume continues after the last window"
        for window in memory_told(windows, advice):
            for tag, scored in window:
                take(tag, scored)
            state.totals = dataclasses.asdict(before + scorer.stats)
            state.max_tokens = scorer.max_tokens
            files.save(len(window))
        if not len(judged):
            first = "".join(f"; line {one['line']}: {one['reason']}" for one in left_out.rows[:1])
            raise UserError(f"{args.input}: there is no row to evaluate{first}")
        summary = {"headline": published.headline(judged), **measures.summarise(judged)}
        bar.close()
        paths = files.finish(summary)
    run = {**dataclasses.asdict(state.stats()), **scorer.about()}
    # a policy's own warnings are about a head
    warnings = (run if args.ref_model is None else run["form"])["warnings"]
    run["warnings"] = warnings + state.stats().warnings()
    for path in paths + _report(args, run, summary, left_out):
        print(f"written: {path}")
    return left_out.exit_code


def _read_rewardbench_names(args: EvalOptions) -> None:
    """Set our options by RewardBench's names for them."""
    if args.torch_dtype is not None:
        args.dtype = args.torch_dtype
    if args.attn_implementation is not None:
        args.attention = _ATTENTION[args.attn_implementation]
    if args.force_truncation:
        args.on_overlong = "truncate_left"
    if args.debug:
        args.limit = min(args.limit or _DEBUG, _DEBUG)
    if args.batch_size is not None:
        words = "micro-batches are cut by tokens, see --max-tokens"
        print(f"rmfast eval: --batch_size changes nothing here: {words}", file=sys.stderr)
    if args.save_all or args.output_dir is not None:
        args.rewardbench_files = True
    args.output_dir = args.output_dir or "results"
    args.split = args.split or _SPLITS.get(args.input, "train")


def _check(args: EvalOptions) -> str | None:
    """Raise UserError for what is wrong without a model. Returns the chat template, if named."""
    for name in ("json", "figure", "scores"):
        path = getattr(args, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: there is no such folder")
    names = ("input", "model", "ref_model", "tokenizer", "chat_template")
    inputs = {flag(name): getattr(args, name) for name in names}
    check_paths(inputs, all_paths(args), overwrite=True)
    if args.figure is not None:
        show.check(args.figure)
    if args.ref_model is None and args.beta is not None:
        raise UserError("--beta belongs to --ref-model: give both, or neither")
    if args.ref_model is not None and args.ref_model == args.model:
        raise UserError("--ref-model is the model itself: every reward would be 0")
    if args.ref_model is not None and args.pooling is not None:
        raise UserError("--pooling belongs to a reward model's head, and --ref-model has none")
    return read_template(args.chat_template)


def _scorer(args: EvalOptions, options: dict[str, Any]) -> Scorer:
    load = functools.partial(loading.load, **args.for_loading())
    task = "reward" if args.ref_model is None else "causal"
    loaded = load(args.model, task=task)
    try:
        if args.ref_model is None:
            from rmfast.score.scorer import Scorer

            return Scorer(loaded.model, loaded.tokenizer, pooling=args.pooling, **options)
        from rmfast.evaluate.implicit import ImplicitScorer

        tokenizer = args.tokenizer or args.model
        reference = load(args.ref_model, task=task, revision=None, tokenizer=tokenizer).model
        options["beta"] = 0.1 if args.beta is None else args.beta
        return ImplicitScorer(loaded.model, reference, loaded.tokenizer, **options)
    except ValueError as error:  # an attention that is not installed, …
        raise UserError(str(error)) from None


class _Source:
    """Rows for a scorer, each with its number and what it was read as."""

    def __init__(self, args: EvalOptions) -> None:
        options = {"name": args.name, "split": args.split, "limit": args.limit}
        self.reader = reader = Reader(args.input, **options)
        names = ("prompt", "chosen", "rejected", "subset")
        columns = {name: getattr(args, f"{name}_column") for name in names}
        cells = reader.format == "csv"
        self.rows = RowReader(columns, cells=cells, lists=True, ignored=args.ignored)

    def __iter__(self) -> Iterator[tuple[Tag, list[Conversation] | RowError]]:
        for record in self.reader.read():
            try:
                benchmark, value = published.read(
                    self.reader.plain(record.value), self.rows.columns
                )
                row = self.rows.read(value, "pair")
            except RowError as error:
                yield (record.number, None, None), error
            else:
                yield (record.number, row, benchmark), [*row.chosen, *row.rejected]


class _LeftOut:
    """The rows that could not be scored."""

    def __init__(self, args: EvalOptions) -> None:
        self.args, self.exit_code = args, 0
        self.rows: list[dict[str, Any]] = []

    def add(self, number: int, error: RowError) -> None:
        if error.kind != "overlong" or self.args.on_overlong != "skip":
            if self.args.strict:
                raise UserError(f"{self.args.input}: line {number}: {error.reason}")
            self.exit_code = 1
        self.rows.append({"line": number, "reason": error.reason, "kind": error.kind})

    def as_dict(self) -> dict[str, Any]:
        kinds = collections.Counter(one["kind"] for one in self.rows)
        return {"bad": kinds["bad"], "overlong": kinds["overlong"], "rows": self.rows[:_LISTED]}

    def lines(self) -> Iterator[str]:
        """What a terminal shows."""
        if self.rows:
            yield "left out: {bad:,} bad rows, {overlong:,} too long".format(**self.as_dict())
        for one in self.rows[:_SHOWN]:
            yield f"  line {one['line']}: {one['reason']}"
        if len(self.rows) > _SHOWN:
            yield f"  and {len(self.rows) - _SHOWN:,} more"


def _report(
    args: EvalOptions, run: dict[str, Any], summary: dict[str, Any], left_out: _LeftOut
) -> list[Path]:
    """Print the figures, and write the JSON and the picture that were asked for: their paths."""
    against = "" if args.ref_model is None else f" against {args.ref_model}"
    title = f"{args.model}{against} on {args.input}"
    print(f"{title}\n\n{show.table(summary)}\n")
    saved = 1 - run["nodes"] / run["tokens"]
    print(
        f"{run['rows']:,} rows, {run['conversations']:,} answers, {run['tokens']:,} tokens in "
        f"{run['seconds']:.1f} s; shared prefixes saved {saved:.0%} of them; level {run['level']}"
    )
    for warning in run["warnings"]:
        print(f"! {warning}")
    for line in left_out.lines():
        print(line)
    figures = {
        "model": args.model,
        "ref_model": args.ref_model,
        "input": args.input,
        **summary,
        "left_out": left_out.as_dict(),
        "run": {**run, "versions": versions()},
    }
    if args.json is not None:
        with saving(Path(args.json), ""):
            text = json.dumps(figures, ensure_ascii=False, indent=2, allow_nan=False)
            Path(args.json).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    if args.figure is not None:
        with saving(Path(args.figure), ""):
            show.figure(summary, title).savefig(args.figure)
    return [Path(path) for path in (args.json, args.figure) if path is not None]
