"""What a GPU would be given is counted, without one; calls of a patched model copy no more."""

import pytest
import torch

pytest.importorskip("triton")

import rmfast
import tiny
from rmfast.benchmarks import gpu_common, launches, played

LARGE = {"vocab_size": 30_000, "max_position_embeddings": 2048}  # for the rows of the benchmark
# by case: copies to the GPU, copies to the host, waits
MOST = {
    "padded batch, forward": (2, 1, 1),
    "padded batch, forward and backward": (1, 1, 1),
    "window of a Scorer": (2, 1, 1),
    "carried piece of a Scorer": (1, 0, 0),
    "training step": (6, 0, 0),  # a trainer sends tensor by tensor
}


@pytest.mark.parametrize("case", launches.CASES)
def test_copies_and_waits(case):
    model = tiny.model(num_hidden_layers=2, **LARGE).to("meta")
    with played.gpu() as gpu:
        found = launches.CASES[case](rmfast.patch(model), gpu)
    ways = ("copies to the GPU", "copies to the host", "waits")
    assert all(found[way] <= most for way, most in zip(ways, MOST[case], strict=True)), found
    assert found["copies to the GPU"] >= 1
    kernels = {name.partition("_")[0] for name in gpu.launches if name.endswith("_kernel")}
    assert {"trie", "elementwise."} <= kernels  # not the way of a CPU


@pytest.mark.parametrize("name, eager", [("Qwen3-0.6B", 290_418), ("Llama-8B", 590_902)])
def test_elementwise_bytes_of_a_layer(name, eager):
    """Beside those of transformers' own code, counted before there were kernels."""
    with played.gpu() as gpu:
        two, three = (launches.padded(launches.build(name, layers), gpu) for layers in (2, 3))
    nodes = len(rmfast.pack(gpu_common.rows_of("pairs")[: 2 * launches.PAIRS]))
    assert 0 < (three["bytes"] - two["bytes"]) / nodes <= 0.35 * eager


@pytest.mark.parametrize("first", [0, 1024])
def test_launches_of_a_plan(first):
    assert 0 < launches.plan(1 << 14, first, None, backward=False)["launches"] <= 40


def test_launches():
    with played.gpu() as gpu:
        x = torch.ones(4, 4, device="cuda")
        assert x.is_cuda and not x.is_meta and x.device == torch.zeros(3, device=x.device).device
        (x.T.reshape(-1)[:3].reshape(1, 3) + 1).sum()
        x.zero_()
        torch.empty(0, device="cuda").add_(1)  # nothing to do
        x.to(x.device)
    assert gpu.launches == dict.fromkeys(("ones", "zeros", "clone", "add", "sum", "zero_"), 1)
    assert not x.is_cuda and x.is_meta
    assert gpu.total()["waits"] == 0


@pytest.mark.parametrize(
    "run, to_gpu, to_host, waits",
    [
        (lambda host, gpu: host.to(gpu.device), 1, 0, 1),
        (lambda host, gpu: host.to(gpu.device, non_blocking=True), 1, 0, 1),
        (lambda host, gpu: host.pin_memory().to(gpu.device, non_blocking=True), 1, 0, 0),
        (lambda host, gpu: host.pin_memory()[2:].to(gpu.device, non_blocking=True), 1, 0, 0),
        (
            torch.inference_mode()(lambda host, gpu: host.pin_memory().cuda(gpu.device, True)),
            1,
            0,
            0,
        ),
        (lambda host, gpu: gpu.copy_(host), 1, 0, 1),
        (lambda host, gpu: gpu[host], 1, 0, 1),
        (lambda host, gpu: torch.tensor([1, 2], device=gpu.device), 1, 0, 1),
        (lambda host, gpu: gpu.cpu(), 0, 1, 1),
        (lambda host, gpu: gpu.to("cpu", non_blocking=True), 0, 1, 0),
        (lambda host, gpu: gpu.tolist(), 0, 1, 1),
        (lambda host, gpu: bool(gpu.max() > 2), 0, 1, 1),
        (lambda host, gpu: gpu[gpu > 1], 0, 0, 1),
        (lambda host, gpu: gpu[gpu - gpu], 0, 0, 0),
        (lambda host, gpu: gpu.unique(), 0, 0, 1),
        (lambda host, gpu: gpu.sum() + host.sum(), 0, 0, 0),
    ],
)
def test_copies(run, to_gpu, to_host, waits):
    with played.gpu() as gpu:
        run(torch.arange(4), gpu.put(torch.arange(4)))
        found = gpu.total()
    ways = ("copies to the GPU", "copies to the host", "waits")
    assert [found[way] for way in ways] == [to_gpu, to_host, waits]


def test_values():
    """What depends on whole numbers has the shape that they give it; others are ones."""
    with played.gpu() as gpu:
        x = gpu.put(torch.tensor([3, 1, 3, 0]))
        found, place = (x + torch.arange(4, device="cuda")).unique(return_inverse=True)
        assert found.tolist() == [2, 3, 5] and place.tolist() == [1, 0, 2, 1]
        gap = torch.empty(1, dtype=torch.int64, device="cuda")
        assert torch.cat([x, gap])[:4].view(torch.uint8).cpu().view(torch.int64)[2] == 3
        x[1:] = 7
        assert x.tolist() == [3, 7, 7, 7]
        assert torch.rand(2, device="cuda").tolist() == [1, 1]


def test_bytes():
    with played.gpu() as gpu:
        x, row = (torch.empty(size, device="cuda") for size in ((100, 8), (8,)))
        few = torch.empty(3, dtype=torch.int64, device="cuda")
        counts = []
        for run in (
            lambda: x + row,
            lambda: x + row.expand(100, 8),
            lambda: x[:50].mul_(2),
            lambda: x.zero_(),
            lambda: x.index_select(0, few),
            lambda: x @ x.T,
            lambda: x.view(-1),
        ):
            before = gpu.total()["bytes"]
            run()
            counts.append(gpu.total()["bytes"] - before)
    whole = 4 * 800
    assert counts == [2 * whole + 32, 2 * whole + 32, whole, whole, 2 * 4 * 24 + 24, 0, 0]
