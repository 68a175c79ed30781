"""``rmfast eval``: how well a reward model tells chosen answers from rejected ones."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast import loading
from rmfast.data.encoding import read_template
from rmfast.data.files import Reader
from rmfast.data.rows import Row, RowReader
from rmfast.errors import RowError, UserError
from rmfast.evaluate import measures, rewardbench, show
from rmfast.evaluate.options import EvalOptions
from rmfast.resume import versions
from rmfast.score.progress import progress_bar
from rmfast.score.windows import memory_told

if TYPE_CHECKING:
    from rmfast.data.encoding import Conversation, Encoder
    from rmfast.score.scorer import Scorer
    from rmfast.score.windows import Scored


_SPLITS = {"allenai/reward-bench": "filtered", "allenai/reward-bench-2": "test"}
_ATTENTION = {"eager": "sdpa", "sdpa": "sdpa", "flash_attention_2": "flash"}
_DEBUG = 10  # rows
_SHOWN = 5  # errors on the screen
_LISTED = 100  # errors in the JSON


def run(args: EvalOptions) -> int:
    """The command, with the options of ``rmfast eval``.

    Returns:
        0; 1 if there are rows that could not be scored.

    Raises:
        UserError, DataError: it cannot run; the message is for people.
    """
    loading.silence_transformers()
    _read_rewardbench_names(args)
    template = _check(args)
    source, judged, left_out = _Source(args), measures.Judged(), _LeftOut(args)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(unit=" answers"))
        scorer = _scorer(args, template, lambda conversations, _: bar.update(conversations))
        files = stack.enter_context(_RowFiles(args, scorer.encoder))
        windows = stack.enter_context(contextlib.closing(scorer.windows(source)))
        for window in memory_told(windows):
            for (number, row), scored in window:
                if scored.error is not None:
                    left_out.add(number, scored.error)
                    files.error(number, scored.error)
                    continue
                judged.add(scored.scores, scored.lengths, len(row.chosen), row.subset)
                files.row(number, row, scored)
        if not len(judged):
            first = "".join(f"; line {one['line']}: {one['reason']}" for one in left_out.rows[:1])
            raise UserError(f"{args.input}: there is no row to evaluate{first}")
        summary = measures.summarise(judged)
        bar.close()
        paths = files.finish(summary)
    _print(args, scorer, summary, left_out)
    paths += _write(args, scorer, summary, left_out)
    for path in paths:
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
    if args.figure is not None:
        show.check(args.figure)
    if args.ref_model is None and args.beta is not None:
        raise UserError("--beta belongs to --ref-model: give both, or neither")
    if args.ref_model is not None and args.ref_model == args.model:
        raise UserError("--ref-model is the model itself: every reward would be 0")
    if args.ref_model is not None and args.pooling != "hf":
        raise UserError("--pooling belongs to a reward model's head, and --ref-model has none")
    return read_template(args.chat_template)


def _scorer(args: EvalOptions, template: str | None, progress: Any) -> Scorer:
    options = args.for_scorer(template) | {"progress": progress}
    load = functools.partial(loading.load, **args.for_loading())
    task = "reward" if args.ref_model is None else "causal"
    loaded = load(args.model, revision=args.revision, task=task, tokenizer=args.tokenizer)
    try:
        if args.ref_model is None:
            from rmfast.score.scorer import Scorer

            return Scorer(loaded.model, loaded.tokenizer, pooling=args.pooling, **options)
        from rmfast.evaluate.implicit import ImplicitScorer

        tokenizer = args.tokenizer or args.model
        reference = load(args.ref_model, task=task, tokenizer=tokenizer).model
        options["beta"] = 0.1 if args.beta is None else args.beta
        return ImplicitScorer(loaded.model, reference, loaded.tokenizer, **options)
    except ValueError as error:  # an attention that is not installed, …
        raise UserError(str(error)) from None


# --- rows


class _Source:
    """Rows for a scorer, each with its number and what it was read as."""

    def __init__(self, args: EvalOptions) -> None:
        options = {"name": args.name, "split": args.split, "limit": args.limit}
        reader = Reader(args.input, **options)
        self.records = reader.read()
        names = ("prompt", "chosen", "rejected", "subset")
        columns = {name: getattr(args, f"{name}_column") for name in names}
        self.rows = RowReader(columns, cells=reader.format == "csv", lists=True)

    def __iter__(self) -> Iterator[tuple[tuple[int, Row | None], list[Conversation] | RowError]]:
        for record in self.records:
            try:
                row = self.rows.read(record.value, "pair")
            except RowError as error:
                yield (record.number, None), error
            else:
                yield (record.number, row), [*row.chosen, *row.rejected]


# --- results


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


class _RowFiles(contextlib.ExitStack):
    """The files that rows are written to as they come; a context manager."""

    def __init__(self, args: EvalOptions, encoder: Encoder) -> None:
        super().__init__()
        self.args, self.encoder = args, encoder
        self.results: list[float] = []  # of RewardBench's rows
        self.stem = rewardbench.stem(args.output_dir, args.model)
        paths = {} if args.scores is None else {"scores": Path(args.scores)}
        if args.rewardbench_files:
            paths["outputs"] = Path(f"{self.stem}_outputs.jsonl")
        if args.save_all:
            paths["all"] = Path(f"{self.stem}_all.jsonl")
        try:
            if args.rewardbench_files:
                paths["outputs"].parent.mkdir(parents=True, exist_ok=True)
            self.files = {
                name: self.enter_context(path.open("w", encoding="utf-8"))
                for name, path in paths.items()
            }
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None

    def row(self, number: int, row: Row, scored: Scored) -> None:
        count = len(row.chosen)
        scores = [float(str(score)) for score in scored.scores]  # the shortest, not fp64's digits
        line = {"line": number} | ({} if row.subset is None else {"subset": row.subset})
        for name, side in (("chosen", slice(count)), ("rejected", slice(count, None))):
            line[name] = rewardbench.single(scores[side])
            line[f"{name}_tokens"] = rewardbench.single(scored.lengths[side].tolist())
        self._write("scores", line)
        if "outputs" in self.files:
            output = rewardbench.output(row, scores, self.encoder)
            self.results.append(output["results"])
            self._write("outputs", output)
            self._write("all", {name: output[f"scores_{name}"] for name in ("chosen", "rejected")})

    def error(self, number: int, error: RowError) -> None:
        self._write("scores", {"line": number, "error": error.reason, "kind": error.kind})

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if name in self.files:
            self.files[name].write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def finish(self, summary: dict[str, Any]) -> list[Path]:
        """Write RewardBench's summary, and return the paths of all files."""
        args, count, subsets = self.args, len(self.results), summary.get("subsets")
        paths = [Path(file.name) for file in self.files.values()]
        if "outputs" in self.files:
            about = {
                "accuracy": sum(self.results) / count,
                "num_prompts": count,
                "model": args.model,
                "ref_model": args.ref_model,
                "tokenizer": args.tokenizer or args.model,
                "chat_template": args.chat_template,
                "extra_results": subsets and {name: x["accuracy"] for name, x in subsets.items()},
            }
            paths.append(Path(f"{self.stem}.json"))
            paths[-1].write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        return paths


