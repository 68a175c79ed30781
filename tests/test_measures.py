"""Figures on preference data, against sums written out one by one."""

from __future__ import annotations

import itertools
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from rmfast.evaluate import measures
from rmfast.evaluate.measures import Judged


def judged(*rows: tuple) -> Judged:
    """Rows as (chosen scores, rejected scores[, chosen lengths, rejected lengths[, subset]])."""
    out = Judged()
    for row in rows:
        chosen, rejected = row[:2]
        lengths = [*row[2], *row[3]] if len(row) > 2 else [1] * (len(chosen) + len(rejected))
        out.add([*chosen, *rejected], lengths, len(chosen), row[4] if len(row) > 4 else None)
    return out


@pytest.fixture(scope="module")
def mixed() -> list[tuple]:
    """Rows of all shapes, scores on a coarse grid so that there are ties."""
    draw = random.Random(0)
    rows = []
    for i in range(200):
        sizes = draw.choice([(1, 1), (1, 1), (1, 3), (2, 2), (3, 3)])
        scores = [[draw.randint(-6, 6) / 4 for _ in range(n)] for n in sizes]
        lengths = [[draw.randint(1, 9) for _ in range(n)] for n in sizes]
        rows.append((*scores, *lengths, draw.choice(["a", "b", None]) if i else "only"))
    return rows


def test_interval():
    low, high = measures.interval(8, 10)  # the textbook's example
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert measures.interval(0, 5)[0] == 0 and measures.interval(5, 5)[1] == 1


def test_best_of_n_tells_ties_apart():
    rows = judged(
        ([2], [1]), ([1], [2]), ([1], [1]), ([1], [0, 3, 2]), ([4], [0, 3, 2]), ([3], [3, 3, 1]),
        ([0, 5], [4]), ([5, 5], [5]), ([-1, -2], [-3, -4]),
    )  # fmt: skip
    assert measures.credits(rows).tolist() == [1, 0, 0.5, 0, 1, 1 / 3, 1, 2 / 3, 1]
    got = measures.tally(measures.credits(rows))
    assert (got["n"], got["wins"], got["ties"], got["losses"]) == (9, 4, 3, 2)
    assert got["accuracy"] == 4 / 9
    assert got["accuracy_ties_shared"] == pytest.approx(5.5 / 9)
    assert got["interval"] == list(measures.interval(4, 9))


def test_nothing_to_measure():
    out = measures.summarise(Judged())
    assert out["rows"]["n"] == out["margin"]["n"] == out["calibration"]["n"] == 0
    assert out["rows"]["accuracy"] is out["calibration"]["ece"] is out["rm_bench"] is None
    json.dumps(out, allow_nan=False)


def test_one_pair():
    out = measures.summarise(judged(([1.5], [0.5], [4], [2])))
    assert out["rows"]["accuracy"] == 1
    assert out["margin"]["mean"] == out["margin"]["median"] == 1
    assert out["length"]["longer_wins"] == out["length"]["longer_chosen"] == 1
    assert out["length"]["margin_and_difference"]["pearson"] is None  # one point has no slope
    json.dumps(out, allow_nan=False)


def brute_pairs(rows: list[tuple]) -> list[tuple[float, int]]:
    out = []
    for chosen, rejected, longer, shorter, _ in rows:
        for (c, m), (r, n) in itertools.product(
            zip(chosen, longer, strict=True), zip(rejected, shorter, strict=True)
        ):
            out.append((c - r, m - n))
    return out


def test_rows_and_pairs(mixed):
    out = measures.summarise(judged(*mixed))
    every = brute_pairs(mixed)
    assert out["groups"] is True
    assert out["pairs"]["n"] == len(every) > len(mixed) == out["rows"]["n"]
    assert out["pairs"]["wins"] == sum(m > 0 for m, _ in every)
    assert out["pairs"]["ties"] == sum(m == 0 for m, _ in every)
    assert out["pairs"]["losses"] == sum(m < 0 for m, _ in every)
    tops = [(max(row[0]), max(row[1])) for row in mixed]
    assert out["rows"]["wins"] == sum(c > r for c, r in tops)
    assert out["rows"]["ties"] == sum(c == r for c, r in tops)
    assert out["rows"]["losses"] == sum(c < r for c, r in tops)
    shares = [
        Fraction(sum(c > r for c in row[0] for r in row[1]), len(row[0]) * len(row[1]))
        for row in mixed
    ]
    assert out["pairs"]["row_mean"] == pytest.approx(float(sum(shares) / len(shares)))
    worth = []
    for row in mixed:
        best = max(row[0] + row[1])
        worth.append(Fraction(row[0].count(best), (row[0] + row[1]).count(best)))
    assert out["rows"]["accuracy_ties_shared"] == pytest.approx(float(sum(worth) / len(worth)))
    json.dumps(out, allow_nan=False)


