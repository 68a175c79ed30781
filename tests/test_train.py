"""``rmfast train`` from end to end: what it writes, what it refuses, and going on after a kill."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import rmfast
import tiny
from rmfast import data, resume
from rmfast.commands import main
from rmfast.data.encoding import Encoder
from rmfast.train import begin, fit, job, watch
from rmfast.train import rows as train_rows
from rmfast.train.trainer import RewardConfig, RewardTrainer

CAN_DRAW = watch._can_draw
WORDS = "what is it a cat dog one two ünïcode 猫 yes no".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("sft"), cls=AutoModelForCausalLM)


def saved(folder: Path, adds_bos: bool = False, **options) -> str:
    tiny.model(vocab_size=tiny.WORDS, max_position_embeddings=200, **options).save_pretrained(
        folder
    )
    tiny.tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def loud_again():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def saved_encoder(folder: Path) -> str:
    """A tiny BERT, and a tokenizer that makes two segments of a prompt and a response."""
    from tokenizers import processors

    tokenizer = tiny.tokenizer(template=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 1), ("</s>", 2)]
    )
    tiny.model("bert", vocab_size=tiny.WORDS, max_position_embeddings=200).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def text(draw: random.Random, most: int = 5) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def pairs(count: int = 30, messages: bool = False, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    out = []
    for i in range(count):  # two pairs a question
        row = {"prompt": f"{i // 2} {WORDS[i // 2 % 9]}?\n", "chosen": "yes " + text(draw)}
        row["rejected"] = "no " + text(draw)
        if messages:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {k: [{"role": roles[k], "content": v}] for k, v in row.items()}
        out.append(row)
    return out


def groups(count: int = 16) -> list[dict]:
    draw = random.Random(0)
    ranks = [[1, 2, 2], [3, 1], [0, 0, 5, 1]]
    return [
        {
            "prompt": f"{i} {text(draw)}",
            "responses": [f"{j} {text(draw)}" for j in range(len(ranks[i % 3]))],
            "ranks": ranks[i % 3],
        }
        for i in range(count)
    ]


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def metrics(folder: str | Path, kind: str) -> list[dict]:
    found = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


FAST = ["--dtype", "float32", "--device", "cpu", "--grad-accum", "1", "--max-steps", "4",
        "--batch-pairs", "4", "--learning-rate", "1e-3"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in a folder of its own; four steps of four pairs, where nothing is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "_can_draw", lambda: False)  # pictures take half of the time

    def run(*argv: str, code: int = 0) -> Path:
        assert main.main(["train", *FAST, *argv]) == code
        return tmp_path / "out"

    return run


def command(name: str, rows: list[dict], *argv: str) -> list[str]:
    return ["--model", name, "--data", lines(Path("in.jsonl"), rows), "--output", "out", *argv]


def card_scores(card: str) -> list[float]:
    """What the card's own code prints, with rmfast and without."""
    scores = []
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, {})
        scores.append(float(said.getvalue()))
    return scores


# --- what comes out


@pytest.mark.parametrize("kind", ["text", "messages", "bos", "lora", "new head"])
def test_a_run_and_its_card(run, model, language_model, tmp_path, capsys, monkeypatch, kind):
    """The card's own code gives the scores of what was trained, with rmfast and without."""
    monkeypatch.setattr(watch, "_can_draw", CAN_DRAW)
    name = {"new head": language_model}.get(kind, model)
    if kind == "bos":
        name = saved(tmp_path / "bos", adds_bos=True)
    lora = ["--lora-rank", "4"] if kind == "lora" else []
    rows = pairs(30, messages=kind not in ("text", "new head"))
    out = run(*command(name, rows, "--eval-split", "0.2", "--eval-every", "2", *lora))
    said = capsys.readouterr()
    assert "held out: 6 pairs of 3 questions" in said.out and "written: out" in said.out
    assert "rmfast train: 4 steps\n" in said.err and "{'loss'" not in said.err

    trained, held_out = metrics(out, "train"), metrics(out, "eval")
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert [line["step"] for line in held_out] == [0, 2, 4]
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "tokens"} <= trained[0].keys()
    assert (out / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) == 2

    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    before = AutoModelForSequenceClassification.from_pretrained(model)
    assert loaded.config.pad_token_id == tiny.PAD
    assert loaded.config.use_cache == before.config.use_cache
    assert not torch.equal(loaded.score.weight, before.score.weight)
    assert not torch.equal(
        loaded.model.layers[1].mlp.up_proj.weight, before.model.layers[1].mlp.up_proj.weight
    )

    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and Path(name).name in card and "in.jsonl" in card
    assert ("its head: new" in card) == (kind == "new head")
    assert "Of 6 pairs of the same data" in card
    assert ("[tokenizer.bos_token_id, *ids]" in card) == (kind == "bos")
    metadata = ModelCard.load(out / "README.md").data
    assert (metadata.library_name, metadata.base_model) == ("transformers", None)
    assert metadata.eval_results[0].metric_value == held_out[-1]["rows"]["accuracy"]
    assert metadata.eval_results[0].dataset_name == "in.jsonl, held-out prompts"
    scores = card_scores(card)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    # and these are tokens like those that were trained on
    tokenizer = AutoTokenizer.from_pretrained(out)
    question, answer = "How many legs has a spider?", "Eight."
    if isinstance(rows[0]["prompt"], list):
        pair = {k: [{"role": r, "content": v}] for k, r, v in (
            ("prompt", "user", question), ("chosen", "assistant", answer),
            ("rejected", "assistant", "Six."))}  # fmt: skip
    else:
        pair = {"prompt": question + " ", "chosen": answer, "rejected": "Six."}
    encoder = Encoder(tokenizer, end_of_text=True)
    row = train_rows.tokens(data.preferences([pair]), encoder)[0][0]
    with torch.inference_mode():
        want = loaded(torch.tensor([row["chosen_ids"].tolist()])).logits.item()
    assert scores[1] == pytest.approx(want, rel=1e-6)


