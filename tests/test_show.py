"""The table and the picture show the numbers they are given."""

from __future__ import annotations

import re
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: rmfast[eval]")

from rmfast.errors import UserError
from rmfast.evaluate import measures, show
from rmfast.evaluate.measures import Judged


@pytest.fixture(scope="module")
def groups() -> dict:
    draw = np.random.default_rng(0)
    out = Judged()
    for i in range(60):
        scores = draw.normal([1, 1, 1, 0, 0, 0])
        out.add(scores, draw.integers(5, 50, 6), 3, f"subset {i % 3}")
    return measures.summarise(out)


@pytest.fixture(scope="module")
def pairs() -> dict:
    draw = np.random.default_rng(1)
    out = Judged()
    for _ in range(80):
        out.add(draw.normal([0.5, 0]), draw.integers(5, 50, 2))
    out.add([1, 1], [5, 5])
    return measures.summarise(out)


def test_table_of_pairs(pairs):
    text = show.table(pairs)
    (line,) = re.findall("^chosen wins .*$", text, re.MULTILINE)
    rows = pairs["rows"]
    assert line.split()[2:6] == [str(rows[k]) for k in ("n", "wins", "ties", "losses")]
    assert line.split()[6] == f"{rows['accuracy']:.1%}"
    low, high = rows["interval"]
    assert line.split()[7:10] == [f"{low:.1%}", "-", f"{high:.1%}"]
    assert "mean of subsets" not in text and "RM-Bench" not in text and "pairs won" not in text
    assert f"mean {pairs['margin']['mean']:.4g}" in text
    bars = re.findall(r"^ +(\S+) to +(\S+) +(\d+)( #+)?$", text, re.MULTILINE)
    assert [int(bar[2]) for bar in bars] == pairs["margin"]["histogram"]["counts"]
    assert max(len(bar[3]) for bar in bars) == 1 + 40
    assert all(bool(bar[3]) == (bar[2] != "0") for bar in bars)
    assert f"error {pairs['calibration']['ece']:.4f}" in text
    assert f"Pearson {pairs['length']['reward_and_length']['pearson']:.4f}" in text


def test_table_of_groups(groups):
    text = show.table(groups)
    assert re.search(r"^best answer is chosen +60 ", text, re.MULTILINE)
    for name, tally in groups["subsets"].items():
        assert re.search(rf"^{name} +20 +{tally['wins']} ", text, re.MULTILINE)
    assert re.search(rf"^mean of subsets +{groups['macro']['accuracy']:.1%}", text, re.MULTILINE)
    assert re.search(r"^pairs +540 ", text, re.MULTILINE)
    found = groups["rm_bench"]
    cells = [f"{found[k]:.1%}" for k in ("easy", "normal", "hard", "mean")]
    assert re.search(r"^  all +" + " +".join(cells) + "$", text, re.MULTILINE)
    cells = [f"{cell:.1%}" for cell in found["matrix"][2]]
    assert re.search(r"^  Markdown +" + " +".join(cells) + "$", text, re.MULTILINE)


def test_table_of_a_subset_with_the_name_of_a_line():
    rows = Judged()
    rows.add([1, 0, 0], [5, 5, 5], subset="pairs")
    rows.add([0, 1, 0], [5, 5, 5], subset="best answer is chosen")
    names = re.findall(r"^(\w.*?) {2,}\d", show.table(measures.summarise(rows)), re.MULTILINE)
    assert names == [*["best answer is chosen"] * 2, "pairs", "mean of subsets", "pairs"]


def test_a_published_figure_comes_first(pairs):
    found = {"benchmark": "B", "score": 0.4567, "parts": {"x": 0.5, "long name": 0.25}, "of": 2,
        "incomplete": "", "formula": "mean of the parts", "paper": "arXiv 1"}  # fmt: skip
    text = show.table({"headline": found, **pairs})
    lines = ["B 45.7%", "  as published (arXiv 1): mean of the parts", "  x           50.0%"]
    assert text.startswith("\n".join([*lines, "  long name   25.0%", "", "rmfast's own figures "]))
    text = show.table({"headline": found | {"incomplete": "2 of its 3 parts"}, **pairs})
    assert text.splitlines()[2] == "  2 of its 3 parts are in these rows"
    assert show.figure({"headline": found, **pairs}, "m")._suptitle.get_text() == "m\nB 45.7%"
    assert show.table({"headline": None, **pairs}) == show.table(pairs)


def test_table_of_nothing():
    text = show.table(measures.summarise(Judged()))
    assert "nan" not in text and re.search(r"^chosen wins +0 +0 +0 +0 +-", text, re.MULTILINE)


