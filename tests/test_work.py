"""Counted work: bytes and launches of head and losses; the counting sees what it should."""

import csv

import pytest
import torch

pytest.importorskip("triton")

import interpreter

from rmfast.benchmarks import launches, work

pytestmark = interpreter.NEEDED


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    out = tmp_path_factory.mktemp("work") / "work.csv"
    work.main(["--csv", str(out), "--chips", "sm_90"])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_limits_hold(lines):
    what = {line["what"].partition(",")[0] for line in lines}
    assert what == {
        "bytes moved", "bytes a token", "launches", "launches a step", "tiles visited",
        "instructions a full tile",
    }  # fmt: skip
    for line in lines:
        if line["limit"]:
            held = line["ratio"] or line["counted"]
            assert float(held) <= float(line["limit"]), line
            if line["what"] in ("bytes moved", "tiles visited"):
                assert float(line["ratio"]) >= 1, line


def test_bytes_of_head_and_loss(lines):
    moved = {line["case"]: float(line["ratio"]) for line in lines if line["what"] == "bytes moved"}
    assert len(moved) >= 9 and max(moved.values()) <= 1.05


def test_two_launches_a_step(lines):
    count = {line["case"]: int(line["counted"]) for line in lines if line["ratio"] == ""}
    assert count["rmfast, one op"] == 2
    assert count["rmfast, head and loss apart"] == 4
    # six forward (rows, two casts, product, difference, log sigmoid, mean and its sign: eight)
    # and no fewer backward: the exact number is torch's to change
    assert count["eager torch on the pooled rows"] >= 14
    assert count["Hugging Face and TRL on the padded batch"] >= 14


def seen_twice():
    """The forward of two scores from one row: what is read twice counts once."""
    from rmfast.kernels import reward_head

    hidden, weight = torch.randn(5, 64), torch.randn(1, 64)
    with work.traffic() as once:
        reward_head.reward_head(hidden, torch.tensor([3]), weight, None)
    with work.traffic() as same:
        reward_head.reward_head(hidden, torch.tensor([3, 3]), weight, None)
    with work.traffic() as other:
        reward_head.reward_head(hidden, torch.tensor([3, 1]), weight, None)
    return once + same + other


def eager_ops():
    x = torch.randn(4, 4)
    with work.Launches().and_triton() as seen:
        torch.empty(3)
        (x.T.reshape(-1)[:3].reshape(1, 3) + 1).sum()
        x.zero_()
    return seen.names


def test_counting():
    with launches.processes(1, interpret=True) as pool:
        once, same, other = pool.submit(seen_twice).result()
        assert pool.submit(eager_ops).result() == ["clone", "add", "sum", "zero_"]
    assert once.kernel == "reward_head._forward_kernel"
    assert (once.read, once.written) == (2 * 256 + 8, 4)
    assert (same.read, same.written) == (2 * 256 + 16, 8)
    assert (other.read, other.written) == (3 * 256 + 16, 8)
