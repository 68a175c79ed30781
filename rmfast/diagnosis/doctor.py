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

from rmfast import loading
from rmfast.diagnosis import checks, trials
from rmfast.diagnosis.case import STATUSES, WRONG, Case, Finding
from rmfast.diagnosis.options import DoctorOptions
from rmfast.packed import patching
from rmfast.packed.models import keeping_modes
from rmfast.resume import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        """Whether scores would be wrong, or the model gives none."""
        return self.counts()[WRONG] > 0

    def counts(self) -> dict[str, int]:
        """Number of findings of each status."""
        found = [finding.status for finding in self.findings]
        return {status: found.count(status) for status in STATUSES}

    def as_dict(self) -> dict[str, Any]:
        """All of it and the versions of the libraries, ready for JSON."""
        result = dataclasses.asdict(self)
        for finding in result["findings"]:
            figures = finding["figures"]
            finding["figures"] = {n: x if math.isfinite(x) else None for n, x in figures.items()}
        return result | {"wrong": self.wrong, "counts": self.counts(), "versions": versions()}

    def __str__(self) -> str:
        column = max((len(finding.name) for finding in self.findings), default=0)
        lines = [f"rmfast doctor: {self.source or self.model}"]
        for finding in self.findings:
            start = f"  {finding.status:7}  {finding.name:{column}}  "
            text, indent = f"{finding.what} {finding.do}", " " * len(start)
            lines += textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=indent)
        counts = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        verdict = "scores would be wrong" if self.wrong else "nothing that gives wrong scores"
        return "\n".join([*lines, f"{counts}: {verdict}"])


def doctor(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: str | None = None,
    missing: list[str] | None = None,
) -> Diagnosis:
    """Check a reward model for common mistakes, and score a few conversations with it.

    The model keeps its device, its mode and its patch. For a model in half precision, a copy in
    fp32 is made for the comparison, where memory allows it.

    Args:
        model: a reward model, or any module around one (PEFT included).
        tokenizer: its tokenizer; without one, checks of text are left out.
        source: folder that the model was loaded from, to see whether the head is in its
            safetensors.
        missing: names of parameters that the checkpoint lacks, as ``from_pretrained(…,
            output_loading_info=True)`` lists them.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"doctor takes a torch.nn.Module, got {type(model).__name__}")
    case = Case(model, tokenizer, str(source) if source else None, missing)
    with torch.no_grad(), keeping_modes(model), _full_precision(), patching.unpatched(model):
        findings = list(checks.run(case))
        model.eval()
        findings += trials.run(case)
    return Diagnosis(type(model).__name__, findings, case.source)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 in fp32 matmuls."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def run(args: DoctorOptions) -> int:
    """``rmfast doctor``; returns the exit code, 1 where scores would be wrong."""
    loading.silence_transformers()  # transformers' warning of a missing head is one of the findings
    loaded = loading.load(args.model, check=False, **args.for_loading())
    source = loading.adapter_folder(args.model, args.revision) or args.model
    found = doctor(loaded.model, loaded.tokenizer, source=source, missing=loaded.missing)
    found.source = args.model
    print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if args.json else found)
    return int(found.wrong)
