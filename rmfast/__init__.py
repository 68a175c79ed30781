"""rmfast: Hugging Face reward models train and score without running a token twice."""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout `kernels/` and `benchmarks/` lie beside this package; an installed one holds them.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

if _TYPE_CHECKING:
    from rmfast import data, loading, losses, ops, training
    from rmfast.diagnosis import Diagnosis, Finding, doctor
    from rmfast.patching import Report, patch, patched, report, unpatch
    from rmfast.scorer import Scorer
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
    "loading",
    "losses",
    "ops",
    "pack",
    "patch",
    "patched",
    "report",
    "training",
    "unpatch",
]

_FROM = {
    "diagnosis": ("Diagnosis", "Finding", "doctor"),
    "patching": ("Report", "patch", "patched", "report", "unpatch"),
    "scorer": ("Scorer",),
    "trie": ("PackedTrie", "pack"),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> _Any:
    """Import a public name when it is first asked for: torch takes seconds, ``--help`` has none."""
    if name not in __all__:
        raise AttributeError(f"module 'rmfast' has no attribute {name!r}")
    module = _importlib.import_module(f"rmfast.{_MODULE_OF.get(name, name)}")
    value = getattr(module, name) if name in _MODULE_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
