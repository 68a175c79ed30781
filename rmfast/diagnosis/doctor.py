"""``rmfast doctor``: what would give wrong scores with this model, and what to do about it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rmfast.diagnosis import checks
from rmfast.diagnosis.checks import STATUSES, Finding
from rmfast.diagnosis.options import DoctorOptions
from rmfast.packed import patching
from rmfast.packed.models import keeping_modes
from rmfast.resume import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_WIDTH = 100


@dataclasses.dataclass
class Diagnosis:
    """A checklist. Print it to read it.

    Attributes:
        model: name of the model's class.
        findings: one or more for each check, in the order of the checks.
        source: the checkpoint, as it was named; None: not known.
    """

    model: str
    findings: list[Finding]
    source: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether scores would be wrong, or not to be had."""
        return any(finding.status == checks.WRONG for finding in self.findings)

    def counts(self) -> dict[str, int]:
        """Findings of each status."""
        found = [finding.status for finding in self.findings]
        return {status: found.count(status) for status in STATUSES}

    def as_dict(self) -> dict[str, Any]:
        """Everything, and the versions it was found with, ready for JSON."""
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        for finding in findings:
            finding["figures"] = {
                name: value if math.isfinite(value) else None
                for name, value in finding["figures"].items()
            }
        return {
            "model": self.model,
            "source": self.source,
            "wrong": self.wrong,
            "counts": self.counts(),
            "findings": findings,
            "versions": versions(),
        }

    def __str__(self) -> str:
        column = max((len(finding.name) for finding in self.findings), default=0)
        lines = [f"rmfast doctor: {self.source or self.model}"]
        for finding in self.findings:
            start = f"  {finding.status:7}  {finding.name:{column}}  "
            rest = " " * len(start)
            lines += textwrap.wrap(
                finding.what, _WIDTH, initial_indent=start, subsequent_indent=rest
            )
            if finding.do:
                lines += textwrap.wrap(
                    finding.do, _WIDTH, initial_indent=f"{rest}> ", subsequent_indent=f"{rest}  "
                )
        found = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        verdict = "scores would be wrong" if self.wrong else "nothing that gives wrong scores"
        return "\n".join([*lines, f"{found}: {verdict}"])


def doctor(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: str | None = None,
    missing: list[str] | None = None,
) -> Diagnosis:
    """Check a reward model for what people trip over, and score a few conversations with it.

    The model is examined where it is, and comes out as it went in: patched or not, with its mode.
    In half precision a copy in fp32 is made for the comparison, where memory allows it.

    Args:
        model: a reward model, or any module around one (PEFT included).
        tokenizer: its tokenizer; without it what has to do with text is left out.
        source: folder or hub name it was loaded from, to see whether the head is in there. A hub's
            files are looked for in its cache alone.
        missing: names of parameters that the checkpoint lacks, as ``from_pretrained(…,
            output_loading_info=True)`` lists them.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"doctor takes a torch.nn.Module, got {type(model).__name__}")
    from rmfast.diagnosis import trials

    with torch.no_grad(), keeping_modes(model), _highest_precision(), patching.unpatched(model):
        case = checks.Case(model, tokenizer, str(source) if source else None, missing)
        findings = list(checks.look(case))
        model.eval()
        findings += trials.run(case)
    return Diagnosis(type(model).__name__, findings, case.source)


@contextlib.contextmanager
def _highest_precision() -> Iterator[None]:
    """Of fp32 matmuls; then the process's own again."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def run(args: DoctorOptions) -> int:
    """``rmfast doctor``; returns the exit code, 1 where scores would be wrong.

    Raises:
        UserError: the model cannot be loaded.
    """
    from rmfast import loading

    loading.quiet()  # what transformers would say of a missing head is a finding
    loaded = loading.load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        check=False,
    )
    found = doctor(loaded.model, loaded.tokenizer, source=args.model, missing=loaded.missing)
    print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if args.json else found)
    return int(found.wrong)
