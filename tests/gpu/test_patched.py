"""Patched models on a GPU, by every attention: scores and gradients against Hugging Face."""

import functools
import math

import pytest
import torch

import rmfast
import tiny
from rmfast.packed import pieces

FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3"])
SEEDS = 8


def model(family, dtype):
    """Without routing, whose choice a rounding can turn."""
    return tiny.model(family, dtype=dtype, head_dim=32, num_experts_per_tok=4).cuda()


def batch(seed):
    return {name: x.cuda() for name, x in tiny.padded(tiny.rows(seed)).items()}


@pytest.fixture
def triton_calls(monkeypatch):
    from rmfast.kernels import trie_attention as kernels

    calls, forward = [], kernels.trie_attention

    def counted(*args, **options):
        calls.append(args)
        return forward(*args, **options)

    monkeypatch.setattr(kernels, "trie_attention", counted)
    return calls


def patched(m, attention):
    rmfast.patch(m, attention=attention)
    report = rmfast.report(m)
    assert report.level == "trie" and f"attention: {attention}" in str(report)
    return m


@pytest.mark.parametrize("attention", ["auto", "triton", "sdpa"])
@FAMILIES
def test_fp32(family, attention, triton_calls):
    m = model(family, torch.float32)
    theirs, their_grads = tiny.run(m, **batch(0))
    ours, our_grads = tiny.run(patched(m, attention), **batch(0))
    assert not rmfast.report(m).fallbacks
    assert len(triton_calls) == (3 if attention in ("auto", "triton") else 0)
    assert tiny.score_error(ours, theirs) <= 1e-4
    assert tiny.grad_error(our_grads, their_grads) <= 1e-4


@pytest.mark.parametrize("attention", ["auto", "triton", "sdpa"])
@FAMILIES
def test_bf16(family, attention, triton_calls):
    m, exact = model(family, torch.bfloat16), model(family, torch.float32)
    exact.load_state_dict(m.state_dict())
    oracle = [tiny.run(exact, **batch(seed)) for seed in range(SEEDS)]
    theirs = [tiny.run(m, **batch(seed)) for seed in range(SEEDS)]
    patched(m, attention)
    ours = [tiny.run(m, **batch(seed)) for seed in range(SEEDS)]
    assert not rmfast.report(m).fallbacks
    assert bool(triton_calls) == (attention in ("auto", "triton"))

    def errors(got):  # of all scores, of all gradients
        scores = torch.cat([x - y for (x, _), (y, _) in zip(got, oracle, strict=True)])
        grads = [tiny.grad_error(x, y) for (_, x), (_, y) in zip(got, oracle, strict=True)]
        return scores.norm().item(), math.hypot(*grads)

    # both are sums of roundings that do not depend on each other. Of some 40 scores, of few
    # routers and sinks that decide: chance counts, and what is wrong is off by the scores' size
    (score, grad), (their_score, their_grad) = errors(ours), errors(theirs)
    size = max(x.abs().max().item() for x, _ in oracle)
    assert score <= 2 * their_score + 2.0**-8 * size
    assert grad <= 1.5 * their_grad + 2.0**-8


@pytest.mark.parametrize("last", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("order", ["patch-first", "dispatch-first"])
def test_layers_on_two_devices(order, last, triton_calls):
    """accelerate's hooks; tests/test_devices.py has more of it, with a make-believe device."""
    accelerate = pytest.importorskip("accelerate")
    if last == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first = "cpu" if last == "cuda:0" else "cuda:0"
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
    places = dict.fromkeys(names, first)
    places |= dict.fromkeys(("model.layers.2", "model.norm", "score"), last)

    def dispatch(m):  # with "cpu" as main device, what is on the CPU runs there
        return accelerate.dispatch_model(m, places, main_device=first)

    make = functools.partial(tiny.model, "qwen3", torch.float32, head_dim=32)
    inputs = {name: x.to(first) for name, x in batch(0).items()}
    theirs, their_grads = tiny.run(dispatch(make()), **inputs)
    m = make()
    m = dispatch(rmfast.patch(m)) if order == "patch-first" else rmfast.patch(dispatch(m))
    ours, our_grads = tiny.run(m, **inputs)
    assert rmfast.report(m).level == "trie" and not rmfast.report(m).fallbacks
    assert len({p.device for p in m.parameters()}) == 2
    assert len(triton_calls) == sum(m.model.layers[i].mlp.up_proj.weight.is_cuda for i in range(3))
    assert ours.device == theirs.device
    assert tiny.score_error(ours, theirs) <= 1e-4
    on_host = ({n: g.cpu() for n, g in grads.items()} for grads in (our_grads, their_grads))
    assert tiny.grad_error(*on_host) <= 1e-4
    rows = [row[keep.bool()].tolist() for row, keep in zip(*batch(0).values(), strict=True)]
    bulk = torch.from_numpy(rmfast.Scorer(m, max_tokens=16).score(rows))
    assert tiny.score_error(bulk, theirs[:, 0].cpu()) <= 1e-4


def test_pieces_wait_for_nothing(no_sync):
    m = patched(model("llama", torch.bfloat16), "triton")
    forward, trie = m._rmfast.overrides[0], rmfast.pack(tiny.rows())
    with torch.no_grad():
        want = forward.by_piece(trie, True, pieces.Budget(12))  # compiles
        with no_sync():
            got = forward.by_piece(trie, True, pieces.Budget(12))
    assert torch.equal(got, want)
