"""The elementwise kernels in patched models: where they are put, what they give, what stays."""

import copy
import pickle
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import rmfast
import tiny
from rmfast.packed import elementwise, last_layer, scoring

KINDS = ("RMSNorm", "gated MLP", "rotary")
FOUND = {  # of three layers
    "llama": (7, 3, 3),
    "mistral": (7, 3, 3),
    "qwen2": (7, 3, 3),
    "qwen3": (13, 3, 3),
    "gemma": (7, 3, 3),
    "gemma2": (13, 3, 3),
    "gemma3_text": (19, 3, 3),
    "olmo2": (13, 3, 0),  # its rotary embedding is fp32's
    "phi3": (7, 0, 0),  # gate and up are one projection, and only a part of a head is turned
    "phi": (0, 0, 3),  # the part of a head that is turned is cut out before
    "glm4": (13, 0, 0),
    "starcoder2": (0, 0, 3),
    "gpt2": (0, 0, 0),
}


def kernels_of(model):
    """Kinds of the stand-ins on a model, by the names of the modules."""
    found = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    found = {k: f.__self__ for k, f in found.items() if elementwise.Kernel.is_in(None, f)}
    return {name: module.__dict__["_rmfast_kernel"].name for name, module in found.items()}


def batch(device, seed=0):
    return {name: x.to(device) for name, x in tiny.padded(tiny.rows(seed)).items()}


@pytest.fixture
def seen(launches):
    from rmfast.kernels import elementwise as kernels

    return launches(kernels)


@pytest.mark.parametrize("family", FOUND)
def test_what_is_found(family):
    model = tiny.model(family)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    names = list(model.state_dict())
    rmfast.patch(model)
    found = list(kernels_of(model).values())
    assert tuple(found.count(kind) for kind in KINDS) == FOUND[family]
    line = [r for r in rmfast.report(model).reasons if "kernels: " in r]
    assert len(line) == any(FOUND[family])
    assert all(f"{n} {kind}" in line[0] for n, kind in zip(FOUND[family], KINDS, strict=True) if n)
    assert list(model.state_dict()) == names
    rmfast.unpatch(model)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi"])
def test_scores_and_gradients(family, device, seen):
    model = tiny.model(family).to(device)
    want = tiny.run(model, **batch(device))
    rmfast.patch(model, attention="auto", prune_last_layer=False)
    got = tiny.run(model, **batch(device))
    assert not rmfast.report(model).fallbacks
    norms, mlps, ropes = FOUND[family]
    assert seen.count("_norm_kernel") == seen.count("_norm_backward_kernel") == norms
    assert seen.count("_gated_kernel") == seen.count("_gated_backward_kernel") == mlps
    assert seen.count("_rotary_kernel") == 2 * ropes
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4
    assert got[1].keys() == want[1].keys()


def test_half_precision(device, seen):
    """No further from fp64 than transformers' own run in fp16."""
    exact = tiny.model("qwen3", torch.float64, num_hidden_layers=2).to(device)
    model = copy.deepcopy(exact).half()
    exact.load_state_dict(model.state_dict())
    batches = [batch(device, seed) for seed in range(8)]

    def scores(model):
        with torch.no_grad():
            return torch.cat([model(**inputs).logits.double() for inputs in batches])

    oracle, theirs = scores(exact), scores(model)
    ours = scores(rmfast.patch(model, attention="auto"))
    assert "_norm_kernel" in seen
    theirs, ours = ((x - oracle).square().mean().sqrt() for x in (theirs, ours))
    # two RMS errors of 48 scores: their ratio moves by 1 / sqrt(48) by chance; four of those
    assert ours <= (1.1 + 4 / 48**0.5) * theirs


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_calls_that_run_unpacked(reentrant, device, seen):
    model = tiny.model("llama", num_hidden_layers=2).to(device).train()
    want = tiny.run(model, **batch(device))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    rmfast.patch(model, attention="auto")
    got = tiny.run(model, **batch(device))
    assert seen.count("_gated_kernel") > 2, "a layer runs again in the backward"
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4
    model.eval()
    seen.clear()
    with torch.no_grad():
        assert tiny.score_error(model(**batch(device), use_cache=True).logits, want[0]) <= 1e-4
    assert seen.count("_rotary_kernel") == 2 and len(rmfast.report(model).fallbacks) == 1


