"""What every test file needs."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What is there before a file is not looked through for garbage: trainers collect it often."""
    gc.collect()
    gc.freeze()
