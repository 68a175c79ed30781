"""What a patched model takes, gives, refuses and hands on."""

import copy
import functools
import gc
import pickle
import re
import weakref

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
)

import rmfast
import tiny
from rmfast import reference
from rmfast.packed import patching

UNIT = 2.0**-24


def both(model, inputs, **options):
    """Logits without and with the patch, and the report."""
    with torch.no_grad():
        theirs = model(**inputs).logits
        with rmfast.patched(model, **options):
            ours = model(**inputs).logits
            report = rmfast.report(model)
    return theirs, ours, report


def assert_same(theirs, ours, bound=1e-12):
    assert ours.shape == theirs.shape
    assert tiny.score_error(ours, theirs) <= bound


# --- batches


def test_one_row_with_and_without_a_pad_token():
    for pad in (tiny.PAD, None):
        model = tiny.model(dtype=torch.float64)
        model.config.pad_token_id = pad
        inputs = {"input_ids": torch.randint(3, tiny.VOCAB, (1, 11))}
        theirs, ours, report = both(model, inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert not report.fallbacks


def test_no_pad_token_and_several_rows_is_refused_as_before():
    model = tiny.model()
    model.config.pad_token_id = None
    inputs = tiny.padded(tiny.rows())
    with pytest.raises(ValueError, match="no padding token is defined") as before:
        model(**inputs)
    rmfast.patch(model)
    with pytest.raises(ValueError, match="no padding token is defined") as after:
        model(**inputs)
    assert str(before.value) == str(after.value)
    assert "no pad token" in rmfast.report(model).warnings[0]


def test_all_pad_row_runs_unpacked_and_says_so():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded([*tiny.rows(), [tiny.PAD]])
    inputs["attention_mask"][-1] = 0
    theirs, ours, report = both(model, inputs)
    assert torch.equal(ours, theirs)
    assert list(report.fallbacks) == ["a row is scored at a token that its attention_mask hides"]
    assert "1 call ran unpacked" in str(report)


@pytest.mark.parametrize("cls", [AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_transforms_of_torch_run_unpacked_and_the_report_says_so(cls):
    model = tiny.model(cls=cls, dtype=torch.float64)
    inputs = {**tiny.padded(tiny.rows()[:2]), "use_cache": False}
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (), inputs).logits.square().sum()

    want = torch.func.grad(loss)(weights)
    rmfast.patch(model)
    got = torch.func.grad(loss)(weights)
    assert tiny.grad_error(got, want) <= 1e-12
    assert list(rmfast.report(model).fallbacks) == ["torch.func, which sees no numbers to pack by"]


def test_all_pad_row_without_a_mask():
    model = tiny.model(dtype=torch.float64)
    inputs = {"input_ids": tiny.padded([*tiny.rows(), [tiny.PAD]])["input_ids"]}
    theirs, ours, report = both(model, inputs)
    assert_same(theirs, ours)
    assert not report.fallbacks


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_equal_to_eos(side):
    """Hugging Face passes over the final eos; "mask" does not."""
    eos = 2
    model = tiny.model(dtype=torch.float64, pad_token_id=eos)
    sequences = [[*row, eos] for row in tiny.rows()]
    inputs = tiny.padded(sequences, side, pad=eos)
    theirs, ours, report = both(model, inputs)
    assert_same(theirs, ours, 1e-4 if side == "left" else 1e-12)
    assert any("equals eos_token_id (2)" in w for w in report.warnings)

    _, ours, report = both(model, inputs, pooling="mask")
    assert not any("eos" in w for w in report.warnings)
    assert (ours - theirs).abs().min() > 0
    with torch.no_grad():
        one_by_one = [model(input_ids=torch.tensor([[*s, 3]])).logits for s in sequences]
        model.config.pad_token_id = None  # one row, no pad token: Hugging Face takes the last
        one_by_one = [model(input_ids=torch.tensor([s])).logits for s in sequences]
    assert_same(torch.cat(one_by_one), ours, 1e-4 if side == "left" else 1e-12)


def test_sdpa_that_leaves_out_the_soft_cap_is_told():
    """gemma2 up to transformers 5.20; later versions refuse SDPA there."""
    batch = tiny.padded(tiny.rows())
    cap = {"attn_logit_softcapping": 0.5}
    right = tiny.model("gemma2", attn_implementation="eager", **cap)
    with torch.no_grad():
        capped = right(**batch).logits
    assert not any("soft cap" in w for w in rmfast.report(rmfast.patch(right)).warnings)
    try:
        model = tiny.model("gemma2", attn_implementation="sdpa", **cap)
    except ValueError:
        model = rmfast.unpatch(right)
        model.config._attn_implementation_internal = "sdpa"
        want = capped  # where Hugging Face refuses, the cap is right
    else:
        with torch.no_grad():
            want = model(**batch).logits
        assert tiny.score_error(want, capped) > 1e-2
    (told,) = rmfast.report(rmfast.patch(model)).warnings
    assert told.startswith("gemma2: in transformers up to 5.20") and "'eager'" in told
    with torch.no_grad():
        assert tiny.score_error(model(**batch).logits, want) <= 1e-4
    model.config.attn_logit_softcapping = None
    assert not rmfast.report(model).warnings


def test_masked_tokens_in_the_middle():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(tiny.rows())
    inputs["attention_mask"][:, 3] = 0
    inputs["attention_mask"][2:, 4:6] = 0
    theirs, ours, report = both(model, inputs)
    assert_same(theirs, ours, 16 * UNIT)
    assert not report.fallbacks
    window = tiny.model("mistral", torch.float64)
    assert_same(*both(window, inputs)[:2], 16 * UNIT)


def test_eight_rollouts_of_one_prompt():
    model = tiny.model(dtype=torch.float64)
    prompt = torch.randint(3, tiny.VOCAB, (40,)).tolist()
    sequences = [prompt + torch.randint(3, tiny.VOCAB, (n,)).tolist() for n in range(1, 9)]
    counted = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: counted.append(args[0].numel())
    )
    theirs, ours, _ = both(model, tiny.padded(sequences))
    hook.remove()
    assert_same(theirs, ours)
    assert counted == [8 * 48, 40 + sum(range(1, 9))]


def test_custom_position_ids():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(tiny.rows(), "left")
    mask = inputs["attention_mask"]
    rising = (mask.cumsum(1) - 1).clamp(min=0)
    theirs, ours, report = both(model, inputs | {"position_ids": rising})
    assert_same(theirs, ours)
    assert not report.fallbacks
    shifted = torch.arange(mask.shape[1])[None] + 7
    theirs, ours, report = both(model, inputs | {"position_ids": shifted})
    assert_same(theirs, ours)
    assert not report.fallbacks
    doubled = rising * 2
    theirs, ours, report = both(model, inputs | {"position_ids": doubled})
    assert torch.equal(theirs, ours)
    assert list(report.fallbacks) == ["position_ids that do not rise by one with each token"]


def test_learned_positions_of_left_padded_rows():
    model = tiny.model("gpt2", torch.float64)
    inputs = tiny.padded(tiny.rows(), "left")
    theirs, ours, report = both(model, inputs)
    assert_same(theirs, ours)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    theirs, ours, report = both(model, inputs)
    assert_same(theirs, ours)
    assert not report.fallbacks


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("num_labels", [1, 5])
def test_labels(family, num_labels):
    model = tiny.model(family, num_labels=num_labels)
    sequences = tiny.rows()
    labels = (
        torch.randint(0, num_labels, (len(sequences),))
        if num_labels > 1
        else torch.randn(len(sequences))
    )
    inputs = tiny.padded(sequences) | {"labels": labels}
    before = model(**inputs)
    with rmfast.patched(model):
        after = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
    assert type(after) is type(before)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=1e-4)
    assert after.logits.shape == before.logits.shape == (len(sequences), num_labels)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], after.loss)
    assert torch.equal(as_tuple[1], after.logits)


