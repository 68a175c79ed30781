"""rmfast: Hugging Face reward models train and score without running a token twice."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout `kernels/` and `benchmarks/` lie beside this package; an installed one holds them.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

if _TYPE_CHECKING:
    from rmfast import data, loading, losses, ops
    from rmfast.diagnosis.case import Finding
    from rmfast.diagnosis.doctor import Diagnosis, doctor
    from rmfast.integrations.everywhere import everywhere
    from rmfast.packed.patching import patch, patched, report, unpatch
    from rmfast.packed.state import Report
    from rmfast.score.scorer import Scorer
    from rmfast.trie import PackedTrie, pack

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "Finding",
    "PackedTrie",
    "Report",
    "Scorer",
    "data",
    "doctor",
    "everywhere",
    "loading",
    "losses",
    "ops",
    "pack",
    "patch",
    "patched",
    "report",
    "unpatch",
]

_FROM = {
    "diagnosis.case": ("Finding",),
    "diagnosis.doctor": ("Diagnosis", "doctor"),
    "integrations.everywhere": ("everywhere",),
    "packed.patching": ("patch", "patched", "report", "unpatch"),
    "packed.state": ("Report",),
    "score.scorer": ("Scorer",),
    "trie": ("PackedTrie", "pack"),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> _Any:
    """Import a name, or a module, when it is first asked for: torch takes seconds."""
    module = _MODULE_OF.get(name, name)
    if name.startswith("_") or _find_spec(f"rmfast.{module}") is None:
        raise AttributeError(f"module 'rmfast' has no attribute {name!r}")
    value = _import_module(f"rmfast.{module}")
    if name in _MODULE_OF:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
