"""Liger's kernels on one instance: what is bound, undone, refused; with a stand-in for Liger.

``tests/kernels/test_liger.py`` runs its real kernels where they are installed.
"""

import copy
import importlib.machinery
import importlib.util
import pickle
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import rmfast
import tiny
from rmfast.packed import liger

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


# --- a stand-in with the names, arguments and side effects of liger_kernel.transformers.functional


class _SwiGLU(torch.autograd.Function):
    """Writes its gradient over what it saved, as Liger's kernel does."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        gate = a.sigmoid()
        of_a, of_b = grad * b * (gate + a * gate * (1 - gate)), grad * a * gate
        a.data.copy_(of_a)
        b.data.copy_(of_b)
        return a, b


class _Rope(torch.autograd.Function):
    """Turns query and key, and their gradients, where they lie."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return tuple(_turned(x, cos, sin) for x in (q, k))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *(_turned(x, cos, -sin) for x in (dq, dk)), None, None


def _turned(x, cos, sin):  # [B, Hq, T, D], [B or 1, T, D] twice
    flat = x.transpose(1, 2).contiguous()
    left, right = flat.to(cos.dtype).chunk(2, -1)
    cos, sin = (table.chunk(2, -1)[0][:, :, None] for table in (cos, sin))
    flat.data.copy_(torch.cat([left * cos - right * sin, right * cos + left * sin], -1))
    return flat.transpose(1, 2)


@pytest.fixture
def calls(monkeypatch):
    """Liger is there, and so is a GPU; the names of its functions that were called."""
    out = []

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        out.append("norm")
        wide = X.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return wide.to(X.dtype) * W

    def liger_swiglu(a, b):
        out.append("swiglu")
        return _SwiGLU.apply(a, b)

    def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        assert position_ids is None and unsqueeze_dim == 1
        out.append("rope")
        return _Rope.apply(q, k, cos, sin)

    functions = (liger_rms_norm, liger_swiglu, liger_rope)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        install(monkeypatch, name)
    install(monkeypatch, "liger_kernel.transformers.functional", *functions)
    monkeypatch.setattr(liger, "_has_gpu", lambda: True)
    monkeypatch.setattr(liger, "_on_gpu", lambda x: True)
    liger._functional.cache_clear()
    yield out
    liger._functional.cache_clear()


def install(monkeypatch, name, *functions):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function in functions:
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, name, module)


def patch(model, **options):
    return rmfast.patch(model, backbone_kernels="liger", **options)


def replaced(model):
    """Names of the modules whose forward is not that of their class."""
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def kernels_of(model):
    return {n for n in replaced(model) if n.split(".")[-1] in ("mlp", "self_attn") or "norm" in n}


# --- bound and undone


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients(family, calls):
    model = tiny.model(family)
    inputs = tiny.padded(tiny.rows())
    want = tiny.run(model, **inputs)
    patch(model)
    norms = 13 if family == "qwen3" else 7
    assert f"Liger's kernels in 3 Attention, 3 MLP, {norms} RMSNorm" in str(rmfast.report(model))
    got = tiny.run(model, **inputs)
    assert not rmfast.report(model).fallbacks
    assert {name: calls.count(name) for name in set(calls)} == {
        "rope": 4,  # the last layer runs until it has keys and values, then on the pooled rows
        "swiglu": 3,
        "norm": norms + (3 if family == "qwen3" else 1),
    }
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4
    assert got[1].keys() == want[1].keys()


def test_only_this_instance_and_only_until_it_is_unpatched(calls):
    from transformers.models.llama import modeling_llama

    names = dict(vars(modeling_llama))
    model, other = tiny.model("llama"), tiny.model("llama")
    attention = type(model.model.layers[0].self_attn)
    parts = {attention, *map(type, model.model.layers[0].children())}
    classes = {cls: dict(vars(cls)) for cls in parts}
    inputs = tiny.padded(tiny.rows())
    with torch.no_grad():
        want = model(**inputs).logits
        patch(model)
        assert len(kernels_of(model)) == 13 and not replaced(other)
        model(**inputs)
        assert len(calls) == 15
        other(**inputs)
        assert len(calls) == 15
        assert vars(modeling_llama) == names
        assert all(dict(vars(cls)) == before for cls, before in classes.items())
        rmfast.patch(model)
        assert not kernels_of(model), "patched anew without them"
        patch(model)
        patch(model)
        with rmfast.packed.patching.unpatched(model):
            assert not replaced(model)
        assert len(kernels_of(model)) == 13
        rmfast.unpatch(model)
        assert not replaced(model)
        assert torch.equal(model(**inputs).logits, want)
    assert len(calls) == 15


