"""Options of ``rmfast doctor``."""

from __future__ import annotations

import dataclasses

from rmfast.arguments import option
from rmfast.score.options import LoadingOptions


@dataclasses.dataclass(kw_only=True)
class DoctorOptions(LoadingOptions):
    """Options of ``rmfast doctor``."""

    model: str = option("Check this reward model or PEFT adapter: a folder or a name on the hub.")
    json: bool = option("Print the findings as JSON.", False)