def whole(rows: list[dict]) -> list[dict]:
    """The prompt's messages before each answer's."""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def group_messages(count: int) -> list[dict]:
    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "responses": [turn("assistant", text) for text in row["responses"]],
            "ranks": row["ranks"],
        }
        for row in groups(count)
    ]


def best_against_others(rows: list[dict]) -> list[dict]:
    """Ranked groups as ``rmfast eval`` takes them."""
    out = []
    for row in rows:
        sides = {"chosen": [], "rejected": []}
        for answer, rank in zip(row["responses"], row["ranks"], strict=True):
            sides["chosen" if rank == min(row["ranks"]) else "rejected"].append(answer)
        out.append({"prompt": row["prompt"], **sides})
    return out


def dialogues(rows: list[dict]) -> list[dict]:
    """As in HH-RLHF."""
    return [
        {k: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[k]}" for k in ("chosen", "rejected")}
        for row in rows
    ]


SHAPES = {  # what is trained on, and what is held out
    "text": (pairs(), pairs(14, seed=1)),
    "whole texts": (whole(pairs()), whole(pairs(14, seed=1))),
    "groups of text": (groups(16), groups(9)),
    "dialogues": (dialogues(pairs()), dialogues(pairs(14, seed=1))),
    "segments": (pairs(), pairs(14, seed=1)),
    "messages": (pairs(messages=True), pairs(14, messages=True, seed=1)),
    "whole conversations": (whole(pairs(messages=True)), whole(pairs(14, messages=True, seed=1))),
    "groups": (group_messages(16), group_messages(9)),
}


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        *((shape, []) for shape in SHAPES),
        ("text", ["--lora-rank", "2"]),
        ("messages", ["--lora-rank", "2", "--dtype", "bfloat16"]),
        ("messages", ["--dtype", "mixed", "--keep-best", "--eval-every", "1"]),
    ],
)
def test_the_last_figures_are_those_of_rmfast_eval(run, tmp_path, shape, more):
    """Of a model with a BOS before each text, whose pairs are dropped where they are too long."""
    rows, held_out = SHAPES[shape]
    name = saved_encoder(tmp_path / "m") if shape == "segments" else saved(tmp_path / "m", True)
    limits = {"text": "35", "whole texts": "35", "groups of text": "30", "segments": "36"}
    more = ["--max-length", limits.get(shape, "52"), "--max-steps", "2", *more]
    more += ["--chat"] if shape == "dialogues" else []
    out = run(*command(name, rows, "--eval-data", lines(tmp_path / "h.jsonl", held_out), *more))
    again = best_against_others(held_out) if "groups" in shape else held_out
    evaluated = ["eval", "--model", str(out), "--input", lines(tmp_path / "e.jsonl", again)]
    main.main([*evaluated, "--json", "e.json"])
    want, got = json.loads(Path("e.json").read_text()), metrics(out, "eval")[-1]
    if shape == "segments":
        ours, theirs = card_scores((out / "README.md").read_text())
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert 3 <= got["rows"]["n"] < len(held_out) and got["rows"] == want["rows"]
    assert got["length"]["n"] == want["length"]["n"] and got["groups"] == want["groups"]
    for part, name in (("margin", "mean"), ("calibration", "log_loss"), ("calibration", "ece")):
        assert got[part][name] == pytest.approx(want[part][name], rel=1e-6), name


