"""What a run found: as CSV, as Markdown, and as two pictures."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from pathlib import Path
from typing import Any

import torch

import rmfast
from rmfast.benchmarks import contestants
from rmfast.benchmarks.peers import workloads
from rmfast.evaluate import show

Row = dict[str, Any]
COLUMNS = """workload alternative verdict difference allowed rows tokens nodes seconds seconds_min
    seconds_max ratio tokens_per_second tokens_run trie_share matmul prepacked floor_seconds
    floor_share baseline versions""".split()
NOTES = """\
Ratio: times as fast as {baselines}. Trie: distinct prefixes ÷ tokens run; no exact method that
runs tokens can have more than 100 %. Floor: time of the linear layers' products on the distinct
prefixes (three times that in training), at the best rate of the same run, ÷ time. Off: largest
difference from the same model in fp32, in standard deviations of its values; whoever is further
off than the number in brackets is wrong, and has no time."""


def check() -> None:
    """Refuse to begin where the pictures cannot be drawn."""
    show.check("report.png")


def compared(rows: list[Row], baseline: str, versions: dict[str, dict[str, str]]) -> list[Row]:
    """The rows with ``ratio``: how many times as fast as the baseline at the same workload."""
    took = {row["workload"]: row.get("seconds") for row in rows if row["alternative"] == baseline}
    for row in rows:
        row["baseline"], theirs = baseline, took.get(row["workload"])
        mine = versions.get(row["alternative"], {})
        row["versions"] = ", ".join(f"{package} {version}" for package, version in mine.items())
        if theirs and row.get("seconds"):
            row["ratio"] = theirs / row["seconds"]
    return rows


def facts(args: argparse.Namespace) -> dict[str, str]:
    """What was run, where and when."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "machine": contestants._device_name(args.device),
        "threads": str(torch.get_num_threads()),
        "model": contestants._name(args.model) if args.model else "SmolLM2-135M",
        "dtype": args.dtype,
        "data": contestants._name(args.data),
        "size": f"{args.size:g}",
        "rounds": f"{args.rounds} of {args.starts} starts",
        "python": platform.python_version(),
        "rmfast": rmfast.__version__,
    }


def write(folder: Path, rows: list[Row], about: dict[str, str], size: float) -> str:
    """Write ``peers.csv``, ``peers.md``, ``throughput.png``, and ``curve.png`` of the curve.

    Returns:
        The Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    text = markdown(rows, about)
    (folder / "peers.md").write_text(text, encoding="utf-8")
    title = f"{about['model']}, {about['dtype']}, {about['machine']}, {about['date'][:10]}"
    if not all(map(_count, rows)):
        bars(rows, title).savefig(folder / "throughput.png")
    if any(map(_count, rows)):
        curve(rows, size, title).savefig(folder / "curve.png")
    return text


# --- Markdown


def markdown(rows: list[Row], about: dict[str, str]) -> str:
    """A table of all ratios, and one for each workload."""
    names = [*dict.fromkeys(row["alternative"] for row in rows)]
    works = {row["workload"]: row for row in rows}
    cells = {(row["alternative"], row["workload"]): row for row in rows}
    summary = [["", *works]]
    for name in names:
        found = (cells.get((name, work)) for work in works)
        summary.append([name, *(_ratio(row) if row else "" for row in found)])
    parts = [*_table(summary), ""]
    for work, one in works.items():
        parts += [f"## {work}", "", f"{one['rows']:,} rows, {one['tokens']:,} tokens, "
                  f"{one['nodes']:,} distinct prefixes", ""]  # fmt: skip
        lines = [["", "ratio", "seconds", "trie", "floor", "off"]]
        lines += [_line(row) for row in rows if row["workload"] == work]
        parts += [*_table(lines), ""]
    baselines = " and ".join(dict.fromkeys(row["baseline"] for row in rows))
    parts += [NOTES.format(baselines=baselines), ""]
    parts += [f"- {name}: {value}" for name, value in about.items()]
    found = {row["alternative"]: row["versions"] for row in rows if row.get("versions")}
    for text in dict.fromkeys(found.values()):
        parts.append(f"- {', '.join(name for name in found if found[name] == text)}: {text}")
    return "\n".join([*parts, ""])


def _table(lines: list[list[str]]) -> list[str]:
    rule = "|---" * len(lines[0]) + "|"
    head, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, rule, *rest]


def _ratio(row: Row) -> str:
    if "ratio" in row:
        return f"{row['ratio']:.2f}×"
    verdict = row["verdict"]
    return f"**{verdict}**" if verdict in ("right", "wrong") else verdict.partition(":")[0]


def _line(row: Row) -> list[str]:
    """A line of a workload's table."""
    name, off = row["alternative"], row["difference"]
    far = "" if off is None else f"{off:.2g} ({row['allowed']:.2g})"
    if "seconds" not in row:
        return [name, f"{row['verdict']}".replace("|", " "), "", "", "", far]
    shares = [row.get("trie_share"), row.get("floor_share")]
    return [
        name, _ratio(row), f"{row['seconds']:.3f}", *(f"{x:.0%}" if x else "" for x in shares), far,
    ]  # fmt: skip


# --- pictures


def bars(rows: list[Row], title: str) -> Any:
    """Tokens of the workload a second, for each workload and alternative."""
    works = [*dict.fromkeys(row["workload"] for row in rows if not _count(row))]
    names = _timed(rows)
    drawn = show._figure(f"Throughput\n{title}", max(8, 1.6 * len(works)), 6)
    axes, width = drawn.subplots(), 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        found = {r["workload"]: r for r in rows if r["alternative"] == name and "seconds" in r}
        at = [i + (place + 0.5) * width - 0.4 for i, work in enumerate(works) if work in found]
        heights = [found[work]["tokens_per_second"] for work in works if work in found]
        axes.bar(at, heights, width, label=name, color=f"C{place % 10}", hatch="//" * (place // 10))
    axes.set_xticks(range(len(works)), [work.replace(", ", ",\n") for work in works])
    axes.set(ylabel="tokens of the workload a second", yscale="log")
    show._legend(axes)
    return drawn


def curve(rows: list[Row], size: float, title: str) -> Any:
    """Cost of N answers to one prompt, in costs of one, and the bound."""
    drawn = show._figure(f"N answers to one prompt\n{title}", 8, 6)
    axes = drawn.subplots()
    bound = [workloads.bound(size, count) for count in workloads.GROUPS]
    axes.plot(workloads.GROUPS, bound, "k--", label="(prompt + N · answer) ÷ (prompt + answer)")
    timed = [row for row in rows if _count(row) and "seconds" in row]
    for place, name in enumerate(_timed(rows)):
        found = {_count(row): row["seconds"] for row in timed if row["alternative"] == name}
        if 1 in found:
            costs, style = [x / found[1] for x in found.values()], ("o-", "v--")[place >= 10]
            axes.plot([*found], costs, style, label=name, color=f"C{place % 10}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="N", ylabel="cost of N ÷ cost of one", yscale="log")
    axes.set_xticks(workloads.GROUPS, workloads.GROUPS)
    show._legend(axes)
    return drawn


def _timed(rows: list[Row]) -> list[str]:
    """Names in their order, which is that of the colours in both pictures."""
    return [*dict.fromkeys(row["alternative"] for row in rows if "seconds" in row)]


def _count(row: Row) -> int:
    """N, of a workload of the curve."""
    start, _, count = row["workload"].partition("-")
    return int(count) if start == "n" else 0
