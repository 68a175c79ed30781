"""What every test file needs."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What is there before a file is not looked through for garbage: trainers collect it often."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def accelerate_anew():
    """Accelerate keeps the first precision it was asked for, for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