def test_special_tokens_in_messages_are_refused_unless_asked_for(run, model, capsys):
    rows = pairs(6, messages=True)
    for row in rows:
        row["prompt"][0]["content"] += "</s>"
    more = ["--eval-split", "0", "--max-steps", "1"]
    run(*command(model, rows, *more), code=2)
    said = capsys.readouterr().err
    assert 'in.jsonl:1: turn 0 (user) has "</s>"' in said and "--special-tokens" in said
    out = run(*command(model, rows, *more, "--special-tokens", "--overwrite"))
    assert "special-tokens: true" in (out / "config.yaml").read_text()


def test_ranked_groups(run, model):
    out = run(*command(model, groups(), "--eval-split", "0.3", "--loss", "plackett_luce"))
    last = metrics(out, "eval")[-1]
    assert last["groups"] and last["rows"]["n"] == 5
    card = (out / "README.md").read_text()
    assert "11 ranked groups of answers of text" in card and "loss: Plackett-Luce" in card


def test_weights_are_the_trainers_and_evaluation_leaves_no_trace(run, model, tmp_path):
    """As RewardTrainer alone trains on the same pairs, with and without evaluation between."""
    options = ["--schedule", "linear", "--warm-up", "0", "--center", "0.01",
               "--label-smoothing", "0.1", "--no-gradient-checkpointing"]  # fmt: skip
    rows = pairs(20)
    held_out = lines(tmp_path / "held.jsonl", pairs(6, seed=1))
    all_of_it = command(model, rows, *options)
    plain = run(*all_of_it, "--eval-split", "0")
    with_eval = run(*all_of_it, "--eval-data", held_out, "--eval-every", "1", "--output", "eval")
    assert not metrics(plain, "eval") and not (plain / "README.md").read_text().count("Held-out")
    got = load_file(plain / "model.safetensors")
    other = load_file(with_eval.with_name("eval") / "model.safetensors")
    assert all(torch.equal(got[name], other[name]) for name in got)

    started = begin.load_to_train(model)
    args = RewardConfig(
        "trl", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3,
        center_rewards_coefficient=0.01, label_smoothing=0.1, lr_scheduler_type="linear",
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", seed=0,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    alone = RewardTrainer(
        started.model, args, train_dataset=Dataset.from_list(rows),
        processing_class=started.tokenizer,
    )  # fmt: skip
    alone.train()
    want = alone.model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_tokens_are_trls(model, tmp_path):
    """Texts and messages, where no tokenizer puts a BOS that a template does not write."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=60)
    for rows in (pairs(), pairs(messages=True), groups()):
        net = AutoModelForSequenceClassification.from_pretrained(model)
        theirs = RewardTrainer(
            net, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        ).train_dataset
        encoder = Encoder(tokenizer, max_length=60, end_of_text=True)
        ours, dropped = train_rows.tokens(data.preferences(rows), encoder)
        names = [name for name in ours[0] if name != "ranks"]
        assert len(ours) == len(theirs) and dropped.total() == len(rows) - len(ours)
        for mine, other in zip(ours, theirs, strict=True):
            for name in names:
                flat = mine[name] if name == "responses_ids" else [mine[name]]
                want = other[name] if name == "responses_ids" else [other[name]]
                assert [x.tolist() for x in flat] == want


def test_no_question_is_on_both_sides():
    found = data.preferences(pairs(60))
    sides = train_rows.hold_out(found, 0.25, 3)
    assert len(sides[0]) + len(sides[1]) == 60 and 13 <= len(sides[1]) <= 15
    assert not {x.question() for x in sides[0]} & {x.question() for x in sides[1]}
    assert train_rows.hold_out(found, 0, 3) == (found, None)
    assert [x.where for x in train_rows.hold_out(found, 0.25, 4)[1]] != [x.where for x in sides[1]]


# --- options


def test_yaml_and_flags(run, model):
    options = {"model": model, "output": "out", "eval_split": 0.2, "learning-rate": "2e-4",
               "gradient-checkpointing": False, "max-steps": 2, "batch-pairs": None}  # fmt: skip
    Path("c.yaml").write_text(yaml.safe_dump(options))
    data = lines(Path("in.jsonl"), pairs())
    # FAST says --learning-rate 1e-3 and --max-steps 4: the command line goes first
    out = run("--config", "c.yaml", "--data", data, "--batch-pairs", "3")
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["learning-rate"] == 1e-3 and kept["max-steps"] == 4 and kept["batch-pairs"] == 3
    assert kept["gradient-checkpointing"] is False and kept["eval-split"] == 0.2
    assert kept["dtype"] == "float32" and kept["epochs"] == 1.0
    # what is kept is a config again, of the same run
    again = run("--config", str(out / "config.yaml"), "--batch-pairs", "3", "--output", "again")
    first, second = (load_file(x / "model.safetensors") for x in (out, again.with_name("again")))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("learning_rat: 1", "there is no option 'learning_rat', did you mean learning-rate?"),
        ("zebra: 1", "there is no option 'zebra'"),
        ("resume: true", "there is no option 'resume'"),
        ("epochs: many", "Invalid value for '--epochs'"),
        ("chat: 3", "Invalid value for '--chat'"),
        ("limit: true", "Invalid value for '--limit'"),
        (
            "loss: hinge",
            "--loss must be one of bradley_terry, focal, all_pairs, plackett_luce, got",
        ),
        ("seed: [1, 2]", "seed needs one value, got [1, 2]"),
        ("eval-split: 0.1\neval_split: 0.2", "duplicate key 'eval_split'"),
        ("- model", "must be options"),
        ("a: b: c", "is not YAML"),
        ("eval-split: 1.0", "--eval-split must be a number at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_yaml(run, capsys, said, message):
    Path("c.yaml").write_text(said)
    run("--config", "c.yaml", "--model", "m", "--data", "d", "--output", "o", code=2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_defaults_of_lora_and_bf16_weights(run, model):
    """The head and the adapters stay fp32 over a bf16 model; what is merged is bf16."""
    argv = [x for x in FAST if x not in ("--learning-rate", "1e-3")]
    argv += ["--dtype", "bfloat16", "--lora-rank", "2", "--max-steps", "2"]
    assert main.main(["train", *argv, *command(model, pairs())]) == 0
    kept = yaml.safe_load(Path("out/config.yaml").read_text())
    assert kept["learning-rate"] == 1e-4 and kept["lora-alpha"] == 4
    last = sorted(Path("out/checkpoints").glob("checkpoint-*"))[-1]
    assert {x.dtype for x in load_file(last / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert any("score" in name for name in load_file(last / "adapter_model.safetensors"))
    assert not list(Path("out").glob("adapter*"))


# --- the best checkpoint, and reports


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"]], ids=["all weights", "LoRA"])
def test_the_best_checkpoint_is_written(run, model, monkeypatch, more):
    """The first of equals, in a run that was stopped and went on elsewhere, too."""
    accuracy = {0: 1.0, 1: 0.9, 2: 0.9, 3: 0.1}
    evaluate = fit.Trainer.evaluate
    stops = []

    def scripted(self, *args, **kwargs):
        figures = evaluate(self, *args, **kwargs)
        if self.state.global_step in stops:
            self.watch.stop()
        return {**figures, "eval_accuracy": accuracy[self.state.global_step]}

    monkeypatch.setattr(fit.Trainer, "evaluate", scripted)
    argv = command(model, pairs(), "--keep-best", "--max-steps", "3", *more)
    out = run(*argv)
    kept = {x.name for x in (out / "checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    *_, last = metrics(out, "eval")
    assert last["step"] == 1 and last["written"]
    assert "3 steps (kept: step 1, the best held-out" in (out / "README.md").read_text()
    want = load_file(out / "model.safetensors")
    if not more:
        best = load_file(out / "checkpoints/checkpoint-1/model.safetensors")
        assert all(torch.equal(want[name], best[name]) for name in want)
    stops.append(1)  # after the next step
    run(*argv, "--output", "b", code=130)
    Path("b").rename("c")
    stops.clear()
    run(*argv, "--output", "c", "--resume")
    got = load_file("c/model.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert metrics("c", "eval")[-1] == last


def test_metrics_are_reported(run, model, capsys, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Fake(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((state.global_step, set(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Fake)
    run(*command(model, pairs(), "--report-to", "fake"), code=2)
    assert "--report-to fake: it is not installed, or unknown" in capsys.readouterr().err
    monkeypatch.setattr(job, "get_available_reporting_integrations", lambda: ["fake"])
    argv = command(model, pairs(), "--eval-every", "2")
    run(*argv)
    assert not seen
    run(*argv, "--report-to", "fake", "--overwrite")
    assert [step for step, names in seen if "loss" in names] == [1, 2, 3, 4]
    assert [step for step, names in seen if "eval_accuracy" in names] == [0, 2, 4]


# --- it learns, or says that it has not

FEW = ["--dtype", "float32", "--device", "cpu", "--eval-split", "0"]


def test_one_step_is_enough_to_learn(run, model):
    """60 pairs and all defaults: one optimiser step."""
    assert main.main(["train", *FEW, *command(model, pairs(60))]) == 0
    (line,) = metrics("out", "train")
    assert line["step"] == 1 and line["learning_rate"] == 1e-5
    want, got = (load_file(f"{x}/model.safetensors") for x in (model, "out"))
    assert not any(torch.equal(want[name], got[name]) for name in want if want[name].ndim > 1)
    assert json.loads(Path("out/checkpoints/run.json").read_text())["warnings"] == []
    assert "Warning" not in Path("out/README.md").read_text()


def test_a_constant_rate_is_warmed_up_too(run, model):
    argv = command(model, pairs(), "--eval-split", "0", "--warm-up", "0.1", "--batch-pairs", "1")
    out = run(*argv, "--schedule", "constant", "--max-steps", "10")
    rates = [line["learning_rate"] for line in metrics(out, "train")]
    assert rates[0] < rates[1] == rates[-1] == 1e-3


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"], ["--dtype", "bfloat16"]], ids=str)
def test_a_run_that_learnt_nothing_says_so(run, model, capsys, more):
    out = run(*command(model, pairs(), *FEW, "--learning-rate", "1e-30", "--max-steps", "2", *more))
    message = "no weight changed in 2 steps, this is the model that the run began with: raise"
    assert f"! {message}" in capsys.readouterr().out
    assert f"**Warning: {message}" in (out / "README.md").read_text()
    (warning,) = json.loads((out / "checkpoints/run.json").read_text())["warnings"]
    assert warning.startswith(message)


@pytest.mark.parametrize(
    ("share", "steps", "want"),
    [(0.03, 1, 0), (0.03, 9, 0), (0.03, 10, 1), (0.03, 1000, 30), (0.9, 50, 5), (0.0, 99, 0),
     (7, 9, 7)],
)  # fmt: skip
def test_warm_up_never_swallows_a_run(tmp_path, share, steps, want):
    args = RewardConfig(str(tmp_path), warmup_steps=share, report_to="none")
    assert args.get_warmup_steps(steps) == want


# --- can it be saved? is found before the first step


def cannot(*_, **__):
    raise ValueError("a reason\nin many lines")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "some/file")


@pytest.mark.parametrize(
    ("what", "name", "does", "message"),
    [
        ("model", "save_pretrained", cannot, "this model could not be saved at the end: a reason"),
        ("tokenizer", "save_pretrained", cannot, "could not be saved at the end: a reason"),
        ("model", "save_pretrained", full, "some/file: cannot be written: No space left"),
        ("layer", "merge", cannot, "could not be saved at the end: a reason"),
    ],
)
def test_what_cannot_be_saved_is_not_trained(
    run, model, capsys, monkeypatch, what, name, does, message
):
    make, made = fit.make_trainer, []

    def make_trainer(*args, **kwargs):
        made.append(make(*args, **kwargs))
        layer = (
            made[0].model.base_model.model.model.layers[1].mlp.up_proj if what == "layer" else None
        )
        found = {"model": made[0].model, "tokenizer": made[0].processing_class, "layer": layer}
        setattr(found[what], name, does)
        return made[0]

    monkeypatch.setattr(fit, "make_trainer", make_trainer)
    more = ["--lora-rank", "2"] if what == "layer" else []
    run(*command(model, pairs(), *more), code=2)
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "in many lines" not in said
    assert made[0].state.global_step == 0 and not list(Path("out/checkpoints").iterdir())


def test_an_adapter_of_a_quantised_model_is_kept(run, model, monkeypatch):
    """As the adapter that it is; the card's code loads it."""
    train = fit.train

    def quantised(trainer, checkpoint):
        train(trainer, checkpoint)
        trainer.model.get_base_model().is_quantized = True

    monkeypatch.setattr(fit, "train", quantised)
    short = ["--max-steps", "1", "--eval-split", "0"]
    out = run(*command(model, pairs(messages=True), "--lora-rank", "2", *short))
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    card = (out / "README.md").read_text()
    assert "this is the adapter alone" in card
    ours = rmfast.loading.load(str(out)).model
    code, names = re.findall(r"```python\n(.*?)```", card, re.S)[1], {}
    exec(code.split("ids =")[0], names)
    theirs, ids = names["model"].eval(), torch.tensor([[5, 6, 7]])
    assert theirs.config.pad_token_id == tiny.PAD
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    before = load_file(f"{model}/model.safetensors")
    assert not torch.equal(ours.score.weight, before["score.weight"])
    monkeypatch.setattr(fit, "train", train)
    run(*command(model, pairs(), *short), "--overwrite")
    assert not list(out.glob("adapter*")) and (out / "model.safetensors").exists()


