"""rmfast's RewardTrainer beside TRL's: the same losses, logs and weights."""

import logging

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

import trl
from datasets import Dataset

import rmfast
import tiny
from rmfast.packed import patching
from rmfast.packed import step as packed_step
from rmfast.train import objective as train_objective
from rmfast.train.trainer import RewardConfig, RewardTrainer

TOKENIZER = tiny.tokenizer()
LOGGED = (
    "loss grad_norm accuracy margin mean_reward min_reward max_reward num_tokens epoch "
    "eval_loss eval_accuracy eval_margin eval_mean_reward"
).split()


def text(generator, count):
    letters = torch.randint(97, 123, (count,), generator=generator)
    return "".join(chr(x) for x in letters.tolist())


def pairs(count=24, margin=False, messages=False):
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        prompt, chosen, rejected = text(g, 9 + i % 4), text(g, 1 + i % 5), text(g, 6)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if messages:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {k: [{"role": roles[k], "content": v}] for k, v in row.items()}
        out.append(row | ({"margin": 0.1 * i} if margin else {}))
    return out


def groups(count=12):
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        ranks = [[1, 2, 2], [3, 1], [0, 0, 5, 1]][i % 3]
        responses = [text(g, 2 + (i + j) % 5) for j in range(len(ranks))]
        out.append({"prompt": text(g, 8), "responses": responses, "ranks": ranks})
    return out


def model(**options):
    return tiny.model("llama", torch.float64, vocab_size=tiny.WORDS, **options)


def trainer(cls, folder, rows, net=None, config=None, callbacks=None, **options):
    ours = issubclass(cls, RewardTrainer)
    config = config or (RewardConfig if ours else trl.RewardConfig)
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3} | options
    evaluated, tokenizer = options.pop("eval_dataset", None), options.pop("tokenizer", TOKENIZER)
    given = {
        name: options.pop(name)
        for name in (
            "data_collator",
            "compute_metrics",
            "peft_config",
            "preprocess_logits_for_metrics",
        )
        if name in options
    }
    args = config(
        output_dir=str(folder), report_to="none", use_cpu=True, seed=0, disable_tqdm=True,
        **{"save_strategy": "no", "max_length": 64, "bf16": False, "logging_steps": 1} | options,
    )  # fmt: skip
    return cls(
        model=model() if net is None else net, args=args,
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=evaluated, processing_class=tokenizer, callbacks=callbacks, **given,
    )  # fmt: skip


def run(*args, **options):
    out = trainer(*args, **options)
    out.train()
    return out


def same(got, want, rtol=1e-6):
    """Logs and weights; in fp64, where only the rotary frequencies are fp32."""
    assert len(got.state.log_history) == len(want.state.log_history)
    for mine, theirs in zip(got.state.log_history, want.state.log_history, strict=True):
        assert {k for k in mine if k in LOGGED} == {k for k in theirs if k in LOGGED}
        for name in LOGGED:
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=rtol, abs=rtol), name
    for (name, p), q in zip(got.model.named_parameters(), want.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol, msg=name)


SGD = {
    "optim": "sgd",
    "learning_rate": 0.05,
}  # AdamW's first steps are signs: no tolerance for them


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({}, {}),
        ({"margin": True}, {"center_rewards_coefficient": 0.01}),
        ({"messages": True}, {"gradient_accumulation_steps": 2}),
        ({}, {"gradient_checkpointing": False, "dataloader_num_workers": 2}),
        ({"count": 10}, {"gradient_checkpointing": True, "max_steps": 6, "max_length": 18}),
    ],
    ids=["plain", "margin, centred", "messages, accumulated", "workers", "last batch smaller"],
)
def test_trains_as_trl_does(tmp_path, data, options):
    options = SGD | {"eval_strategy": "steps", "eval_steps": 2} | options
    rows, held_out = pairs(**data), Dataset.from_list(pairs(**data | {"count": 7}))
    make = {"eval_dataset": held_out, "per_device_eval_batch_size": 7}
    want = run(trl.RewardTrainer, tmp_path / "a", rows, **options, **make)
    got = run(RewardTrainer, tmp_path / "b", rows, **options, **make)
    assert rmfast.report(got.model).level == "trie" and not rmfast.report(got.model).fallbacks
    same(got, want)


