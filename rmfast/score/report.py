"""The report of a run of ``rmfast score``, as JSON and for the screen."""

from __future__ import annotations

import collections
import platform
from pathlib import Path
from typing import Any

from rmfast.resume import versions
from rmfast.score.options import ScoreOptions
from rmfast.score.progress import saved_by_sharing
from rmfast.score.start import State


def report(about: dict[str, Any], state: State, options: ScoreOptions) -> dict[str, Any]:
    """What the run did.

    Args:
        about: what the scorer says of the model.
    """
    totals = collections.Counter(state.totals)
    return {
        "input": options.input,
        "output": options.output,
        "rows": state.rows,
        "scored": totals["rows"],
        "overlong": totals["overlong"],
        "errors": totals["errors"],
        "conversations": totals["conversations"],
        "tokens": totals["tokens"],
        "distinct_prefixes": totals["nodes"],
        "tokens_run": totals["tokens_run"],
        "sharing_saved": saved_by_sharing(totals),
        "micro_batches": totals["micro_batches"],
        "max_tokens": state.max_tokens,
        "halvings": totals["halvings"],
        "seconds": state.seconds,
        "seconds_scoring": totals["seconds"],
        "tokens_per_second": totals["tokens"] / state.seconds if state.seconds else 0.0,
        "model": options.model,
        "revision": options.revision,
        **about,
        "versions": {**versions(), "python": platform.python_version()},
    }


def as_text(found: dict[str, Any], path: Path, errors: Path) -> str:
    """The report for the screen.

    Args:
        path: the output.
        errors: the file of the rows that were left out.
    """
    left_out = found["errors"] + found["overlong"]
    lines = [f"{found['scored']:,} of {found['rows']:,} rows scored: {path}"]
    if left_out:
        lines.append(
            f"  left out           {left_out:,} ({found['overlong']:,} too long): {errors}"
        )
    lines += [
        f"  conversations      {found['conversations']:,}",
        f"  tokens             {found['tokens']:,}, {found['tokens_per_second']:,.0f} a second",
        f"  distinct prefixes  {found['distinct_prefixes']:,}",
        f"  saved              {found['sharing_saved']:.1%} of the tokens by sharing prefixes",
        f"  seconds            {found['seconds']:,.1f}",
        f"  model              {found['model']}, {found['dtype']}, {found['device']}, level "
        f"{found['level']}",
    ]
    lines += [f"  ! {warning}" for warning in found["warnings"]]
    return "\n".join(lines)
