"""Layers on several devices, as accelerate's ``device_map`` has it, and what a device may lack.

There is one real device here. The second is make-believe: its tensors say they are on ``meta``,
hold numbers all the same, refuse to meet tensors of the CPU and, as on MPS, to be fp64.
"""

import copy
import functools
import os
import types
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import rmfast
import tiny
from rmfast.diagnosis import trials
from rmfast.diagnosis.case import Case
from rmfast.evaluate import implicit
from rmfast.packed import attention, pieces, step
from rmfast.packed.survey import is_sharded
from rmfast.score import memory
from rmfast.train import batches
from rmfast.train import objective as train_objective
from rmfast.trie import PackedTrie, moved

CPU, THERE = torch.device("cpu"), torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(torch.Tensor):
    """A tensor on the other device."""

    @staticmethod
    def __new__(cls, held):
        like = {"strides": held.stride(), "dtype": held.dtype, "device": THERE}
        return cls._make_wrapper_subclass(cls, held.size(), **like)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs, fp64=True):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, There) for x in tensors]
    if any(there) and op not in COPIES:
        strangers = [x for x in tensors if not isinstance(x, There) and x.ndim]
        assert not strangers, f"{op} of tensors on two devices"
    asked = kwargs.get("device")
    onto = torch.device(asked) == THERE if asked is not None else any(there)
    if op is torch.ops.aten.copy_.default:
        onto = there[0]
    if asked is not None:
        kwargs = kwargs | {"device": CPU}
    args_, kwargs_ = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    out = op(*args_, **kwargs_)
    if op._schema.is_mutable and isinstance(out, torch.Tensor):
        return args[0]

    def on(x):
        if not (isinstance(x, torch.Tensor) and onto):
            return x
        assert fp64 or x.dtype != torch.float64, f"{op}: no fp64 on this device"
        return There(x)

    return tree_map(on, out)


class TwoDevices(TorchDispatchMode):
    def __init__(self, fp64=True):
        super().__init__()
        self.fp64 = fp64

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {}, self.fp64)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """To ask for it on ``meta`` is an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.fixture
def no_inference_mode(monkeypatch):
    """Of which what is make-believe here knows nothing."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)


def here(x):
    return x.held if isinstance(x, There) else x


def move(module):
    """A module's own weights to the other device."""
    for name, p in module._parameters.items():
        module._parameters[name] = p if p is None else nn.Parameter(There(p.data))
    for name, x in module._buffers.items():
        module._buffers[name] = x if x is None else There(x)


def split(there, model):
    """A model with these of its modules on the other device, and accelerate's hooks."""
    for name, module in model.named_modules():
        moved = any(f"{name}.".startswith(f"{prefix}.") for prefix in there)
        if moved:
            move(module)
        hook = AlignDevicesHook(THERE if moved else CPU, io_same_device=name == "")
        hook.init_hook = lambda module: module  # everything is in its place
        block = name.rpartition(".")[2].isdigit()
        if block or name in ("", *there) or module._parameters or module._buffers:
            add_hook_to_module(module, hook)
    return model


def offloaded(model):
    return cpu_offload(model, CPU)


def on_disk(folder, model):
    return disk_offload(model, folder, CPU)


