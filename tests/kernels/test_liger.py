"""Liger's own kernels in a patched backbone, where liger-kernel is installed (rmfast[liger])."""

import pytest
import torch

import rmfast
import tiny
from rmfast.packed import liger

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch, device):
    """Liger's functions; interpreted, with what the interpreter lacks."""
    reason = "liger-kernel is not installed: pip install 'rmfast[liger]'"
    pytest.importorskip("liger_kernel", reason=reason)
    if device != "cpu":
        return
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(x):  # a compiled kernel gets a tensor
        if isinstance(x, float):
            handle = interpreter.TensorHandle(np.array([x], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(x)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))  # it has no libdevice
    monkeypatch.setattr(liger, "_has_gpu", lambda: True)
    monkeypatch.setattr(liger, "_on_gpu", lambda x: True)


@pytest.fixture
def called(monkeypatch):
    """The names of Liger's functions that were called."""
    from liger_kernel.transformers import functional

    out = []
    for name in ("liger_rms_norm", "liger_swiglu", "liger_rope"):
        plain = getattr(functional, name)

        def watched(*args, name=name, plain=plain, **kwargs):
            out.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(functional, name, watched)
    return out


def build(family, device, dtype=torch.float32):
    return tiny.model(family, dtype, num_hidden_layers=2).to(device)


def batch(device, seed=0):
    return {k: v.to(device) for k, v in tiny.padded(tiny.rows(seed)).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients(family, device, called):
    """On the packed trie, whose positions [1, N] jump back."""
    model, inputs = build(family, device), batch(device)
    want = tiny.run(model, **inputs)
    rmfast.patch(model, backbone_kernels="liger")
    got = tiny.run(model, **inputs)
    # the last layer runs until it has keys and values, then again on the pooled rows
    assert called.count("liger_rope") == 3 and called.count("liger_swiglu") == 2
    assert called.count("liger_rms_norm") == (12 if family == "qwen3" else 6)
    assert not rmfast.report(model).fallbacks
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4
    assert got[1].keys() == want[1].keys()


def test_a_padded_call_and_pieces(device, called):
    model, inputs = build("llama", device), batch(device)
    with torch.no_grad():
        want = model(**inputs).logits
        rmfast.patch(model, backbone_kernels="liger", max_tokens=20)
        for call in (inputs, {**inputs, "use_cache": True}):
            called.clear()
            assert tiny.score_error(model(**call).logits, want) <= 1e-4
            assert set(called) == {"liger_rms_norm", "liger_swiglu", "liger_rope"}
    assert list(rmfast.report(model).fallbacks.values()) == [1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, device, called):
    model, inputs = build("llama", device).train(), batch(device)
    want = tiny.run(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    rmfast.patch(model, backbone_kernels="liger")
    got = tiny.run(model, **inputs)
    assert called.count("liger_swiglu") == 3, "the first layer runs again in the backward"
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4


def test_bf16(device, called):
    """No further from fp64 than transformers' own run in bf16."""
    if device == "cpu":
        pytest.skip("the interpreter computes on the raw bits of bf16")
    exact = build("qwen3", device, torch.float64)
    model = build("qwen3", device, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    batches = [batch(device, seed) for seed in range(16)]

    def scores(model):
        with torch.no_grad():
            return torch.cat([model(**inputs).logits.double() for inputs in batches])

    oracle, theirs = scores(exact), scores(model)
    ours = scores(rmfast.patch(model, backbone_kernels="liger"))
    assert called
    theirs, ours = ((x - oracle).square().mean().sqrt() for x in (theirs, ours))
    # two RMS errors of 96 scores: their ratio moves by 1 / sqrt(96) by chance; four of those
    assert ours <= (1.1 + 4 / 96**0.5) * theirs
