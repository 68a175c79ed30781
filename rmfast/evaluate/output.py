"""The files that ``rmfast eval`` writes rows to, window by window, and reads back to resume."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast.arguments import flag
from rmfast.errors import RowError, UserError
from rmfast.evaluate import rewardbench
from rmfast.evaluate.options import EvalOptions
from rmfast.resume import model_identity, same_run, saving, stored
from rmfast.score.output import Appended
from rmfast.score.start import State, beside, settings
from rmfast.score.windows import Scored, Tagged

if TYPE_CHECKING:
    from rmfast.data.encoding import Encoder
    from rmfast.data.files import Reader
    from rmfast.data.rows import Row

_SIDES = ("chosen", "rejected")
_SCORES = "--scores"
_OUTPUTS, _SUMMARY, _ALL = "MODEL_outputs.jsonl", "MODEL.json", "MODEL_all.jsonl"


def first_state(args: EvalOptions, reader: Reader, template: str | None) -> State:
    """The state to start from: a new one, or that of the run that ``--resume`` continues."""
    if args.scores is None:
        if args.resume:
            raise UserError("--resume continues what is in --scores: give it, too")
        return State({})
    now = settings(args, reader, template)
    now |= model_identity("--ref-model", args.ref_model)
    now |= {flag(name): getattr(args, name) for name in ("subset_column", "beta")}
    path = Path(args.scores)
    file = beside(path, "state.json")
    before = None if args.overwrite else stored(file, State)
    if before is not None and args.resume:
        same_run(before.settings, now)
        return before
    if path.exists() and path.stat().st_size and not args.overwrite:
        words = "--overwrite replaces it"
        if args.resume:
            words = f"--resume cannot continue it without {file}, {words}"
        elif before is not None and not before.done:
            words = f"--resume continues it, {words}"
        raise UserError(f"{path} already exists: {words}")
    return State(now)


def all_paths(args: EvalOptions) -> dict[str, Path]:
    """What ``rmfast eval`` writes, by the names that users know."""
    found = {f"--{name}": getattr(args, name) for name in ("scores", "json", "figure")}
    stem = rewardbench.stem(args.output_dir, args.model)
    if args.rewardbench_files:
        found |= {_OUTPUTS: f"{stem}_outputs.jsonl", _SUMMARY: f"{stem}.json"}
    if args.save_all:
        found[_ALL] = f"{stem}_all.jsonl"
    return {name: Path(path) for name, path in found.items() if path is not None}


class RowFiles(contextlib.ExitStack):
    """``--scores`` and RewardBench's files; a context manager."""

    def __init__(self, args: EvalOptions, encoder: Encoder, state: State) -> None:
        super().__init__()
        self.args, self.encoder, self.state = args, encoder, state
        self.results: list[float] = []  # of RewardBench's rows
        self.paths = all_paths(args)
        rows = [name for name in (_SCORES, _OUTPUTS, _ALL) if name in self.paths]
        self.lines: dict[str, list[bytes]] = {name: [] for name in rows}
        self.files: dict[str, Appended] = {}
        for name in rows:
            path = self.paths[name]
            with self._saving(path):
                if name != _SCORES:
                    path.parent.mkdir(parents=True, exist_ok=True)
                file = Appended(path, None, state.output if name == _SCORES else 0)
                self.files[name] = self.enter_context(contextlib.closing(file))
        self.save()

    def _saving(self, path: Path) -> contextlib.AbstractContextManager:
        resumes = self.args.scores is not None
        return saving(path, "; --resume continues from what is saved" if resumes else "")

    def earlier(self, rows: Iterator[Tagged]) -> Iterator[tuple[Any, Scored]]:
        """Of the rows, those that ``--scores`` has. A tag begins with the row's number."""
        if not self.state.rows:
            return
        path = self.paths[_SCORES]
        with open(path, "rb") as file:
            for text, (tag, row) in zip(file, rows, strict=False):
                try:
                    yield tag, _scored(json.loads(text), tag[0], row)
                except (ValueError, KeyError, TypeError):
                    change = f"{path} has other rows than {self.args.input}"
                    raise UserError(f"{change}: --overwrite starts again") from None

    def add(self, number: int, row: Row | None, scored: Scored, new: bool = True) -> None:
        """Take a row; what is not ``new`` is in ``--scores`` already."""
        if scored.error is not None:
            error = {"error": scored.error.reason, "kind": scored.error.kind}
            self._line(_SCORES, {"line": number} | error, new)
            return
        count = len(row.chosen)
        scores = [float(str(score)) for score in scored.scores]  # the shortest, not fp64's digits
        line = {"line": number} | ({} if row.subset is None else {"subset": row.subset})
        for name, side in zip(_SIDES, (slice(count), slice(count, None)), strict=True):
            line[name] = rewardbench.single(scores[side])
            line[f"{name}_tokens"] = rewardbench.single(scored.lengths[side].tolist())
        self._line(_SCORES, line, new)
        if _OUTPUTS in self.files:
            output = rewardbench.output(row, scores, self.encoder)
            self.results.append(output["results"])
            self._line(_OUTPUTS, output)
            self._line(_ALL, {name: output[f"scores_{name}"] for name in _SIDES})

    def _line(self, name: str, line: dict[str, Any], new: bool = True) -> None:
        if new and name in self.files:
            text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
            self.lines[name].append(text.encode("utf-8", "backslashreplace"))

    def save(self, new: int = 0) -> None:
        """Put the rows that were taken on the disk, and then the ``new`` ones into the state."""
        for name, file in self.files.items():
            with self._saving(self.paths[name]):
                file.append(b"".join(self.lines[name]))
            self.lines[name].clear()
        self.state.rows += new
        if _SCORES in self.files:
            self.state.output = self.files[_SCORES].mark()
            with self._saving(self.paths[_SCORES]):
                self.state.save(self.paths[_SCORES])

    def finish(self, summary: dict[str, Any]) -> list[Path]:
        """Write RewardBench's summary, and return the paths of all files."""
        args, count, headline = self.args, len(self.results), summary["headline"]
        self.state.done = True
        self.save()
        paths = [self.paths[name] for name in self.files]
        subsets = {name: x["accuracy"] for name, x in summary.get("subsets", {}).items()}
        if headline and headline["benchmark"] == "RewardBench 2":
            subsets = headline["parts"]
        if _OUTPUTS in self.files:
            about = {
                "accuracy": sum(self.results) / count,
                "num_prompts": count,
                "model": args.model,
                "ref_model": args.ref_model,
                "tokenizer": args.tokenizer or args.model,
                "chat_template": args.chat_template,
                "extra_results": subsets or None,
            }
            paths.append(self.paths[_SUMMARY])
            with self._saving(paths[-1]):
                paths[-1].write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        return paths


def _scored(line: dict[str, Any], number: Any, row: Any) -> Scored:
    """What became of a row, from its line; another row's is a ValueError."""
    if line["line"] != number:
        raise ValueError
    if "error" in line:
        return Scored(None, None, RowError(line["error"], line["kind"]))
    scores, lengths = (
        np.concatenate([np.atleast_1d(line[f"{side}{x}"]) for side in _SIDES])
        for x in ("", "_tokens")
    )
    if isinstance(row, RowError) or len(row) != len(scores):
        raise ValueError
    return Scored(scores.astype(np.float32), lengths, None)