def test_positional_and_foreign_arguments():
    for family in ("llama", "gpt2"):  # gpt2's second argument is the cache, not the mask
        model = tiny.model(family, dtype=torch.float64)
        inputs = tiny.padded(tiny.rows())
        args = (inputs["input_ids"],)
        args += (
            (inputs["attention_mask"],) if family == "llama" else (None, inputs["attention_mask"])
        )
        with torch.no_grad():
            theirs = model(*args).logits
            with rmfast.patched(model):
                ours = model(*args, margin=torch.randn(6), num_items_in_batch=6).logits
                assert not rmfast.report(model).fallbacks
        assert_same(theirs, ours)


@pytest.mark.parametrize(
    "extra",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attention_mask": torch.ones(6, 1, 16, 16, dtype=torch.bool).tril()},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_cannot_be_packed_goes_to_the_original_forward(extra):
    model = tiny.model(attn_implementation="eager")
    inputs = tiny.padded(tiny.rows()) | extra
    with torch.no_grad():
        theirs = model(**inputs)
        with rmfast.patched(model):
            ours = model(**inputs)
            assert sum(rmfast.report(model).fallbacks.values()) == 1
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.keys() == theirs.keys()
    if "output_hidden_states" in extra:
        assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    if "output_attentions" in extra:
        assert all(map(torch.equal, ours.attentions, theirs.attentions))


def test_inputs_embeds_and_cache():
    model = tiny.model()
    inputs = tiny.padded(tiny.rows())
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(*both(model, by_embeds)[:2])
    with torch.no_grad():
        with rmfast.patched(model):
            first = model(input_ids=inputs["input_ids"][:, :4], use_cache=True)
            second = model(
                input_ids=inputs["input_ids"][:, 4:9], past_key_values=first.past_key_values
            )
        whole = model(input_ids=inputs["input_ids"][:, :9])
    torch.testing.assert_close(second.logits, whole.logits, rtol=1e-4, atol=1e-4)


def test_the_callers_mistakes_raise_what_they_raised():
    model = tiny.model()
    ids = tiny.padded(tiny.rows())["input_ids"]
    calls = [
        {},
        {"input_ids": ids, "inputs_embeds": torch.randn(6, 16, 32)},
        {"input_ids": ids + tiny.VOCAB},
        {"input_ids": ids - 50},
    ]
    for call in calls:
        with pytest.raises(Exception) as before:
            model(**call)
        with rmfast.patched(model), pytest.raises(type(before.value)):
            model(**call)


def test_logits_are_fp32():
    model = tiny.model(dtype=torch.bfloat16)
    inputs = tiny.padded(tiny.rows())
    rmfast.patch(model)
    assert model(**inputs).logits.dtype == torch.float32
    assert model(**inputs, use_cache=True).logits.dtype == torch.float32


HALF = {
    "use_cache": {"use_cache": True},
    "output_hidden_states": {"output_hidden_states": True},
    "labels": {"use_cache": True, "labels": torch.linspace(-1, 2, 6)},
    "attention_mask": {"attention_mask": torch.ones(6, 1, 16, 16, dtype=torch.bool).tril()},
    "position_ids": {"position_ids": torch.arange(16)[None] * 2},
    "foreign": {"output_hidden_states": True, "margin": torch.ones(6)},
}


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize(
    ("family", "case"),
    # gpt2 and biogpt have a loss in a forward of their own
    [(f, c) for f in ("llama", "gpt2", "biogpt") for c in HALF if f == "llama" or c != "labels"],
)
def test_what_runs_unpacked_is_scored_in_fp32_too(family, case, how):
    """The hidden states are Hugging Face's; the head reads them as it reads packed rows."""
    if family in tiny.LOWER:
        pytest.skip(f"the classifier of this transformers' {family} scores with its own head")
    kind = torch.float32 if how == "autocast" else getattr(torch, how)
    model = tiny.model(family, kind)
    exact = tiny.model(family, torch.float64)
    exact.load_state_dict(model.state_dict())
    inputs = tiny.padded(tiny.rows(), "right") | HALF[case]
    with torch.no_grad():
        oracle = exact(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            theirs = model(**inputs)
            backbone = {k: v for k, v in inputs.items() if k not in ("labels", "margin")}
            hidden = model.base_model(**backbone)[0]
            rmfast.patch(model)
            ours = model(**inputs)
    report = rmfast.report(model)
    assert sum(report.fallbacks.values()) == 1
    assert not any("fp32" in warning for warning in report.warnings)
    last = reference.last_token(inputs["input_ids"], None, tiny.PAD, "hf")
    rows, head = hidden[torch.arange(6), last].double(), model.score.weight.double()
    bound = 2 * 32 * UNIT * (rows.abs() @ head.abs().T)
    assert ours.logits.dtype == torch.float32 and theirs.logits.dtype != torch.float32
    assert ((ours.logits - rows @ head.T).abs() <= bound).all()
    step = 2 * torch.finfo(theirs.logits.dtype).eps * oracle.abs().max()
    assert (ours.logits - oracle).norm() <= 1.1 * (theirs.logits - oracle).norm() + step
    assert ours.keys() == theirs.keys()
    if "output_hidden_states" in inputs:
        assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    if "labels" in inputs:
        labels = inputs["labels"]
        torch.testing.assert_close(ours.loss, (ours.logits[:, 0] - labels).square().mean())


def test_scores_that_stay_rounded_are_reported():
    """Where the head runs inside a forward of somebody else's."""
    embeds = tiny.model(dtype=torch.bfloat16).get_input_embeddings()
    inputs = tiny.padded(tiny.rows())
    by_embeds = {"inputs_embeds": embeds(inputs["input_ids"]), "use_cache": False}
    labelled = inputs | {"labels": torch.ones(6, dtype=torch.bfloat16)}
    for family, call in (("llama", by_embeds), ("gpt2", labelled), ("bloom", labelled)):
        model = tiny.model(family, torch.bfloat16)
        theirs, ours, report = both(model, call)
        assert torch.equal(theirs.float(), ours) and ours.dtype == torch.float32
        said = "1 call was scored by the model's own forward, in bfloat16 and not in fp32"
        assert said in report.warnings
    theirs, ours, report = both(tiny.model("gpt2"), inputs | {"labels": torch.ones(6)})
    assert not any("fp32" in warning for warning in report.warnings)
    for kind in (torch.bfloat16, torch.float32):
        model = tiny.model(dtype=kind)
        model.score = nn.Sequential(model.score, nn.Tanh())
        for call in (inputs, inputs | {"use_cache": True}):
            _, ours, report = both(model, call)
            said = "the reward head is no bare linear layer: it runs in torch.bfloat16, not in fp32"
            assert (said in report.warnings) is (kind == torch.bfloat16)
            assert torch.equal(ours, ours.to(kind).float())


def test_gradients_of_a_padded_batch_in_half_precision():
    exact, half = tiny.model(dtype=torch.float64), tiny.model(dtype=torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    inputs = tiny.padded(tiny.rows()) | {"use_cache": True}
    _, oracle = tiny.run(exact, **inputs)
    _, theirs = tiny.run(half, **inputs)
    _, ours = tiny.run(rmfast.patch(half), **inputs)
    assert rmfast.report(half).fallbacks
    assert tiny.grad_error(ours, oracle) <= 1.1 * tiny.grad_error(theirs, oracle)


def test_rotary_frequencies_that_a_long_batch_leaves_behind():
    """They are Hugging Face's of this version, where short batches may keep them for good."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    made = (
        tiny.model("llama", torch.float64, rope_parameters=rope, max_position_embeddings=12)
        for _ in range(2)
    )
    plain, patched = next(made), rmfast.patch(next(made))
    long = tiny.padded(tiny.rows())
    short = tiny.padded([row[:10] for row in tiny.rows()])
    for inputs in (short, long, short, long):
        assert_same(plain(**inputs).logits, patched(**inputs).logits, 96 * UNIT)
    assert sum(rmfast.report(patched).fallbacks.values()) == 2


def test_long_rope_goes_unpacked_where_frequencies_depend_on_padding():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 12,
    }
    model = tiny.model(
        "phi3", torch.float64, rope_parameters=rope, original_max_position_embeddings=12,
        partial_rotary_factor=1.0,
    )  # fmt: skip
    long = tiny.padded(tiny.rows(), "left")
    theirs, ours, report = both(model, long)
    assert torch.equal(ours, theirs)
    assert "12 positions or more" in next(iter(report.fallbacks))
    short = tiny.padded([row[:10] for row in tiny.rows()])
    theirs, ours, report = both(model, short)
    assert_same(theirs, ours)
    assert not report.fallbacks


# --- noise


def test_active_dropout_switches_sharing_off_and_says_so():
    inputs = tiny.padded(tiny.rows())
    tokens, nodes = int(inputs["attention_mask"].sum()), len(rmfast.pack(**inputs))
    for family, noise in (
        ("llama", {"attention_dropout": 0.1}),
        ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1}),
        ("phi3", {"resid_pdrop": 0.2}),
    ):
        model = rmfast.patch(tiny.model(family, **noise))
        assert any("dropout" in w for w in rmfast.report(model).warnings)
        ran = []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args, ran=ran: ran.append(args[0].numel())
        )
        model.train()
        first, second = model(**inputs).logits, model(**inputs).logits
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        assert ran == [tokens] * 2 + [nodes] * 2, family
    quiet = rmfast.patch(tiny.model("llama"))
    assert not rmfast.report(quiet).warnings


def test_dropout_has_the_same_mean_as_in_hugging_face():
    """Attention dropout over packed rows: the mean over draws meets the unpatched mean."""
    model = tiny.model("llama", torch.float64, attention_dropout=0.2).train()
    inputs = tiny.padded(tiny.rows())

    def draws(count):
        with torch.no_grad():
            return torch.stack([model(**inputs).logits for _ in range(count)])

    torch.manual_seed(0)
    theirs = draws(300)
    rmfast.patch(model)
    ours = draws(300)
    error = (theirs.var(0) / 300 + ours.var(0) / 300).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error).all()
    ratio = ours.std(0) / theirs.std(0)
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


# --- levels


class OwnHead(nn.Module):
    """A reward model of somebody's own: an MLP on the last attended token."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, input_ids, attention_mask):
        hidden = self.backbone(input_ids, attention_mask=attention_mask).last_hidden_state
        last = (torch.arange(input_ids.shape[1]) * attention_mask).argmax(-1)
        return self.head(hidden[torch.arange(len(last)), last])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3_moe"])
def test_backbone_level_under_a_users_own_head(family, side):
    model = OwnHead(tiny.model(family, torch.float64).base_model).eval()
    inputs = tiny.padded(tiny.rows(), side)

    def run():
        model.zero_grad()
        scores = model(**inputs)
        (scores * torch.arange(12.0).view(6, 2)).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return scores.detach(), grads

    theirs, their_grads = run()
    rmfast.patch(model)
    assert rmfast.report(model).level == "backbone"
    ours, our_grads = run()
    assert not rmfast.report(model).fallbacks
    assert_same(theirs, ours, 16 * 96 * UNIT)
    assert tiny.grad_error(our_grads, their_grads) <= 16 * 96 * UNIT
    rmfast.unpatch(model)
    assert torch.equal(run()[0], theirs)


def test_backbone_level_of_a_causal_lm_and_a_token_head():
    inputs = tiny.padded(tiny.rows())
    keep = inputs["attention_mask"].bool()
    for cls in (AutoModelForCausalLM, AutoModelForTokenClassification):
        model = tiny.model("llama", torch.float64, cls=cls)
        with torch.no_grad():
            theirs = model(**inputs, output_hidden_states=True)
            with rmfast.patched(model):
                ours = model(**inputs, output_hidden_states=True)
                report = rmfast.report(model)
        assert report.level == "backbone"
        assert not report.fallbacks
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.logits[keep], theirs.logits[keep], rtol=1e-9, atol=1e-9)
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(a[keep], b[keep], rtol=1e-9, atol=1e-9)
            assert a[~keep].abs().max() == 0


# --- called past the classifier


def test_a_backbone_called_past_its_classifier_runs_packed():
    """As TRL's get_reward does: the head on every token, then a gather."""
    model = tiny.model("qwen3", torch.float64)
    inputs = tiny.padded(tiny.rows())
    last = inputs["attention_mask"].sum(1) - 1

    def run():
        model.zero_grad()
        out = model.model(**inputs, output_hidden_states=True, use_cache=False)
        scores = model.score(out.hidden_states[-1])[torch.arange(6), last, 0]
        (scores * torch.arange(6.0)).sum().backward()
        return scores.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    theirs, their_grads = run()
    rmfast.patch(model)
    model(**inputs)
    assert rmfast.report(model).packed == {"Qwen3ForSequenceClassification": 1}
    assert not any("hidden states of" in text for text in rmfast.report(model).warnings)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[1][0].shape[1]))
    ours, our_grads = run()
    assert seen == [len(rmfast.pack(tiny.rows()))]
    assert tiny.score_error(ours, theirs) <= 16 * 96 * UNIT
    assert tiny.grad_error(our_grads, their_grads) <= 16 * 96 * UNIT
    report = rmfast.report(model)
    assert report.level == "trie" and not report.fallbacks
    assert report.packed == {"Qwen3ForSequenceClassification": 1, "Qwen3Model": 1}
    assert "1 call of Qwen3Model ran packed" in str(report)
    assert any("hidden states of" in text for text in report.warnings)
    model.model(**inputs, output_attentions=True)
    assert list(rmfast.report(model).fallbacks) == ["the argument output_attentions"]