def test_a_model_that_runs_padded_trains_as_trl_does(tmp_path):
    nets = [tiny.model("bloom", torch.float64) for _ in range(2)]
    options = SGD | {"max_steps": 2, "center_rewards_coefficient": 0.01}
    want = run(trl.RewardTrainer, tmp_path / "a", pairs(), net=nets[0], **options)
    got = run(RewardTrainer, tmp_path / "b", pairs(), net=nets[1], **options)
    assert rmfast.report(got.model).level == "head" and not rmfast.report(got.model).fallbacks
    same(got, want)


def test_trls_own_config_will_do(tmp_path):
    got = run(RewardTrainer, tmp_path / "a", pairs(), config=trl.RewardConfig, **SGD)
    want = run(trl.RewardTrainer, tmp_path / "b", pairs(), **SGD)
    same(got, want)


@pytest.mark.parametrize("how", ["backbone", "own collator", "dropout"])
def test_what_is_not_packed_trains_as_trl_does(tmp_path, how):
    options, nets = dict(SGD), [model(), model()]
    if how == "backbone":  # a head of two layers
        for net in nets:
            torch.manual_seed(1)
            net.score = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh()).double()
            net.score.append(torch.nn.Linear(8, 1).double())
        rmfast.patch(nets[1], pooling="hf")
    if how == "own collator":
        options["data_collator"] = trl.trainer.reward_trainer.DataCollatorForPreference(tiny.PAD)
    if how == "dropout":  # as long as none is drawn, dropout trains like no dropout
        for net in nets:
            net.model.layers[0].self_attn.attention_dropout = 1e-300
    want = run(trl.RewardTrainer, tmp_path / "a", pairs(), nets[0], **options)
    got = run(RewardTrainer, tmp_path / "b", pairs(), nets[1], **options)
    if how == "dropout":
        assert not got.data_collator.share_prefixes
    same(got, want)


def test_nan_losses_are_filtered_as_transformers_does(tmp_path):
    class Bad:
        """The third loss is NaN; its gradient is not."""

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.seen = getattr(self, "seen", 0) + 1
            return loss + float("nan") if self.seen == 3 else loss

    theirs = type("Theirs", (Bad, trl.RewardTrainer), {})
    ours = type("Ours", (Bad, RewardTrainer), {})
    for filtered in (True, False):
        options = SGD | {"logging_nan_inf_filter": filtered}
        want = run(theirs, tmp_path / "a", pairs(), **options)
        got = run(ours, tmp_path / "b", pairs(), **options)
        assert got.args.logging_nan_inf_filter == filtered
        losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (got, want)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6, nan_ok=True)


# --- the loss is the mean over all pairs of a step


class Recording(RewardTrainer):
    """Keeps each optimiser step's batches and loss."""

    def get_batch_samples(self, *args):
        out = super().get_batch_samples(*args)
        self.steps = [*getattr(self, "steps", []), out[0]]
        return out


