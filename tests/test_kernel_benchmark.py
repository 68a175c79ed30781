"""The benchmark of the kernels end to end on a CPU, tiny; no duration is looked at."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rmfast import reference
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