def test_a_call_that_falls_back_has_the_backbone_as_it_was():
    """It is told once, and the backbone's zeros for hidden tokens are not what is scored."""
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded([*tiny.rows(), [tiny.PAD]])
    inputs["attention_mask"][-1] = 0
    want = model(**inputs).logits
    for pooling in ("hf", "mask"):
        with rmfast.patched(model, pooling=pooling):
            assert torch.equal(model(**inputs).logits, want) or pooling == "mask"
            assert sum(rmfast.report(model).fallbacks.values()) == 1


# --- a language model


def test_labels_of_hidden_tokens_fall_back_and_others_do_not():
    model = tiny.model(cls=AutoModelForCausalLM, dtype=torch.float64)
    inputs = tiny.padded(tiny.rows(), "left")
    mask = inputs["attention_mask"]
    first = (mask.cumsum(1) == 1) & (mask == 1)
    attended = inputs["input_ids"].masked_fill(mask == 0, -100)
    cases = [
        ({"labels": attended}, True),  # the first token is predicted from a pad
        ({"labels": attended.masked_fill(first, -100)}, False),
        ({"labels": inputs["input_ids"]}, True),
        ({"labels": attended, "shift_labels": attended}, False),
        ({"labels": attended, "shift_labels": inputs["input_ids"]}, True),
        ({"labels": attended.masked_fill(first, -7), "ignore_index": -7}, True),  # -100 counts
        ({"logits_to_keep": 3}, False),
        ({}, False),
    ]
    for more, falls_back in cases:
        if more.get("ignore_index"):
            more["labels"] = more["labels"].masked_fill(mask == 0, 5)
        theirs = model(**inputs, **more)
        with rmfast.patched(model):
            ours = model(**inputs, **more)
            assert bool(rmfast.report(model).fallbacks) == falls_back, more
        if theirs.loss is not None:
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=16 * 96 * UNIT, atol=0)
        keep = mask[:, -ours.logits.shape[1] :].bool()
        assert_same(theirs.logits[keep], ours.logits[keep], 16 * 96 * UNIT)