def mapped(folder, model):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(
        model, places | {"score": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def in_order(order, model, dispatch, **options):
    if order == "patch-first":
        return dispatch(rmfast.patch(model, **options))
    return rmfast.patch(dispatch(model), **options)


INPUTS = tiny.padded(tiny.rows()) | {"use_cache": False}
NODES = len(rmfast.pack(tiny.rows()))
ORDER = pytest.mark.parametrize("order", ["patch-first", "dispatch-first"])
PLACES = {
    "one layer": ["model.layers.1"],
    "the rest": ["model.layers.1", "model.layers.2", "model.norm", "score"],
    "not the head": ["model.layers.2", "model.norm"],
    "head": ["score"],
    "embeddings": ["model.embed_tokens", "model.layers.0"],
}
# sums of fp64 in another order; rotary frequencies, and what is made of them, are fp32
SCORES, GRADIENTS = 1e-12, 16 * 96 * 2.0**-24


@ORDER
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral"])
def test_layers_on_two_devices(family, place, order, monkeypatch):
    want, grads = tiny.run(tiny.model(family, torch.float64), **INPUTS)
    model = tiny.model(family, torch.float64)
    model = in_order(order, model, functools.partial(split, PLACES[place]), max_tokens=12)
    copied, to = [], PackedTrie.to
    monkeypatch.setattr(PackedTrie, "to", lambda *args: copied.append(args[1]) or to(*args))
    with TwoDevices():
        ours, our_grads = tiny.run(model, **INPUTS)
        assert copied.count(THERE) <= 1  # once a batch, for all layers there
        with torch.no_grad():
            in_pieces = model(**INPUTS).logits
    assert rmfast.report(model).level == "trie"
    assert not rmfast.report(model).fallbacks
    for logits in (ours, in_pieces):
        assert type(logits) is torch.Tensor  # where the input was
        assert tiny.score_error(logits, want) <= SCORES
    assert tiny.grad_error({n: here(g) for n, g in our_grads.items()}, grads) <= GRADIENTS


@ORDER
@pytest.mark.parametrize("place", PLACES)
def test_a_packed_batch_on_two_devices(place, order):
    rows = tiny.rows()
    examples = [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in zip(rows[:3], rows[3:], strict=True)
    ]
    batch, objective = batches.Collator(tiny.PAD)(examples), train_objective.Objective()

    def loss_of(model):
        model.zero_grad()
        loss = model(rmfast_step=step.Step(batch, objective)).loss
        loss.backward()
        return loss.detach(), {n: here(p.grad) for n, p in model.named_parameters()}

    want = loss_of(rmfast.patch(tiny.model(dtype=torch.float64)))
    dispatch = functools.partial(split, PLACES[place])
    model = in_order(order, tiny.model(dtype=torch.float64), dispatch)
    with TwoDevices():
        got = loss_of(model)
    torch.testing.assert_close(here(got[0]), want[0], rtol=SCORES, atol=SCORES)
    assert tiny.grad_error(got[1], want[1]) <= GRADIENTS


@ORDER
@pytest.mark.parametrize("place", ["one layer", "the rest", "not the head", "embeddings"])
def test_a_backbone_on_two_devices(place, order):
    there = [name for name in PLACES[place] if name != "score"]
    inputs = INPUTS | {"output_hidden_states": True}
    make = functools.partial(tiny.model, "llama", torch.float64, cls=AutoModelForCausalLM)
    want = make()(**inputs)
    model = in_order(order, make(), functools.partial(split, there))
    with TwoDevices():
        got = model(**inputs)
    assert rmfast.report(model).level == "backbone"
    keep = INPUTS["attention_mask"].bool()
    pairs = [(got.logits, want.logits), *zip(got.hidden_states, want.hidden_states, strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(here(ours)[keep], theirs[keep], rtol=1e-9, atol=1e-9)


@ORDER
@pytest.mark.parametrize("there", [["transformer.h.2", "transformer.ln_f"], ["score"]])
def test_padded_batches_on_two_devices(there, order):
    want, grads = tiny.run(tiny.model("bloom", torch.float64), **INPUTS)
    model = tiny.model("bloom", torch.float64)
    model = in_order(order, model, functools.partial(split, there))
    with TwoDevices():
        ours, our_grads = tiny.run(model, **INPUTS)
    assert rmfast.report(model).level == "head"
    assert tiny.score_error(here(ours), want) <= SCORES
    assert tiny.grad_error({n: here(g) for n, g in our_grads.items()}, grads) <= GRADIENTS


@ORDER
def test_bulk_on_two_devices(order, no_inference_mode):
    with torch.no_grad():
        want = tiny.model(dtype=torch.float64)(**INPUTS).logits[:, 0]
    dispatch = functools.partial(split, PLACES["not the head"])
    model = in_order(order, tiny.model(dtype=torch.float64), dispatch)
    with TwoDevices():
        scorer = rmfast.Scorer(model, max_tokens=12)
        got = torch.from_numpy(scorer.score(tiny.rows()))
        assert scorer.stats.tokens_run == NODES
    assert tiny.score_error(got, want) <= 2.0**-23 * (1 + want.abs().max() / want.std())


@ORDER
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
def test_weights_that_are_loaded_when_they_are_needed(where, family, order, tmp_path):
    with torch.no_grad():
        want = tiny.model(family, torch.float64)(**INPUTS).logits
    kinds = {"cpu": offloaded, "disk": on_disk, "map": mapped}
    dispatch = kinds[where] if where == "cpu" else functools.partial(kinds[where], tmp_path)
    model = in_order(order, tiny.model(family, torch.float64), dispatch, max_tokens=12)
    ran = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: ran.append(args[0]))
    with torch.no_grad():
        assert tiny.score_error(model(**INPUTS).logits, want) <= SCORES
    assert sum(x.numel() for x in ran) == NODES and len(ran) > 1
    scorer = rmfast.Scorer(model, max_tokens=12)
    got = torch.from_numpy(scorer.score(tiny.rows()))
    assert tiny.score_error(got, want[:, 0]) <= 2.0**-23 * (1 + want.abs().max() / want.std())
    assert scorer.about()["level"] == "trie" and not scorer.about()["fallbacks"]
    assert model.score.weight.is_meta
    rmfast.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, want)


@ORDER
def test_hooks_that_are_taken_away(order):
    want = tiny.model(dtype=torch.float64)(**INPUTS).logits
    dispatch = functools.partial(dispatch_model, device_map={"": "cpu"}, force_hooks=True)
    model = in_order(order, tiny.model(dtype=torch.float64), dispatch)
    clone = copy.deepcopy(model)
    assert tiny.score_error(clone(**INPUTS).logits, want) <= SCORES
    remove_hook_from_submodules(model)
    assert tiny.score_error(model(**INPUTS).logits, want) <= SCORES
    assert rmfast.report(model).level == "trie"
    assert not rmfast.report(model).fallbacks
    rmfast.unpatch(model)
    assert torch.equal(model(**INPUTS).logits, want)


def test_a_wrapper_over_the_hooks_stays_outermost():
    model = dispatch_model(tiny.model(dtype=torch.float64), {"": "cpu"}, force_hooks=True)
    tiny.double(model)
    want = model(**INPUTS).logits
    rmfast.patch(model)
    assert rmfast.report(model).level == "backbone"
    assert tiny.score_error(model(**INPUTS).logits, want) <= SCORES


# --- a device without fp64


def everything(model):
    for module in model.modules():
        move(module)
    return model


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bulk_without_fp64(family, no_inference_mode):
    with torch.no_grad():
        want = tiny.model(family)(**INPUTS).logits[:, 0]
    model = everything(tiny.model(family, use_cache=False))
    with TwoDevices(fp64=False):
        got = torch.from_numpy(rmfast.Scorer(model, max_tokens=200).score(tiny.rows()))
    assert tiny.score_error(got, want) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_implicit_rewards_without_fp64(family, no_inference_mode):
    make = functools.partial(tiny.model, family, cls=AutoModelForCausalLM)

    def rewards(policy):
        reference = make()
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(0.9)
        if isinstance(next(policy.parameters()), There):
            everything(reference)
        scorer = implicit.ImplicitScorer(policy, reference, max_tokens=200)
        return torch.from_numpy(scorer.score_pairs([tuple(tiny.rows()[:2])] * 2))

    want = rewards(make())
    with TwoDevices(fp64=False):
        got = rewards(everything(make()))
    assert tiny.score_error(got, want) <= 1e-4


def test_the_doctors_trials_without_fp64():
    model = tiny.model()
    case = Case(model)
    with torch.no_grad():
        want = trials.batch_scores(case, model, tiny.rows())
    everything(model).config.use_cache = False
    with TwoDevices(fp64=False), torch.no_grad():
        got = trials.batch_scores(case, model, tiny.rows())
    assert got.dtype == torch.float64
    assert tiny.score_error(got, want) <= 1e-4


# --- tensor parallelism, as transformers has it: two processes, each with half of every layer


def worker(rank, port, family, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    model = AutoModelForSequenceClassification.from_pretrained(
        Path(folder) / family, tp_plan="auto", dtype=torch.float64
    ).eval()
    assert is_sharded(model.modules())
    memory.free_bytes = lambda device: [1, 1 << 60][rank]  # bytes: each has a memory of its own

    def trained():
        logits, grads = tiny.run(model, **INPUTS)
        return logits, {n: getattr(g, "_local_tensor", g) for n, g in grads.items()}

    found = {"theirs": trained()}
    rmfast.patch(model, max_tokens=12)
    found |= {"ours": trained(), "report": rmfast.report(model)}
    with torch.no_grad():
        found["scores"] = model(**INPUTS).logits
    bulk = rmfast.Scorer(model)
    found |= {"bulk": torch.from_numpy(bulk.score(tiny.rows())), "max_tokens": bulk.max_tokens}
    torch.save(found, Path(folder) / f"{family}-{rank}.pt")
    processes.leave()


FAMILIES = ("llama", "qwen3")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for family in FAMILIES:
        tiny.model(family, torch.float64).save_pretrained(folder / family)
    return processes.launch("test_devices", FAMILIES, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_processes(family, two_processes):
    with torch.no_grad():
        want = tiny.model(family, torch.float64)(**INPUTS).logits
    ranks = [torch.load(two_processes / f"{family}-{i}.pt", weights_only=False) for i in range(2)]
    for got in ranks:
        assert got["report"].level == "trie"
        assert not got["report"].fallbacks
        assert "run at once" not in str(got["report"])  # whole, on both alike
        (theirs, their_grads), (ours, our_grads) = got["theirs"], got["ours"]
        for scores in (theirs, ours, got["scores"]):
            assert tiny.score_error(scores, want) <= SCORES
        assert tiny.grad_error(our_grads, their_grads) <= GRADIENTS  # of this process's parts
        error = 2.0**-23 * (1 + want.abs().max() / want.std())
        assert tiny.score_error(got["bulk"], want[:, 0]) <= error
    assert ranks[0]["max_tokens"] == ranks[1]["max_tokens"]


def test_memory_that_runs_out_where_the_model_is_sharded():
    """Halved on one process alone, it would wait for the other for ever."""

    def work():
        raise torch.OutOfMemoryError("out of memory")

    budget = pieces.Budget(64, fixed=True)
    with pytest.raises(MemoryError, match="sharded: set max_tokens"):
        budget.attempt(work, size=1)
    assert (budget.tokens, budget.halvings) == (64, 0)


# --- copies between the devices, all of a model being on the other one

WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten._unique2}


class Transfers(TwoDevices):
    """Lists them: to the other device, or back, for which the host waits."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(op, types, args, kwargs)
        ends = [isinstance(x, There) for x in (args[:2] if op is COPIES[1] else (*args[:1], out))]
        if op in COPIES and ends[0] != ends[1]:
            self.listed.append("there" if ends[0] == (op is COPIES[1]) else "back")
        elif op.overloadpacket in WAITS and any(isinstance(x, There) for x in args):
            self.listed.append("back")
        return out


@pytest.fixture
def transfers(monkeypatch, no_inference_mode):
    """The list, but for what the CPU's attention, which runs here, reads of the trie."""
    mode, attend = Transfers(), attention.trie_attention
    mode.listed = []

    def unseen(*args, **kwargs):
        before = mode.listed[:]
        try:
            return attend(*args, **kwargs)
        finally:
            mode.listed[:] = before

    monkeypatch.setattr(attention, "trie_attention", unseen)
    with mode:
        yield mode.listed


def all_there(cls=AutoModelForSequenceClassification, **options):
    model = rmfast.patch(tiny.model(cls=cls), **options)
    for module in model.modules():
        move(module)
    return model


def inputs_there():
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"].bool()
    there = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(16)[None]}
    return {name: There(x) for name, x in there.items()}


@pytest.mark.parametrize(
    "cls", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_a_call_is_fetched_in_one_copy_and_sent_in_one(cls, transfers):
    want = tiny.model(cls=cls)(**INPUTS).logits.detach()
    got = all_there(cls)(**inputs_there()).logits.held
    assert transfers == ["back", "there"]
    if got.ndim == 3:  # hidden states of padding are zeros
        got, want = (x[INPUTS["attention_mask"] != 0] for x in (got, want))
    assert tiny.score_error(got, want) <= 1e-4


def test_pieces_are_sent_in_one_copy_each_and_nothing_waits(transfers):
    want = tiny.model()(**INPUTS).logits.detach()
    model, passes = all_there(max_tokens=12), []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        got = model(**inputs_there()).logits.held
    assert len(passes) >= 4 and tiny.score_error(got, want) <= 1e-4
    # and where in them each sequence is scored
    assert transfers == ["back"] + ["there"] * (len(passes) + 1)


def test_scores_of_a_window_are_fetched_in_one_copy(transfers):
    want = tiny.model()(**INPUTS).logits.detach()[:, 0]
    seen = []
    scorer = rmfast.Scorer(
        all_there(), max_tokens=12, progress=lambda *_: seen.append(transfers[:])
    )
    got = torch.from_numpy(scorer.score(tiny.rows()))
    assert tiny.score_error(got, want) <= 1e-4
    assert seen == [["there"] * (i + 1) for i in range(scorer.stats.micro_batches)]
    assert transfers == [*seen[-1], "there", "back"] and len(seen) >= 4


def test_padded_batches_are_sent_in_one_copy_each_and_fetched_together(transfers):
    model = torch.nn.Linear(1, 1).eval()  # no decoder: it runs padded
    move(model)
    model.config = types.SimpleNamespace(num_labels=1, pad_token_id=tiny.PAD, vocab_size=tiny.VOCAB)

    def forward(input_ids, attention_mask):
        return types.SimpleNamespace(
            logits=(input_ids * attention_mask).sum(1, keepdim=True).float()
        )

    model.forward = forward
    scorer = rmfast.Scorer(model, max_tokens=32)
    scorer._pads_count = False  # what tries it looks at scores
    assert scorer.score(tiny.rows()).tolist() == [sum(row) for row in tiny.rows()]
    assert transfers == ["there"] * scorer.stats.micro_batches + ["back"]
    assert scorer.stats.micro_batches >= 3


def test_of_a_packed_batch_nothing_is_moved_unless_it_runs_padded(transfers):
    rows = tiny.rows()
    batch = batches.Collator(tiny.PAD)([{"chosen_ids": rows[0], "rejected_ids": rows[1]}])
    batch = {n: There(x) if isinstance(x, torch.Tensor) else x for n, x in batch.items()}

    def objective(given, batch):
        scores = given.scores()
        return scores.sum(), scores.detach(), None

    all_there()(rmfast_step=step.Step(batch, objective)).loss.backward()
    assert transfers == []
    inputs = step.padded(batch, tiny.PAD)
    assert transfers == ["back", "there"]
    for name, x in tiny.padded(rows[:2]).items():
        assert torch.equal(inputs[name].held, x)


def test_moved_tensors_are_the_same():
    tensors = [
        torch.arange(5), None, torch.tensor([True, False, True]), torch.arange(9)[3::4][:1],
        torch.from_numpy(np.flatnonzero(np.zeros(3))),
        torch.tensor(3.5, dtype=torch.float64), torch.arange(6, dtype=torch.int32).view(2, 3).T,
    ]  # fmt: skip
    with TwoDevices():
        there = moved(tensors, THERE)
        back = moved(there, CPU)
        mixed = moved([tensors[0], there[2]], CPU)
    assert all(x.device == THERE for x in there if x is not None)
    for before, after in zip([*tensors, tensors[0], tensors[2]], [*back, *mixed], strict=True):
        assert before is after or (before.dtype == after.dtype and torch.equal(before, after))
    assert all(x.held.storage_offset() * x.held.itemsize % 16 == 0 for x in there if x is not None)
    assert all(x is y for x, y in zip(moved(tensors, CPU), tensors, strict=True)), "nothing to do"
