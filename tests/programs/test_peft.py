"""PEFT's adapters on a reward model, with the head that they save."""

import pytest
import torch

import rmfast
import tiny

peft = pytest.importorskip("peft")

SOME = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
ALL = {"target_modules": "all-linear", "modules_to_save": ["score"]}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KINDS = {
    "LoRA": peft.LoraConfig(r=4, **SOME),
    "LoRA, modules_to_save": peft.LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["score", "embed_tokens"]
    ),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, **SOME),
    "DoRA of all": peft.LoraConfig(r=4, use_dora=True, **ALL),
    "PiSSA": peft.LoraConfig(r=4, init_lora_weights="pissa", **SOME),
    "IA3": peft.IA3Config(task_type="SEQ_CLS", **IA3),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, total_step=9, **SOME),
    "VeRA": peft.VeraConfig(r=4, **SOME),
    "OFT": peft.OFTConfig(oft_block_size=4, **SOME),
}


def draw(model):
    """All that is trained is drawn: a new adapter changes nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def tuned(kind):
    return draw(peft.get_peft_model(tiny.model(), KINDS[kind]))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains(kind, side, same):
    model, batch = tuned(kind), tiny.padded(tiny.rows(), side)
    assert same(lambda: model(**batch).logits, model)[0].level == "trie"


def test_adapters_are_switched_left_out_and_merged(same):
    model, batch = tuned("LoRA"), tiny.padded(tiny.rows())
    model.add_adapter("second", KINDS["DoRA of all"])

    def run():
        scores = []
        for name in ("second", "default", "second"):
            model.set_adapter(name)
            scores.append(model(**batch).logits)
        with model.disable_adapter():
            scores.append(model(**batch).logits)
        model.merge_adapter()
        scores.append(model(**batch).logits)
        model.unmerge_adapter()
        return torch.cat(scores)

    model.set_adapter("second")
    draw(model)
    assert same(run, model)[0].level == "trie"


PROMPTS = {
    peft.PromptTuningConfig: "inputs_embeds instead of input_ids",
    peft.PrefixTuningConfig: "attention_mask is not [B, T]",
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_trained_prompts_run_as_they_did(kind):
    batch = tiny.padded(tiny.rows())
    model = peft.get_peft_model(tiny.model(), kind(task_type="SEQ_CLS", num_virtual_tokens=3))
    theirs, their_grads = tiny.run(model.eval(), **batch)
    rmfast.patch(model)
    ours, our_grads = tiny.run(model, **batch)
    assert torch.equal(ours, theirs) and tiny.grad_error(our_grads, their_grads) == 0
    assert rmfast.report(model).fallbacks == {PROMPTS[kind]: 1}
