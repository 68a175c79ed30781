"""Tries cut with gradients under FSDP2, in two processes: beside one that runs them whole."""

import datetime
import os
from pathlib import Path

import processes
import pytest
import torch

import rmfast
import tiny

# what is frozen; None: nothing, and gradient checkpointing
KINDS = {"all": (), "checkpointed": None, "head": ("model",), "upper": ("embed_tokens", "layers.0")}
STEPS = 2


def batch(step, rank):
    """Of the second process so small that it fits; the first one has several pieces."""
    rows = tiny.rows(10 * step + rank)
    return tiny.padded(rows if rank == 0 else [rows[4][:3], rows[3][:3]])


def loss(net, step, rank):
    scores = net(**batch(step, rank)).logits[:, 0]
    return scores.square().mean() + scores[0]


def net_of(kind):
    net = tiny.model("llama").double().train()
    for name, p in net.named_parameters():
        p.requires_grad_(not any(part in name for part in KINDS[kind] or ()))
    if KINDS[kind] is None:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    return net


def worker(rank, port, kind, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=wait)
    net, gathered, ran = rmfast.patch(net_of(kind), max_training_tokens=6), [], []
    mesh = init_device_mesh("cpu", (2,))
    for layer in net.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net.model.layers[1].mlp.register_forward_hook(lambda *_: gathered.append(weights_gathered(net)))
    net.model.layers[0].mlp.register_forward_hook(lambda _, x, out: ran.append(out.shape[-2]))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        losses.append(loss(net, step, rank))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rmfast.report(net).level == "trie" and not rmfast.report(net).fallbacks
    found = {"losses": torch.stack(losses).detach(), "gathered": max(gathered), "ran": ran}
    found["weights"] = {name: p.full_tensor().detach() for name, p in net.named_parameters()}
    torch.save(found, Path(folder) / f"{kind}-{rank}.pt")
    processes.leave()


def weights_gathered(net):
    """How many layers are, while one runs."""
    sharded = (hasattr(layer.mlp.up_proj.weight, "device_mesh") for layer in net.model.layers)
    return sum(not one for one in sharded)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return processes.launch("test_twice_processes", KINDS, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("kind", KINDS)
def test_as_one_process(kind, two):
    net = net_of(kind)
    ranks = [torch.load(two / f"{kind}-{rank}.pt", weights_only=False) for rank in range(2)]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        each = torch.stack([loss(net, step, rank) for rank in range(2)])
        each.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        got = torch.stack([rank["losses"][step] for rank in ranks])
        torch.testing.assert_close(got, each.detach(), rtol=1e-5, atol=1e-6)  # fp32 frequencies
    for rank in ranks:
        for name, p in net.named_parameters():
            torch.testing.assert_close(rank["weights"][name], p.data, rtol=1e-5, atol=1e-6)
        assert rank["gathered"] == 1, "FSDP2 keeps one layer at a time"
    ran = [rank["ran"] for rank in ranks]
    assert max(map(max, ran)) <= 6 and len(ran[0]) == len(ran[1])  # as many passes
    assert 1 in ran[1]  # and some of them do nothing
