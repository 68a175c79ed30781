"""Options of ``rmfast doctor``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rmfast.arguments import Options, option


@dataclasses.dataclass(kw_only=True)
class DoctorOptions(Options):
    """Options of ``rmfast doctor``."""

    # fmt: off
    model: str = option("Check this reward model or PEFT adapter: a folder or a name on the hub.")
    json: bool = option("Print the findings as JSON.", False)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "Load the weights in this dtype; auto: the checkpoint's.", "auto")
    device: str | None = option(
        "Run on cpu, cuda or cuda:N (default: a GPU if there is one).", None)
    revision: str | None = option("Take this branch, tag or commit on the hub.", None)
    tokenizer: str | None = option(
        "Check with this tokenizer, a folder or hub name (default: the model's).",
        None, metavar="NAME")
    trust_remote_code: bool = option("Run code that comes with the model.", False)
    # fmt: on
