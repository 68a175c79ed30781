"""The figures of :func:`rmfast.evaluate.measures.summarise` as a table and as a picture."""

from __future__ import annotations

import contextlib
import itertools
import os
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rmfast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BAR = 40  # characters
_LEVELS = ("easy", "normal", "hard", "mean")
_STYLES = ("concise", "detailed", "Markdown")


def table(summary: dict[str, Any]) -> str:
    """The figures as plain text."""
    ece, log_loss = (_number(summary["calibration"][name]) for name in ("ece", "log_loss"))
    calibration = f"expected calibration error {ece}, log loss {log_loss}"
    parts = [_accuracy(summary), _margin(summary), _length(summary["length"])]
    if summary.get("headline"):
        parts.insert(0, _headline(summary["headline"]))
    parts.append([f"calibration of σ(margin): {calibration}"])
    if summary["rm_bench"] is not None:
        parts.append(_rm_bench(summary["rm_bench"]))
    return "\n\n".join("\n".join(part) for part in parts)


def _grid(rows: list[list[str]], indent: str = "") -> Iterator[str]:
    """Cells below one another: names, in the first column, on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield indent + "   ".join([name.ljust(widths[0]), *right]).rstrip()


def _headline(found: dict[str, Any]) -> Iterator[str]:
    yield _score(found)
    yield f"  as published ({found['paper']}): {found['formula']}"
    if found["incomplete"]:
        yield f"  {found['incomplete']} are in these rows"
    yield from _grid([[name, _share(score)] for name, score in found["parts"].items()], "  ")


def _score(found: dict[str, Any]) -> str:
    return f"{found['benchmark']} {_share(found['score'])}"


def _accuracy(summary: dict[str, Any]) -> Iterator[str]:
    groups = summary["groups"]
    tallies = [("best answer is chosen" if groups else "chosen wins", summary["rows"])]
    if "subsets" in summary:
        tallies += [*summary["subsets"].items(), ("mean of subsets", summary["macro"])]
    if groups:
        tallies.append(("pairs", summary["pairs"]))
    counted = ("n", "wins", "ties", "losses")
    title = "rmfast's own figures" if summary.get("headline") else ""
    rows = [[title, *counted, "accuracy", "95 % interval", "ties shared"]]
    for name, tally in tallies:
        counts = [f"{tally[key]:,}" if key in tally else "" for key in counted]
        interval = " - ".join(map(_share, tally.get("interval") or ()))
        shares = [_share(tally[key]) for key in ("accuracy", "accuracy_ties_shared")]
        rows.append([name, *counts, shares[0], interval, shares[1]])
    yield from _grid(rows)
    if groups:
        yield f"mean over rows of the pairs won: {_share(summary['pairs']['row_mean'])}"


def _margin(summary: dict[str, Any]) -> Iterator[str]:
    margin, reward = summary["margin"], summary["reward"]
    yield "margin (chosen - rejected)"
    if not margin["n"]:
        return
    yield (
        f"  mean {margin['mean']:.4g}, median {margin['median']:.4g}, standard deviation "
        f"{margin['std']:.4g}; mean reward {reward['chosen']:.4g} chosen, "
        f"{reward['rejected']:.4g} rejected"
    )
    edges, counts = margin["histogram"]["edges"], margin["histogram"]["counts"]
    for (left, right), count in zip(itertools.pairwise(edges), counts, strict=True):
        bar = "#" * -(-count * _BAR // max(counts))
        yield f"  {left:10.4g} to {right:10.4g} {count:9,} {bar}".rstrip()


def _length(length: dict[str, Any]) -> Iterator[str]:
    yield "length (tokens)"
    yield (
        f"  the longer answer wins {_share(length['longer_wins'])} of {length['n']:,} pairs of "
        f"different lengths, and is the chosen one in {_share(length['longer_chosen'])}"
    )
    tallies = {name: length[f"accuracy_if_{name}"] for name in ("longer", "same", "shorter")}
    parts = [f"{name} {_share(x['accuracy'])} of {x['n']:,}" for name, x in tallies.items()]
    yield f"  accuracy where the chosen answer is … {', '.join(parts)}"
    for key, pair in (
        ("reward_and_length", "reward and length"),
        ("margin_and_difference", "margin and difference of lengths"),
    ):
        pearson, spearman = (_number(length[key][name]) for name in ("pearson", "spearman"))
        yield f"  correlation of {pair}: Pearson {pearson}, Spearman {spearman}"


def _rm_bench(found: dict[str, Any]) -> Iterator[str]:
    yield f"RM-Bench, {found['n']:,} rows of 3 chosen and 3 rejected answers"
    rows = [["", *_LEVELS]]
    both = {"all": found}
    if "pooled" in found:
        both = {"mean of domains": found, "all rows": found["pooled"]}
    for name, levels in (*both.items(), *found["subsets"].items()):
        rows.append([name, *(_share(levels[key]) for key in _LEVELS)])
    yield from _grid(rows, "  ")
    rows = [["chosen, against rejected:", *_STYLES]]
    for name, shares in zip(_STYLES, found["matrix"], strict=True):
        rows.append([name, *map(_share, shares)])
    yield from _grid(rows, "  ")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def check(path: str) -> None:
    """Raise UserError where :func:`figure` cannot be made, or not saved under this name."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UserError("a figure needs matplotlib: pip install 'rmfast[eval]'") from None
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if os.path.splitext(path)[1].lower()[1:] not in kinds:
        raise UserError(f"--figure {path}: its name must end with one of .{', .'.join(kinds)}")


