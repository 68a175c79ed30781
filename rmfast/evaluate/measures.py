"""What scores of preference data say about a reward model. Numbers in, numbers out.

A row is a prompt with chosen and rejected answers, one or more of each. A pair is a chosen and a
rejected answer of one row, and its margin is the chosen answer's score minus the rejected one's.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 15  # of the reliability diagram
_DOMAINS = {"chat", "code", "math", "safety-refuse", "safety-response"}  # of RM-Bench


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share ``right / total``; trials are taken as independent."""
    z, share = 1.96, right / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


class Judged:
    """Scores and lengths of rows, collected at 16 bytes an answer."""

    def __init__(self) -> None:
        self.subsets: list[str | None] = []
        self.benchmarks: set[str | None] = set()  # those that the columns of the rows tell
        self.ids: list[Any] = []  # what a benchmark calls each row
        self._scores, self._lengths = array("d"), array("q")
        self._chosen, self._sizes = array("q"), array("q")

    def add(
        self,
        scores: Sequence[float] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        chosen: int = 1,
        subset: str | None = None,
        benchmark: str | None = None,
        id: Any = None,
    ) -> None:
        """Add a row: finite scores, and lengths in tokens, of its ``chosen`` chosen answers and
        then of its rejected ones."""
        self._scores.extend(map(float, scores))
        self._lengths.extend(map(int, lengths))
        self._chosen.append(chosen)
        self._sizes.append(len(scores))
        self.subsets.append(subset)
        self.benchmarks.add(benchmark)
        self.ids.append(id)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def scores(self) -> np.ndarray:  # fp64 [answers]
        return np.array(self._scores)

    @property
    def lengths(self) -> np.ndarray:  # int64 [answers]
        return np.array(self._lengths)

    @property
    def is_chosen(self) -> np.ndarray:  # bool [answers]
        chosen, sizes = np.array(self._chosen), np.array(self._sizes)
        kinds = np.stack([chosen, sizes - chosen], 1).reshape(-1)
        return np.repeat(np.arange(kinds.size) % 2 == 0, kinds)

    @property
    def has_groups(self) -> bool:
        """Whether a row has more than two answers."""
        return max(self._sizes, default=2) > 2

    def shapes(self) -> Iterator[Shape]:
        """The rows by their numbers of chosen and of rejected answers."""
        chosen, sizes = np.array(self._chosen, np.int64), np.array(self._sizes, np.int64)
        first = np.cumsum(sizes) - sizes
        scores, lengths = self.scores, self.lengths
        for count, size in np.unique(np.stack([chosen, sizes], 1), axis=0).tolist():
            rows = np.flatnonzero((chosen == count) & (sizes == size))
            where = first[rows, None] + np.arange(size)
            yield Shape(rows, scores[where], lengths[where], count)


class Shape(NamedTuple):
    """Rows with equally many chosen, and equally many rejected answers; the chosen ones first."""

    rows: np.ndarray  # int64 [M], their places among all rows
    scores: np.ndarray  # fp64 [M, C + R]
    lengths: np.ndarray  # int64 [M, C + R]
    chosen: int  # C


def credit(scores: np.ndarray, chosen: int) -> np.ndarray:  # [..., C + R] -> fp64 [...]
    """1 where the best score is a chosen answer's, 0 where it is a rejected one's.

    Where several answers share the best score, the share of chosen ones among them (0.5 for a
    pair): the expected result of drawing one of them at random, which is RewardBench 2's rule.
    """
    best = scores == scores.max(-1, keepdims=True)
    return best[..., :chosen].sum(-1) / best.sum(-1)


def credits(judged: Judged) -> np.ndarray:  # fp64 [rows]
    """The :func:`credit` of every row."""
    found = np.empty(len(judged))
    for shape in judged.shapes():
        found[shape.rows] = credit(shape.scores, shape.chosen)
    return found