@pytest.mark.parametrize(("ranked", "budget"), [(False, 60), (True, 90)])
def test_token_budget(tmp_path, ranked, budget):
    """Batches keep to the budget, and steps are those of the mean over their pairs."""
    rows = groups(18) if ranked else pairs(30, margin=True)
    options = {"max_tokens_per_batch": budget, "gradient_accumulation_steps": 3, **SGD}
    kind = "plackett_luce" if ranked else "bradley_terry"
    got = run(
        Recording, tmp_path, rows, num_train_epochs=2, loss_type=kind, max_grad_norm=0.0,
        lr_scheduler_type="constant", **options | {"max_steps": -1},
    )  # fmt: skip
    batches = [batch for step in got.steps for batch in step]
    assert max(len(batch["input_ids"]) for batch in batches) <= budget
    assert len({batch["count"] for batch in batches}) > 1
    assert sum(batch["count"] for batch in batches) == 2 * len(rows)
    net, objective = model(), train_objective.Objective(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=SGD["learning_rate"])
    losses = []
    for step in got.steps:
        total, count = 0.0, sum(batch["count"] for batch in step)
        for batch in step:
            scores = net(**packed_step.padded(batch, tiny.PAD)).logits[:, 0]
            total = total + objective.of_scores(scores, batch)[0] / count
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    logged = [log["loss"] for log in got.state.log_history if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-5)
    for p, q in zip(got.model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_examples_larger_than_the_budget_run_in_pieces(tmp_path, monkeypatch):
    """Alone in their batches, and the training is that of batches which run whole."""
    options = {"max_tokens_per_batch": 18, "gradient_accumulation_steps": 3, **SGD}
    got = run(Recording, tmp_path, pairs(30, margin=True), **options)
    larger = [b for step in got.steps for b in step if len(b["input_ids"]) > 18]
    assert larger and {batch["count"] for batch in larger} == {1}
    assert "with gradients at most 18 tokens run at once" in str(got.report)
    repatch = patching.repatch
    monkeypatch.setattr(patching, "repatch", lambda model, **_: repatch(model))
    whole = run(Recording, tmp_path, pairs(30, margin=True), **options)
    assert "with gradients" not in str(whole.report)
    for p, q in zip(got.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


def test_all_pairs_is_the_default_of_groups(tmp_path):
    got = run(RewardTrainer, tmp_path, groups(), **SGD)
    assert got.objective.kind == "all_pairs"
    log = got.state.log_history[0]
    assert {"loss", "accuracy", "margin", "mean_reward"} <= log.keys()


def test_a_common_prefix_counts_once(tmp_path):
    rows = [{**row, "prompt": "s" * 40 + row["prompt"]} for row in pairs(20)]
    out = trainer(RewardTrainer, tmp_path, rows, max_tokens_per_batch=150, max_length=128)
    sizes = [len(batch["input_ids"]) for batch in out.get_train_dataloader()]
    own = sum(out.data_collator.nodes(row) for row in out.train_dataset)
    assert max(sizes) <= 150 and len(sizes) < own / 150


# --- going on


class Stop(Exception):
    pass


@pytest.mark.parametrize("budget", [None, 60])
def test_resumed_is_as_never_interrupted(tmp_path, budget):
    options = {"max_steps": 8, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 3, "max_tokens_per_batch": budget}
    whole = run(RewardTrainer, tmp_path / "a", pairs(20), **options)

    class Stops(RewardTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise Stop
            return super().training_step(*args, **kwargs)

    broken = trainer(Stops, tmp_path / "b", pairs(20), **options)
    with pytest.raises(Stop):
        broken.train()
    resumed = trainer(RewardTrainer, tmp_path / "b", pairs(20), **options)
    resumed.train(resume_from_checkpoint=True)
    losses = [[x.get("loss") for x in t.state.log_history] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("ends", [False, True], ids=["text", "text that ends with eos"])
def test_a_tokenizer_without_a_pad_token(tmp_path, ends):
    """The end of text becomes the pad, and a score is read before a final one: as in TRL."""
    rows = pairs()
    if ends:
        rows = [{**row, "chosen": row["chosen"] + "</s>"} for row in rows]
    trainers = []
    for cls in (RewardTrainer, trl.RewardTrainer):
        tokenizer = tiny.tokenizer()
        tokenizer.pad_token = None
        net = model()
        net.config.pad_token_id = None
        trainers.append(run(cls, tmp_path / cls.__module__, rows, net, tokenizer=tokenizer, **SGD))
        assert trainers[-1].model.config.pad_token_id == tokenizer.eos_token_id
    same(*trainers)


# --- what is dropped, and what is refused


def test_rows_that_say_nothing_are_dropped_and_counted(tmp_path, caplog):
    rows = pairs(6)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[3]["chosen"] = " "
    rows[4]["chosen"] = "x" * 80
    with caplog.at_level(logging.WARNING):
        out = trainer(RewardTrainer, tmp_path, rows)
    assert out.dropped["train"] == {
        "identical chosen and rejected": 1, "empty response": 1, "longer than max_length": 1,
    }  # fmt: skip
    assert len(out.train_dataset) == 3
    assert "train data set: 3 rows dropped" in caplog.text
    held_out = {"train": Dataset.from_list([*pairs(2), rows[1]])}
    out = trainer(RewardTrainer, tmp_path, rows, eval_dataset=held_out)
    assert out.dropped["train"].total() == 3 and out.dropped["eval train"].total() == 1
    rows = groups(6)
    rows[0] = {"prompt": "p", "responses": ["a"], "ranks": [1]}
    rows[1]["ranks"] = [4] * len(rows[1]["ranks"])
    rows[2]["responses"][0] = ""
    rows[3]["responses"][0] = "x" * 80
    out = trainer(RewardTrainer, tmp_path, rows)
    assert out.dropped["train"] == {
        "fewer than two responses": 1, "all responses tied": 1, "empty response": 1,
        "longer than max_length": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            pairs(3, margin=True),
            {"margin": float("nan")},
            "row 1: margin must be a finite number, not nan",
        ),
        (pairs(3), {"chosen": "", "rejected": ""}, None),
        (groups(3), {"ranks": [1]}, "row 1: 2 responses and 1 ranks"),
        (groups(3), {"ranks": [1.0, float("inf")]}, "row 1: each of ranks must be a finite"),
        (groups(3), {"responses": ["a"] * 65, "ranks": list(range(65))}, "row 1: 65 responses"),
        ([{"question": "a", "good": "b"}] * 2, {}, "columns question, good; needed are chosen"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "no row left"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, options, message):
    rows[1 if len(rows) > 1 else 0] |= options
    if message is None:
        assert len(trainer(RewardTrainer, tmp_path, rows).train_dataset) == 2
        return
    with pytest.raises(ValueError, match=message):
        trainer(RewardTrainer, tmp_path, rows)


def test_keys_that_are_null_say_nothing(tmp_path):
    """Arrow gives every message, and every object in one, the keys of all."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if 'name' in m %}!{% endif %}"
        "{% if 'more' in m and 'x' in m.more %}?{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = pairs(8, messages=True)
    for side in ("chosen", "rejected"):  # the first row has keys that others lack
        rows[0][side][0] |= {"name": "n", "more": {"x": 1, "y": 2}}
        rows[1][side][0] |= {"more": {"y": 2}}
    found = trainer(RewardTrainer, tmp_path, rows, tokenizer=tokenizer).train_dataset
    texts = [tokenizer.decode(ids) for ids in found["chosen_ids"]]
    assert [text.count("!") + text.count("?") for text in texts] == [2] + [0] * 7


@pytest.mark.parametrize(
    "options",
    [
        {"use_liger_kernel": True},
        {"label_smoothing_factor": 0.1},
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"split_batches": True}},
        {"max_tokens_per_batch": 0},
        {"train_sampling_strategy": "sequential", "max_tokens_per_batch": 60},
        {"dataloader_drop_last": True, "max_tokens_per_batch": 60},
        {"auto_find_batch_size": True, "max_tokens_per_batch": 60},
        {"include_for_metrics": ["inputs"]},
    ],
    ids=str,
)
def test_options_that_would_train_on_something_else_are_refused(tmp_path, options, monkeypatch):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}.* cannot be used with rmfast's RewardTrainer"):
        trainer(RewardTrainer, tmp_path, pairs(4), **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (pairs(4), {"loss_type": "all_pairs"}, "does not go with pairs"),
        (pairs(4), {"loss_type": "hinge"}, "'hinge' does not go with pairs: bradley_terry and"),
        (groups(4), {"loss_type": "bradley_terry"}, "does not go with ranked responses"),
        (groups(4), {"eval_dataset": Dataset.from_list(pairs(3))}, "train: ranked responses, eval"),
        (pairs(4), {"data_collator": list, "max_tokens_per_batch": 99}, "give no data_collator"),
    ],
)
def test_what_does_not_go_together(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(RewardTrainer, tmp_path, rows, **options).get_train_dataloader()


def test_more_labels_than_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_labels=2"):
        trainer(RewardTrainer, tmp_path, pairs(4), model(num_labels=2))


# --- the step


def test_a_whole_training_step_reads_nothing_from_the_device(tmp_path):
    """Of tensors that hold no numbers: an item, a nonzero or a copy to numpy would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    out = trainer(RewardTrainer, tmp_path, pairs(), gradient_accumulation_steps=2)
    out.create_optimizer()
    batches, count = out.get_batch_samples(iter(out.get_train_dataloader()), 2, out.args.device)
    mode = FakeTensorMode()
    net = out.model
    for module in net.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    fake = mode.from_tensor(value.detach())
                    held[name] = torch.nn.Parameter(fake) if held is module._parameters else fake
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = mode.from_tensor(value)
    out.optimizer = torch.optim.AdamW(net.parameters())
    out._tr_loss = mode.from_tensor(torch.tensor(0.0))
    out._filters, out._globalstep_last_logged = True, 0
    with mode:
        for batch in batches:
            out._tr_loss += out.training_step(net, batch, count)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        out.optimizer.step()
        with pytest.raises(Exception, match="local_scalar_dense"):
            out._tr_loss.item()
    assert len(out.batch_metrics["train"].waiting) == 2
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("rows", "strategy"),
    [(pairs(24, margin=True), {"logging_strategy": "no"}), (groups(24), {"logging_steps": 7})],
    ids=["pairs, none logged", "groups"],
)
def test_metrics_that_wait_take_so_much_room_and_no_more(tmp_path, rows, strategy, monkeypatch):
    from rmfast.train import metrics

    class Watched(RewardTrainer):
        most = 0

        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            self.most = max(self.most, *(len(one.waiting) for one in self.batch_metrics.values()))
            return out

    options = {
        "max_steps": 8, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 1,
        "eval_strategy": "steps", "eval_steps": 8, "eval_dataset": Dataset.from_list(rows[:7]),
    }  # fmt: skip
    options = SGD | options | strategy
    want = run(RewardTrainer, tmp_path / "a", rows, **options)
    monkeypatch.setattr(metrics, "WAITING", 3)
    got = run(Watched, tmp_path / "b", rows, **options)
    assert got.most == 2, "of 8 and 7 batches"
    same(got, want, 1e-12)


# --- adapters


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, **options)


@pytest.mark.parametrize("options", [{"modules_to_save": ["score"]}, {"task_type": "SEQ_CLS"}])
def test_lora_trains_and_saves_the_head(tmp_path, options):
    from peft import PeftModel

    trainers = []
    for cls in (trl.RewardTrainer, RewardTrainer):
        torch.manual_seed(3)
        args = {"max_steps": 3, **SGD}
        out = trainer(cls, tmp_path / cls.__module__, pairs(), model_with(lora(**options)), **args)
        out.train()
        trainers.append(out)
    want, got = trainers
    assert rmfast.report(got.model).level == "trie" and not rmfast.report(got.model).fallbacks
    same(got, want)
    got.save_model(str(tmp_path / "saved"))
    back = PeftModel.from_pretrained(model(), str(tmp_path / "saved"))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(back.eval()(ids).logits, got.model.eval()(ids).logits)
    before = model().score.weight
    assert not torch.equal(back.base_model.model.score.weight, before)


def model_with(config):
    from peft import get_peft_model

    return get_peft_model(model(), config)


def test_lora_without_the_head_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the reward head is frozen.*modules_to_save"):
        trainer(RewardTrainer, tmp_path, pairs(4), model_with(lora()))
