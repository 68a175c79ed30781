"""Kernels run under Triton's interpreter, which must be asked for before triton is imported."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if INTERPRETED or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU: `make test` runs these with TRITON_INTERPRET=1")
    for item in items:
        if "/kernels/" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"
