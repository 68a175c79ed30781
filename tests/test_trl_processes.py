"""RewardTrainer in two processes, under DDP and FSDP2, beside one process."""

import os
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

import trl
from datasets import Dataset
from test_trl import SGD, Recording, groups, lora, model, model_with, pairs, run, trainer

import rmfast
import tiny
from rmfast.packed import step as packed_step
from rmfast.train import objective as train_objective
from rmfast.train.trainer import RewardTrainer

BUDGET = {"max_tokens_per_batch": 60}
PROCESSES = {
    "ddp": {},
    "ddp-unchecked": {"gradient_checkpointing": False},  # DDP then looks for unused parameters
    "ddp-budget": BUDGET,
    "ddp-groups": {"loss_type": "plackett_luce", "max_tokens_per_batch": 40},
    "ddp-lora": {"gradient_checkpointing": False},
    "fsdp2-lora": {},
    "fsdp2": {"gradient_checkpointing": False},
    "fsdp2-budget": BUDGET,
    "fsdp2-groups": {
        "loss_type": "plackett_luce",
        "max_tokens_per_batch": 40,
        "gradient_checkpointing": False,
    },
    "fsdp2-bf16": {"bf16": True, "gradient_checkpointing": False},
    "trl-fsdp2-bf16": {"bf16": True, "gradient_checkpointing": False},
}
HELD_OUT = 13  # pairs: the last batch of evaluation is filled up with pairs seen before


def options_of(kind):
    out = {**SGD, "num_train_epochs": 2, "max_steps": -1, "max_grad_norm": 1.0}
    out |= {"gradient_accumulation_steps": 2, **PROCESSES[kind]}
    held_out = groups(7) if "groups" in kind else pairs(HELD_OUT, margin=True)
    out |= {"eval_strategy": "epoch", "eval_dataset": Dataset.from_list(held_out)}
    return out | {"per_device_eval_batch_size": 4}


def rows_of(kind):
    return groups(18) if "groups" in kind else pairs(32, margin=True)


def net_of(kind):
    if "lora" in kind:
        torch.manual_seed(3)
        return model_with(lora(task_type="SEQ_CLS")).double()
    return model().float() if "bf16" in kind else model()


class AsOnGPUs:
    """accelerate shards on accelerators alone; what it then does, it does on a CPU as well."""

    def create_accelerator_and_postprocess(self):
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def worker(rank, port, kind, folder):
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    options = {**options_of(kind), "ddp_backend": "gloo"}
    cls = trl.RewardTrainer if "trl" in kind else Recording
    if "fsdp2" in kind:
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options |= {"fsdp": True, "fsdp_config": wrap}
        cls = type("Sharded", (AsOnGPUs, cls), {})
    out = run(cls, folder, rows_of(kind), net_of(kind), **options)
    if "fsdp2" in kind:  # an evaluation leaves the outermost parameters gathered
        for module in out.model.modules():
            getattr(module, "reshard", lambda: None)()
    weights = {name: p.detach() for name, p in out.model.named_parameters()}
    assert all(isinstance(p, DTensor) == ("fsdp2" in kind) for p in weights.values())
    if "fsdp2" in kind:
        weights = {name: p.full_tensor() for name, p in weights.items()}
    found = {"logs": out.state.log_history, "weights": weights}
    if "trl" not in kind:
        assert not rmfast.report(out.model).fallbacks
        found["steps"] = out.steps
    torch.save(found, Path(folder) / f"{kind}-{rank}.pt")
    processes.leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return processes.launch("test_trl_processes", PROCESSES, tmp_path_factory.mktemp("two"))


def results(folder, kind):
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in range(2)]


def logged(log_history, start, names):
    """Of each log that has a loss, the numbers of these names."""
    logs = [log for log in log_history if f"{start}loss" in log]
    return [[log[f"{start}{name}"] for name in names] for log in logs]


DEFINED = "loss accuracy margin mean_reward num_tokens".split()  # of any division into batches
EXACT = 1e-6  # logged losses are added up in fp32, and fp64 models have fp32 rotary frequencies

SUMS = 1e-13  # of fp64 gradients, in another order