def test_rollouts_of_a_left_padded_policy():
    """GRPO: prompts padded on the left, completions on the right, log-probabilities of those."""
    model = tiny.model(cls=AutoModelForCausalLM, dtype=torch.float64)
    prompts = [row for row in ([5, 6, 7], [8, 9, 10, 11, 12]) for _ in range(4)]
    g = torch.Generator().manual_seed(0)
    ends = [
        torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist() for n in (6, 2, 4, 6, 1, 3, 5, 2)
    ]
    left, right = tiny.padded(prompts, "left"), tiny.padded(ends)
    inputs = {name: torch.cat([left[name], right[name]], 1) for name in left}
    completion = right["attention_mask"]

    def run():
        model.zero_grad()
        logits = model(**inputs, logits_to_keep=7, use_cache=False).logits[:, :-1]
        chosen = right["input_ids"][..., None]
        logps = logits.log_softmax(-1).gather(-1, chosen)[..., 0] * completion
        (logps.sum(1) * torch.linspace(-1, 1, 8)).sum().backward()
        return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    theirs, their_grads = run()
    rmfast.patch(model)
    ours, our_grads = run()
    assert not rmfast.report(model).fallbacks
    assert tiny.score_error(ours, theirs) <= 16 * 96 * UNIT
    assert tiny.grad_error(our_grads, their_grads) <= 16 * 96 * UNIT


# --- what a loss, or another patch, may read


def test_losses_that_read_hidden_tokens_fall_back():
    inputs = tiny.padded(tiny.rows())
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    token = ids % 2
    first = torch.ones(6, dtype=torch.int64)
    cases = [
        (AutoModelForTokenClassification, {"labels": token}, "labels that are read from a token"),
        (AutoModelForTokenClassification, {"labels": token.masked_fill(mask == 0, -100)}, None),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": first, "end_positions": first},
            "a loss over all tokens",
        ),
    ]
    for cls, labels, reason in cases:
        model = tiny.model("llama", torch.float64, 2, cls)
        want = model(**inputs, **labels).loss
        with rmfast.patched(model):
            torch.testing.assert_close(model(**inputs, **labels).loss, want, rtol=1e-9, atol=0)
            reasons = list(rmfast.report(model).fallbacks)
        assert reasons == [] if reason is None else reasons[0].startswith(reason)


def test_a_language_model_that_makes_labels_of_its_own():
    class Own(type(tiny.model(cls=AutoModelForCausalLM))):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)

    model = tiny.model(cls=AutoModelForCausalLM, dtype=torch.float64)
    model.__class__ = Own
    for side in ("left", "right"):
        inputs = tiny.padded(tiny.rows(), side)
        want = model(**inputs).loss
        with rmfast.patched(model):
            torch.testing.assert_close(model(**inputs).loss, want, rtol=1e-9, atol=0)
            assert bool(rmfast.report(model).fallbacks) == (side == "left")


def test_patched_again_from_inside_the_loss_is_still_looked_at():
    model = tiny.model(cls=AutoModelForCausalLM, dtype=torch.float64)
    inputs = tiny.padded(tiny.rows(), "left")
    want = model(**inputs, labels=inputs["input_ids"]).loss
    rmfast.patch(rmfast.patch(model).model)
    torch.testing.assert_close(model(**inputs, labels=inputs["input_ids"]).loss, want)
    assert rmfast.report(model).fallbacks


