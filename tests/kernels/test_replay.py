"""Passes replayed as CUDA graphs.

Without a GPU, what a graph would hold is recorded under the interpreter, and launched again.
"""

import copy
import gc
import itertools
import os
import pickle
import weakref

import numpy as np
import peft
import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

import rmfast
import tiny
from rmfast.packed import patching, replay

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape(TorchDispatchMode):
    """Keeps operations and kernels with their tensors, as a graph does: no Python in between."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def replay(self):
        for step in self.steps:
            step()

    def kernel(self, fn, args, kwargs):
        with _disable_current_modes():
            launch(fn, *args, **kwargs)
        self.steps.append(lambda: launch(fn, *args, **kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rmfast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        asks = WAITS & set(func.tags)
        if func is torch.ops.aten.index.Tensor:
            asks = any(x.dtype == torch.bool for x in tensors(args[1]))
        if asks:
            raise RuntimeError(f"{func} waits for the device\nwhich a capture forbids")
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.steps.append(lambda: func(*args, **kwargs))
            return out
        given = {storage(x) for x in tensors((args, kwargs))}
        made = [x for x in tensors(out) if storage(x) not in given]
        if made and "empty" not in str(func):

            def again():
                new = (x for x in tensors(func(*args, **kwargs)))
                for old, x in zip(tensors(out), new, strict=True):
                    old.copy_(x)

            self.steps.append(again)
        return out


launch = InterpretedFunction.run


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.fixture
def captures(monkeypatch):
    """A list of what was captured, on the CPU too."""
    found, real = [], replay.capture

    def on_gpu(run, pool):
        out = real(run, pool)
        found.append(out)
        return out

    if not INTERPRETED:
        monkeypatch.setattr(replay, "capture", on_gpu)
        return found

    def capture(run, pool):
        tape = Tape()
        with monkeypatch.context() as inner, tape:
            inner.setattr(InterpretedFunction, "run", lambda fn, *a, **k: tape.kernel(fn, a, k))
            out = run()
        found.append(tape)
        return tape.replay, out, pool

    monkeypatch.setattr(replay, "capture", capture)
    monkeypatch.setattr(replay, "may_capture", lambda x: True)
    monkeypatch.setattr(replay, "stream", lambda device: 0)
    return found


def batches(seed=0):
    """Batches whose tries have one rounded size: two prompts, three answers and four in turn."""
    draw = np.random.default_rng(seed)
    for answers in itertools.cycle(((4, 4, 4), (2, 2, 2, 2))):
        prompts = [draw.integers(3, 90, 6).tolist() for _ in range(2)]
        rows = [[*prompts[i % 2], *draw.integers(3, 90, n)] for i, n in enumerate(answers)]
        yield {name: x.to(DEVICE) for name, x in tiny.padded(rows).items()}


def scores(model, batch):
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def check(model, own, batch):
    got, want = scores(model, batch), scores(own, batch)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max(), (got, want)


def patched(family, **config):
    """A patched model with its graphs, and the same unpatched."""
    own = tiny.model(family, **config).eval().to(DEVICE)
    model = rmfast.patch(copy.deepcopy(own), cuda_graphs=True)
    return model, own, patching.attached(model).overrides[0].graphs


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_same_scores(family, captures, poison):
    model, own, graphs = patched(family)
    for batch, _ in zip(batches(), range(5), strict=False):
        check(model, own, batch)
    assert graphs.replayed == 3 and len(captures) == 1
    assert "CUDA graphs: 1 captured, 3 passes replayed" in str(rmfast.report(model))


@pytest.fixture
def replaying(captures):
    """A model that replays, the same unpatched, and its graphs."""
    model, own, graphs = patched("qwen3", num_hidden_layers=1)
    for batch, _ in zip(batches(), range(3), strict=False):
        scores(model, batch)
    assert graphs.replayed == 1
    return model, own, graphs


def trained(model):
    with torch.no_grad():
        for p in model.model.parameters():
            p.mul_(1.5)


def other_weight(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(2 * layer.weight.detach())


def other_eps(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 3 * out)


def wrapper(model):
    before = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * before(x)


def adapter(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.eval()


@pytest.mark.parametrize(
    "change, more", [(trained, 1), (other_weight, 0), (other_eps, 0), (hook, 0), (wrapper, 0),
                     (adapter, 0)],
)  # fmt: skip
def test_changes_are_seen(change, more, replaying):
    model, own, graphs = replaying
    change(model)
    change(own)
    check(model, own, next(batches(1)))
    assert graphs.replayed == 1 + more


def test_calls_that_are_not_replayed(replaying):
    model, own, graphs = replaying
    batch = next(batches(1))
    with torch.autocast(DEVICE, torch.bfloat16):
        scores(model, batch)
    model(**batch).logits.sum().backward()  # with gradients
    with graphs._free:  # another thread replays
        check(model, own, batch)
    check(model, own, {name: x.repeat(1, 1)[:, :4] for name, x in batch.items()})  # other size
    assert graphs.replayed == 1
    check(model, own, batch)
    assert graphs.replayed == 2


def test_capture_that_fails(captures, monkeypatch):
    """As where the model's own code asks the device something."""
    mlp = type(tiny.model("qwen3").model.layers[0].mlp)
    monkeypatch.setattr(
        mlp,
        "forward",
        lambda self, x: self.down_proj(x.repeat(1, 1, 2)[..., :48]) * float(1 + x.any()),
    )
    model, own, graphs = patched("qwen3", num_hidden_layers=1)
    for batch, _ in zip(batches(), range(4), strict=False):
        check(model, own, batch)
    assert graphs.replayed == 0
    why = "aten._local_scalar_dense" if INTERPRETED else ""  # CUDA has words of its own
    assert f"no more, as capture failed: {why}" in str(rmfast.report(model))


def test_copies(replaying):
    model, own, _ = replaying
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(again, own, next(batches(1)))
        assert patching.attached(again).overrides[0].graphs.replayed == 0


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU only gc frees a patched model")
def test_graphs_keep_no_model_alive(captures):
    gc.disable()
    try:
        model = rmfast.patch(tiny.model("qwen3", num_hidden_layers=1).eval(), cuda_graphs=True)
        for batch, _ in zip(batches(), range(3), strict=False):
            scores(model, batch)
        gone = weakref.ref(model.model.layers[0])
        del model
        assert len(captures) == 1 and gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("nodes", [1, 15, 16, 17, 100, 1000, 4095])
@pytest.mark.parametrize("pooled", [1, 2, 3, 64, 65])
def test_rounded(nodes, pooled):
    n, p = replay.rounded(nodes + pooled, pooled)
    assert pooled <= p < 2 * pooled or p == pooled == 1
    assert nodes + p <= n <= max(16, (nodes + p) * 9 / 8 + 1) + 16