def test_subsets_and_their_mean(mixed):
    out = measures.summarise(judged(*mixed))
    assert list(out["subsets"]) == ["a", "b", "only"]  # rows without a name belong to none
    shares = []
    for name, got in out["subsets"].items():
        tops = [(max(row[0]), max(row[1])) for row in mixed if row[4] == name]
        assert (got["n"], got["wins"]) == (len(tops), sum(c > r for c, r in tops))
        assert got["interval"] == list(measures.interval(got["wins"], got["n"]))
        shares.append(got["wins"] / got["n"])
    assert out["macro"]["accuracy"] == pytest.approx(sum(shares) / 3)
    assert "subsets" not in measures.summarise(judged(([1], [0])))


def test_margins(mixed):
    values = [m for m, _ in brute_pairs(mixed)]
    out = measures.summarise(judged(*mixed))["margin"]
    mean = math.fsum(values) / len(values)
    assert out["mean"] == pytest.approx(mean)
    assert out["std"] == pytest.approx(
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    )
    ordered = sorted(values)
    middle = ordered[len(values) // 2 - 1 : len(values) // 2 + 1] if len(values) % 2 == 0 else None
    assert out["median"] == (sum(middle) / 2 if middle else ordered[len(values) // 2])
    assert (out["min"], out["max"]) == (ordered[0], ordered[-1])


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1, 7, 12345])
@pytest.mark.parametrize("shift", [-40, -1, 0, 1, 40])
def test_histogram(scale, shift):
    values = np.random.default_rng(0).normal(shift, 1, 500) * scale
    out = measures.margins(values)["histogram"]
    edges, counts = out["edges"], out["counts"]
    assert 0.0 in edges
    assert 10 <= len(counts) <= 27
    assert sum(counts) == 500
    assert (
        sum(n for n, right in zip(counts, edges[1:], strict=True) if right <= 0)
        == (values < 0).sum()
    )
    for i in (0, len(counts) // 2, len(counts) - 1):
        assert counts[i] == sum(edges[i] <= v < edges[i + 1] for v in values)


def test_histogram_of_equal_scores():
    out = measures.margins(np.zeros(3))["histogram"]
    assert out == {"edges": [0.0, 1.0], "counts": [3]}
    ends = measures.margins(np.array([-2.0, 2.0]))["histogram"]
    assert sum(ends["counts"]) == 2 and ends["counts"][0] == 1


def test_calibration(mixed):
    values = [m for m, _ in brute_pairs(mixed)]
    out = measures.calibration(np.array(values), bins=15)
    width = Fraction(1, 30)
    members: dict[int, list[tuple[float, float]]] = {}
    for m in values:
        confidence = 1 / (1 + math.exp(-abs(m)))
        right = 1.0 if m > 0 else 0.5 if m == 0 else 0.0
        place = max(math.ceil((Fraction(confidence) - Fraction(1, 2)) / width) - 1, 0)
        members.setdefault(place, []).append((confidence, right))
    error = 0.0
    for place, inside in members.items():
        confidence = math.fsum(c for c, _ in inside) / len(inside)
        right = math.fsum(r for _, r in inside) / len(inside)
        row = out["bins"][place]
        assert row["n"] == len(inside)
        assert row["confidence"] == pytest.approx(confidence)
        assert row["right"] == pytest.approx(right)
        assert row["from"] <= confidence <= row["to"]
        error += len(inside) / len(values) * abs(right - confidence)
    assert out["ece"] == pytest.approx(error)
    assert out["log_loss"] == pytest.approx(
        math.fsum(-math.log(1 / (1 + math.exp(-m))) for m in values) / len(values)
    )
    empty = [row for i, row in enumerate(out["bins"]) if i not in members]
    assert all(row["n"] == 0 and row["right"] is None for row in empty)


def test_calibration_of_a_model_that_knows():
    """Pairs drawn with the chance the margin claims: what is left is the noise of 20,000 draws."""
    draw = np.random.default_rng(0)
    size = np.abs(draw.normal(0, 2, 20_000))
    right = draw.random(20_000) < 1 / (1 + np.exp(-size))
    fair = measures.calibration(np.where(right, size, -size))
    assert fair["ece"] < 3 * math.sqrt(15 * 0.25 / 20_000)  # 15 bins, each a binomial share
    bold = measures.calibration(np.where(right, 3 * size, -3 * size))
    assert bold["ece"] > 0.08


def test_calibration_of_margins_beyond_exp():
    out = measures.calibration(np.array([-2000.0, 2000.0]))
    assert out["ece"] == 0.5 and out["log_loss"] == 1000


@pytest.mark.parametrize("seed", range(5))
def test_correlations(seed):
    draw = random.Random(seed)
    x = [draw.randint(0, 6) / 2 for _ in range(40)]
    y = [a * draw.choice([-1, 1]) + draw.random() for a in x]

    def mean_of(values):
        return math.fsum(values) / len(values)

    def correlation(a, b):
        """From sums of products, not from deviations."""
        top = mean_of([i * j for i, j in zip(a, b, strict=True)]) - mean_of(a) * mean_of(b)
        spread = [mean_of([i * i for i in c]) - mean_of(c) ** 2 for c in (a, b)]
        return top / math.sqrt(spread[0] * spread[1])

    def ranks(values):
        """Smaller ones count 1, equal ones 1/2, and 1/2 to begin at 1."""
        return [0.5 + sum(1.0 if w < v else 0.5 if w == v else 0.0 for w in values) for v in values]

    assert measures.pearson(np.array(x), np.array(y)) == pytest.approx(correlation(x, y))
    assert measures.spearman(np.array(x), np.array(y)) == pytest.approx(
        correlation(ranks(x), ranks(y))
    )


def test_correlations_that_are_certain():
    x = np.arange(5.0)
    assert measures.pearson(x, 3 - 2 * x) == pytest.approx(-1, abs=1e-15)
    assert measures.spearman(x, np.exp(x)) == pytest.approx(1, abs=1e-15)
    assert measures.pearson(x, np.full(5, 0.1)) is None  # whose mean is not 0.1 in floats
    assert measures.spearman(x, np.ones(5)) is None


def test_length_bias(mixed):
    out = measures.summarise(judged(*mixed))["length"]
    every = brute_pairs(mixed)
    differ = [(m, d) for m, d in every if d]
    assert out["n"] == len(differ) < len(every)
    assert out["longer_wins"] == pytest.approx(sum(m * d > 0 for m, d in differ) / len(differ))
    assert out["longer_chosen"] == pytest.approx(sum(d > 0 for _, d in differ) / len(differ))
    for name, test in (
        ("longer", lambda d: d > 0),
        ("same", lambda d: d == 0),
        ("shorter", lambda d: d < 0),
    ):
        part = [m for m, d in every if test(d)]
        got = out[f"accuracy_if_{name}"]
        assert (got["n"], got["wins"], got["ties"]) == (
            len(part), sum(m > 0 for m in part), sum(m == 0 for m in part),
        )  # fmt: skip
    lengths = [[n for row in mixed for n in row[side]] for side in (2, 3)]
    assert out["mean_chosen"] == pytest.approx(sum(lengths[0]) / len(lengths[0]))
    assert out["mean_rejected"] == pytest.approx(sum(lengths[1]) / len(lengths[1]))
    answers = [(s, n) for row in mixed for s, n in zip(row[0], row[2], strict=True)]
    answers += [(s, n) for row in mixed for s, n in zip(row[1], row[3], strict=True)]
    assert out["reward_and_length"]["pearson"] == pytest.approx(
        np.corrcoef(np.array(answers).T)[0, 1]
    )
    assert out["margin_and_difference"]["pearson"] == pytest.approx(
        np.corrcoef(np.array(every).T)[0, 1]
    )


def test_a_reward_that_is_length():
    draw = random.Random(0)
    rows = []
    for _ in range(50):
        a, b = draw.sample(range(1, 99), 2)
        rows.append(([float(a)], [float(b)], [a], [b]))
    out = measures.summarise(judged(*rows))["length"]
    assert out["longer_wins"] == 1
    assert out["accuracy_if_longer"]["accuracy"] == 1
    assert out["accuracy_if_shorter"]["accuracy"] == 0
    assert out["reward_and_length"]["pearson"] == pytest.approx(1)


def test_rm_bench():
    """Each style of chosen answer is a place in a matrix that can be read off the scores."""
    easy = ([1, 2, 3], [0.5, 1.5, 2.5])  # 1 > .5 | 2 > .5, 1.5 | 3 > all
    tied = ([1, 1, 1], [1, 1, 1])
    lost = ([0, 0, 0], [1, 1, 1])
    won = ([1, 1, 1], [0, 0, 0])
    pair = ([9], [1])
    rows = [(*row, [1] * len(row[0]), [1] * len(row[1]), name) for row, name in (
        (easy, "x"), (tied, "x"), (lost, "y"), (won, "y"), (pair, "y"),
    )]  # fmt: skip
    out = measures.summarise(judged(*rows))["rm_bench"]
    assert out["n"] == 4
    assert out["matrix"] == [[0.5, 0.25, 0.25], [0.5, 0.5, 0.25], [0.5, 0.5, 0.5]]
    assert (out["easy"], out["normal"], out["hard"]) == (0.5, 0.5, 0.25)
    assert out["mean"] == pytest.approx(1.25 / 3)
    assert out["subsets"]["x"] == {
        "n": 2, "easy": 0.5, "normal": 0.5, "hard": 0.0, "mean": pytest.approx(1 / 3),
    }  # fmt: skip
    assert list(out["subsets"]) == ["x", "y"]
    assert measures.summarise(judged(pair))["rm_bench"] is None