def test_figure(pairs, tmp_path):
    out = show.figure(pairs, "a model")
    margins, reliability = out.axes
    heights = [bar.get_height() for bar in margins.patches]
    assert heights == pairs["margin"]["histogram"]["counts"]
    assert margins.get_title() == f"accuracy {pairs['rows']['accuracy']:.1%}"
    filled = [row["right"] for row in pairs["calibration"]["bins"] if row["n"]]
    assert [bar.get_height() for bar in reliability.patches] == filled
    out.savefig(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


@pytest.mark.parametrize(
    "title, shown",
    [
        ("$x_{ and $\\b", "$x_{ and $\\b"),
        ("one $ alone", "one $ alone"),
        ("猫 \ud83d\udcff", "\\u732b \\ud83d\\udcff"),  # no font here has it: written out
        ("модель \u210a", "модель \u210a"),  # two fonts
        ("a\tb\nc\x07", "a\\tb\nc\\x07"),
        ("/a-long/path" * 40, None),
        ("模型" * 90, None),
    ],
)
def test_any_title_is_drawn(pairs, monkeypatch, title, shown):
    from matplotlib import font_manager

    kept = [x for x in font_manager.fontManager.ttflist if x.name.startswith(("DejaVu", "STIX"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", kept)
    out = show.figure(pairs, title)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing
        out.canvas.draw()
    text = out._suptitle
    if shown is not None:
        assert text.get_text().replace(r"\$", "$") == shown
    drawn = text.get_window_extent()
    assert drawn.x0 >= 0 and drawn.x1 <= out.bbox.x1


@pytest.mark.parametrize("scale", [1e-6, 1, 12345, 3e7])
def test_labels_do_not_collide(scale):
    draw, rows = np.random.default_rng(0), Judged()
    for _ in range(100):
        rows.add(draw.normal([0.5, 0]) * scale, [5, 5])
    lines = [{"kind": "train", "step": i, "loss": 1 / i} for i in range(1, 60)]
    tally = {"accuracy": 0.75, "interval": [0.5, 0.9]}
    lines.append({"kind": "eval", "step": 9, "rows": tally, "calibration": {"log_loss": 0.6}})
    title = "a model " * 30
    for out in (show.figure(measures.summarise(rows), title), show.curve(lines, title)):
        out.canvas.draw()
        found = [out._suptitle]
        for axes in out.axes:
            found += [axes.title, axes.xaxis.label, axes.yaxis.label, axes.get_legend(), axes.patch]
            low, high = axes.get_xlim()
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            found += [label for tick, label in ticks if low <= tick <= high]
            found.append(axes.xaxis.get_offset_text())
        boxes = [x.get_window_extent().shrunk(0.99, 0.99) for x in found if _is_seen(x)]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])


def _is_seen(artist) -> bool:
    """Whether it is no text, or text that is not empty."""
    return not hasattr(artist, "get_text") or bool(artist.get_text())


def test_figure_of_nothing():
    show.figure(measures.summarise(Judged()), "").canvas.draw()


def test_what_stands_in_the_way_of_a_figure(monkeypatch):
    show.check("out.png")
    with pytest.raises(UserError, match=r"--figure out.txt: its name must end with .* \.png"):
        show.check("out.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UserError, match=r"pip install 'rmfast\[eval\]'"):
        show.check("out.png")


def test_curve():
    lines = [{"kind": "train", "step": i, "loss": 1 / i} for i in (1, 2, 3)]
    tally = {"accuracy": 0.75, "interval": [0.5, 0.9]}
    lines.insert(1, {"kind": "eval", "step": 2, "rows": tally, "calibration": {"log_loss": 0.6}})
    loss, accuracy = show.curve(lines, "a title").axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[1, 1], [2, 1 / 2], [3, 1 / 3]],
        [[2, 0.6]],
    ]
    assert accuracy.lines[0].get_xydata().tolist() == [[2, 0.75]]
    assert accuracy.collections[0].get_paths()[0].get_extents().intervaly.tolist() == [0.5, 0.9]
    shown = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert shown == ["held out", "95 % interval", "chance"]
    assert all(tick == int(tick) for axes in (loss, accuracy) for tick in axes.get_xticks())
    assert len(show.curve(lines[:1], "nothing held out").axes) == 1


def test_curve_of_many_steps_has_a_running_mean():
    losses = np.random.default_rng(0).random(100).tolist()
    lines = [{"kind": "train", "step": 3 * i, "loss": x} for i, x in enumerate(losses, start=1)]
    _, smooth = show.curve(lines, "").axes[0].lines
    assert smooth.get_label() == "training, mean of 5"
    xs, ys = smooth.get_data()
    assert list(xs) == list(range(15, 303, 3))
    assert list(ys) == pytest.approx([sum(losses[i : i + 5]) / 5 for i in range(96)])