# --- going on


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, language_model):
    """Killed anywhere, and told to stop; with a new head, several epochs and a token budget."""
    rows = lines(tmp_path / "in.jsonl", pairs(20))
    argv = [
        "--model", language_model, "--data", rows, "--eval-split", "0.2", "--max-steps", "6",
        "--grad-accum", "1", "--max-tokens-per-batch", "150", "--learning-rate", "1e-3",
        "--dtype", "float32", "--device", "cpu", "--save-every", "2", "--eval-every", "3",
        "--no-gradient-checkpointing",
    ]  # fmt: skip
    shares = [0.5, 0.75, 0.93]
    job = {"folder": str(tmp_path), "argv": argv, "shares": shares}
    root = str(Path(rmfast.__file__).parent.parent)
    out = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_train.py"))],
        input=json.dumps(job), capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    first, *tries = map(json.loads, out.stdout.splitlines())
    assert first["code"] == 0 and first["weights"]
    kills, stops = tries[: len(shares)], tries[len(shares) :]
    assert [one["ended"] for one in kills] == [-9] * len(shares)
    assert all(one["same"] and one["code"] == 0 for one in kills), kills
    assert len({tuple(one["left"]) for one in kills}) > 2, (
        kills
    )  # at different places, some half saved
    assert [one["ended"] for one in stops] == [130, 130]
    for one in stops:
        assert one["same"] and one["code"] == 0, one
        assert f"saved up to step {one['step']}; the same command with --resume" in one["said"]


