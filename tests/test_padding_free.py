"""Sequences laid end to end in one row, as trainers give them that remove padding."""

import functools

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import flash
import rmfast
import tiny
from rmfast.ops import TriePlan
from rmfast.packed import attention, padding_free
from rmfast.packed.stand_in import Unservable

UNIT = 2.0**-24
FAMILIES = ["llama", "gemma2", "gpt2", "qwen3_moe", "mistral"]


def row(sequences, tail=()):
    """Ids and positions of all sequences in one row; ``tail``: positions of pads at its end."""
    ids = [token for sequence in sequences for token in sequence] + [tiny.PAD] * len(tail)
    positions = [i for sequence in sequences for i in range(len(sequence))] + list(tail)
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}


def lengths(sequences):
    ends = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    longest = max(map(len, sequences))
    return {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def values(family="llama", dtype=torch.float64, **options):
    options = {"cls": AutoModelForTokenClassification, "use_cache": False} | options
    return tiny.model(family, dtype, **options)


def compared(model, inputs, count=None):
    """Logits of the first ``count`` tokens and gradients, without and with the patch."""
    count = inputs["input_ids"].shape[1] if count is None else count

    def run():
        model.zero_grad()
        logits = model(**inputs).logits[:, :count]
        (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), grads

    theirs, their_grads = run()
    with rmfast.patched(model):
        ours, our_grads = run()
        report = rmfast.report(model)
    assert report.level == "backbone"
    assert tiny.score_error(ours, theirs) <= 16 * 96 * UNIT
    assert tiny.grad_error(our_grads, their_grads) <= 16 * 96 * UNIT
    return report


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_sequences_runs_packed(family, attention):
    try:
        model = values(family, attn_implementation=attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention} in this version of transformers")
    assert not compared(model, row(tiny.rows())).fallbacks


@pytest.mark.parametrize("family", ["gpt_oss", "biogpt"])
def test_a_family_whose_masks_do_not_go_by_positions(family):
    model, inputs = values(family, attn_implementation="eager"), row(tiny.rows())
    want = model(**inputs).logits
    with rmfast.patched(model):
        assert torch.equal(model(**inputs).logits, want)
        (reason,) = rmfast.report(model).fallbacks
    assert reason == "sequences in one row, which this model lets see each other"


@given(
    sequences=st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=2, max_size=6),
    tail=st.sampled_from([(), (0,), (0, 0, 0), (0, 1, 2)]),
    given_lengths=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_sequences_and_pads_at_the_end(sequences, tail, given_lengths):
    assume(len({token for s in sequences for token in s}) > 1)  # else all values are alike
    model, inputs = values(), row(sequences, tail)
    if given_lengths and not tail:
        inputs |= lengths(sequences)
    count = sum(map(len, sequences))
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[1][0].shape[1]))
    assert not compared(model, inputs, count).fallbacks
    padding = 1 if 0 in tail[1:] or len(tail) == 1 else len(tail)
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert seen[-1] == len(prefixes) + (padding if tail else 0)


def test_one_sequence_is_a_batch_of_one():
    sequence = tiny.rows()[:1]
    assert not compared(values(), row(sequence)).fallbacks
    assert not compared(values(), row(sequence) | lengths(sequence)).fallbacks


def test_active_noise_is_drawn_for_each_sequence():
    model = values("starcoder2", residual_dropout=0.3).train()
    inputs = row([tiny.rows()[0]] * 2)
    rmfast.patch(model)
    first, second = model(**inputs).logits[0].view(2, -1)
    assert not rmfast.report(model).fallbacks
    assert (first - second).abs().max() > 0


