"""The figures of :func:`rmfast.evaluate.measures.summarise` as a table and as a picture."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rmfast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BAR = 40  # characters
_STYLES = ("concise", "detailed", "Markdown")
_DRAWN = 40  # subsets in the picture


def table(summary: dict[str, Any]) -> str:
    """What a terminal shows."""
    parts = [_accuracy(summary), _margin(summary), _length(summary["length"])]
    parts.append(_calibration(summary["calibration"]))
    if summary["rm_bench"] is not None:
        parts.append(_rm_bench(summary["rm_bench"]))
    return "\n\n".join("\n".join(part) for part in parts)


def _accuracy(summary: dict[str, Any]) -> Iterator[str]:
    named = summary.get("subsets", {})
    wide = max([24, *map(len, named)])
    counted = ("n", "wins", "ties", "losses")
    yield (
        f"{'':{wide}}"
        + "".join(f"{name:>9}" for name in counted)
        + (f"{'accuracy':>11}{'95 % interval':>18}{'ties shared':>13}")
    )

    def line(name: str, tally: dict[str, Any]) -> str:
        between = " - ".join(map(_share, tally["interval"] or ()))
        return (
            f"{name:{wide}}"
            + "".join(f"{tally[key]:9,}" for key in counted)
            + f"{_share(tally['accuracy']):>11}{between:>18}"
            + f"{_share(tally['accuracy_ties_shared']):>13}"
        )

    groups = summary["groups"]
    yield line("best answer is chosen" if groups else "chosen wins", summary["rows"])
    for name, tally in named.items():
        yield line(name, tally)
    if named:
        macro, gap = summary["macro"], " " * (4 * 9)
        yield f"{'mean of subsets':{wide}}{gap}{_share(macro['accuracy']):>11}{'':18}" + (
            f"{_share(macro['accuracy_ties_shared']):>13}"
        )
    if groups:
        yield line("pairs", {**summary["pairs"], "interval": None})
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
    top = max(counts)
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        bar = "#" * -(-count * _BAR // top)
        yield f"  {left:10.4g} to {right:10.4g} {count:9,} {bar}".rstrip()


def _length(length: dict[str, Any]) -> Iterator[str]:
    yield "length (tokens)"
    yield (
        f"  the longer answer wins {_share(length['longer_wins'])} of {length['n']:,} pairs of "
        f"different lengths, and is the chosen one in {_share(length['longer_chosen'])}"
    )
    parts = []
    for name in ("longer", "same", "shorter"):
        tally = length[f"accuracy_if_{name}"]
        parts.append(f"{name} {_share(tally['accuracy'])} of {tally['n']:,}")
    yield f"  accuracy where the chosen answer is … {', '.join(parts)}"
    for key, what in (
        ("reward_and_length", "reward and length"),
        ("margin_and_difference", "margin and difference of lengths"),
    ):
        both = length[key]
        yield (
            f"  correlation of {what}: Pearson {_number(both['pearson'])}, "
            f"Spearman {_number(both['spearman'])}"
        )


def _calibration(calibration: dict[str, Any]) -> Iterator[str]:
    yield (
        f"calibration of σ(margin): expected calibration error {_number(calibration['ece'])}, "
        f"log loss {_number(calibration['log_loss'])}"
    )
    yield f"  {'confidence':>13}{'pairs':>9}{'mean':>9}{'right':>9}"
    for row in calibration["bins"]:
        if row["n"]:
            yield (
                f"  {row['from']:5.3f} - {row['to']:5.3f}{row['n']:9,}{row['confidence']:9.3f}"
                f"{row['right']:9.3f}"
            )


def _rm_bench(found: dict[str, Any]) -> Iterator[str]:
    yield f"RM-Bench, {found['n']:,} rows of 3 chosen and 3 rejected answers"
    wide = max([24, *map(len, found["subsets"])])
    yield f"  {'':{wide}}" + "".join(f"{name:>9}" for name in ("easy", "normal", "hard", "mean"))
    for name, levels in (("all", found), *found["subsets"].items()):
        cells = (levels[key] for key in ("easy", "normal", "hard", "mean"))
        yield f"  {name:{wide}}" + "".join(f"{_share(cell):>9}" for cell in cells)
    yield f"  {'chosen, against rejected:':{wide}}" + "".join(f"{name:>9}" for name in _STYLES)
    for name, row in zip(_STYLES, found["matrix"], strict=True):
        yield f"  {name:{wide}}" + "".join(f"{_share(cell):>9}" for cell in row)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


# --- the picture


def check(path: str) -> None:
    """Raises UserError where :func:`figure` cannot be made, or not saved under such a name."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UserError("a figure needs matplotlib: pip install 'rmfast[eval]'") from None
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if os.path.splitext(path)[1].lower()[1:] not in kinds:
        raise UserError(f"--figure {path}: its name must end with one of .{', .'.join(kinds)}")