def test_lora_goes_on_to_the_same_weights(run, model, monkeypatch):
    argv = command(model, pairs(), "--lora-rank", "4", "--save-every", "1")
    whole = run(*argv, "--output", "whole").with_name("whole")

    class Stop(Exception):
        pass

    def stop(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise Stop
        return RewardTrainer.training_step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(fit.Trainer, "training_step", stop)
        with pytest.raises(Stop):
            run(*argv)
    out = run(*argv, "--resume")
    want, got = (load_file(x / "model.safetensors") for x in (whole, out))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert metrics(whole, "train") == metrics(out, "train")


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]], ids=["all weights", "LoRA"])
def test_killed_after_the_last_step(run, model, monkeypatch, more):
    """Steps that do not end with an epoch: transformers would take another one."""
    argv = command(model, pairs(), "--max-steps", "2", *more)
    whole = run(*argv, "--output", "whole").with_name("whole")
    with monkeypatch.context() as patched:
        patched.setattr(fit, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*argv)
    out = run(*argv, "--resume")
    want, got = (load_file(x / "model.safetensors") for x in (whole, out))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert (
        metrics(whole, "train") == metrics(out, "train")
        and "2 steps" in (out / "README.md").read_text()
    )


def test_stopped_while_it_is_measured_and_written(run, model, monkeypatch, capsys):
    argv = command(model, pairs(), "--max-steps", "1")
    with monkeypatch.context() as patched:
        patched.setattr(
            watch.Watch, "measure_written", lambda *_: signal.raise_signal(signal.SIGTERM)
        )
        run(*argv, code=130)
    said = capsys.readouterr().err
    assert "interrupted, saved up to step 1; the same command with --resume goes on" in said
    out = run(*argv, "--resume")
    assert [line["step"] for line in metrics(out, "eval")] == [0, 1]


