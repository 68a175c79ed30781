"""What is asked of every program: the same numbers with the patch, of fewer tokens, all packed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flash
import rmfast
import tiny

SCORES, GRADIENTS = 1e-5, 1e-4  # of the spread; relative L2
ROUNDS = 3
TIMES = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption("--speed", action="store_true", help="time the programs, on SmolLM2-135M")


def pytest_collection_modifyitems(config, items):
    """Times are taken where they are asked for."""
    if not config.getoption("--speed", False):
        items[:] = [item for item in items if "timed" not in getattr(item, "fixturenames", ())]


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(TIMES, []):
        terminalreporter.write_line(line)


def ran(run: Callable[[], Tensor], models: tuple[nn.Module, ...]) -> tuple[Tensor, dict, int]:
    """What ``run()`` returns, all gradients, and how many tokens went into the models."""
    tokens = []
    for model in models:
        model.zero_grad()
    embeddings = (m for model in models for m in model.modules() if isinstance(m, nn.Embedding))
    hooks = [
        one.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
        for one in embeddings
    ]
    out = run()
    if out.requires_grad:
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    for hook in hooks:
        hook.remove()
    grads = {
        f"{i}.{name}": p.grad.detach().clone()
        for i, model in enumerate(models)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return out.detach(), grads, sum(tokens)


@pytest.fixture
def flash_attention(monkeypatch) -> None:
    """Models attend by transformers' path of FlashAttention 2, on a CPU."""
    flash.stand_in(monkeypatch)


@pytest.fixture
def same() -> Callable[..., list[rmfast.Report]]:
    """``same(run, *models, **options of patch)``: the reports of the patched models.

    ``run()`` calls the program's code on the models and returns its numbers, a tensor. Gradients
    are those of a sum that weighs each number its own way; where the numbers are detached, those
    that ``run`` has left there.
    """

    def check(run: Callable[[], Tensor], *models: nn.Module, **options: Any):
        theirs, their_grads, whole = ran(run, models)
        for model in models:
            rmfast.patch(model, **options)
        ours, our_grads, packed = ran(run, models)
        assert tiny.score_error(ours, theirs) <= SCORES
        assert our_grads.keys() == their_grads.keys()
        if their_grads:
            assert tiny.grad_error(our_grads, their_grads) <= GRADIENTS
        reports = [rmfast.report(model) for model in models]
        assert not any(report.fallbacks for report in reports), reports
        assert packed < whole, "prefixes are shared"
        return reports

    return check


@pytest.fixture
def timed(request) -> Callable[..., None]:
    """``timed(name, run, *models)``: a line of the table, plain and patched in turns.

    The first round is not timed.
    """

    def measure(name: str, run: Callable[[], Any], *models: nn.Module) -> None:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for i in range(ROUNDS + 1):
            for patched in seconds:
                for model in models:
                    rmfast.patch(model) if patched else rmfast.unpatch(model)
                begin = time.perf_counter()
                run()
                seconds[patched] += [time.perf_counter() - begin] * (i > 0)
        assert not any(rmfast.report(model).fallbacks for model in models)
        plain, ours = (sorted(one)[ROUNDS // 2] for one in seconds.values())
        line = f"{name}: {plain:.2f} s, patched {ours:.2f} s, {plain / ours:.2f} times as fast"
        request.config.stash.setdefault(TIMES, []).append(line)

    return measure