@pytest.mark.parametrize("order", ["patch-then-peft", "peft-then-patch"])
def test_lora(order, device, seen):
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False)
    plain = get_peft_model(tiny.model("qwen2", num_hidden_layers=2), config).eval().to(device)
    want = tiny.run(plain, **batch(device))
    if order == "patch-then-peft":
        inner = rmfast.patch(tiny.model("qwen2", num_hidden_layers=2), attention="auto")
        model = get_peft_model(inner, config).to(device)
        model.load_state_dict(plain.state_dict())
    else:
        model = rmfast.patch(copy.deepcopy(plain), attention="auto")
    got = tiny.run(model.eval(), **batch(device))
    assert seen.count("_gated_backward_kernel") == 2 and "_sum_kernel" not in seen
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4


def test_copies_and_pickles(device, seen):
    model = rmfast.patch(tiny.model("qwen3").to(device), attention="auto")
    with torch.no_grad():
        want = model(**batch(device)).logits
        count = len(seen)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            seen.clear()
            assert torch.equal(same(**batch(device)).logits, want) and len(seen) == count
            assert kernels_of(same) == kernels_of(model)
            assert all(m.__dict__["forward"].__self__ is m for m in _modules_of(same))
            rmfast.unpatch(same)
            assert not kernels_of(same) and kernels_of(model)


def _modules_of(model):
    return [m for name, m in model.named_modules() if name in kernels_of(model)]


def test_a_language_model(device, seen):
    model = tiny.model("gemma", cls=AutoModelForCausalLM).to(device)
    with torch.no_grad():
        want = model(**batch(device)).logits
        rmfast.patch(model, attention="auto")
        got = model(**batch(device)).logits
    mask = batch(device)["attention_mask"].bool()
    assert {"_norm_kernel", "_gated_kernel", "_rotary_kernel"} == set(seen)
    assert rmfast.report(model).level == "backbone"
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=1e-4)


def test_compiled_layers_keep_the_kernels(device, seen):
    """Each is one op of the graph, which nothing breaks and which all layers have in common."""
    model = rmfast.patch(tiny.model("llama").to(device), attention="auto")
    got = {}
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: got.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    model(**batch(device))
    hook.remove()
    for layer, again in zip(model.model.layers, (False, True), strict=False):
        want = layer(*got["args"], **got["kwargs"])
        layer.compile(fullgraph=True, dynamic=True, backend="eager")
        seen.clear()
        with torch._dynamo.config.patch(error_on_recompile=again):
            torch.testing.assert_close(layer(*got["args"], **got["kwargs"]), want)
        assert [seen.count(f"_{name}_kernel") for name in ("norm", "gated", "rotary")] == [2, 1, 1]


# --- what stays as it was


def test_without_a_gpu_there_is_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = rmfast.patch(tiny.model())
    assert not kernels_of(model) and "kernels: " not in str(rmfast.report(model))