def test_resume_and_overwrite(run, model, capsys):
    argv = command(model, pairs())
    run(*argv, "--resume")  # nothing is there: it starts
    run(*argv, "--resume")
    assert "already complete: out" in capsys.readouterr().out
    for more, message in (
        ([], "--output out is not empty (README.md, chat_template.jinja, checkpoints): --resume"),
        (["--resume", "--batch-pairs", "5"], "and --batch-pairs was 4, now it is 5; --overwrite"),
        (["--resume", "--max-length", "60"], "and --max-length was 1024, now it is 60"),
        (["--resume", "--lora-rank", "2"], "and --lora-rank was not given, now it is 2"),
        (["--resume", "--data", lines(Path("b.jsonl"), pairs(29))], "the preferences of --data "),
    ):
        run(*argv, *more, code=2)
        assert message in " ".join(capsys.readouterr().err.split()), more
    Path("b.jsonl").write_text(Path("in.jsonl").read_text())
    run(*argv, "--resume", "--data", "b.jsonl")  # the same preferences, wherever they are
    run(*argv, "--overwrite", "--max-length", "3", code=2)  # nothing is lost before it can run
    assert Path("out/model.safetensors").exists() and len(metrics("out", "train")) == 4
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("epochs: 1")
    run(*argv, "--output", "mine", code=2)
    run(*argv, "--output", "mine", "--resume", code=2)
    assert "mine has no run to go on with" in capsys.readouterr().err
    Path("out/mine.txt").write_text("kept")
    run(*argv, "--overwrite", "--max-steps", "1")
    assert len(metrics("out", "train")) == 1 and Path("out/mine.txt").exists()