def pairs(judged: Judged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margin, difference of lengths, and row of every pair; fp64, int64, int64 ``[P]``."""
    found = [(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))]
    for shape in judged.shapes():
        both = (shape.scores, shape.lengths)
        margin, longer = (x[:, : shape.chosen, None] - x[:, None, shape.chosen :] for x in both)
        rows = np.repeat(shape.rows, margin[0].size)
        found.append((margin.ravel(), longer.ravel(), rows))
    margin, longer, rows = map(np.concatenate, zip(*found, strict=True))
    return margin, longer, rows


def _wins(margin: np.ndarray) -> np.ndarray:
    """The credit of pairs: 1, 0.5 for a tie, 0."""
    return (np.sign(margin) + 1) / 2


def tally(credit: np.ndarray) -> dict[str, Any]:
    """Wins, ties and losses of rows or pairs by their :func:`credits`, and accuracy.

    ``accuracy`` counts a tie as wrong, as RewardBench does; ``interval`` is Wilson's for it.
    ``accuracy_ties_shared`` is the mean credit.
    """
    total, wins, losses = credit.size, int((credit == 1).sum()), int((credit == 0).sum())
    return {
        "n": total,
        "wins": wins,
        "ties": total - wins - losses,
        "losses": losses,
        "accuracy": wins / total if total else None,
        "interval": list(interval(wins, total)) if total else None,
        "accuracy_ties_shared": _mean(credit),
    }


def margins(margin: np.ndarray) -> dict[str, Any]:
    """Mean, median, standard deviation, extremes and histogram."""
    if not margin.size:
        return {"n": 0}
    edges = _edges(margin.min(), margin.max())
    return {
        "n": margin.size,
        "mean": float(margin.mean()),
        "median": float(np.median(margin)),
        "std": float(margin.std()),
        "min": float(margin.min()),
        "max": float(margin.max()),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(margin, edges)[0].tolist()},
    }


def _edges(low: float, high: float) -> np.ndarray:
    """Edges of some ten to twenty-five round bins. One edge is 0: losses are left of it."""
    span = max(high, 0.0) - min(low, 0.0)
    if not span:
        return np.array([0.0, 1.0])
    step = 10.0 ** math.floor(math.log10(span / 10))
    step *= next(k for k in (5, 2, 1) if span / (step * k) >= 10)
    first = math.floor(min(low, 0.0) / step)
    last = math.floor(max(high, 0.0) / step) + 1  # a bin holds its left edge
    return np.arange(first, last + 1) * step


def calibration(margin: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """How far σ(margin), the Bradley-Terry chance of the chosen answer, can be believed.

    The answer with the higher score is the guess, σ(|margin|) the confidence in it; a tie is right
    by half. ``ece``, the expected calibration error, is Σ n_b/n · |right_b − confidence_b|: Guo et
    al. 2017, arXiv 1706.04599, equation 3. The bins have equal widths from 1/2 to 1 and hold their
    right edge. ``log_loss`` is the mean of −log σ(margin).
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(margin))), _wins(margin)
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, x, minlength=bins) for x in (confidence, right)]
    table = [
        {
            "from": float(edges[i]),
            "to": float(edges[i + 1]),
            "n": int(count[i]),
            "confidence": float(sums[0][i] / count[i]) if count[i] else None,
            "right": float(sums[1][i] / count[i]) if count[i] else None,
        }
        for i in range(bins)
    ]
    total = margin.size
    return {
        "n": total,
        "ece": float(np.abs(sums[0] - sums[1]).sum() / total) if total else None,
        "log_loss": _mean(np.logaddexp(0, -margin)),
        "bins": table,
    }


def correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    return {"pearson": pearson(x, y), "spearman": spearman(x, y)}


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation; None where either is constant, or there are fewer than two points."""
    if x.size < 2 or x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (math.sqrt(x @ x) * math.sqrt(y @ y)), -1, 1))


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[which.reshape(-1)]


def length_bias(judged: Judged) -> dict[str, Any]:
    """Whether length is mistaken for quality.

    Of the ``n`` pairs of different lengths, ``longer_wins`` is the share in which the longer answer
    has the higher score, and ``longer_chosen`` the share in which it is the chosen one.
    ``accuracy_if_longer``, ``…_same``, ``…_shorter`` are tallies of the pairs whose chosen answer
    is longer, as long, or shorter. Correlations: of an answer's reward with its length, prompt
    included; and of a pair's margin with its difference of lengths, which the prompt is not in.
    """
    margin, longer, _ = pairs(judged)
    won, differ = _wins(margin), longer != 0
    scores, lengths, is_chosen = judged.scores, judged.lengths, judged.is_chosen
    return {
        "n": int(differ.sum()),
        "longer_wins": _mean((margin * np.sign(longer) > 0)[differ]),
        "longer_chosen": _mean((longer > 0)[differ]),
        "mean_chosen": _mean(lengths[is_chosen]),
        "mean_rejected": _mean(lengths[~is_chosen]),
        "accuracy_if_longer": tally(won[longer > 0]),
        "accuracy_if_same": tally(won[~differ]),
        "accuracy_if_shorter": tally(won[longer < 0]),
        "reward_and_length": correlation(scores, lengths),
        "margin_and_difference": correlation(margin, longer),
    }


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if x.size else None


def rm_bench(judged: Judged) -> dict[str, Any] | None:
    """RM-Bench's figures of the rows of three chosen and three rejected answers; None: no such row.

    Answers come in three styles: concise, detailed, detailed with Markdown. ``matrix[i][j]`` is how
    often the chosen answer in style i beats the rejected one in style j; a tie is no win. ``hard``
    is the mean of the cells above the diagonal, where the rejected answer is the more elaborate
    one, ``normal`` of the diagonal, ``easy`` of the cells below: Liu et al. 2024, arXiv 2410.16184.

    Of RM-Bench itself, the two domains of safety are one, and the figures are means over domains,
    as its leaderboard has them; ``pooled`` are those of all rows.
    """
    shape = next((s for s in judged.shapes() if s.scores.shape[1] == 2 * s.chosen == 6), None)
    if shape is None:
        return None
    wins = shape.scores[:, :3, None] > shape.scores[:, None, 3:]
    names = [judged.subsets[row] for row in shape.rows]
    whole = wins.mean(0)
    published = judged.benchmarks == {"RM-Bench"} and set(names) <= _DOMAINS
    if published:
        names = [name.split("-")[0] for name in names]
    matrices = {name: wins[inside].mean(0) for name, inside in by_subset(names).items()}
    matrix = np.mean(list(matrices.values()), 0) if published else whole
    found = {"n": len(wins), **_levels(matrix), "matrix": matrix.tolist()}
    if published:
        found["pooled"] = _levels(whole)
    subsets = {
        name: {"n": names.count(name), **_levels(matrix)} for name, matrix in matrices.items()
    }
    return found | {"subsets": subsets}


def _levels(matrix: np.ndarray) -> dict[str, float]:  # fp64 [3, 3]
    levels = {
        "easy": float(matrix[np.tril_indices(3, -1)].mean()),
        "normal": float(np.diag(matrix).mean()),
        "hard": float(matrix[np.triu_indices(3, 1)].mean()),
    }
    return {**levels, "mean": sum(levels.values()) / 3}


def by_subset(names: list[str | None]) -> dict[str, np.ndarray]:
    """For each name, sorted, which rows have it, bool ``[rows]``."""
    found, names = sorted({name for name in names if name is not None}), np.array(names, object)
    return {name: names == name for name in found}


def summarise(judged: Judged) -> dict[str, Any]:
    """All figures, ready for JSON; None stands where there is nothing to measure.

    ``rows`` is the :func:`tally` of rows, ``pairs`` of pairs (the same where no row has more than
    two answers), and ``macro`` the mean over subsets. ``pairs["row_mean"]`` is the mean over rows
    of the share of pairs won, so that a row with many answers counts no more than another.
    """
    margin, _, rows = pairs(judged)
    row_credit = credits(judged)
    won, count = np.bincount(rows, margin > 0), np.bincount(rows)
    of_pairs = tally(_wins(margin))
    del of_pairs["interval"]  # pairs of one row are not independent; rows are
    summary = {
        "groups": judged.has_groups,
        "rows": tally(row_credit),
        "pairs": {**of_pairs, "row_mean": _mean(won / np.maximum(count, 1))},
    }
    parts = {name: tally(row_credit[inside]) for name, inside in by_subset(judged.subsets).items()}
    if parts:
        summary["subsets"] = parts
        summary["macro"] = {
            name: float(np.mean([part[name] for part in parts.values()]))
            for name in ("accuracy", "accuracy_ties_shared")
        }
    scores, is_chosen = judged.scores, judged.is_chosen
    return summary | {
        "margin": margins(margin),
        "reward": {"chosen": _mean(scores[is_chosen]), "rejected": _mean(scores[~is_chosen])},
        "length": length_bias(judged),
        "calibration": calibration(margin),
        "rm_bench": rm_bench(judged),
    }
