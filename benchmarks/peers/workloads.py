"""What is scored: rows of token ids, from generators with a seed or from a user's file.

Where the text does not matter, ids are drawn at random. ``size`` scales how many rows there are,
and in ``long``, ``dualkv-*`` and ``n-*``, where the lengths are what counts, how long they are.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rmfast.benchmarks import contestants
from rmfast.reference.head import until_scored

Rows = list[list[int]]
GROUPS = (1, 2, 4, 8, 16, 32, 64)  # N of the curve
PROMPT, ANSWER = 1000, 100  # tokens, of best-of-16 and of the curve


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows of token ids, to be scored, or trained on, with a model of :mod:`models`."""

    name: str
    rows: Rows
    model: str = "main"
    trains: bool = False  # rows are chosen, rejected, chosen, ...: an epoch is trained

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def nodes(self) -> int:
        """Distinct prefixes: no exact method that runs tokens can run fewer."""
        return contestants.trie_nodes(self.rows)


class Draw:
    """Random ids that are no special tokens, and lengths."""

    def __init__(self, vocabulary: int) -> None:
        self.rng = np.random.default_rng(0)
        self.low, self.high = min(100, vocabulary // 2), vocabulary * 9 // 10  # most have them here

    def ids(self, count: int) -> list[int]:
        return self.rng.integers(self.low, self.high, count).tolist()

    def group(self, prompt: int, answers: list[int]) -> Rows:
        """Answers to one prompt."""
        begin = self.ids(prompt)
        return [begin + self.ids(length) for length in answers]


def many(count: int, size: float, least: int = 1) -> int:
    return max(least, round(count * size))


def groups_of_4(draw: Draw, size: float) -> Rows:
    """As UltraFeedback: 48 prompts of some 200 tokens with 4 answers of some 250 each."""
    made = []
    for _ in range(many(48, size)):
        lengths = np.clip(draw.rng.lognormal((5.0, *[5.3] * 4), 0.7), 8, 1024).astype(int).tolist()
        made += draw.group(lengths[0], lengths[1:])
    return made


def best_of_16(draw: Draw, size: float) -> Rows:
    """8 prompts of 1,000 tokens with 16 answers of 100, shuffled."""
    made = [row for _ in range(many(8, size)) for row in draw.group(PROMPT, [ANSWER] * 16)]
    return [made[i] for i in draw.rng.permutation(len(made))]


def turns_12(draw: Draw, size: float) -> Rows:
    """8 conversations of 12 turns of 30 + 70 tokens, scored after each."""
    made = []
    for _ in range(many(8, size)):
        whole = draw.ids(12 * 100)
        made += [whole[:end] for end in range(100, 12 * 100 + 1, 100)]
    return made


def system_prompt(draw: Draw, size: float) -> Rows:
    """1,000 texts of 20 to 80 tokens behind one system prompt of 300."""
    return draw.group(300, draw.rng.integers(20, 81, many(1000, size, 2)).tolist())


def equal(draw: Draw, size: float) -> Rows:
    """64 unrelated texts of 256 tokens: nothing to share, nothing to pad."""
    return [draw.ids(256) for _ in range(many(64, size, 2))]


def unequal(draw: Draw, size: float) -> Rows:
    """64 unrelated texts of 16 to 1,024 tokens."""
    return [draw.ids(n) for n in draw.rng.integers(16, 1025, many(64, size, 2)).tolist()]


def long(draw: Draw, size: float) -> Rows:
    """As Long-RewardBench: a context of 32,768 tokens with 4 answers of 256."""
    return draw.group(many(32_768, size), [many(256, size)] * 4)


def curve(draw: Draw, size: float, count: int) -> Rows:
    """``count`` answers of 100 tokens to one prompt of 1,000."""
    return draw.group(many(PROMPT, size), [many(ANSWER, size)] * count)


def bound(size: float, count: int) -> float:
    """What ``count`` answers cost at least, as a multiple of one."""
    prompt, answer = many(PROMPT, size), many(ANSWER, size)
    return (prompt + answer * count) / (prompt + answer)


GENERATORS: dict[str, Callable[[Draw, float], Rows]] = {
    "groups-of-4": groups_of_4, "best-of-16": best_of_16, "turns-12": turns_12,
    "system-prompt": system_prompt, "equal": equal, "unequal": unequal,
}  # fmt: skip
PAIRS = 96
NAMES = ("pairs", *GENERATORS, "long", "curve", "dualkv")


def made(
    names: list[str], data: Path | None, size: float, vocabularies: dict[str, int], tokenizer: str
) -> Iterator[Workload]:
    """The workloads of these names.

    Args:
        names: of :data:`NAMES`.
        data: pairs in place of the embedded ones, in any form that ``rmfast train`` reads.
        size: 1: as the functions above say.
        vocabularies: how many ids each model knows.
        tokenizer: folder of the tokenizer for pairs.
    """
    draws = {model: Draw(count) for model, count in vocabularies.items()}
    for name in names:
        if name == "pairs":
            rows = _pairs(data, many(PAIRS, size, 2), tokenizer)
            yield Workload(name, rows)
            yield Workload("pairs, training", rows, trains=True)
        elif name == "long":
            yield Workload(name, long(draws["tiny"], size), "tiny")
        elif name == "curve":
            for count in GROUPS:
                yield Workload(f"n-{count}", curve(draws["main"], size, count))
        elif name == "dualkv":
            from rmfast.benchmarks.gpu_kernels import DUALKV

            for count, prompt, _ in DUALKV:
                answers = [many(2048, size)] * count
                rows = draws["attention"].group(many(prompt, size), answers)
                yield Workload(f"dualkv-{count}x{prompt}", rows, "attention")
        else:
            yield Workload(name, GENERATORS[name](draws["main"], size))


def _pairs(data: Path | None, count: int, folder: str) -> Rows:
    """Up to the token that Hugging Face scores: others score a pad token at the end, too."""
    from transformers import AutoConfig, AutoTokenizer

    args = argparse.Namespace(data=data, pairs=count)
    rows = contestants._rows(args, AutoTokenizer.from_pretrained(folder))
    pad = AutoConfig.from_pretrained(folder).pad_token_id or 0  # as models.py has it
    return [until_scored(np.asarray(row), pad).tolist() for row in rows]