@pytest.mark.parametrize(
    "name",
    ["checkpoints/checkpoint-500/x", "checkpoints/x", "README.md", "model.safetensors", "x/y"],
)
def test_a_folder_that_no_run_wrote_stays_as_it_is(run, capsys, name):
    file = Path("out", name)
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for argv in ([], ["--overwrite"], ["--resume"]):
        run("--model", "x", "--data", "x.jsonl", "--output", "out", *argv, code=2)
        said = capsys.readouterr().err
        assert ("no run to go on with" if argv == ["--resume"] else "no run of rmfast") in said
        assert [path for path in Path("out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "precious"


def test_a_new_run_clears_away_what_the_last_one_wrote(tmp_path):
    ours = ["checkpoints/checkpoint-2/x", "metrics.jsonl", "model-1-of-2.safetensors", "README.md"]
    theirs = ["checkpoints/mine/x", "checkpoints/mine.bin", "mine.txt", "model.txt"]
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    job.State({"a": 1}, done=True).save(tmp_path)
    job._clear(tmp_path, job.State({"a": 2}))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*theirs, "checkpoints/run.json"}
    assert resume.stored(tmp_path / "checkpoints/run.json", job.State) == job.State({"a": 2})


def test_places_where_a_run_must_not_write(run, model, capsys):
    argv = command(model, pairs(6))
    Path("data").mkdir()
    lines(Path("data/a.jsonl"), pairs(6))
    for more, said in (
        (["--output", model], "is the model: give it another name"),
        (["--data", "data", "--output", "data/out"], "lies in a folder that --data reads"),
        (["--eval-data", "data", "--output", "data"], "is the eval-data"),
    ):
        run(*argv, *more, code=2)
        assert said in " ".join(capsys.readouterr().err.split())
    Path("out").mkdir()
    with resume.locked(Path("out")):
        for more in ([], ["--resume"], ["--overwrite"]):
            run(*argv, *more, code=2)
            assert f"out is being written by another run (process {os.getpid()}" in (
                " ".join(capsys.readouterr().err.split())
            )
    assert list(Path("out").iterdir()) == []


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "argv", "message"),
    [
        (pairs(2), [], "all 2 pairs have one question, or begin alike: nothing can be held out"),
        (pairs(6), ["--max-length", "3"], "in.jsonl: no pairs left to train on"),
        (
            pairs(6),
            ["--loss", "plackett_luce"],
            "loss_type='plackett_luce' does not go with ",
        ),
        (
            pairs(6),
            ["--label-smoothing", "0.5"],
            "--label-smoothing must be a number at least 0 and below 0.5",
        ),
        (pairs(6), ["--lora-alpha", "8"], "--lora-alpha goes with --lora-rank"),
        (pairs(6), ["--eval-split", "0", "--eval-every", "2"], "--eval-every goes with held-out"),
        (pairs(6), ["--eval-split", "0", "--keep-best"], "--keep-best goes with held-out"),
        (
            pairs(6),
            ["--keep-best", "--eval-every", "2", "--save-every", "3"],
            "saves where it measures: give --eval-every alone",
        ),
        (pairs(6), ["--eval-split", "0.1", "--eval-data", "x"], "--eval-split: give one of them"),
        (pairs(6), ["--eval-data", "none.jsonl"], "none.jsonl: no such file"),
        (pairs(6), ["--chat-template", "none.jinja"], "--chat-template none.jinja: "),
        (pairs(6), ["--output", "in.jsonl"], "--output in.jsonl is a file"),
        (pairs(6), ["--output", "in.jsonl/x"], "--output in.jsonl/x: cannot be written: Not a"),
        (pairs(6), ["--model", "no/such"], "no/such cannot be loaded"),
        ([{"chosen": "a", "rejected": "a"}], [], "no preferences in 1 rows; dropped: 1 × ident"),
        ([{"chosen": "a", "rejected": "b", "margin": "x"}], [], '"margin" must be a number'),
        (groups(4), ["--loss", "bradley_terry"], "does not go with ranked responses"),
        (
            [{"prompt": "p", "responses": [str(i) for i in range(65)], "ranks": list(range(65))}],
            ["--eval-split", "0"],
            "65 answers, more than 64: --ratings pairs or --ranks pairs",
        ),
    ],
)
def test_what_is_refused(run, model, capsys, rows, argv, message):
    run(*command(model, rows, *argv), code=2)
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and said.startswith("rmfast train: ")


