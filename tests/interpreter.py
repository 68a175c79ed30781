"""Whether Triton's interpreter runs with the numpy that is installed."""

import importlib.metadata

import pytest
from packaging.version import Version


def why_not() -> str | None:
    """Until 3.7 it makes an int of an array with one element; numpy refuses that from 2.4 on."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return None  # without Triton there is no kernel to import either
    if Version(triton) >= Version("3.7") or Version(numpy) < Version("2.4"):
        return None
    return f"the interpreter of Triton {triton} needs numpy below 2.4, this is {numpy}"


NEEDED = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