def _title(args: EvalOptions) -> str:
    against = "" if args.ref_model is None else f" against {args.ref_model}"
    return f"{args.model}{against} on {args.input}"


def _print(args: EvalOptions, scorer: Scorer, summary: dict[str, Any], left_out: _LeftOut) -> None:
    stats, model = scorer.stats, scorer.about()
    print(f"{_title(args)}\n\n{show.table(summary)}\n")
    saved = 1 - stats.nodes / stats.tokens
    print(
        f"{stats.rows:,} rows, {stats.conversations:,} answers, {stats.tokens:,} tokens in "
        f"{stats.seconds:.1f} s; shared prefixes saved {saved:.0%} of them; level {model['level']}"
    )
    for warning in model["warnings"] if args.ref_model is None else ():  # these are about a head
        print(f"! {warning}")
    for line in left_out.lines():
        print(line)


def _write(
    args: EvalOptions, scorer: Scorer, summary: dict[str, Any], left_out: _LeftOut
) -> list[Path]:
    """Write the JSON and the figure that were asked for, and return their paths."""
    figures = {
        "model": args.model,
        "ref_model": args.ref_model,
        "input": args.input,
        **summary,
        "left_out": left_out.as_dict(),
        "run": {**scorer.stats.as_dict(), **scorer.about(), "versions": versions()},
    }
    try:
        if args.json is not None:
            text = json.dumps(figures, ensure_ascii=False, indent=2, allow_nan=False)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        if args.figure is not None:
            show.figure(summary, _title(args)).savefig(args.figure)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None
    return [Path(path) for path in (args.json, args.figure) if path is not None]
