"""How far a run of ``rmfast score`` is."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmfast.errors import RowError


@dataclasses.dataclass
class State:
    """How far a run is: all that ``--resume`` needs.

    Attributes:
        settings: what decides the output, by names that users know.
        rows: records read.
        windows: that they made.
        position: of the last record, for the progress bar.
        output: mark of the output.
        errors: mark of the file of errors.
        max_tokens: tokens a micro-batch.
        totals: the scorer's figures.
        seconds: all runs together.
        done: nothing is left to do.
    """

    settings: dict[str, Any]
    rows: int = 0
    windows: int = 0
    position: int | None = None
    output: int = 0
    errors: int = 0
    max_tokens: int | None = None
    totals: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    done: bool = False

    def is_failure(self, error: RowError) -> bool:
        """A row that is too long may be meant to be skipped."""
        return error.kind != "overlong" or self.settings["--on-overlong"] != "skip"

    def exit_code(self) -> int:
        kinds = ["errors"] if self.settings["--on-overlong"] == "skip" else ["errors", "overlong"]
        return int(any(self.totals.get(kind) for kind in kinds))
