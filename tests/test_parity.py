"""Packed scores and gradients equal Hugging Face's, family by family.

Bounds. Transformers computes rotary angles, norms and router weights in fp32 whatever the model's
dtype, so in fp64 what is left is their rounding: one unit of 2**-24 a step along 3 layers and back.
Left-padded rows get other (shifted) angles than packed ones; an angle of up to 16 radians is off
by up to 16 units. In fp32 the bounds are the library's promise: 1e-4.
"""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import rmfast
import tiny
from rmfast.packed import last_layer, scoring
from rmfast.packed.families import RESHAPING, TRIE_BACKBONES

UNIT = 2.0**-24
# Eager attention in transformers masks with the smallest fp64 number and takes the softmax in
# fp32, where that is -inf: rows of padding turn NaN. These families have no other attention.
NO_FP64 = {"gemma2"}


def compare(family, model, **inputs):
    theirs, their_grads = tiny.run(model, **inputs)
    tokens_run = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: tokens_run.append(args[0].numel())
    )
    with rmfast.patched(model):
        ours, our_grads = tiny.run(model, **inputs)
        report = rmfast.report(model)
    hook.remove()
    assert report.level == tiny.LOWER.get(family, "trie")
    left = inputs["input_ids"][:, 0].min() == 0  # learned positions may differ there
    if report.level != "head" and not left:
        assert tokens_run == [len(rmfast.pack(inputs["input_ids"], inputs["attention_mask"]))]
    assert not report.fallbacks
    assert ours.shape == theirs.shape
    return tiny.score_error(ours, theirs), tiny.grad_error(our_grads, their_grads)


def family_model(family, dtype):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    if CONFIG_MAPPING[family] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        pytest.skip(f"this transformers has no sequence classifier of {family}")
    return tiny.model(family, dtype)


@pytest.fixture
def handed_on(monkeypatch):
    """How many rows each packed pass gave the head."""
    counts = []

    def pooled_rows(hidden, *args):
        counts.append(len(hidden))
        return last_layer.pooled_rows(hidden, *args)

    monkeypatch.setattr(scoring, "pooled_rows", pooled_rows)
    return counts


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(TRIE_BACKBONES - NO_FP64))
def test_fp64(family, side):
    model = family_model(family, torch.float64)
    scores, grads = compare(family, model, **tiny.padded(tiny.rows(), side))
    steps = 2 * 3 * 16  # there and back, layers, fp32 roundings in each
    assert scores <= (UNIT if side == "right" else 16 * UNIT * steps)
    assert grads <= UNIT * steps * (1 if side == "right" else 16)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("family", sorted(TRIE_BACKBONES))
def test_fp32(family, mask, handed_on):
    model = family_model(family, torch.float32)
    inputs = tiny.padded(tiny.rows(seed=1), "right" if mask else "left")
    if not mask:  # the caller's bug, which must come out the same: pads count as tokens
        del inputs["attention_mask"]
    scores, grads = compare(family, model, **inputs)
    assert scores <= 1e-4
    assert grads <= 1e-4
    # the final norm runs on pooled rows only: of six rows, one twice
    assert (handed_on == [5]) == (family not in RESHAPING | tiny.LOWER.keys())


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


class Doubled(torch.nn.Module):
    """A norm of somebody's own."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return 2 * self.norm(hidden)


def _whole(seen):
    return lambda module, args, *_: seen.append(args[0].shape[1])


OTHERS = {
    "hook on the norm": lambda m, seen: m.model.norm.register_forward_hook(_whole(seen)),
    "hook before it": lambda m, seen: m.model.norm.register_forward_pre_hook(_whole(seen)),
    "forward of the norm": lambda m, seen: setattr(
        m.model.norm, "forward", Doubled(copy.deepcopy(m.model.norm)).forward
    ),
    "another norm": lambda m, seen: setattr(m.model, "norm", Doubled(m.model.norm)),
    "hook on the backbone": lambda m, seen: m.model.register_forward_hook(
        lambda module, args, out: seen.append(out[0].shape[1])
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_known_after_the_last_layer_gets_a_row_for_each_node(other, when, handed_on):
    model, seen = tiny.model(), []
    if when == "after":
        rmfast.patch(model)
    OTHERS[other](model, seen)
    rmfast.patch(model)
    inputs = tiny.padded(tiny.rows())
    ours = tiny.run(model, **inputs)
    nodes = len(rmfast.pack(tiny.rows()))
    assert handed_on == [nodes] and set(seen) <= {nodes}
    theirs = tiny.run(rmfast.unpatch(model), **inputs)
    assert tiny.score_error(ours[0], theirs[0]) <= 1e-4
    assert tiny.grad_error(ours[1], theirs[1]) <= 1e-4


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
