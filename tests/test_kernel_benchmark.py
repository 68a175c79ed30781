"""The benchmark of the kernels end to end on a CPU, tiny; no duration is looked at."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import rmfast
from rmfast import ops, reference
from rmfast.benchmarks import kernels


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels") / "figures.csv"
    kernels.main(["--device", "cpu", "--quick", "--rounds", "2", "--csv", str(out)])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_who_ran(lines):
    ran = {}
    for line in lines:
        ran.setdefault(line["what"], set()).add(line["contestant"])
    head = {"rmfast, one op", "rmfast, two ops", "torch", "torch, every row"}
    torchs = {"torch SDPA, dense mask", "torch SDPA, nothing shared"}
    ran["attention, forward and backward"].discard("FlexAttention")  # torch 2.13 lost it on a CPU
    assert ran == {
        "head and loss, forward and backward": head,
        "masks, once a batch": {"rmfast", "FlexAttention"},
        "attention, forward": {"rmfast", "FlexAttention", *torchs},
        "attention, forward and backward": {"rmfast", *torchs},
    }


def test_figures(lines):
    for line in lines:
        assert list(line) == list(kernels.COLUMNS)
        low, middle, high = (float(line[f"seconds{end}"]) for end in ("_min", "", "_max"))
        assert 0 < low <= middle <= high
        assert (line["device"], line["torch"], line["rounds"]) == ("cpu", torch.__version__, "2")
        if line["what"].startswith("masks"):
            assert line["work"] == line["share"] == line["difference"] == ""
            continue
        assert float(line["rate"]) == pytest.approx(float(line["work"]) / middle)
        assert float(line["share"]) == pytest.approx(float(line["rate"]) / float(line["roof"]))
        assert float(line["difference"]) < 0.02  # bf16


def test_work_is_counted_from_the_mask(lines):
    _, _, ((_, numbers),) = (*kernels.QUICK[:2], kernels.QUICK[2].items())
    trie = kernels.trie_of(*numbers)
    nodes = torch.arange(len(trie))
    mask = reference.trie_mask(nodes, nodes, trie.subtree_end, trie.position_ids, None)
    shape = kernels.QUICK[0]["tiny"]
    one = 4 * int(mask.sum()) * shape.heads * shape.head_dim
    work = {line["what"]: int(line["work"]) for line in lines if line["unit"] == "flops"}
    assert work == {"attention, forward": one, "attention, forward and backward": one * 14 // 4}


def test_a_gpu_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, said in (([], "torch sees no GPU"), (["--device", "cpu"], "goes with --quick")):
        with pytest.raises(SystemExit) as end:
            kernels.main(argv)
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_only_a_gpus_figures_are_kept(lines):
    assert kernels.file_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.csv"
    results = Path(kernels.__file__).with_name("results")
    before = {file: file.stat().st_mtime_ns for file in results.glob("*")}
    kernels.main(["--device", "cpu", "--quick", "--rounds", "1"])
    assert before == {file: file.stat().st_mtime_ns for file in results.glob("*")}


# --- FlexAttention


def branches(nodes):
    """A trie of so many nodes: long prefixes inside one another, and a stranger."""
    ids = torch.randint(0, 90, (nodes,), generator=torch.Generator().manual_seed(nodes)).tolist()
    third = nodes // 3
    trunk, rest = ids[: max(1, third)], ids[max(1, third) :]
    rows = [trunk + rest[:third], [*trunk[: third // 2], 91, *rest[third:-1]]]
    trie = rmfast.pack([row for row in rows if row][:nodes])
    assert abs(len(trie) - nodes) <= 2
    return trie


@pytest.mark.parametrize("nodes", [1, 127, 129, 256, 511, 1300])
def test_blocks_of_flex_hold_what_is_seen(nodes):
    """A full block holds nothing else; a block that is not listed holds nothing."""
    trie = branches(nodes)
    every = torch.arange(len(trie))
    mask = kernels.block_mask(trie.subtree_end)
    allowed = reference.trie_mask(every, every, trie.subtree_end, trie.position_ids, None)
    assert torch.equal(mask.mask_mod(0, 0, every[:, None], every), allowed)
    assert mask.shape == (1, 1, *allowed.shape)
    size = mask.BLOCK_SIZE[0]
    allowed = F.pad(allowed, (0, -len(trie) % size) * 2)
    blocks = allowed.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    holds = torch.zeros(2, *blocks.shape[:2], dtype=torch.int32)
    for kind, counts, listed in (
        (0, mask.kv_num_blocks, mask.kv_indices),
        (1, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for q, count in enumerate(counts[0, 0].tolist()):
            assert (listed[0, 0, q, :count].diff() > 0).all()
            holds[kind, q, listed[0, 0, q, :count].long()] = 1
    assert torch.equal(holds.sum(0), blocks.any(-1).any(-1).int())
    assert torch.equal(holds[1], blocks.all(-1).all(-1).int())
    assert nodes < 1300 or holds[1].any()


def test_a_block_mask_is_made_without_the_pairs_of_nodes():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.seen = max(self.seen, x.numel())
            return out

    trie = branches(5000)
    with Largest() as largest:
        kernels.block_mask(trie.subtree_end)
    assert len(trie) <= largest.seen < len(trie) + 128


@pytest.mark.parametrize("nodes", [1, 129, 511])
def test_flex_over_several_blocks(nodes):
    """Forward only: FlexAttention has no backward on a CPU."""
    trie = branches(nodes)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(trie), 16) for heads in (4, 2, 2))
    with torch.no_grad():
        got = kernels.flex(trie.subtree_end, "cpu")(q, k, v)
    plan = ops.TriePlan(trie.subtree_end, trie.position_ids)
    want = ops.trie_attention(q.double(), k.double(), v.double(), plan)
    # logits of size 10 and values of size 4, their rounding twice
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * 40 * 10 * 2.0**-24)
