"""``rmfast eval``: how well a reward model tells chosen answers from rejected ones."""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast import loading
from rmfast.data.files import Reader, Record, file_format
from rmfast.data.rows import Row, read_row
from rmfast.data.values import kind_of
from rmfast.errors import DataError, RowError, UserError
from rmfast.evaluate import measures, rewardbench, show
from rmfast.evaluate.options import EvalOptions
from rmfast.resume import versions
from rmfast.score.progress import progress_bar

if TYPE_CHECKING:
    from rmfast.data.encoding import Conversation
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
    _rewardbench_names(args)
    template = _check(args)
    source = _Source(args)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(unit=" answers"))
        scorer = _scorer(args, template, lambda conversations, _: bar.update(conversations))
        sinks = _Sinks(args, scorer, stack)
        judged = measures.Judged()
        failed: list[dict[str, Any]] = []
        windows = stack.enter_context(contextlib.closing(scorer.windows(source)))
        for window in _in_words(windows):
            for (number, row), scored in window:
                if scored.error is not None:
                    _fail(args, failed, number, scored.error)
                    sinks.error(number, scored.error)
                    continue
                judged.add(scored.scores, scored.lengths, len(row.chosen), row.subset)
                sinks.row(number, row, scored)
        if not len(judged):
            first = f"; line {failed[0]['line']}: {failed[0]['reason']}" if failed else ""
            raise UserError(f"{args.input}: there is no row to evaluate{first}")
        summary = measures.summarise(judged)
        bar.close()
        written = sinks.finish(summary)
    return _tell(args, scorer, summary, failed, written)


def _rewardbench_names(args: EvalOptions) -> None:
    """RewardBench's options in terms of ours."""
    if args.torch_dtype is not None:
        args.dtype = args.torch_dtype
    if args.attn_implementation is not None:
        args.attention = _ATTENTION[args.attn_implementation]
    if args.force_truncation:
        args.on_overlong = "truncate_left"
    if args.debug:
        args.limit = min(args.limit or _DEBUG, _DEBUG)
    if args.batch_size is not None:
        print(
            "rmfast eval: --batch_size changes nothing here: micro-batches are cut by tokens, "
            "see --max-tokens",
            file=sys.stderr,
        )
    if args.save_all or args.output_dir is not None:
        args.rewardbench_files = True
    args.output_dir = args.output_dir or "results"
    args.split = args.split or _SPLITS.get(args.input, "train")