def test_a_transform_of_a_call_with_labels():
    """Gradients of each example, which see no numbers."""
    make = functools.partial(tiny.model, cls=AutoModelForCausalLM, attn_implementation="eager")
    model = make(dtype=torch.float64, use_cache=False)
    inputs = tiny.padded(tiny.rows()[:2])
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, ids, mask):
        call = {"input_ids": ids[None], "attention_mask": mask[None], "labels": ids[None]}
        return torch.func.functional_call(model, weights, (), call).loss

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    want = each(weights, inputs["input_ids"], inputs["attention_mask"])
    rmfast.patch(model)
    got = each(weights, inputs["input_ids"], inputs["attention_mask"])
    assert tiny.grad_error(got, want) <= 1e-12


def test_one_models_fallback_is_not_anothers():
    teacher, model = rmfast.patch(tiny.model()), rmfast.patch(tiny.model(cls=AutoModelForCausalLM))
    inputs, seen = tiny.padded(tiny.rows(), "left"), []
    teacher.model.norm.register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    model.lm_head.register_forward_pre_hook(lambda *_: teacher(**inputs) and None)
    model(**inputs, labels=inputs["input_ids"])
    assert rmfast.report(model).fallbacks and not rmfast.report(teacher).fallbacks
    assert seen == [1]


def test_a_classifiers_own_forward_may_score_a_hidden_token():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(tiny.rows(), "left")
    inputs["attention_mask"][:, -1] = 0
    want = type(model).forward(model, **inputs).logits
    rmfast.patch(model)
    assert torch.equal(type(model).forward(model, **inputs).logits, want)
    reasons = list(rmfast.report(model).fallbacks)
    assert reasons == ["a token that attention_mask hides, and is no pad token"]


def test_attention_that_was_changed_counts_in_the_next_call():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def doubled(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(module, query, key, 2 * value, *args, **kwargs)

    AttentionInterface.register("doubled", doubled)
    AttentionMaskInterface.register("doubled", sdpa_mask)
    model, inputs = rmfast.patch(tiny.model(dtype=torch.float64)), tiny.padded(tiny.rows())
    model.set_attn_implementation("doubled")
    got = model(**inputs).logits
    want = rmfast.unpatch(model)(**inputs).logits
    assert tiny.score_error(got, want) <= 1e-12


# --- router logits


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "jetmoe"])
def test_router_logits_come_back_by_token(family):
    model = tiny.model(family, torch.float64, cls=AutoModelForCausalLM, output_router_logits=True)
    inputs = tiny.padded(tiny.rows())
    keep = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~keep, -100)

    def run():
        model.zero_grad()
        out = model(**inputs, labels=labels)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return out, grads

    theirs, their_grads = run()
    rmfast.patch(model)
    ours, our_grads = run()
    assert not rmfast.report(model).fallbacks
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert tiny.grad_error(our_grads, their_grads) <= 16 * 96 * UNIT
    for a, b in zip(ours.router_logits or (), theirs.router_logits or (), strict=True):
        assert a.shape == b.shape
        kept = keep.flatten()
        torch.testing.assert_close(a[kept], b[kept], rtol=1e-6, atol=1e-6)


def test_a_classifier_asked_for_router_logits_runs_packed():
    model = tiny.model("mixtral", torch.float64, output_router_logits=True)
    inputs = tiny.padded(tiny.rows())
    theirs, ours, report = both(model, inputs)
    assert_same(theirs, ours, 16 * 96 * UNIT)
    assert report.level == "trie" and not report.fallbacks


# --- the class counts, not what its config calls itself


def test_a_config_of_ones_own():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    class RewardConfig(GPTNeoXConfig):
        model_type = "my_reward_model"

    class Model(GPTNeoXModel):
        config_class = RewardConfig

    own = RewardConfig(**tiny.config("gpt_neox").to_dict() | {"model_type": "my_reward_model"})
    model = OwnHead(Model(own).to(torch.float64)).eval()
    inputs = tiny.padded(tiny.rows())
    want = model(**inputs)
    rmfast.patch(model)
    assert rmfast.report(model).level == "backbone"
    assert_same(want, model(**inputs), 16 * 96 * UNIT)
    rmfast.unpatch(model)

    class Norm(nn.LayerNorm):  # and a part of its own
        def forward(self, x):
            return super().forward(x.cumsum(1))

    model.backbone.final_layer_norm.__class__ = Norm
    assert rmfast.report(rmfast.patch(model)).level == "head"


def test_generation_is_untouched():
    model = tiny.model("llama", cls=AutoModelForCausalLM)
    prompt = torch.randint(3, tiny.VOCAB, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    with rmfast.patched(model):
        got = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(got, want)


def test_after_a_block_the_patch_is_the_one_from_before():
    model, inputs = tiny.model("llama"), tiny.padded(tiny.rows())
    rmfast.patch(model, share_prefixes=False)
    scorer = rmfast.Scorer(model, max_tokens=64)
    model(**inputs, use_cache=True)  # falls back
    before = rmfast.report(model)
    with rmfast.patched(model, prune_last_layer=False):
        assert str(rmfast.report(model)) != str(before)
    assert str(rmfast.report(model)) == str(before)
    assert np.isfinite(scorer.score(tiny.rows())).all()


def test_a_subclass_with_its_own_forward_keeps_it():
    model = tiny.model("llama", torch.float64)

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1
            return out

    model.__class__ = Shifted
    theirs, ours, report = both(model, tiny.padded(tiny.rows()))
    assert report.level == "backbone"
    assert_same(theirs, ours)


HEAD_LEVEL = {
    "jamba": "carry state|not among the backbones",
    "qwen3_next": "linear_attention",
    "bloom": "not among the backbones",
    "falcon": "not among the backbones",
    "gptj": "not among the backbones",
    "gpt_neo": "not among the backbones",
    "mpt": "not among the backbones",
    "opt": "not among the backbones",
}


@pytest.mark.parametrize("family", HEAD_LEVEL)
def test_head_level(family):
    model = tiny.model(family, num_labels=3)
    inputs = tiny.padded(tiny.rows(), "right")
    seen = []
    theirs, their_grads = tiny.run(model, **inputs)
    before = model(**inputs, labels=torch.arange(6) % 3)
    with rmfast.patched(model):
        report = rmfast.report(model)
        hook = model.score.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        model(**inputs)
        hook.remove()
        ours, our_grads = tiny.run(model, **inputs)
        after = model(**inputs, labels=torch.arange(6) % 3)
    assert report.level == "head"
    assert re.search(HEAD_LEVEL[family], report.reasons[0])
    assert seen == [(6, 1, 32)]  # pooled first: the head sees one row a sequence
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert tiny.grad_error(our_grads, their_grads) <= 1e-4
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=1e-4)


