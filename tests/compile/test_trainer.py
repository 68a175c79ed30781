"""``torch_compile=True`` of TrainingArguments: the layers are compiled, the numbers stay."""

import pytest
import torch

pytest.importorskip("trl")

import rmfast
from rmfast.integrations.trl import RewardTrainer
from test_trl import SGD, pairs, run, same


def test_compiled_steps_are_those_of_eager_ones(tmp_path):
    from torch._dynamo.utils import counters

    want = run(RewardTrainer, tmp_path / "a", pairs(), **SGD)
    torch._dynamo.reset()
    counters.clear()
    got = run(RewardTrainer, tmp_path / "b", pairs(), torch_compile=True, **SGD)
    assert not rmfast.report(got.model).fallbacks
    assert counters["stats"]["unique_graphs"] > 0
    same(got, want, 1e-5)  # fused, the fp32 parts of a layer round elsewhere