@pytest.mark.parametrize("kind", ["ddp", "ddp-unchecked", "ddp-lora", "fsdp2", "fsdp2-lora"])
def test_two_processes_train_as_one_does_with_trl(kind, two_processes, tmp_path):
    """TRL in one process, which accumulates the batches that the two have at a time."""
    options = options_of(kind) | {"gradient_accumulation_steps": 4}
    want = run(trl.RewardTrainer, tmp_path, rows_of(kind), net_of(kind), **options)
    one = run(RewardTrainer, tmp_path, rows_of(kind), net_of(kind), **options)
    for got in results(two_processes, kind):
        for (name, p), q in zip(want.model.named_parameters(), one.model.parameters(), strict=True):
            torch.testing.assert_close(got["weights"][name], p.data, rtol=EXACT, atol=EXACT)
            torch.testing.assert_close(got["weights"][name], q.data, rtol=0, atol=SUMS)
    logs = results(two_processes, kind)[0]["logs"]
    for start, names in (("", [*DEFINED, "grad_norm"]), ("eval_", ["num_tokens"])):
        for mine, theirs in zip(
            logged(logs, start, names), logged(want.state.log_history, start, names), strict=True
        ):
            assert mine == pytest.approx(theirs, rel=EXACT)


def steps_by_hand(net, objective, steps):
    """Losses of optimiser steps, with the mean over all pairs of a step, on the padded model."""
    optimizer = torch.optim.SGD(net.parameters(), lr=SGD["learning_rate"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / len(steps))
    for batches in steps:
        count = sum(batch["count"] for batch in batches)
        total, correct, ranked = 0.0, 0.0, 0
        for batch in batches:
            scores = net(**packed_step.padded(batch, tiny.PAD)).logits[:, 0]
            total = total + objective.of_scores(scores, batch)[0] / count
            better, worse = batch["pairs"].T if "pairs" in batch else indices(batch["count"])
            correct += (scores[better] > scores[worse]).sum().item()
            ranked += len(better)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield [total.item(), correct / ranked]


def indices(count):
    return torch.arange(count), torch.arange(count, 2 * count)


@pytest.mark.parametrize("kind", ["ddp-budget", "ddp-groups", "fsdp2-budget", "fsdp2-groups"])
def test_a_step_of_two_processes_is_the_mean_over_all_their_pairs(kind, two_processes):
    """Of batches with unequal numbers of pairs, on processes and one after another."""
    ranks = results(two_processes, kind)
    steps = [a + b for a, b in zip(*(rank["steps"] for rank in ranks), strict=True)]
    assert len({batch["count"] for step in steps for batch in step}) > 1
    counts = [[sum(batch["count"] for batch in step) for step in rank["steps"]] for rank in ranks]
    assert counts[0] != counts[1]
    objective = train_objective.Objective(PROCESSES[kind].get("loss_type", "bradley_terry"))
    net = net_of(kind)
    want = list(steps_by_hand(net, objective, steps))
    got = logged(ranks[0]["logs"], "", ["loss", "accuracy"])
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=EXACT)
    for rank in ranks:
        for name, p in net.named_parameters():
            torch.testing.assert_close(rank["weights"][name], p.data, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", ["ddp", "ddp-groups", "fsdp2", "fsdp2-groups"])
def test_two_processes_evaluate_as_one(kind, two_processes, tmp_path):
    """Nobody counts what accelerate fills the last batch up with."""
    got = results(two_processes, kind)[0]
    out = trainer(RewardTrainer, tmp_path, rows_of(kind), net_of(kind), **options_of(kind))
    out.model.load_state_dict(got["weights"])
    want = out.evaluate()
    names = "loss accuracy margin mean_reward".split()
    mine = logged(got["logs"], "eval_", names)[-1]
    assert mine == pytest.approx([want[f"eval_{name}"] for name in names], rel=EXACT)


def test_mixed_precision_of_fsdp2_is_no_worse_than_trls(two_processes, tmp_path):
    options = options_of("fsdp2") | {"gradient_accumulation_steps": 4}
    exact = run(trl.RewardTrainer, tmp_path, rows_of("fsdp2"), net_of("fsdp2"), **options)
    losses = torch.tensor(logged(exact.state.log_history, "", ["loss", "margin"])).double()
    before = model().state_dict()

    def errors(kind):
        found = results(two_processes, kind)[0]
        loss = torch.tensor(logged(found["logs"], "", ["loss", "margin"])).double()
        trained = exact.model.state_dict()
        moved = sum((trained[n] - p).square().sum() for n, p in before.items()) ** 0.5
        apart = sum((trained[n] - p).square().sum() for n, p in found["weights"].items()) ** 0.5
        return (loss - losses).norm() / losses.norm(), apart / moved

    for ours, theirs in zip(errors("fsdp2-bf16"), errors("trl-fsdp2-bf16"), strict=True):
        assert ours <= 1.1 * theirs + 2.0**-8
