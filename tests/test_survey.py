"""What people change in a patched model between two calls counts at the next one."""

import copy
import functools
import gc
import pickle
import weakref

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

import rmfast
import tiny
from rmfast.benchmarks import host
from rmfast.packed import models, patching, state, survey
from rmfast.packed.step import Step
from rmfast.train.batches import Collator
from rmfast.train.objective import Objective

ROWS = tiny.rows()
INPUTS = tiny.padded(ROWS)
TOKENS = int(INPUTS["attention_mask"].sum())
NODES = len(rmfast.pack(**INPUTS))
WINDOWS = "mask and attention have different sliding windows"
CAUSAL = "attention modules were made bidirectional"
EXACT = 16 * 96 * 2.0**-24  # fp64, but for fp32 rotary frequencies: as in tests/test_rlhf.py
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
make = functools.partial(tiny.model, dtype=torch.float64, attn_implementation="sdpa")


def scores(model):
    with torch.no_grad():
        return model(**INPUTS, use_cache=False).logits  # a layer put twice has one place in a cache


class Watched:
    """A patched model that has run packed once, and how its next calls run."""

    def __init__(self, model, **options):
        self.model, self.ran = rmfast.patch(model, **options), []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: self.ran.append(args[0].shape)
        )
        assert self.nodes() == NODES

    def nodes(self, run=scores):
        """Tokens that a packed call runs."""
        self.ran.clear()
        run(self.model)
        assert all(shape[0] == 1 for shape in self.ran), rmfast.report(self.model)
        return sum(shape[1] for shape in self.ran)

    def why_not(self, run=scores):
        """Why a call runs unpacked."""
        before = rmfast.report(self.model).fallbacks
        self.ran.clear()
        run(self.model)
        assert all(shape[0] == len(ROWS) for shape in self.ran)
        (reason,) = rmfast.report(self.model).fallbacks - before
        return reason

    def is_exact(self):
        """Whether its scores are those of its own code."""
        ours = scores(self.model)
        with patching.unpatched(self.model):
            return tiny.score_error(ours, scores(self.model)) <= EXACT


def nearest(model, kind):
    return next(m for m in model.modules() if isinstance(m, kind))


# --- noise


class Gate(nn.SiLU):
    """An activation with an attribute of any name."""

    def __init__(self, **names):
        super().__init__()
        self.__dict__.update(names)


def attention_chance(model):
    model.model.layers[1].self_attn.attention_dropout = 0.3


def chance_of_a_name_that_was_not_there(model):
    model.model.layers[1].mlp.router_jitter_noise = 0.3


def chance_of_a_dropout_module(model):
    nearest(model, nn.Dropout).p = 0.3


def dropout_put_into_a_layer(model):
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, nn.Dropout())


def activation_replaced(model):
    """By one with as many attributes."""
    model.model.layers[1].mlp.act_fn = Gate(drop=0.3)


def layer_replaced(model):
    model.model.layers[0] = make(attention_dropout=0.3).model.layers[0].train()


