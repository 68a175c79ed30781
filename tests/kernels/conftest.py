"""Kernels run under Triton's interpreter, which must be asked for before triton is imported."""

import os

import interpreter
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    reason = None
    if INTERPRETED:
        reason = interpreter.why_not()
    elif not torch.cuda.is_available():
        reason = "no GPU: `make test` runs these with TRITON_INTERPRET=1"
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if "/kernels/" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody has written yet is NaN, or a large negative integer."""

    def poisoned(make):
        def run(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(float("nan"))
            return x.fill_(max(-(2**31), torch.iinfo(x.dtype).min) + 7)

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def launches(monkeypatch):
    """A list that grows by the name of each kernel launched from the modules given to it."""
    seen = []

    def watch(*modules):
        for module in modules:
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                monkeypatch.setattr(module, name, _Watched(name, getattr(module, name), seen))
        return seen

    return watch


class _Watched:
    def __init__(self, name, kernel, seen):
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.seen.append(self.name)
            return self.kernel[grid](*args, **kwargs)

        return launch