def test_state_dict_copies_and_pickles(calls):
    model = tiny.model("qwen3")
    keys = list(model.state_dict())
    inputs = tiny.padded(tiny.rows())
    patch(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        want = model(**inputs).logits
        count = len(calls)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for module in same.modules():
                forward = module.__dict__.get("forward")
                assert forward is None or forward.module is module
            calls.clear()
            assert torch.equal(same(**inputs).logits, want)
            assert len(calls) == count
            rmfast.unpatch(same)
            assert not replaced(same) and kernels_of(model)


def test_a_language_model(calls):
    """A language model keeps its own forward and loss."""
    model = tiny.model("llama", cls=AutoModelForCausalLM)
    inputs = tiny.padded(tiny.rows())
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    want = model(**inputs, labels=labels)
    patch(model)
    assert rmfast.report(model).level == "backbone"
    got = model(**inputs, labels=labels)
    assert set(calls) == {"norm", "swiglu", "rope"}
    assert got.logits.shape == want.logits.shape
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-4)
    assert "forward" not in model.__dict__


def test_pieces_and_calls_that_run_unpacked(calls):
    model = tiny.model("mistral")
    inputs = tiny.padded(tiny.rows(), "left")
    with torch.no_grad():
        want = model(**inputs).logits
        patch(model, max_tokens=9)
        assert tiny.score_error(model(**inputs).logits, want) <= 1e-4
        assert calls.count("swiglu") >= 9
        assert tiny.score_error(model(**inputs, use_cache=True).logits, want) <= 1e-4
    assert len(rmfast.report(model).fallbacks) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    model = tiny.model("qwen3").train()
    inputs = tiny.padded(tiny.rows())
    want = tiny.run(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    patch(model)
    got = tiny.run(model, **inputs)
    again = calls.count("swiglu") - 3  # of older transformers the last layer, too
    assert again in (2, 3), "layers run again in the backward"
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4


@pytest.mark.parametrize("order", ["patch-then-peft", "peft-then-patch"])
def test_lora(order, calls):
    targets = ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False)
    inputs = tiny.padded(tiny.rows())
    plain = get_peft_model(tiny.model("qwen2"), config).eval()
    want = tiny.run(plain, **inputs)
    if order == "patch-then-peft":
        model = get_peft_model(patch(tiny.model("qwen2")), config)
        model.load_state_dict(plain.state_dict())
    else:
        model = patch(copy.deepcopy(plain))
    got = tiny.run(model.eval(), **inputs)
    assert calls.count("swiglu") == 3
    assert tiny.score_error(got[0], want[0]) <= 1e-4
    assert tiny.grad_error(got[1], want[1]) <= 1e-4


def test_autocast(calls):
    """bf16 autocast: no further from fp64 than without the kernels."""
    exact = tiny.model("qwen3", torch.float64).train()
    batches = [tiny.padded(tiny.rows(seed)) for seed in range(16)]
    oracle = [tiny.run(exact, **inputs) for inputs in batches]
    model = copy.deepcopy(exact).float()

    def errors():
        scores = grads = 0.0
        for inputs, want in zip(batches, oracle, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**inputs).logits
            assert logits.dtype == torch.float32
            model.zero_grad()
            weight = torch.linspace(-1, 2, logits.numel()).view_as(logits)
            (logits * weight).sum().backward()
            got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            scores += (logits.detach().double() - want[0]).square().sum().item()
            grads += tiny.grad_error(got, want[1]) ** 2
        return scores**0.5, grads**0.5

    rmfast.patch(model)
    theirs = errors()
    patch(model)
    ours = errors()
    assert calls.count("swiglu") == 3 * 16
    # the ratio of two RMS errors of 96 scores moves by 1 / sqrt(96) by chance; four of those
    assert ours[0] <= (1.1 + 4 / 96**0.5) * theirs[0]
    assert ours[1] <= (1.1 + 4 / 96**0.5) * theirs[1]


