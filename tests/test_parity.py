"""Packed scores and gradients equal Hugging Face's, family by family.

Bounds. Transformers computes rotary angles, norms and router weights in fp32 whatever the model's
dtype, so in fp64 what is left is their rounding: one unit of 2**-24 a step along 3 layers and back.
Left-padded rows get other (shifted) angles than packed ones; an angle of up to 16 radians is off
by up to 16 units. In fp32 the bounds are the library's promise: 1e-4.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING

import rmfast
import tiny
from rmfast.packed.families import TRIE_BACKBONES

UNIT = 2.0**-24
# Eager attention in transformers masks with the smallest fp64 number and takes the softmax in
# fp32, where that is -inf: rows of padding turn NaN. These families have no other attention.
NO_FP64 = {"gemma2"}


def compare(model, **inputs):
    theirs, their_grads = tiny.run(model, **inputs)
    tokens_run = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: tokens_run.append(args[0].numel())
    )
    with rmfast.patched(model):
        ours, our_grads = tiny.run(model, **inputs)
        report = rmfast.report(model)
    hook.remove()
    assert report.level == "trie"
    if inputs["input_ids"][:, 0].min() > 0:  # left-padded rows may differ in learned positions
        assert tokens_run == [len(rmfast.pack(inputs["input_ids"], inputs["attention_mask"]))]
    assert not report.fallbacks
    assert ours.shape == theirs.shape
    return tiny.score_error(ours, theirs), tiny.grad_error(our_grads, their_grads)


def family_model(family, dtype):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    return tiny.model(family, dtype)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(TRIE_BACKBONES - NO_FP64))
def test_fp64(family, side):
    model = family_model(family, torch.float64)
    scores, grads = compare(model, **tiny.padded(tiny.rows(), side))
    steps = 2 * 3 * 16  # there and back, layers, fp32 roundings in each
    assert scores <= (UNIT if side == "right" else 16 * UNIT * steps)
    assert grads <= UNIT * steps * (1 if side == "right" else 16)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("family", sorted(TRIE_BACKBONES))
def test_fp32(family, mask):
    model = family_model(family, torch.float32)
    inputs = tiny.padded(tiny.rows(seed=1), "right" if mask else "left")
    if not mask:  # the caller's bug, which must come out the same: pads count as tokens
        del inputs["attention_mask"]
    scores, grads = compare(model, **inputs)
    assert scores <= 1e-4
    assert grads <= 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("options", [{"share_prefixes": False}, {"prune_last_layer": False}])
def test_options_change_no_number(family, options):
    model = tiny.model(family, torch.float64)
    inputs = tiny.padded(tiny.rows())
    theirs, their_grads = tiny.run(model, **inputs)
    with rmfast.patched(model, **options):
        ours, our_grads = tiny.run(model, **inputs)
    assert tiny.score_error(ours, theirs) <= UNIT
    assert tiny.grad_error(our_grads, their_grads) <= 96 * UNIT


def test_last_layer_runs_pooled_rows_only():
    for family in ("llama", "gpt2", "mixtral", "gpt_neox"):
        model = tiny.model(family)
        layers = (
            model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
        )
        seen = []
        mlp = layers[-1].mlp
        hook = mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        with rmfast.patched(model):
            model(**tiny.padded(tiny.rows()))
        hook.remove()
        assert [shape[1] for shape in seen] == [5], family  # six rows, one of them twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_low_precision_error_is_no_larger_than_hugging_faces(family, dtype):
    """Against an fp64 oracle, over enough batches that luck averages out."""
    oracle = tiny.model(family, torch.float64)
    model = tiny.model(family, dtype)
    model.load_state_dict(oracle.state_dict())
    oracle.load_state_dict(model.state_dict())  # the rounded weights
    ours, theirs = [], []
    for seed in range(24):
        inputs = tiny.padded(tiny.rows(seed))
        with torch.no_grad():
            true = oracle(**inputs).logits
            theirs.append(model(**inputs).logits.double() - true)
            with rmfast.patched(model):
                got = model(**inputs).logits
            assert got.dtype == torch.float32
            ours.append(got.double() - true)
    ours, theirs = (torch.cat(x).square().mean().sqrt() for x in (ours, theirs))
    ulp = torch.finfo(dtype).eps * true.abs().mean()
    assert ours <= 1.1 * theirs + ulp / 24**0.5, (ours / theirs).item()
