"""Options of ``rmfast demo``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rmfast.arguments import Options, option


@dataclasses.dataclass(kw_only=True)
class DemoOptions(Options):
    """Options of ``rmfast demo``."""

    # fmt: off
    steps: int = option("Train for this many steps.", 60, least=1)
    device: Literal["cpu", "cuda"] | None = option(
        "Run here (default: a GPU if there is one).", None)
    # fmt: on