def test_held_out_data_of_another_kind(run, model, capsys):
    for other, message in (
        (groups(), "it has groups, and in.jsonl has pairs: both must be of one kind"),
        (pairs(messages=True), "it has messages, and in.jsonl has text"),
    ):
        run(*command(model, pairs(), "--eval-data", lines(Path("e.jsonl"), other)), code=2)
        assert message in capsys.readouterr().err
    run(*command(model, pairs(), "--eval-data", lines(Path("e.jsonl"), pairs(8))))
    assert "! 4 questions of --eval-data are in --data, too" in capsys.readouterr().out


def test_messages_without_a_template(run, tmp_path, capsys):
    folder = saved(tmp_path / "bare")
    tiny.tokenizer(template=False).save_pretrained(folder)
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    run(*command(folder, pairs(messages=True)), code=2)
    assert "--chat-template FILE names one" in capsys.readouterr().err
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    out = run(*command(folder, pairs(messages=True), "--chat-template", "t.jinja"))
    assert AutoTokenizer.from_pretrained(out).chat_template == Path("t.jinja").read_text()


def test_an_adapter_that_lost_its_head(run, model, language_model, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    kept = {name: x for name, x in load_file(file).items() if "score" not in name}
    save_file(kept, file, {"format": "pt"})
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "adapter")
    run(*command(str(tmp_path / "adapter"), pairs()), code=2)
    said = capsys.readouterr().err
    assert "is the adapter of a reward model, and the head that it was trained with is not" in said


def test_divergence_is_told(run, model, capsys):
    run(*command(model, pairs(), "--learning-rate", "0.99", "--schedule", "constant",
                 "--weight-decay", "9e30", "--warm-up", "0"), code=2)  # fmt: skip
    said = capsys.readouterr().err
    assert re.search(r"step \d+: (the loss is|a row cannot be scored)", said), said


def test_without_matplotlib_it_trains(run, model, capsys, monkeypatch):
    monkeypatch.setattr(watch, "_can_draw", CAN_DRAW)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = run(*command(model, pairs()))
    assert "no training.png without matplotlib: pip install 'rmfast[eval]'" in (
        capsys.readouterr().out
    )
    assert not (out / "training.png").exists() and "![" not in (out / "README.md").read_text()


def test_any_name_will_do(run, model, monkeypatch):
    monkeypatch.setattr(watch, "_can_draw", CAN_DRAW)
    name = "a$b_{$c 猫 %s ^"
    run(*command(model, pairs(), "--output", name, "--max-steps", "1"))
    assert f"# {name}" in Path(name, "README.md").read_text()


def test_a_picture_that_fails_does_not_stop_the_training(run, model, monkeypatch, capsys):
    monkeypatch.setattr(watch, "_can_draw", CAN_DRAW)
    monkeypatch.setattr(watch.show, "curve", cannot)
    out = run(*command(model, pairs(), "--max-steps", "1"))
    assert capsys.readouterr().err.count("no training.png: a reason\n") == 1
    assert not (out / "training.png").exists() and "![" not in (out / "README.md").read_text()


def test_without_trl(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("rmfast.train.job", "rmfast.train.fit", "rmfast.train.trainer"):
        monkeypatch.delitem(sys.modules, name)
    for name in ("job", "fit"):
        monkeypatch.delattr(rmfast.train, name)
    assert main.main(["train", "--model", "m", "--data", "d", "--output", "o"]) == 2
    assert "training needs TRL: pip install 'rmfast[train]'" in capsys.readouterr().err


def test_several_processes_are_refused(run, model, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(*command(model, pairs()), code=2)
    assert "it runs in one process" in capsys.readouterr().err
