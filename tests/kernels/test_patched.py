"""Patched models with the Triton kernels inside: scores and gradients against Hugging Face."""

import pytest
import torch

import rmfast
import tiny


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_triton_backend(family, device, launches):
    """Grouped heads; soft cap, head_dim padded; window; sinks, by the very kernels a GPU runs."""
    from rmfast.kernels import reward_head, trie_attention

    seen = launches(reward_head, trie_attention)
    m = tiny.model(family).to(device)
    batch = {name: x.to(device) for name, x in tiny.padded(tiny.rows()).items()}
    theirs, their_grads = tiny.run(m, **batch)
    rmfast.patch(m, attention="triton")
    assert rmfast.report(m).level == "trie"
    ours, our_grads = tiny.run(m, **batch)
    assert not rmfast.report(m).fallbacks
    assert seen.count("_dq_kernel") == 3 == seen.count("_dkv_kernel")
    assert tiny.score_error(ours, theirs) <= 1e-4
    assert tiny.grad_error(our_grads, their_grads) <= 1e-4


def test_scoring_keeps_no_backward_state(device, launches):
    from rmfast.kernels import trie_attention

    seen = launches(trie_attention)
    m = rmfast.patch(tiny.model().to(device), attention="triton")
    batch = {name: x.to(device) for name, x in tiny.padded(tiny.rows()).items()}
    want = tiny.run(m, **batch)[0]
    kept = []
    forward = trie_attention.trie_attention

    def spy(*args, **kwargs):
        out, lse = forward(*args, **kwargs)
        kept.append(lse.numel())
        return out, lse

    trie_attention.trie_attention = spy
    try:
        with torch.inference_mode():
            got = m(**batch).logits
    finally:
        trie_attention.trie_attention = forward
    assert kept == [0, 0, 0]
    assert seen.count("_forward_kernel") == 6
    assert torch.equal(got, want)