@pytest.mark.parametrize(
    "change",
    [
        attention_chance,
        chance_of_a_name_that_was_not_there,
        chance_of_a_dropout_module,
        dropout_put_into_a_layer,
        activation_replaced,
        layer_replaced,
    ],
)
def test_noise(change):
    """Where a module draws noise, prefixes are not shared; while it does not, they are."""
    model = make("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if change is not chance_of_a_dropout_module:
        model = make()
        model.model.layers[1].mlp.act_fn = Gate(alpha=0.3)
    watched = Watched(model.train())
    change(model)
    assert watched.nodes() == TOKENS
    model.eval()
    assert watched.nodes() == NODES and watched.is_exact()
    model.train()
    assert watched.nodes() == TOKENS


def test_noise_that_is_taken_out():
    watched = Watched(make(attention_dropout=0.3))
    watched.model.train()
    assert watched.nodes() == TOKENS
    for layer in watched.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    assert watched.nodes() == NODES


def test_a_packed_batch_is_looked_at_again():
    pairs = [{"chosen_ids": ROWS[0], "rejected_ids": ROWS[1]}]
    watched = Watched(make().train())
    batch = Collator(tiny.PAD)(pairs)

    def step(model):
        model(rmfast_step=Step(batch, Objective()))

    assert watched.nodes(step) == len(batch["input_ids"])
    attention_chance(watched.model)
    step(watched.model)
    reasons = rmfast.report(watched.model).fallbacks
    assert list(reasons) == ["a packed batch with shared prefixes while dropout is active"]


# --- attention


def test_made_bidirectional():
    watched = Watched(make())
    attention = watched.model.model.layers[1].self_attn
    attention.is_causal = False
    assert watched.why_not() == CAUSAL
    attention.is_causal = True
    assert watched.nodes() == NODES
    watched.model.model.layers[0].is_causal = False  # where there was no such name
    assert watched.why_not() == CAUSAL


@pytest.mark.parametrize("where", ["attention", "config"])
def test_windows(where):
    watched = Watched(make("qwen2"))
    sliding = watched.model.model.layers[1].self_attn
    place = sliding if where == "attention" else watched.model.config
    assert sliding.sliding_window == 5
    place.sliding_window = 3
    assert watched.why_not() == WINDOWS
    place.sliding_window = 5
    assert watched.nodes() == NODES


def renamed(model):
    model.set_attn_implementation("eager")


def config_of_one_module(model):
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation_internal = "sdpa"


def layer_of_another_model(model):
    model.model.layers[1] = make().model.layers[0]


def layers_in_another_order(model):
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]


def last_layer_taken_away(model):
    del model.model.layers[2]
    model.config.num_hidden_layers = 2


@pytest.mark.parametrize(
    "change",
    [
        renamed,
        config_of_one_module,
        layer_of_another_model,
        layers_in_another_order,
        last_layer_taken_away,
    ],
)
def test_layers_and_their_configs(change):
    watched = Watched(make())
    change(watched.model)
    assert watched.nodes() == NODES
    assert watched.is_exact()


# --- hooks, adapters


def test_hooks_around_the_model():
    model = make()
    scorer = rmfast.Scorer(model)
    scorer.score(ROWS)
    hook = model.register_forward_hook(lambda *_: None)
    scorer.score(ROWS)
    assert sum(rmfast.report(model).fallbacks.values()) == 1
    hook.remove()
    scorer.score(ROWS)
    assert sum(rmfast.report(model).fallbacks.values()) == 1


def noisy_adapter(model, name="default"):
    config = peft.LoraConfig(**LORA, lora_dropout=0.3, init_lora_weights=False)
    if name == "default":
        return peft.get_peft_model(model, config)
    model.add_adapter(name, config)
    return model


def test_adapters():
    """Added, switched, named for each row, disabled, deleted and merged, without a patch anew."""
    watched = Watched(make())
    plain = scores(watched.model)
    watched.model = model = noisy_adapter(watched.model).double()
    assert watched.nodes() == TOKENS  # an adapter comes in training mode
    model.eval()
    first = scores(model)
    assert watched.nodes() == NODES and watched.is_exact() and not torch.equal(first, plain)
    noisy_adapter(model, "second").double().eval()
    model.set_adapter("second")
    assert watched.nodes() == NODES and watched.is_exact() and not torch.equal(scores(model), first)
    names = ["default", "second", *["__base__"] * (len(ROWS) - 2)]
    reason = watched.why_not(lambda model: model(**INPUTS, adapter_names=names))
    assert reason == "PEFT's adapter_names: each row has an adapter of its own"
    with model.disable_adapter():
        assert watched.nodes() == NODES and watched.is_exact()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert watched.nodes() == NODES
    torch.testing.assert_close(scores(model), first)
    watched.model = merged = model.merge_and_unload().train()
    assert watched.nodes() == NODES and watched.is_exact()  # no dropout is left
    assert tiny.score_error(scores(merged), first) <= EXACT


# --- gradients, other processes, devices


