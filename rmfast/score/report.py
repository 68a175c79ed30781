"""The report of a run of ``rmfast score``, as JSON and for the screen."""

from __future__ import annotations

import itertools
import json
import platform
from pathlib import Path
from typing import Any

from rmfast.resume import versions
from rmfast.score.options import ScoreOptions
from rmfast.score.start import STDOUT, State, beside

_SHOWN = 3  # reasons on the screen
_WIDTH = 200  # characters of each


def report(model: dict[str, Any], state: State, options: ScoreOptions) -> dict[str, Any]:
    """The figures of the run, and what the scorer says of the ``model``."""
    stats = state.stats()
    return {
        "input": options.input,
        "output": options.output,
        "rows": state.rows,
        "scored": stats.rows,
        "overlong": stats.overlong,
        "errors": stats.errors,
        "conversations": stats.conversations,
        "tokens": stats.tokens,
        "distinct_prefixes": stats.nodes,
        "tokens_run": stats.tokens_run,
        "sharing_saved": stats.saved,
        "micro_batches": stats.micro_batches,
        "max_tokens": state.max_tokens,
        "halvings": stats.halvings,
        "seconds": state.seconds,
        "seconds_scoring": stats.seconds,
        "tokens_per_second": stats.tokens / state.seconds if state.seconds else 0.0,
        "model": options.model,
        "revision": options.revision,
        "tokenizer": options.tokenizer or options.model,
        **model,
        "warnings": model["warnings"] + stats.warnings(),
        "versions": {**versions(), "python": platform.python_version()},
    }


def as_text(found: dict[str, Any], path: Path) -> str:
    """The report for the screen, of the output ``path``."""
    names = {"output": path, "errors": beside(path, "errors.jsonl")}
    if path == STDOUT:
        names = {"output": "stdout", "errors": "stderr"}
    lines = [f"{found['scored']:,} of {found['rows']:,} rows scored: {names['output']}"]
    if left_out := found["errors"] + found["overlong"]:
        words = f"{left_out:,} ({found['overlong']:,} too long): {names['errors']}"
        lines += [f"  left out           {words}"]
        lines += [] if path == STDOUT else _first(names["errors"])
    lines += [
        f"  conversations      {found['conversations']:,}",
        f"  tokens             {found['tokens']:,}, {found['tokens_per_second']:,.0f} a second",
        f"  distinct prefixes  {found['distinct_prefixes']:,}",
        f"  saved              {found['sharing_saved']:.1%} of the tokens by sharing prefixes",
        f"  seconds            {found['seconds']:,.1f}",
        f"  model              {found['model']}, {found['dtype']}, {found['device']}, level "
        f"{found['level']}",
    ]
    return "\n".join([*lines, *(f"  ! {warning}" for warning in found["warnings"])])


def _first(errors: Path) -> list[str]:
    """The first rows that were left out, and why."""
    with errors.open(encoding="utf-8") as file:
        found = [json.loads(line) for line in itertools.islice(file, _SHOWN)]
    return [f"    line {one['line']}: {one['reason'][:_WIDTH]}" for one in found]
