"""For a machine with a GPU, where the kernels run compiled: `make gpu`. Elsewhere all skip."""

import contextlib
import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    skip = pytest.mark.skip(reason="no GPU, or interpreted: `make gpu` runs these where one is")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh():
    """fp32 is fp32, and no test is left with the graphs that others compiled."""
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()


@pytest.fixture
def no_sync():
    """A block in which whatever makes the host wait for the GPU raises."""

    @contextlib.contextmanager
    def watch():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watch
