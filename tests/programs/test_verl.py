"""verl's FSDP engine: values of a critic and log-probabilities of a policy, without padding.

The engine is verl's own, from loading to the backward pass: FSDP2 over one process, and the
attention function that verl puts into transformers. Stood in for: the GPU, by a platform registered
with verl as its plug-ins are, and flash-attn's two functions (``flash.py``).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import tiny
from rmfast.benchmarks.peers.workloads import Draw
from rmfast.demo import embedded

PINS = [
    "verl==0.9.1", "trl==0.27.0", "tensordict==0.10.0", "pyvers==0.2.3", "codetiming==1.4.0",
    "hydra-core==1.3.8", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "torchdata==0.11.0",
    "cloudpickle==3.1.3", "orjson==3.13.0",
]  # fmt: skip
pytest.importorskip("verl", reason="verl is not installed: make programs")

from verl.plugin.platform import platform_manager  # noqa: E402
from verl.plugin.platform.platform_cuda import PlatformCUDA  # noqa: E402


class OnCPU(PlatformCUDA):
    device_name, device_module = "cpu", torch.cpu

    def current_device(self):
        return "cpu"


platform_manager.set_platform(OnCPU())

from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402

ENGINES = {
    "value_model": transformer_impl.FSDPEngineWithValueHead,
    "language_model": transformer_impl.FSDPEngineWithLMHead,
}
CLASSES = {
    "value_model": AutoModelForTokenClassification, "language_model": AutoModelForCausalLM
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def as_transformers_had_it(monkeypatch, flash_attention):
    """verl replaces transformers' function for the whole process."""
    from transformers.integrations import flash_attention

    theirs = flash_attention._flash_attention_forward
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", theirs)


def engine(folder, kind, **options):
    model = HFModelConfig(
        path=str(folder), model_type=kind, load_tokenizer=False, enable_gradient_checkpointing=False
    )
    fsdp = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        **options,
    )
    optimizer = FSDPOptimizerConfig(lr=0.0, total_training_steps=1)
    made = ENGINES[kind](model, fsdp, optimizer, CheckpointConfig())
    made.initialize()
    return made


def batch(rows, padded=False):
    def nested(each):
        return torch.nested.as_nested_tensor(list(each), layout=torch.jagged)

    tensors = {
        "input_ids": nested(map(torch.tensor, rows)),
        "position_ids": nested(torch.arange(len(row)) for row in rows),
        "loss_mask": nested(torch.ones(len(row)) for row in rows),
    }
    how = {
        "use_remove_padding": not padded, "pad_mode": "no_padding", "temperature": 1.0,
        "use_dynamic_bsz": False, "micro_batch_size_per_gpu": len(rows),
    }  # fmt: skip
    return tensordict_utils.get_tensordict(tensors, non_tensor_dict=how)


def step(engine, data, key):
    """Forward and backward of one micro-batch, by its own method: values or log-probabilities."""

    def loss(model_output, data, dp_group):
        found = model_output[key].values()
        found_there.append(found.detach())
        return (found * torch.linspace(-1, 2, len(found))).sum(), {}

    found_there = []

    def run():
        found_there.clear()
        with engine.train_mode(zero_grad_on_exit=False):
            engine.forward_backward_batch(data.clone(), loss)
        return found_there[0]

    return run


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("how", ["remove_padding", "pad_to_length", "padded"])
def test_its_engine(kind, how, tmp_path, same):
    tiny.model("qwen2", cls=CLASSES[kind]).save_pretrained(tmp_path)
    made = engine(tmp_path, kind, pad_to_length=how == "pad_to_length", pad_to_length_bucket=50)
    data = batch(tiny.rows(), how == "padded")
    run = step(made, data, "values" if kind == "value_model" else "log_probs")
    assert same(run, made.module)[0].level == "backbone"


def test_speed_of_its_value_model(timed):
    made, draw = engine(embedded.checkpoint(), "value_model"), Draw(49_000)
    rows = draw.group(400, [40] * 8)
    name = "value model, 8 rollouts of 400 + 40 tokens"
    timed(name, step(made, batch(rows), "values"), made.module)