# --- what stays as it was


def test_somebodys_own_forward_stays(calls):
    model = tiny.model("llama")
    mine = model.model.layers[1].mlp
    seen = []

    def forward(x):
        seen.append(x.shape)
        return type(mine).forward(mine, x)

    mine.forward = forward
    inputs = tiny.padded(tiny.rows())
    patch(model)
    assert "2 MLP" in str(rmfast.report(model))
    model(**inputs)
    assert seen and calls.count("swiglu") == 2
    rmfast.unpatch(model)
    assert mine.forward is forward


def test_fp64_runs_as_it_was(calls):
    model = tiny.model("qwen3", torch.float64)
    inputs = tiny.padded(tiny.rows())
    want = tiny.run(model, **inputs)
    got = tiny.run(patch(model), **inputs)
    assert not calls
    assert tiny.score_error(got[0], want[0]) <= 1e-12
    assert tiny.grad_error(got[1], want[1]) <= 1e-5  # the model's own fp32 rotary tables


def test_norms_kept_in_fp32(calls):
    """As peft.prepare_model_for_kbit_training leaves them: transformers' output dtype, not x's."""
    model = tiny.model("qwen3", torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.float()
    norm = model.model.layers[0].self_attn.q_norm
    x = torch.randn(1, 5, 4, 8, dtype=torch.bfloat16)
    want = norm(x)
    patch(model)
    assert torch.equal(norm(x), want) and norm(x).dtype == torch.float32
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        model(**tiny.padded(tiny.rows()))
    assert "rope" not in calls, "fp32 queries are not turned in the tables' bf16"
    assert calls.count("norm") == 8, "the others have their kernel"


def test_on_the_cpu_they_wait(calls, monkeypatch):
    monkeypatch.setattr(liger, "_on_gpu", lambda x: x.is_cuda)
    model = tiny.model("llama")
    inputs = tiny.padded(tiny.rows())
    with torch.no_grad():
        want = rmfast.patch(model)(**inputs).logits
        assert torch.equal(patch(model)(**inputs).logits, want)
    assert not calls
    assert "the model is not on a GPU" in str(rmfast.report(model))


def test_a_second_backward_is_refused(calls):
    """The kernel's gradient lies where its input was: a silently wrong one would come out."""
    model = patch(tiny.model("llama"))
    score = model(**tiny.padded(tiny.rows())).logits.sum()
    score.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward .*without backbone_kernels"):
        score.backward()


# --- refused


def test_refused_without_a_gpu_or_the_package(calls, monkeypatch):
    model = rmfast.patch(tiny.model("llama"), pooling="mask")
    monkeypatch.setattr(liger, "_has_gpu", lambda: False)
    with pytest.raises(ValueError, match=r"'liger' needs a GPU, and torch sees none"):
        patch(model)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"pip install 'rmfast\[liger\]'"):
        patch(model)
    assert rmfast.packed.patching.attached(model).options.pooling == "mask", "left as it was"
    assert not kernels_of(model)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "bert", "qwen3_moe", "bloom"])
def test_refused_by_family(family, calls):
    with pytest.raises(ValueError, match=f"llama, mistral, qwen2, qwen3, and this is {family}:"):
        patch(tiny.model(family))


def test_refused_by_option(calls):
    with pytest.raises(ValueError, match=r"must be 'liger' or None, got 'unsloth'"):
        rmfast.patch(tiny.model("llama"), backbone_kernels="unsloth")
    with pytest.raises(ValueError, match=r"choose it or backbone_kernels='liger'"):
        patch(tiny.model("llama"), compile=True)
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        patch(tiny.model("llama", hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"this is Linear"):
        patch(torch.nn.Linear(2, 2))


def test_refused_where_all_is_somebody_elses(calls):
    model = tiny.model("llama")
    for module in model.model.modules():
        module.forward = type(module).forward.__get__(module)
    with pytest.raises(ValueError, match="no module of this LlamaModel"):
        patch(model)


def test_this_machine():
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        pytest.skip("here it would not be refused")
    with pytest.raises(ValueError, match=r"backbone_kernels='liger' needs"):
        patch(tiny.model("llama"))
