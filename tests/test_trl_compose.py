"""RewardTrainer and what it is combined with: adapters, precision, other options."""

import copy

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

import trl
from datasets import Dataset
from peft import get_peft_model
from test_trl import SGD, TOKENIZER, groups, lora, model, pairs, run, same, trainer
from transformers import TrainerCallback

import rmfast
import tiny
from rmfast.train.trainer import RewardTrainer

EXACT = 1e-6  # logged losses are added up in fp32, and fp64 models have fp32 rotary frequencies

# --- adapters


class Packed(torch.nn.Linear):
    """Stands for a quantised layer: codes in place of a weight, decoded when it is called."""

    def __init__(self, plain):
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (plain.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter(codes.flatten()[:, None], requires_grad=False)

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype)
        return torch.nn.functional.linear(x, weight * self.scale.to(x.dtype))


def quantised(net):
    """A frozen backbone of packed layers, the rest in fp32 or more, as PEFT prepares it."""
    from peft import prepare_model_for_kbit_training

    for layer in net.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, Packed(linear.float()))
    return prepare_model_for_kbit_training(net, use_gradient_checkpointing=False)


def test_quantised_backbones_train_as_with_trl(tmp_path):
    """Nothing looks at a backbone's weights, which are codes."""
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(get_peft_model(quantised(model()), lora(task_type="SEQ_CLS")).double())
    want = run(trl.RewardTrainer, tmp_path / "a", pairs(), nets[0], **SGD)
    got = run(RewardTrainer, tmp_path / "b", pairs(), nets[1], **SGD)
    assert rmfast.report(got.model).level == "trie" and not rmfast.report(got.model).fallbacks
    same(got, want)
    trained = {name for name, p in got.model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trained)
    assert all("lora" in name or "score" in name for name in trained)


# --- precision


class Gradients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        self.seen.append(grads)


def steps(cls, folder, net, **options):
    """Losses and gradients of 24 steps that change nothing."""
    gradients = Gradients()
    still = {"optim": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 24}
    out = trainer(
        cls, folder, pairs(96, margin=True), net, callbacks=[gradients], **still, **options
    )
    net.is_loaded_in_4bit = False  # or transformers imports bitsandbytes to count parameters
    out.train()
    losses = [log["loss"] for log in out.state.log_history if "loss" in log]
    return torch.tensor(losses).double(), gradients.seen, out


@pytest.mark.parametrize("quantise", [False, True])
def test_bf16_is_no_further_from_exact_than_trls(tmp_path, quantise):
    def net(dtype):
        out = model().to(torch.bfloat16 if quantise else torch.float32).to(dtype)
        return quantised(out) if quantise else out

    options = {}
    if quantise:  # TRL rounds its weights to bf16
        options["peft_config"] = lora(modules_to_save=["score"])
    exact = net(torch.float64)
    losses, grads, _ = steps(trl.RewardTrainer, tmp_path / "a", exact, **copied(options))
    errors = []
    for cls in (trl.RewardTrainer, RewardTrainer):
        low = net(torch.bfloat16 if quantise else torch.float32)
        low.is_loaded_in_4bit = quantise
        loss, grad, out = steps(cls, tmp_path / "b", low, bf16=True, **copied(options))
        apart = sum(tiny.grad_error(a, b) ** 2 for a, b in zip(grad, grads, strict=True)) ** 0.5
        errors.append(((loss - losses).norm().item(), apart))
    assert not rmfast.report(out.model).fallbacks
    for theirs, ours in zip(*errors, strict=True):
        assert ours <= 1.1 * theirs + 2.0**-8


def copied(options):  # TRL and PEFT write into them
    return copy.deepcopy(options)