def figure(summary: dict[str, Any], title: str) -> Figure:
    """Histogram of margins, reliability diagram, accuracy by subset, length.

    It has a canvas of its own: neither a display nor pyplot's state is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subsets = min(len(summary.get("subsets", {})), _DRAWN)
    out = Figure(figsize=(12, max(8, 4 + 0.3 * subsets)), layout="constrained")
    FigureCanvasAgg(out)
    out.suptitle(title, wrap=True)
    (first, second), (third, fourth) = out.subplots(2, 2)
    _draw_margins(first, summary["margin"])
    _draw_reliability(second, summary["calibration"])
    _draw_accuracy(third, summary)
    _draw_length(fourth, summary["length"])
    return out


def curve(lines: list[dict[str, Any]], title: str) -> Figure:
    """Loss of training, and held-out accuracy with its 95 % interval, by optimiser step.

    Args:
        lines: those of ``rmfast train``'s metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "eval"]
    out = Figure(figsize=(8, 8 if held_out else 4), layout="constrained")
    FigureCanvasAgg(out)
    out.suptitle(title, wrap=True)
    first, *second = out.subplots(2 if held_out else 1, 1, squeeze=False)[:, 0]
    first.plot([x["step"] for x in trained], [x["loss"] for x in trained], label="training")
    first.set(xlabel="step", ylabel="loss")
    for axes in second:
        steps = [line["step"] for line in held_out]
        losses = [line["calibration"]["log_loss"] for line in held_out]
        first.plot(steps, losses, "o-", label="held out, log loss of σ(margin)")
        tallies = [line["rows"] for line in held_out]
        axes.plot(steps, [tally["accuracy"] for tally in tallies], "o-")
        axes.fill_between(steps, *zip(*(tally["interval"] for tally in tallies), strict=True),
                          alpha=0.2)  # fmt: skip
        axes.axhline(0.5, color="grey", linestyle=":")
        axes.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    first.legend()
    return out


def _draw_margins(axes: Axes, margin: dict[str, Any]) -> None:
    axes.set(title="margins", xlabel="chosen - rejected", ylabel="pairs")
    if not margin["n"]:
        return
    edges, counts = margin["histogram"]["edges"], margin["histogram"]["counts"]
    widths = [right - left for left, right in itertools.pairwise(edges)]
    colours = ["tab:red" if left < 0 else "tab:blue" for left in edges[:-1]]
    axes.bar(edges[:-1], counts, widths, align="edge", color=colours, edgecolor="white")
    axes.axvline(margin["mean"], color="black", linestyle="--", label=f"mean {margin['mean']:.3g}")
    axes.legend()


def _draw_reliability(axes: Axes, calibration: dict[str, Any]) -> None:
    axes.set(
        title=f"calibration of σ(margin): error {_number(calibration['ece'])}",
        xlabel="confidence",
        ylabel="share right",
        xlim=(0.5, 1),
        ylim=(0, 1),
    )
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="calibrated")
    rows = [row for row in calibration["bins"] if row["n"]]
    axes.bar(
        [row["from"] for row in rows],
        [row["right"] for row in rows],
        [row["to"] - row["from"] for row in rows],
        align="edge",
        color="tab:blue",
        alpha=0.5,
        edgecolor="white",
    )
    axes.plot([r["confidence"] for r in rows], [r["right"] for r in rows], "o", color="tab:blue")
    axes.legend(loc="lower right")


def _draw_accuracy(axes: Axes, summary: dict[str, Any]) -> None:
    axes.set(title="accuracy, with its 95 % interval", xlim=(0, 1))
    tallies = {"all": summary["rows"], **summary.get("subsets", {})}
    tallies = {name: tally for name, tally in tallies.items() if tally["n"]}
    left_out = len(tallies) - _DRAWN - 1
    if left_out > 0:
        axes.set_xlabel(f"and {left_out} more subsets")
        tallies = dict(list(tallies.items())[: _DRAWN + 1])
    names = [f"{name} ({tally['n']:,})" for name, tally in tallies.items()]
    shares = [tally["accuracy"] for tally in tallies.values()]
    ends = zip(*(tally["interval"] for tally in tallies.values()), strict=True)
    errors = [[abs(a - b) for a, b in zip(end, shares, strict=True)] for end in ends]
    axes.barh(names, shares, xerr=errors or None, color="tab:blue", alpha=0.7, capsize=3)
    axes.invert_yaxis()
    axes.axvline(0.5, color="grey", linestyle=":")


def _draw_length(axes: Axes, length: dict[str, Any]) -> None:
    axes.set(title="length", ylim=(0, 1), ylabel="share of pairs")
    bars = {
        "longer\nwins": length["longer_wins"],
        "longer\nis chosen": length["longer_chosen"],
    }
    for name in ("longer", "same", "shorter"):
        bars[f"right, chosen\n{name}"] = length[f"accuracy_if_{name}"]["accuracy"]
    bars = {name: value for name, value in bars.items() if value is not None}
    colours = ["tab:orange" if "right" not in name else "tab:blue" for name in bars]
    axes.bar(list(bars), list(bars.values()), color=colours, alpha=0.7)
    axes.axhline(0.5, color="grey", linestyle=":")
    both = length["margin_and_difference"]
    axes.set_xlabel(
        f"margin and difference of lengths: Pearson {_number(both['pearson'])}, "
        f"Spearman {_number(both['spearman'])}"
    )
