"""Scoring in bulk, side by side: Hugging Face length-sorted, the patched model, `rmfast score`.

    python -m rmfast.benchmarks.bulk --data pairs.jsonl --pairs 750
    python -m rmfast.benchmarks.bulk --data pairs.jsonl --groups 8

`rmfast score` goes from JSON lines to JSON lines: it reads, tokenises, orders, scores and writes.
The two others have their tokens and batches given, in memory: Hugging Face length-sorted, and the
patched model called on the same micro-batches that the scorer makes. Every contestant is a process
of its own with its model loaded; they take turns.

With ``--groups`` the input is prompts of 600 tokens with 8 responses each, made of the data's text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rmfast
from rmfast import data
from rmfast.benchmarks import contestants as shared
from rmfast.data.encoding import Encoder
from rmfast.demo import embedded
from rmfast.packed import pieces
from rmfast.score.options import ScoreOptions
from rmfast.score.windows import gathered

DEFAULT = ("hf-sorted", "rmfast-bare", "rmfast-score")
_PROMPT, _RESPONSES = 600, 8  # tokens; a prompt's responses
_RESPONSE = 64  # tokens, at most


@dataclasses.dataclass(frozen=True)
class Job(shared.Job):
    """What `rmfast score` is told."""

    input: str = ""
    window: int = 0  # conversations
    most: int = 0  # trie nodes a micro-batch

    def runner(self) -> Runner:
        return Runner(self)


class Runner(shared.Runner):
    """`rmfast score`, all but the loading of the model, as one pass."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoTokenizer

        super().__init__(job)
        self.tokenizer = AutoTokenizer.from_pretrained(job.model)
        self.output = Path(job.input).with_name("scored.jsonl")

    def _pass(self) -> None:
        from rmfast.score import job as score_job

        options = ScoreOptions(
            model=self.job.model,
            input=self.job.input,
            output=str(self.output),
            overwrite=True,
            batch_window=self.job.window,
            max_tokens=self.job.most,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            score_job.run(options, self._scorer)

    def _scorer(self, _: ScoreOptions, settings: dict[str, Any]) -> rmfast.Scorer:
        """The model is loaded already."""
        return rmfast.Scorer(self.model, self.tokenizer, **settings)

    def result(self) -> dict[str, Any]:
        rows = [json.loads(line) for line in self.output.read_text().splitlines()]
        names = [name for name in rows[0] if name.endswith(("reward", "rewards"))]
        scores = [row[name] for row in rows for name in names]
        flat = [x for score in scores for x in (score if isinstance(score, list) else [score])]
        return {**super().result(), "scores": flat}


def micro_batches(rows: list[list[int]], window: int, most: int) -> list[list[int]]:
    """The rows that end in each of the scorer's micro-batches."""
    out, first = [], 0
    for part in gathered(enumerate([row] for row in rows), window):
        trie = rmfast.pack([row for _, (row,) in part])
        start = 0
        while start < len(trie):
            piece = pieces.cut(trie, start, most)
            start = piece.stop
            if piece.rows.size:
                out.append((piece.rows + first).tolist())
        first += len(part)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = shared.parser("bulk", DEFAULT, "Time scoring in bulk, from file to file.")
    parser.add_argument("--window", type=int, default=1024, help="conversations a window")
    parser.add_argument("--max-tokens", type=int, default=4096, help="trie nodes a micro-batch")
    parser.add_argument("--groups", type=int, default=0, metavar="N",
                        help="score N prompts of 600 tokens with 8 responses each")  # fmt: skip
    args = parser.parse_args(argv)
    args.model = args.model or str(embedded.checkpoint())
    with tempfile.TemporaryDirectory() as folder:
        jobs = prepare(args, Path(folder) / "input.jsonl")
        figures = shared.measure(jobs, args.rounds, lambda line: print(line, file=sys.stderr))
    shared.compare(figures)
    shared.show("bulk", args, figures)
    if args.csv is not None:
        shared.append_csv(args.csv, "groups of 8" if args.groups else "bulk", args, figures)


def prepare(args: argparse.Namespace, path: Path) -> dict[str, shared.Job]:
    """The contestants' jobs. The input that `rmfast score` reads is written to ``path``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.data is None:
        pairs = embedded.pairs("held-out")
    else:
        pairs = data.preferences(args.data, ranks="pairs").records
    if args.groups:
        records = groups(pairs, args.groups, tokenizer)
        conversations = [(r["prompt"], x) for r in records for x in r["responses"]]
    else:
        records = [{"chosen": p.chosen, "rejected": p.rejected} for p in pairs[: args.pairs]]
        conversations = [side for r in records for side in r.values()]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = [ids.tolist() for ids in Encoder(tokenizer)(conversations)]
    given = {"hf-sorted": shared.by_length(rows, args.sorted_batch)}
    given["rmfast-bare"] = micro_batches(rows, args.window, args.max_tokens)
    windows = gathered(enumerate([row] for row in rows), args.window)
    given["rmfast-score"] = [[i for i, _ in window] for window in windows]
    args.pairs = len(records)
    out = shared.jobs(args, rows, given, tokenizer)
    if "rmfast-score" in out:
        job = vars(out["rmfast-score"])
        out["rmfast-score"] = Job(**job, input=str(path), window=args.window, most=args.max_tokens)
    return out


def groups(pairs: list[data.Pair], count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts of 600 tokens, each with 8 responses: all of it text of the data, in its order."""
    texts = [_text(side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    ids = iter([token for text in texts for token in tokenizer(text)["input_ids"]])
    out = []
    for _ in range(count):
        prompt = tokenizer.decode([next(ids) for _ in range(_PROMPT)])
        cuts = [_RESPONSE // 2 + _RESPONSE // 2 * i // _RESPONSES for i in range(_RESPONSES)]
        responses = [tokenizer.decode([next(ids) for _ in range(cut)]) for cut in cuts]
        out.append({"prompt": prompt, "responses": responses})
    return out


def _text(side: Any) -> str:
    return side if isinstance(side, str) else "\n".join(m["content"] for m in side)


if __name__ == "__main__":
    main()