def _figure(title: str, width: float, height: float) -> Figure:
    """An empty figure with a canvas of its own: no display and no state of pyplot is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    title, families = _drawable(title)
    lines = "\n".join(_wrapped(line, 8 * width) for line in title.split("\n"))
    figure.suptitle(lines.replace("$", r"\$"), fontfamily=families)  # between two is mathtext
    return figure


def _wrapped(line: str, width: float) -> str:
    """The line in lines of so many letters, of which some are twice as wide."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)
    width *= len(line) / (len(line) + wide) if line else 1
    return textwrap.fill(line, int(width), break_on_hyphens=False)


def _drawable(text: str) -> tuple[str, list[str]]:
    """A text and the font families that draw it; what no installed font has is written out."""
    from matplotlib import font_manager, rcParams

    families, missing = list(rcParams["font.family"]), set(text) - {"\n"}
    own = font_manager.findfont(font_manager.FontProperties())
    entries = [(own, None), *((font.fname, font.name) for font in font_manager.fontManager.ttflist)]
    for path, name in entries:
        if not missing:
            break
        if "Last Resort" in str(name):  # boxes
            continue
        with contextlib.suppress(OSError, RuntimeError):
            letters = font_manager.get_font(path).get_charmap()
            found = {x for x in missing if ord(x) in letters}
            missing -= found
            families += [name] if found and name else []
    written = {ord(x): x.encode("unicode_escape").decode() for x in missing}
    return text.translate(written), families


def _legend(axes: Axes) -> None:
    """A legend below the axes, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)


def figure(summary: dict[str, Any], title: str) -> Figure:
    """Histogram of margins, with the accuracy above it, and reliability diagram."""
    if summary.get("headline"):
        title += f"\n{_score(summary['headline'])}"
    drawn = _figure(title, 12, 5)
    margins, reliability = drawn.subplots(1, 2)
    margins.set_title(f"accuracy {_share(summary['rows']['accuracy'])}")
    _draw_margins(margins, summary["margin"])
    _draw_reliability(reliability, summary["calibration"])
    return drawn


def curve(lines: list[dict[str, Any]], title: str) -> Figure:
    """Loss of training, and held-out accuracy with its 95 % interval, by optimiser step.

    Args:
        lines: those of ``rmfast train``'s metrics.jsonl.
    """
    from matplotlib.ticker import MaxNLocator

    trained = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "eval"]
    drawn = _figure(title, 8, 8 if held_out else 4)
    first, *second = drawn.subplots(2 if held_out else 1, 1, squeeze=False, sharex=True)[:, 0]
    steps, losses = ([line[key] for line in trained] for key in ("step", "loss"))
    count = len(losses) // 20
    first.plot(steps, losses, label="training", alpha=0.4 if count > 1 else 1)
    if count > 1:
        sums = list(itertools.accumulate(losses, initial=0))
        means = [(b - a) / count for a, b in zip(sums, sums[count:], strict=False)]
        label = f"training, mean of {count}"
        first.plot(steps[count - 1 :], means, color="tab:blue", label=label)
    first.set(ylabel="loss")
    for axes in second:
        steps = [line["step"] for line in held_out]
        losses = [line["calibration"]["log_loss"] for line in held_out]
        label = "held out, log loss of σ(margin)"
        first.plot(steps, losses, "o-", color="tab:orange", label=label)
        tallies = [line["rows"] for line in held_out]
        low, high = zip(*(tally["interval"] for tally in tallies), strict=True)
        axes.plot(steps, [tally["accuracy"] for tally in tallies], "o-", label="held out")
        band = {"alpha": 0.2, "edgecolor": "tab:blue", "label": "95 % interval"}
        axes.fill_between(steps, low, high, **band)  # of one step, its edge is what is seen
        axes.axhline(0.5, color="grey", linestyle=":", label="chance")
        axes.set(ylabel="held-out accuracy", ylim=(0, 1))
    for axes in (first, *second):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelbottom=True)
        _legend(axes)
    return drawn


def _draw_margins(axes: Axes, margin: dict[str, Any]) -> None:
    axes.set(xlabel="margin (chosen - rejected)", ylabel="pairs")
    if not margin["n"]:
        return
    edges, counts = margin["histogram"]["edges"], margin["histogram"]["counts"]
    widths = [right - left for left, right in itertools.pairwise(edges)]
    colours = ["tab:red" if left < 0 else "tab:blue" for left in edges[:-1]]
    axes.bar(edges[:-1], counts, widths, align="edge", color=colours, edgecolor="white")
    axes.axvline(margin["mean"], color="black", linestyle="--", label=f"mean {margin['mean']:.3g}")
    axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    axes.locator_params(axis="x", nbins=7)
    _legend(axes)


def _draw_reliability(axes: Axes, calibration: dict[str, Any]) -> None:
    title = f"calibration of σ(margin): error {_number(calibration['ece'])}"
    axes.set(title=title, xlabel="confidence", ylabel="share right", xlim=(0.5, 1), ylim=(0, 1))
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="calibrated")
    bins = [one for one in calibration["bins"] if one["n"]]
    low, high, confidence, right = (
        [one[key] for one in bins] for key in ("from", "to", "confidence", "right")
    )
    widths = [b - a for a, b in zip(low, high, strict=True)]
    style = {"color": "tab:blue", "alpha": 0.5, "edgecolor": "white"}
    axes.bar(low, right, widths, align="edge", **style)
    axes.plot(confidence, right, "o", color="tab:blue")
    _legend(axes)