REFUSED = {
    "lengths that differ": lambda x: x | lengths(tiny.rows()[::-1]),
    "lengths in a list": lambda x: x | {"cu_seq_lens_q": [0, 79]},
    "a mask": lambda x: x | {"attention_mask": torch.ones_like(x["input_ids"])},
    "another beginning": lambda x: x | {"position_ids": x["position_ids"] + 1},
    "a cache": lambda x: x | {"use_cache": None},
    "several rows": lambda x: {name: value.repeat(2, 1) for name, value in x.items()},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_something_else_runs_as_it_was(case):
    model, inputs = values(), REFUSED[case](row(tiny.rows()))
    model.config.use_cache = case == "a cache"  # it lets sequences see each other under SDPA
    want = model(**inputs).logits
    with rmfast.patched(model):
        assert torch.equal(model(**inputs).logits, want)
        assert sum(rmfast.report(model).fallbacks.values()) == 1


def test_a_dict_of_no_masks():
    """With flash attention, positions keep sequences apart then; with SDPA, nothing does."""
    model, inputs = values("qwen2"), row(tiny.rows())
    right = model(**inputs).logits
    inputs["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    mixed = model(**inputs).logits
    assert tiny.score_error(mixed, right) > 0.01
    rmfast.patch(model)
    assert torch.equal(model(**inputs).logits, mixed)
    assert list(rmfast.report(model).fallbacks) == ["attention_mask is not [B, T]"]
    # the flash function itself is not called by what runs packed
    rmfast.unpatch(model).config._attn_implementation_internal = "flash_attention_2"
    rmfast.patch(model)
    assert tiny.score_error(model(**inputs).logits, right) <= 1e-9
    assert not rmfast.report(model).fallbacks


def test_positions_that_do_not_come_to_flash_attention():
    """Then it would let the sequences see each other."""
    layer = values().model.layers[0].self_attn
    trie = rmfast.pack(tiny.rows())
    plan = TriePlan(trie.subtree_end, trie.position_ids)
    x, run = torch.randn(1, 4, len(trie), 8), attention.TrieRun(trie, plan, True, apart=True)
    forward = functools.partial(attention._forward, "sdpa", layer, x, x, x, rmfast_run=run)
    assert forward(position_ids=None)[0].shape == (1, len(trie), 4, 8)
    with pytest.raises(attention.SequencesMeet):
        forward()


def test_attention_of_others_runs_as_it_was(monkeypatch):
    """It may attend to tokens that another process holds."""
    from transformers import AttentionInterface
    from transformers.integrations import sdpa_attention

    def theirs(*args, **kwargs):
        return sdpa_attention.sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("theirs", theirs)
    model, inputs = values(), tiny.padded(tiny.rows())
    model.config._attn_implementation_internal = "theirs"
    want = model(**inputs).logits
    with rmfast.patched(model):
        assert torch.equal(model(**inputs).logits, want)
        assert list(rmfast.report(model).fallbacks) == [f"the attention function is by {__name__}"]


@pytest.mark.parametrize(("processes", "runs_packed"), [(None, False), (1, True), (2, False)])
def test_flash_attention_of_others(processes, runs_packed, monkeypatch):
    """What verl and its like put there splits sequences, and says over how many processes."""
    if Version(transformers.__version__) < Version("5.10"):
        pytest.skip("this transformers reads a version of any folder named kernels")
    from transformers.integrations import flash_attention

    flash.stand_in(monkeypatch)
    names = {"theirs": flash_attention._flash_attention_forward, "__name__": "others"}
    if processes is not None:
        names["get_ulysses_sequence_parallel_world_size"] = lambda: processes
    exec("def function(*args, **kwargs): return theirs(*args, **kwargs)", names)
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", names["function"])
    model, inputs = values(attn_implementation=flash.NAME), tiny.padded(tiny.rows(), "left")
    want, seen = model(**inputs).logits, inputs["attention_mask"].bool()
    rmfast.patch(model)
    assert tiny.score_error(model(**inputs).logits[seen], want[seen]) <= 16 * 96 * UNIT
    fallbacks = list(rmfast.report(model).fallbacks)
    assert fallbacks == ([] if runs_packed else ["the attention function is by others"])


def test_a_language_models_loss_over_a_row():
    model = values(cls=AutoModelForCausalLM)
    inputs = row(tiny.rows())
    labels = inputs["input_ids"].masked_fill(inputs["position_ids"] == 0, -100)
    want = model(**inputs, labels=labels).loss
    with rmfast.patched(model):
        loss = model(**inputs, labels=labels).loss
        assert not rmfast.report(model).fallbacks
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)


def test_lengths_without_positions_are_refused():
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(Unservable, match="cu_seq_lens_q"):
        padding_free.begins(ids, None, None, [torch.tensor([0, 2, 4])])


def test_frequencies_go_by_the_longest_sequence_not_by_the_row():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = values("llama", rope_parameters=rope, max_position_embeddings=20)
    assert not compared(model, row(tiny.rows())).fallbacks
    want = model(**(inputs := row([[3] * 25, [4] * 3]))).logits
    with rmfast.patched(model):
        assert torch.equal(model(**inputs).logits, want)
        assert "20 positions or more" in next(iter(rmfast.report(model).fallbacks))


class Values(nn.Module):
    """OpenRLHF's kind of model: a backbone called by position, and a head on all its tokens."""

    def __init__(self, base):
        super().__init__()
        self.model, self.config = base, base.config
        self.value = nn.Linear(32, 1, bias=False).to(torch.float64)

    def forward(self, input_ids, position_ids):
        out = self.model(input_ids, attention_mask=None, position_ids=position_ids)
        return self.value(out["last_hidden_state"])[..., 0]


def test_under_a_head_of_ones_own():
    model, inputs = Values(values().model), row(tiny.rows())
    want = model(**inputs)
    rmfast.patch(model)
    assert tiny.score_error(model(**inputs), want) <= 16 * 96 * UNIT
    assert not rmfast.report(model).fallbacks