def pieces(watched, run=lambda model: model(**INPUTS)):
    assert watched.nodes(run) == NODES
    return len(watched.ran)


def test_frozen_parameters():
    watched = Watched(make(), max_tokens=10)
    assert pieces(watched) == 1
    watched.model.requires_grad_(False)
    assert pieces(watched) > 1
    watched.model.model.layers[0].input_layernorm.weight.requires_grad_()
    assert pieces(watched) == 1


class DTensor(nn.Parameter):
    pass


def fully_sharded(model):
    norm = model.model.norm
    norm.weight = DTensor(norm.weight.detach())


def deepspeed(model):
    model.model.norm.weight.ds_id = 0


def fsdp(model):
    model.model.layers[0]._is_fsdp_managed_module = True


def tensor_parallel(model):
    model.model.layers[0]._hf_device_mesh = None


@pytest.mark.parametrize("change", [fully_sharded, deepspeed, fsdp, tensor_parallel])
def test_models_that_processes_share(change, monkeypatch):
    """They run as many passes each: not in pieces, whose sizes depend on the memory of one."""
    watched = Watched(make().requires_grad_(False), max_tokens=10)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert pieces(watched) > 1
    change(watched.model)
    assert pieces(watched) == 1


def test_offloaded():
    watched = Watched(make(), max_tokens=10)
    want = scores(watched.model)
    cpu_offload(watched.model, torch.device("cpu"))
    assert watched.model.model.norm.weight.is_meta
    assert pieces(watched, scores) > 1
    assert tiny.score_error(scores(watched.model), want) <= EXACT
    remove_hook_from_submodules(watched.model)
    assert not watched.model.model.norm.weight.is_meta
    assert pieces(watched, scores) > 1


# --- copies, and what is let go of


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_looked_at_for_themselves(copied):
    model = rmfast.patch(make().train())
    scores(model)
    clone = copied(model)
    ours, theirs = Watched(clone), Watched(model)
    attention_chance(clone)
    assert (ours.nodes(), theirs.nodes()) == (TOKENS, NODES)


def test_what_is_taken_out_of_a_model_is_freed():
    model = rmfast.patch(make())
    scores(model)
    gone = weakref.ref(model.model.layers[0].mlp)
    gc.disable()
    try:
        model.model.layers[0].mlp = make().model.layers[0].mlp
        assert gone() is None
    finally:
        gc.enable()
    scores(model)
    assert Watched(model).is_exact()


def test_a_walk_meets_every_module():
    model = make()
    model.model.layers[1] = model.model.layers[2]  # in two places
    model.register_module("nothing", None)
    assert set(survey.walk(model)) == set(model.modules())


@pytest.mark.parametrize("lora", [False, True])
def test_a_call_walks_once(lora, monkeypatch):
    """Whatever else it asks of a model is asked of a few modules, however many layers there are."""
    visited, walked = [], []

    def modules(self, *args, **kwargs):
        for found in named_modules(self, *args, **kwargs):
            visited.append(found)
            yield found

    def walk(root):
        walked.append(root)
        return survey.walk(root)

    def counts(layers):
        out = {}
        for name, call, _ in host.calls(lora, num_hidden_layers=layers, hidden_size=64):
            visited.clear(), walked.clear()
            call()
            out[name] = len(visited), len(walked)
        return out

    named_modules = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", modules)
    monkeypatch.setattr(state, "walk", walk)
    few, more = counts(1), counts(3)
    assert few == more
    assert [walks for _, walks in few.values()] == [1, 1, 1, 1, 0]


def test_modes_are_put_back():
    model = make().eval()
    mixed = [model.model.layers[0], model.score]
    for module in mixed:
        module.training = True
    for change in (model.train, model.eval):
        with models.keeping_modes(model):
            change()
        assert [m for m in model.modules() if m.training] == mixed


def test_the_benchmark_of_the_host(capsys):
    host.main(["--layers", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.endswith(" ms") for line in lines)
    assert all(float(line.split()[-2]) >= 0 for line in lines)