def test_head_level_pools_by_the_mask_too():
    model = tiny.model("bloom", torch.float64)
    sequences = [[*row, tiny.PAD] for row in tiny.rows()]
    inputs = tiny.padded(sequences)
    _, ours, _ = both(model, inputs, pooling="mask")
    model.config.pad_token_id = None
    with torch.no_grad():
        want = torch.cat([model(input_ids=torch.tensor([s])).logits for s in sequences])
    assert_same(want, ours, 1e-6)


def test_an_encoder_runs_as_it_was():
    config = BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    theirs, ours, report = both(model, tiny.padded(tiny.rows()))
    assert report.level == "head"
    assert "its forward runs as it was" in str(report)
    assert torch.equal(ours, theirs)


def test_triton_where_it_cannot_run_says_so(monkeypatch):
    m = rmfast.patch(tiny.model(), attention="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot run: tensors are on cpu"):
        m(**tiny.padded(tiny.rows()))
    monkeypatch.setattr("rmfast.packed.state.HAS_TRITON", False)
    with pytest.raises(ValueError, match="pip install triton"):
        rmfast.patch(tiny.model(), attention="triton")


def test_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        rmfast.patch("model")
    with pytest.raises(ValueError, match="pooling must be one of"):
        rmfast.patch(tiny.model(), pooling="last")
    for attention in ("magic", "flex", "flash"):
        with pytest.raises(ValueError, match="attention must be one of"):
            rmfast.patch(tiny.model(), attention=attention)
    with pytest.raises(ValueError, match="not patched"):
        rmfast.report(tiny.model())
    with pytest.raises(ValueError, match="several backbones"):
        rmfast.patch(nn.ModuleList([tiny.model(), tiny.model()]))
    with pytest.raises(ValueError, match="cannot be honoured"):
        rmfast.patch(OwnHead(tiny.model().base_model), pooling="mask")
    unknown = OwnHead(nn.Linear(2, 2))
    rmfast.patch(unknown)
    assert rmfast.report(unknown).level == "head"


def test_a_bidirectional_decoder_is_not_packed():
    model = tiny.model("gemma3_text", use_bidirectional_attention=True)
    theirs, ours, report = both(model, tiny.padded(tiny.rows()))
    assert report.level == "head"
    assert "bidirectional" in report.reasons[0]
    assert_same(theirs, ours, 1e-4)


# --- what somebody did to the model before or after the patch: never a silent other number


def test_a_forward_replaced_before_the_patch_stays_outermost():
    model = tiny.model(dtype=torch.float64)
    wrapper = tiny.double(model)
    theirs, ours, report = both(model, tiny.padded(tiny.rows()))
    assert report.level == "backbone"
    assert_same(theirs, ours)
    assert model.forward is wrapper


def test_a_class_forward_replaced_by_somebody(monkeypatch):
    model = tiny.model(dtype=torch.float64)
    layer = type(model.model.layers[0])
    plain = layer.forward

    @functools.wraps(plain)
    def shifted(self, hidden, *args, **kwargs):
        return plain(self, hidden, *args, **kwargs) + 0.5

    monkeypatch.setattr(layer, "forward", shifted)
    assert_same(*both(model, tiny.padded(tiny.rows()))[:2])


@pytest.mark.parametrize("where", ["forward", "hook", "peft-hook"])
def test_a_head_that_somebody_changed(where):
    model = tiny.model(dtype=torch.float64)
    if where == "forward":
        plain = model.score.forward
        model.score.forward = lambda hidden: plain(hidden) * 3
    elif where == "hook":
        model.score.register_forward_hook(lambda _, args, out: out * 3)
    else:
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
        )
        model.base_model.model.score.register_forward_hook(lambda _, args, out: out * 3)
    theirs, ours, report = both(model, tiny.padded(tiny.rows()))
    assert_same(theirs, ours)
    assert not report.fallbacks


def test_a_head_that_mixes_tokens_is_a_head_of_its_own():
    class Smoothed(nn.Module):
        def forward(self, hidden):
            return (hidden + hidden.roll(1, dims=1)).sum(-1, keepdim=True)

    inputs = {"input_ids": torch.randint(3, tiny.VOCAB, (4, 9))}
    model = tiny.model(dtype=torch.float64)
    model.score = Smoothed()
    theirs, ours, report = both(model, inputs)
    assert report.level == "backbone"
    assert_same(theirs, ours)
    model = rmfast.patch(tiny.model(dtype=torch.float64))
    model.score = Smoothed()
    assert_same(theirs, model(**inputs).logits)
    assert list(rmfast.report(model).fallbacks) == ["the score head mixes tokens"]


def test_offloaded_weights():
    from accelerate import cpu_offload

    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(tiny.rows())
    want = model(**inputs).logits
    offloaded = cpu_offload(tiny.model(dtype=torch.float64), torch.device("cpu"))
    assert_same(want, rmfast.patch(offloaded)(**inputs).logits)
    late = cpu_offload(rmfast.patch(tiny.model(dtype=torch.float64)), torch.device("cpu"))
    assert_same(want, late(**inputs).logits)


def test_stepwise_decoding_without_asking_for_a_cache_fails_loudly():
    ids = torch.randint(3, tiny.VOCAB, (1, 12))
    for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = rmfast.patch(tiny.model(cls=cls, use_cache=True))
        first = model(ids[:, :6])
        with pytest.raises(ValueError, match="use_cache=True"):
            model(ids[:, 6:], past_key_values=first.past_key_values)
        with pytest.raises(AttributeError, match="use_cache=True"):
            first.past_key_values.get_seq_length()
        assert model(ids, use_cache=False).past_key_values is None
        whole = model(ids).logits
        asked = model(ids[:, :6], use_cache=True).past_key_values
        rest = model(ids[:, 6:], past_key_values=asked).logits
        torch.testing.assert_close(rest[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "smollm3"])
def test_mask_and_attention_with_different_windows(family):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    off = {"layer_types": kinds, "use_sliding_window": False} if family == "smollm3" else {}
    model = tiny.model(family, torch.float64, **off)
    if not off:
        model.config.sliding_window = 3
    theirs, ours, report = both(model, tiny.padded(tiny.rows()))
    assert torch.equal(theirs, ours)
    assert "sliding windows" in next(iter(report.fallbacks))


def test_layers_shared_or_replaced():
    inputs = tiny.padded(tiny.rows()) | {"use_cache": False}
    for family in ("llama", "gpt2"):
        model = tiny.model(family, torch.float64)
        base = model.base_model
        layers = base.layers if hasattr(base, "layers") else base.h
        layers[1] = layers[2]
        assert_same(*both(model, inputs)[:2])
        layers[1] = copy.deepcopy(layers[0])  # block expansion: a config of its own
        assert_same(*both(model, inputs)[:2])
        rmfast.patch(model)
        with torch.no_grad():
            layers[0], layers[2] = layers[2], layers[0]
            ours = model(**inputs).logits
            rmfast.unpatch(model)
            assert_same(model(**inputs).logits, ours)