def test_on_the_cpu_of_a_gpu_machine_they_wait(monkeypatch):
    model = tiny.model("qwen3", torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    scores = []
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        rmfast.patch(model)
        assert len(kernels_of(model)) == 19 * there
        scores.append(tiny.run(model, **batch("cpu")))
    (want, want_grads), (got, got_grads) = scores
    assert torch.equal(got, want)
    assert all(torch.equal(got_grads[name], g) for name, g in want_grads.items())


class Louder(nn.Module):
    """Somebody's norm, written as Llama's but for one number."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(4).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def test_what_is_somebodys_own_stays(device, seen):
    model = tiny.model("llama", hidden_act="gelu").to(device)
    layer = model.model.layers[1]
    layer.input_layernorm = Louder(layer.input_layernorm)
    norm = layer.post_attention_layernorm
    norm.forward = forward = type(norm).forward.__get__(norm)
    rmfast.patch(model)
    found = kernels_of(model)
    assert sorted(found.values()) == ["RMSNorm"] * 5 + ["rotary"] * 3
    assert norm.forward is forward
    rmfast.unpatch(model)
    assert norm.forward is forward and not kernels_of(model)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_the_activation_sees_it(kind, device, seen):
    model = tiny.model("llama", num_hidden_layers=2).to(device)
    rmfast.patch(model, attention="auto")
    calls = []
    mlp = model.model.layers[0].mlp
    register = getattr(mlp.act_fn, f"register_{kind}_hook")
    register(lambda *args: calls.append(args[0]))
    tiny.run(model, **batch(device))
    assert calls == [mlp.act_fn] and seen.count("_gated_kernel") == 1
    mlp.act_fn = nn.Tanh()
    with torch.no_grad():
        x = torch.randn(3, 32, device=device)
        assert torch.equal(mlp(x), mlp.down_proj(torch.tanh(mlp.gate_proj(x)) * mlp.up_proj(x)))


@pytest.mark.parametrize(
    "what", ["norm", "gemma's norm", "MLP", "attention", "rotary", "activation"]
)
def test_what_is_replaced_after_the_patch_runs(what, device, seen, monkeypatch):
    """On the class or in the module of transformers, as other libraries do."""
    model = tiny.model("gemma" if "gemma" in what else "llama", num_hidden_layers=2).to(device)
    rmfast.patch(model, attention="auto")
    layer = model.model.layers[0]
    module = sys.modules[type(layer).__module__]
    place, name, count = {
        "norm": (type(model.model.norm), "forward", "_norm_kernel"),
        "gemma's norm": (type(model.model.norm), "_norm", "_norm_kernel"),
        "MLP": (type(layer.mlp), "forward", "_gated_kernel"),
        "attention": (type(layer.self_attn), "forward", "_rotary_kernel"),
        "rotary": (module, "apply_rotary_pos_emb", "_rotary_kernel"),
        "activation": (layer.mlp.act_fn, "forward", "_gated_kernel"),
    }[what]
    calls, before = [], getattr(place, name)

    def other(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(place, name, other)
        model(**batch(device))
    assert calls and seen.count(count) == (what == "activation")
    with torch.no_grad():
        model(**batch(device))
    assert seen.count(count) >= 2


def test_sdpa_is_the_way_out(device, seen):
    model = rmfast.patch(tiny.model("llama").to(device), attention="sdpa")
    with torch.no_grad():
        model(**batch(device))
    assert not kernels_of(model) and not seen


def test_the_final_norm_runs_on_pooled_rows(device, seen):
    model = rmfast.patch(tiny.model("llama", num_hidden_layers=2).to(device), attention="auto")
    rows = []
    forward = last_layer.pooled_rows
    assert last_layer.ends_with_norm(model.model)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(scoring, "pooled_rows", lambda h, *a: rows.append(len(h)) or forward(h, *a))
        scores = model(**batch(device)).logits
    assert len(rows) == 1 and rows[0] <= len(scores)


def test_second_derivatives_of_calls_that_run_unpacked(device, seen):
    model = tiny.model("qwen3", num_hidden_layers=1, attn_implementation="eager").to(device)
    embeds = torch.randn(1, 4, 32, device=device, requires_grad=True)

    def twice():
        out = model(inputs_embeds=embeds).logits.sum()
        (first,) = torch.autograd.grad(out, embeds, create_graph=True)
        return torch.autograd.grad(first.square().sum(), embeds)[0]

    want = twice()
    rmfast.patch(model, attention="auto")
    assert (twice() - want).abs().max() <= 1e-4 * want.abs().max()
    assert {"_norm_kernel", "_gated_kernel", "_rotary_kernel"} <= set(seen)


def test_dtypes_are_those_of_transformers(device, seen):
    """Norms kept in fp32, as peft.prepare_model_for_kbit_training leaves them; fp64."""
    model = tiny.model("qwen3", torch.float16).to(device)
    attention = model.model.layers[0].self_attn.float()
    wide = copy.deepcopy(attention.q_norm).double()
    x = torch.randn(1, 5, 4, 8, dtype=torch.float16, device=device)
    want = attention.q_norm(x), wide(x.double())
    rmfast.patch(model)
    got = attention.q_norm(x)
    assert got.dtype == want[0].dtype == torch.float32 and seen == ["_norm_kernel"]
    assert (got - want[0]).abs().max() <= 2**-10 * want[0].abs().max()
    attention.q_norm.double()
    assert torch.equal(attention.q_norm(x.double()), want[1]) and len(seen) == 1
