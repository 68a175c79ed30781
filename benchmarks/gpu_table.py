"""Writes the table of the newest results of a GPU into texts, between two marker comments.

    python -m rmfast.benchmarks.gpu_table README.md docs/gpu.md

After ``<!-- gpu table -->`` come whole passes, after ``<!-- gpu table: all -->`` kernels too.
Results are ``benchmarks/results/<device>.json``, which ``make gpu`` writes; none may be there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WHOLE, ALL, END = "<!-- gpu table -->", "<!-- gpu table: all -->", "<!-- end -->"
NONE = "Not yet run on a GPU."


def newest(results: Path) -> dict[str, Any] | None:
    """By the date of its last part."""
    found = [json.loads(path.read_text()) for path in results.glob("*.json")]
    date = lambda one: max(part["facts"]["date"] for part in one.values())  # noqa: E731
    return max(found, key=date, default=None)


def table(result: dict[str, Any] | None, every: bool = True) -> str:
    """Versions, verdicts of the check, what was reached, of which goals: whole passes, or every."""
    if result is None:
        return NONE
    facts = max((part["facts"] for part in result.values()), key=lambda x: x["date"])
    versions = (f"{name} {facts['packages'].get(name)}" for name in ("torch", "triton"))
    lines = [f"{facts['device']}, {', '.join(versions)}, {facts['date'][:10]}."]
    parts = [result.get(part, {"found": {}})["found"] for part in ("check", "report")]
    words = (("Checks", "passed", "failed"), ("Sections of timings", "finished", "not finished"))
    for (what, well, ill), found in zip(words, parts, strict=True):
        bad = [name for name, one in found.items() if not one["ok"]]
        said = f" {what} {well}: {len(found) - len(bad)} of {len(found)}"
        said += f"; {ill}: {', '.join(bad)}." if bad else "."
        lines[0] += said if found else f" {what}: not run."
    sections = parts[1]
    rows = [row for one in sections.values() for row in one["rows"]]
    roof = [f"{k} {v:.1f}" for k, v in next((r for r in rows if "copy TB/s" in r), {}).items()]
    lines[0] += f" Measured: {', '.join(roof)}." if roof else ""
    goals = [row for row in rows if "goal" in row and (every or "peak GB" in row)]
    if goals:
        lines += [
            "",
            "| | measured | goal | reached | peak GB, Hugging Face's |",
            "|---|---|---|---|---|",
        ]
    for row in goals:
        measured = "–" if row["measured"] is None else f"{row['measured']:.2f}"
        peaks = [row.get(name) for name in ("peak GB", "HF peak GB")]
        peak = ", ".join("–" if x is None else f"{x:.1f}" for x in peaks) if any(peaks) else ""
        reached = "yes" if row["reached"] else "no"
        lines.append(f"| {row['goal']} | {measured} | {row['needed']} | {reached} | {peak} |")
    return "\n".join(lines)


def put(text: str, result: dict[str, Any] | None) -> str:
    """``text`` with the table it asks for between the markers.

    Raises:
        ValueError: the markers are not there, once each, in order.
    """
    marker = ALL if ALL in text else WHOLE
    before, begin, rest = text.partition(marker)
    _, end, after = rest.partition(END)
    if not (begin and end) or marker in rest:
        raise ValueError(f"needs {WHOLE} or {ALL} and then {END}, once")
    return f"{before}{marker}\n{table(result, marker == ALL)}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("gpu_table", description=__doc__.partition("\n")[0])
    parser.add_argument("texts", type=Path, nargs="+", help="files with markers, as README.md")
    results = Path(__file__).with_name("results")
    parser.add_argument(
        "--results", type=Path, default=results, help="folder; default: %(default)s"
    )
    args = parser.parse_args(argv)
    for path in args.texts:
        text = path.read_text(encoding="utf-8")
        path.write_text(put(text, newest(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