def test_backbone_replaced_after_the_patch():
    model, other = tiny.model(dtype=torch.float64), tiny.model(dtype=torch.float64)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    inputs = tiny.padded(tiny.rows())
    rmfast.patch(model)
    model.model = other.model
    ours = model(**inputs).logits
    assert list(rmfast.report(model).fallbacks) == ["the backbone was replaced after the patch"]
    plain = tiny.model(dtype=torch.float64)
    plain.model = other.model
    assert_same(plain(**inputs).logits, ours)


def test_made_bidirectional():
    inputs = {"input_ids": torch.randint(3, tiny.VOCAB, (3, 9))}
    model = tiny.model(dtype=torch.float64)
    theirs, ours, report = both(model, inputs | {"is_causal": False})
    assert torch.equal(theirs, ours)
    assert list(report.fallbacks) == ["the argument is_causal"]
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    theirs, ours, report = both(model, inputs)
    assert torch.equal(theirs, ours)
    assert list(report.fallbacks) == ["attention modules were made bidirectional"]


def test_attention_scaled_by_absolute_position():
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 6,
    }
    model = tiny.model("ministral3", torch.float64, rope_parameters=rope)
    theirs, ours, report = both(model, tiny.padded(tiny.rows(), "left"))
    assert_same(theirs, ours, 16 * 96 * UNIT)
    assert report.level == tiny.LOWER.get("ministral3", "trie") and not report.fallbacks
    assert ("cache_position" in report.reasons[0]) == ("ministral3" in tiny.LOWER)


@pytest.mark.parametrize(
    ("family", "noise"),
    [
        ("starcoder2", {"residual_dropout": 0.3}),
        ("starcoder2", {"embedding_dropout": 0.3}),
        ("seed_oss", {"residual_dropout": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
        ("jetmoe", {"attention_dropout": 0.3}),
        ("llama", {"attention_dropout": 1}),
    ],
)
def test_each_sequence_draws_its_own_noise(family, noise):
    model = rmfast.patch(tiny.model(family, **noise)).train()
    row = tiny.rows()[1]
    same = model(**tiny.padded([row, row, row])).logits
    assert len(same.unique()) == 3 or noise.get("attention_dropout") == 1
    assert "dropout" in rmfast.report(model).warnings[0]


def test_one_backbone_under_two_heads_is_patched_once():
    first, second = tiny.model(), tiny.model()
    second.model = first.model
    rmfast.patch(first)
    with pytest.raises(ValueError, match="already patched as part of a Llama"):
        rmfast.patch(second)
    with pytest.raises(ValueError, match="already patched as part of a Llama"):
        rmfast.patch(first.model)
    rmfast.unpatch(first)
    assert "forward" not in first.model.layers[-1].__dict__
    rmfast.patch(second)


def test_negative_positions_and_a_subclass_of_another_name():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(tiny.rows())
    positions = torch.arange(inputs["input_ids"].shape[1])[None] - 3
    theirs, ours, _ = both(model, inputs | {"position_ids": positions})
    assert torch.equal(theirs, ours)
    model = tiny.model("gpt2", torch.float64)
    model.__class__ = type("MyRewardModel", (type(model),), {})
    labels = torch.randn(6, dtype=torch.float64)
    theirs = model(**inputs, labels=labels).loss
    with rmfast.patched(model):
        assert torch.equal(model(**inputs, labels=labels).loss, theirs)


def test_hooks_are_pointed_out():
    model = rmfast.patch(tiny.model())
    assert not rmfast.report(model).warnings
    model.model.norm.register_forward_hook(lambda *_: None)
    assert "hooks" in rmfast.report(model).warnings[0]


# --- in place, and back


def state(model):
    """Everything a patch could leave behind, by module."""
    return {
        name: {
            k: v for k, v in m.__dict__.items() if k not in ("_parameters", "_modules", "_buffers")
        }
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_unpatch_restores_everything(family):
    model = tiny.model(family)
    before, config = state(model), copy.deepcopy(model.config)
    implementation = model.config._attn_implementation
    assert rmfast.patch(model) is model
    assert rmfast.unpatch(model) is model
    after = state(model)
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].keys() == before[name].keys(), name
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == implementation
    assert rmfast.unpatch(model) is model  # harmless


def test_patching_twice_is_harmless():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(tiny.rows())
    with torch.no_grad():
        theirs = model(**inputs).logits
        rmfast.patch(rmfast.patch(model))
        assert_same(theirs, model(**inputs).logits)
        with rmfast.patched(model, share_prefixes=False):
            assert "share_prefixes=False" in str(rmfast.report(model))
            assert_same(theirs, model(**inputs).logits)
        assert "share_prefixes=False" not in str(rmfast.report(model))
        rmfast.unpatch(model)
        assert "forward" not in model.__dict__
        assert torch.equal(model(**inputs).logits, theirs)


def test_patched_unpatches_when_the_block_raises():
    model = tiny.model()
    with pytest.raises(KeyError), rmfast.patched(model):
        raise KeyError
    assert "forward" not in model.__dict__


def test_identity_of_the_model():
    model, plain = rmfast.patch(tiny.model()), tiny.model()
    assert type(model) is type(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]


def test_deepcopy_and_pickle_stay_patched_and_independent():
    model = rmfast.patch(tiny.model(dtype=torch.float64))
    inputs = tiny.padded(tiny.rows())
    want = model(**inputs).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert rmfast.report(clone).level == "trie"
        assert torch.equal(clone(**inputs).logits, want)
        with torch.no_grad():
            clone.score.weight.zero_()
        assert clone(**inputs).logits.abs().max() == 0
        assert torch.equal(model(**inputs).logits, want)
        rmfast.unpatch(clone)
        assert "forward" not in clone.__dict__
        assert "forward" in model.__dict__


def test_save_and_load(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path / "plain")
    rmfast.patch(model)
    model.save_pretrained(tmp_path / "patched")
    plain, patched = ((tmp_path / n / "config.json").read_text() for n in ("plain", "patched"))
    assert plain == patched
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "patched")
    inputs = tiny.padded(tiny.rows())
    assert_same(model(**inputs).logits, loaded(**inputs).logits, 1e-4)
    with pytest.raises(ValueError, match="not patched"):
        rmfast.report(loaded)


def test_attention_renamed_after_the_patch():
    model = rmfast.patch(tiny.model(dtype=torch.float64))
    inputs = tiny.padded(tiny.rows())
    want = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert_same(want, model(**inputs).logits)
    rmfast.unpatch(model)
    assert model.config._attn_implementation == "eager"


# --- gone when it is let go of


def raises(model, inputs):
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + tiny.VOCAB)