# --- Trainer's options


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"neftune_noise_alpha": 5.0},
        {"include_num_input_tokens_seen": "non_padding"},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential"},
        {
            "load_best_model_at_end": True,
            "metric_for_best_model": "margin",
            "greater_is_better": False,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_what_they_do_in_trl(tmp_path, options):
    options = {**SGD, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, **options}
    options["eval_dataset"] = Dataset.from_list(pairs(7))
    rows = pairs(10)
    want = run(trl.RewardTrainer, tmp_path / "a", rows, **copied(options))
    got = run(RewardTrainer, tmp_path / "b", rows, **copied(options))
    same(got, want)
    assert got.state.num_input_tokens_seen == want.state.num_input_tokens_seen
    reasons = " ".join(rmfast.report(got.model).fallbacks)
    assert ("NEFTune" in reasons) == ("neftune_noise_alpha" in options)
    if "load_best_model_at_end" in options:
        margins = [x["eval_margin"] for x in got.state.log_history if "eval_margin" in x]
        assert got.state.best_metric == min(margins) != margins[-1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_adapters_train_as_with_trl(tmp_path, reentrant):
    options = {**SGD, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    options["peft_config"] = lora(modules_to_save=["score"])
    want = run(trl.RewardTrainer, tmp_path / "a", pairs(), **copied(options))
    got = run(RewardTrainer, tmp_path / "b", pairs(), **copied(options))
    assert not rmfast.report(got.model).fallbacks
    same(got, want, 1e-5)  # TRL makes adapters in fp32


@pytest.mark.parametrize("what", ["all", "non_padding", "no"])
@pytest.mark.parametrize("ranked", [False, True])
def test_tokens_seen_are_those_of_all_sequences(tmp_path, what, ranked):
    options = {**SGD, "include_num_input_tokens_seen": what}
    out = run(RewardTrainer, tmp_path, groups() if ranked else pairs(), **options)
    want = 0 if what == "no" else out._total_train_tokens
    assert out.state.num_input_tokens_seen == want
    assert want > 0 or what == "no"


@pytest.mark.parametrize("budget", [None, 60])
def test_workers_change_nothing(tmp_path, budget):
    rows, trained = pairs(20), []
    for workers in (0, 2):
        options = {**SGD, "max_steps": -1, "num_train_epochs": 2, "max_tokens_per_batch": budget}
        options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        trained.append(run(RewardTrainer, tmp_path, rows, **options).model.state_dict())
    for name, p in trained[0].items():
        assert torch.equal(p, trained[1][name]), name


class OutOfMemory:
    """More than two pairs are too many, and that is found out when their loss is there."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        out = super().compute_loss(model, inputs, *args, **kwargs)
        if len(inputs["pool_index"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")
        return out


def test_smaller_batches_when_memory_runs_out(tmp_path):
    small = {**SGD, "per_device_train_batch_size": 2}
    want = run(RewardTrainer, tmp_path / "a", pairs(), **small)
    cls = type("Runs out", (OutOfMemory, RewardTrainer), {})
    got = run(cls, tmp_path / "b", pairs(), auto_find_batch_size=True, **SGD)
    same(got, want)


@pytest.mark.parametrize("patched", [False, True])
def test_a_folder_and_an_adapter(tmp_path, patched):
    """As ``trl reward`` calls it."""
    model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    options = {**SGD, "model_init_kwargs": {"dtype": "auto"}}
    options["peft_config"] = lora(modules_to_save=["score"])
    folder = str(tmp_path / "model")
    want = run(trl.RewardTrainer, tmp_path / "a", pairs(), folder, **copied(options))
    # or an adapter around a patched model
    source = (lambda: rmfast.patch(model())) if patched else (lambda: folder)
    got = run(RewardTrainer, tmp_path / "b", pairs(), source(), **copied(options))
    assert rmfast.report(got.model).level == "trie" and not rmfast.report(got.model).fallbacks
    same(got, want, 1e-5)  # TRL makes adapters in fp32
    with pytest.raises(ValueError, match=r"the reward head is frozen.*modules_to_save"):
        trainer(RewardTrainer, tmp_path / "c", pairs(4), source(), **SGD, peft_config=lora())


# --- data of other kinds


def numbers(log_history):
    timed = ("runtime", "per_second", "flos")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in log_history]


def close(got, want):
    assert len(got) == len(want)
    for mine, theirs in zip(numbers(got), numbers(want), strict=True):
        assert mine == pytest.approx(theirs, rel=EXACT, abs=EXACT)


def test_several_held_out_sets_by_name(tmp_path):
    options = {**SGD, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"per_device_eval_batch_size": 7, "metric_for_best_model": "eval_hard_loss"}
    sets = {"easy": Dataset.from_list(pairs(7)), "hard": Dataset.from_list(pairs(5, margin=True))}
    want = run(trl.RewardTrainer, tmp_path / "a", pairs(), eval_dataset=sets, **options)
    got = run(RewardTrainer, tmp_path / "b", pairs(), eval_dataset=sets, **options)
    close(got.state.log_history, want.state.log_history)
    assert {"eval_easy_loss", "eval_hard_loss"} <= {k for log in got.state.log_history for k in log}
    assert got.state.best_metric == pytest.approx(want.state.best_metric, rel=EXACT)


def test_metrics_of_ones_own(tmp_path):
    calls = []

    def spread(found):
        calls.append(found.predictions)
        return {"spread": float(found.predictions.std())}

    held_out = Dataset.from_list(pairs(7))
    for cls in (trl.RewardTrainer, RewardTrainer):
        out = trainer(
            cls, tmp_path, pairs(), **SGD, eval_dataset=held_out, compute_metrics=spread,
            per_device_eval_batch_size=4,
        )  # fmt: skip
        assert out.evaluate()["eval_spread"] == float(calls[-1].std())
        out.predict(out.eval_dataset)
    for mine, theirs in zip(calls[2:], calls[:2], strict=True):
        assert mine.shape == theirs.shape
        assert mine == pytest.approx(theirs, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("ranked", [False, True])
def test_streamed_data(tmp_path, ranked):
    rows = groups(18) if ranked else pairs(20)
    trained = []
    for data in (rows, Dataset.from_list(rows).to_iterable_dataset()):
        out = run(RewardTrainer, tmp_path, data, **SGD, train_sampling_strategy="sequential")
        trained.append(out.model.state_dict())
    for name, p in trained[0].items():
        assert torch.equal(p, trained[1][name]), name


def test_bad_rows_of_a_stream_are_left_out_or_named(tmp_path):
    rows = pairs(9)
    rows[2]["chosen"] = rows[2]["rejected"]
    rows[3]["chosen"] = ""
    stream = Dataset.from_list(rows).to_iterable_dataset()
    out = trainer(RewardTrainer, tmp_path, stream)
    assert len(list(out.train_dataset)) == 7
    rows = groups(6)
    rows[4]["ranks"] = [1.0]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="row 4: 2 responses and 1 ranks"):
        list(trainer(RewardTrainer, tmp_path, stream).train_dataset)


def test_another_kind_of_data_cannot_be_evaluated(tmp_path):
    out = trainer(RewardTrainer, tmp_path, pairs(4))
    with pytest.raises(ValueError, match="the eval data set has ranked responses"):
        out.evaluate(Dataset.from_list(groups(4)))