def _check(args: EvalOptions) -> str | None:
    """What can be found wrong before a model is loaded. Returns the chat template, if named."""
    for name in ("json", "figure", "scores"):
        path = getattr(args, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: there is no such folder")
    if args.figure is not None:
        show.check(args.figure)
    if args.ref_model is None and args.beta is not None:
        raise UserError("--beta belongs to --ref-model")
    if args.ref_model is not None and args.ref_model == args.model:
        raise UserError("--ref-model is the model itself: every reward would be 0")
    if args.ref_model is not None and args.pooling != "hf":
        raise UserError("--pooling belongs to a reward model's head, and --ref-model has none")
    return None if args.chat_template is None else _template(args.chat_template)


def _template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {path}: not a text file with a Jinja template (names of FastChat's "
            f"templates are not known here): {error}"
        ) from None


def _in_words(windows: Iterator[list[Scored]]) -> Iterator[list[Scored]]:
    try:
        yield from windows
    except MemoryError as error:
        raise UserError(str(error)) from None


def _scorer(args: EvalOptions, template: str | None, progress: Any) -> Scorer:
    options = {
        "max_tokens": args.max_tokens,
        "max_length": args.max_length,
        "on_overlong": args.on_overlong,
        "system_prompt": args.system_prompt,
        "chat_template": template,
        "chat": False if args.plain else None,
        "window": args.batch_window,
        "attention": args.attention,
        "compile": args.compile,
        "progress": progress,
    }
    how = {
        "dtype": args.dtype,
        "device": args.device,
        "trust_remote_code": args.trust_remote_code,
        "tokenizer": args.tokenizer,
    }
    task = "reward" if args.ref_model is None else "causal"
    loaded = loading.load(args.model, revision=args.revision, task=task, **how)
    try:
        if args.ref_model is None:
            from rmfast.score.scorer import Scorer

            return Scorer(loaded.model, loaded.tokenizer, pooling=args.pooling, **options)
        from rmfast.evaluate.implicit import ImplicitScorer

        how["tokenizer"] = args.tokenizer or args.model
        other = loading.load(args.ref_model, task="causal", **how).model
        beta = 0.1 if args.beta is None else args.beta
        return ImplicitScorer(loaded.model, other, loaded.tokenizer, beta=beta, **options)
    except ValueError as error:  # an attention that is not installed, …
        raise UserError(str(error)) from None


# --- rows


def _records(args: EvalOptions) -> tuple[Iterator[Record], bool]:
    """The records, and whether all values are text, as in CSV.

    A file that is one list of JSON, as RM-Bench's are, is read whole.
    """
    listed = _json_list(args.input)
    if listed is None:
        reader = Reader(args.input, name=args.name, split=args.split, limit=args.limit)
        return reader.read(), reader.format == "csv"
    numbered = enumerate(listed[: args.limit], start=1)
    return (Record(i, _an_object(value), i) for i, value in numbered), False


def _an_object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError(f"an item must be a JSON object, this is {kind_of(value)}")


def _json_list(source: str) -> list[Any] | None:
    if file_format(source) != ("jsonl", False) or not Path(source).is_file():
        return None
    try:
        with open(source, "rb") as file:
            first = next((line.strip() for line in file if line.strip()), b"")
        if not first.removeprefix(b"\xef\xbb\xbf").startswith(b"["):
            return None
        value = json.loads(Path(source).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: a list of JSON that cannot be read: {error}") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from None
    return value


class _Source:
    """Rows for a scorer, each with its number and what it was read as."""

    def __init__(self, args: EvalOptions) -> None:
        self.records, cells = _records(args)
        names = ("prompt", "chosen", "rejected", "subset")
        self.columns = {name: getattr(args, f"{name}_column") for name in names}
        self.columns["cells"] = cells

    def __iter__(self) -> Iterator[tuple[tuple[int, Row | None], list[Conversation] | RowError]]:
        for record in self.records:
            try:
                if isinstance(record.value, RowError):
                    raise record.value
                row = read_row(record.value, **self.columns)
            except RowError as error:
                yield (record.number, None), error
            else:
                yield (record.number, row), [*row.chosen, *row.rejected]


# --- results


class _Sinks:
    """The files that rows are written to as they come."""

    def __init__(self, args: EvalOptions, scorer: Scorer, stack: contextlib.ExitStack) -> None:
        self.args = args
        self.scores = self.rewardbench = None
        try:
            if args.scores is not None:
                file = open(args.scores, "w", encoding="utf-8")  # noqa: SIM115 (the stack does)
                self.scores = stack.enter_context(file)
            if args.rewardbench_files:
                files = rewardbench.Files(
                    args.output_dir, args.model, scorer.encoder, args.save_all
                )
                self.rewardbench = stack.enter_context(files)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None

    def row(self, number: int, row: Row, scored: Scored) -> None:
        scores = [float(str(score)) for score in scored.scores]  # the shortest, not fp64's digits
        count = len(row.chosen)
        if self.scores is not None:
            line: dict[str, Any] = {"line": number}
            if row.subset is not None:
                line["subset"] = row.subset
            for name, here in (("chosen", slice(count)), ("rejected", slice(count, None))):
                line[name] = _only(scores[here])
                line[f"{name}_tokens"] = _only(scored.lengths[here].tolist())
            self._write(line)
        if self.rewardbench is not None:
            one = measures.Judged()
            one.add(scored.scores, scored.lengths, count)
            self.rewardbench.add(
                row.record,
                row.prompt,
                row.chosen,
                row.rejected,
                scores,
                float(measures.credits(one)[0]),
            )

    def error(self, number: int, error: RowError) -> None:
        if self.scores is not None:
            self._write({"line": number, "error": error.reason, "kind": error.kind})

    def _write(self, line: dict[str, Any]) -> None:
        self.scores.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, summary: dict[str, Any]) -> list[Path]:
        """Paths of RewardBench's files, if these were asked for."""
        if self.rewardbench is None:
            return []
        args, parts = self.args, summary.get("subsets")
        return self.rewardbench.finish(
            model=args.model,
            ref_model=args.ref_model,
            tokenizer=args.tokenizer or args.model,
            chat_template=args.chat_template,
            subsets=parts and {name: tally["accuracy"] for name, tally in parts.items()},
        )


def _only(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _fail(args: EvalOptions, failed: list[dict[str, Any]], number: int, error: RowError) -> None:
    if args.strict and not _skipped(args, error.kind):
        raise UserError(f"{args.input}: line {number}: {error.reason}")
    failed.append({"line": number, "reason": error.reason, "kind": error.kind})


def _skipped(args: EvalOptions, kind: str) -> bool:
    return kind == "overlong" and args.on_overlong == "skip"


def _tell(
    args: EvalOptions,
    scorer: Scorer,
    summary: dict[str, Any],
    failed: list[dict[str, Any]],
    written: list[Path],
) -> int:
    stats, model = scorer.stats, scorer.about()
    kinds = collections.Counter(one["kind"] for one in failed)
    about = {
        "model": args.model,
        "ref_model": args.ref_model,
        "input": args.input,
        **summary,
        "left_out": {"bad": kinds["bad"], "overlong": kinds["overlong"], "rows": failed[:_LISTED]},
        "run": {
            **stats.as_dict(),
            **model,
            "versions": versions(),
        },
    }
    title = f"{args.model} on {args.input}"
    if args.ref_model is not None:
        title = f"{args.model} against {args.ref_model} on {args.input}"
    print(f"{title}\n\n{show.table(summary)}\n")
    saved = 1 - stats.nodes / stats.tokens
    print(
        f"{stats.rows:,} rows, {stats.conversations:,} answers, {stats.tokens:,} tokens in "
        f"{stats.seconds:.1f} s; shared prefixes saved {saved:.0%} of them; level {model['level']}"
    )
    for warning in model["warnings"] if args.ref_model is None else ():  # these are about a head
        print(f"! {warning}")
    if failed:
        print(f"left out: {kinds['bad']:,} bad rows, {kinds['overlong']:,} too long")
        for one in failed[:_SHOWN]:
            print(f"  line {one['line']}: {one['reason']}")
        if len(failed) > _SHOWN:
            print(f"  and {len(failed) - _SHOWN:,} more")
    try:
        if args.json is not None:
            text = json.dumps(about, ensure_ascii=False, indent=2, allow_nan=False)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        if args.figure is not None:
            show.figure(summary, title).savefig(args.figure)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None
    written += [Path(x) for x in (args.json, args.figure, args.scores) if x is not None]
    for path in written:
        print(f"written: {path}")
    return int(any(not _skipped(args, one["kind"]) for one in failed))
