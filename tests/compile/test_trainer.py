"""``torch_compile=True`` of TrainingArguments: the layers are traced, the numbers stay."""

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

from test_trl import SGD, model, pairs, run, same
from transformers import TrainerCallback

import rmfast
from rmfast.train.trainer import RewardTrainer

OPTIONS = SGD | {"max_steps": 10}


def test_compiled_steps_are_those_of_eager_ones(tmp_path):
    from torch._dynamo.utils import counters

    want = run(RewardTrainer, tmp_path / "a", pairs(40), net(), **OPTIONS)
    torch._dynamo.reset()
    counters.clear()
    traced = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # inductor takes minutes
    graphs = []

    class Counts(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    got = run(
        RewardTrainer, tmp_path / "b", pairs(40), net(), callbacks=[Counts()], **traced, **OPTIONS
    )
    assert not rmfast.report(got.model).fallbacks
    assert 0 < graphs[4] == graphs[-1]  # nothing is compiled anew for each length
    same(got, want)


def net():
    return model(num_hidden_layers=2)