LIVES = {
    "patched": lambda model, inputs: None,
    "scored": lambda model, inputs: model(**inputs),
    "trained": lambda model, inputs: tiny.run(model, **inputs),
    "fell back": lambda model, inputs: model(**inputs, use_cache=True),
    "raised": raises,
    "in pieces": lambda model, inputs: model.requires_grad_(False)(**inputs),
    "unpatched": lambda model, inputs: rmfast.unpatch(model),
    "patched again": lambda model, inputs: rmfast.patch(model, share_prefixes=False),
    "copied": lambda model, inputs: copy.deepcopy(model)(**inputs),
    "bulk": lambda model, inputs: rmfast.Scorer(model).score(tiny.rows()),
    "wrapped": lambda model, inputs: peft.get_peft_model(model, LORA)(**inputs),
}
LORA = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "query_key_value"])


OF_TRANSFORMERS = ("trained", "fell back", "raised", "bulk", "wrapped")
EAGER = functools.partial(tiny.model, attn_implementation="eager")
KINDS = [
    ("trie", EAGER, {"max_tokens": 10}),
    ("trie", EAGER, {"prune_last_layer": False}),
    ("backbone", lambda: OwnHead(tiny.model(dtype=torch.float64).base_model), {}),
    ("head", functools.partial(EAGER, "bloom"), {}),
]
CASES = [
    (*kind, life) for kind in KINDS for life in LIVES
    if kind[0] != "backbone" or life not in OF_TRANSFORMERS
]  # fmt: skip


@pytest.mark.parametrize(("level", "make", "options", "life"), CASES)
def test_a_model_is_freed_with_its_last_name(level, make, options, life):
    inputs = tiny.padded(tiny.rows())
    make()(**inputs)  # what libraries import and keep on their first call is not ours
    gc.disable()
    try:
        model = rmfast.patch(make(), **options)
        assert rmfast.report(model).level == level
        LIVES[life](model, inputs)
        left = [weakref.ref(p) for p in model.parameters()]
        del model
        assert sum(p() is not None for p in left) == 0
    finally:
        gc.enable()


def test_the_copy_of_a_layer_alone_runs_as_it_was():
    model = rmfast.patch(tiny.model(dtype=torch.float64))
    inputs = tiny.padded(tiny.rows())
    want = model(**inputs).logits
    layer = model.model.layers[-1]
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        model.model.layers[-1] = clone
        assert_same(want, model(**inputs).logits)
        assert not rmfast.report(model).fallbacks
    assert len(pickle.dumps(layer)) < 2 * sum(8 * p.numel() for p in layer.parameters())


def test_the_backbone_outlives_its_model():
    inputs = tiny.padded(tiny.rows())
    model = tiny.model(dtype=torch.float64)
    want = model.model(**inputs)[0]
    base = rmfast.patch(model).model
    del model
    assert_same(want, base(**inputs)[0])
    report = rmfast.report(base)
    assert report.level == "head" and "its backbone runs as it was" in str(report)
    assert list(report.fallbacks) == ["the classifier that was patched is gone"]
    rmfast.patch(base)
    assert rmfast.report(base).level == "backbone"
    keep = inputs["attention_mask"].bool()
    assert_same(want[keep], base(**inputs)[0][keep])
    rmfast.unpatch(base)
    assert torch.equal(want, base(**inputs)[0])


def test_a_forward_without_its_model_says_so():
    model = rmfast.patch(tiny.model())
    forward = model.forward
    del model
    with pytest.raises(ReferenceError, match="keep the model"):
        forward(**tiny.padded(tiny.rows()))


def _refused(model):
    head = model.score
    model.score = nn.LSTM(1, 1)  # mixes tokens: no known classifier, so pooling has no say
    try:
        with pytest.raises(ValueError, match="pooling='mask'"):
            rmfast.patch(model, pooling="mask")
    finally:
        model.score = head


def _patched(model):
    with rmfast.patched(model, share_prefixes=False):
        pass


def _unpatched(model):
    with patching.unpatched(model):
        pass


@pytest.mark.parametrize(
    "block", [_patched, _unpatched, _refused, rmfast.doctor, rmfast.Scorer, patching.repatch]
)
def test_a_wrapper_put_on_a_patched_model_keeps_its_say(block):
    model, inputs = tiny.model("llama"), tiny.padded(tiny.rows())
    with torch.no_grad():
        want = 2 * model(**inputs).logits
        rmfast.patch(model)
        tiny.double(model)
        block(model)
        assert tiny.score_error(model(**inputs).logits, want) <= 1e-4
        scores = rmfast.Scorer(model).score(tiny.rows())
    assert np.abs(scores - want[:, 0].numpy()).max() <= 1e-4 * want.std()


def test_a_forward_is_wrapped_as_the_method_it_was():
    """ms-swift takes a method's function, and binds what it makes of it."""
    model, inputs, calls = tiny.model(), tiny.padded(tiny.rows()), []
    want = model(**inputs).logits
    rmfast.patch(model)
    function = model.forward.__func__

    @functools.wraps(function)
    def counted(self, *args, **kwargs):
        calls.append(self)
        return function(self, *args, **kwargs)

    model.forward = counted.__get__(model)
    assert tiny.score_error(model(**inputs).logits, want) <= 1e-5
    assert calls == [model] and not rmfast.report(model).fallbacks
    rmfast.unpatch(model)
    assert torch.equal(model(**inputs).logits, want) and len(calls) == 2


def test_a_wrapper_put_on_while_it_was_unpatched_keeps_its_say():
    model, inputs = tiny.model("llama"), tiny.padded(tiny.rows())
    with torch.no_grad():
        want = 2 * model(**inputs).logits
        rmfast.patch(model)
        with patching.unpatched(model):
            tiny.double(model)
        assert tiny.score_error(model(**inputs).logits, want) <= 1e-4
    assert rmfast.report(model).level == "backbone"


@pytest.mark.parametrize("order", [1, -1])
def test_a_copy_that_meets_the_forward_first_is_packed_too(order):
    model, inputs = rmfast.patch(tiny.model("llama")), tiny.padded(tiny.rows())
    both = [model.forward, model][::order]
    for copied in (copy.deepcopy(both)[::order][1], pickle.loads(pickle.dumps(both))[::order][1]):
        seen = []
        copied.get_input_embeddings().register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].shape[0])
        )
        copied(**inputs)
        assert seen == [1], "packed rows"
        assert not rmfast.report(copied).fallbacks


def test_a_backbone_that_outlived_its_classifier_is_patched_under_another():
    base = rmfast.patch(tiny.model("llama")).model
    other, inputs = tiny.model("llama"), tiny.padded(tiny.rows())
    other.model = base
    patching.repatch(other)
    assert rmfast.report(other).level == "trie"
    ours, _ = tiny.run(other, **inputs)
    theirs, _ = tiny.run(rmfast.unpatch(other), **inputs)
    assert tiny.score_error(ours, theirs) <= 1e-4
