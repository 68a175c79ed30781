"""PEFT's adapters: in a folder or in the hub's cache, and what must not be random in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

import tiny
from rmfast import loading
from rmfast.commands.main import main
from rmfast.errors import UserError
from rmfast.train import begin

peft = pytest.importorskip("peft")

ROWS = 260
CLASSIFIER, LANGUAGE = AutoModelForSequenceClassification, AutoModelForCausalLM


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A language model whose config has no pad token, as Llama's has none."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model(cls=LANGUAGE, vocab_size=ROWS, pad_token_id=None).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def tuned(base: str, cls: type = CLASSIFIER, rows: int = ROWS, seed: int = 0, **settings):
    """An adapter of a model, with weights drawn for all that it trains."""
    labels = {"num_labels": 1} if cls is CLASSIFIER else {}
    model = cls.from_pretrained(base, **labels)
    torch.manual_seed(seed)
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "r": 2} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model.eval()


def saved(model, folder: Path, tokenizer=True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def scores(model) -> torch.Tensor:  # fp64 [6], row by row
    return torch.cat([model(torch.tensor([row])).logits[:, 0] for row in tiny.rows()]).double()


def same(name: str, model, **options) -> bool:
    """Whether the scores are those of the adapter on its model, up to the rounding of a merge."""
    loaded = loading.load(name, device="cpu", **options)
    return tiny.score_error(scores(loaded.model), scores(model)) < 1e-5


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a folder into the hub's cache, as the hub itself lays it out; nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, folder: str, revision: str = "main") -> str:
        root, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", revision[0] * 40
        shutil.copytree(folder, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        return name

    return put


def moved(folder: str, base: str) -> str:
    """The adapter, made for the model of another name."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return folder


# --- by name


def test_by_the_name_on_the_hub(base, hub, tmp_path, capsys):
    hub("me/base", base)
    first, second = tuned(base), tuned(base, seed=1)
    name = hub("me/rm", moved(saved(first, tmp_path / "a"), "me/base"))
    hub("me/rm", moved(saved(second, tmp_path / "b"), "me/base"), revision="v2")
    assert same(name, first) and same(name, second, revision="v2")
    capsys.readouterr()
    assert main(["doctor", "--model", name, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("rmfast doctor: me/rm\n")
    assert "The adapter trains and saves the head" in out
    moved(saved(first, tmp_path / "c"), "me/gone")
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(UserError, match=r"^me/gone cannot be loaded: there is no such folder"):
            load(str(tmp_path / "c"))
    model, _, start = begin.load_to_train(name)
    assert not start.new and tiny.score_error(scores(model), scores(first)) < 1e-5


def test_without_a_tokenizer_it_is_the_models(base, tmp_path):
    model = tuned(base)
    assert same(saved(model, tmp_path, tokenizer=False), model)


def test_the_pad_token_is_that_of_its_tokenizer(base, tmp_path):
    folder = saved(tuned(base), tmp_path)
    assert loading.load(folder, device="cpu").model.config.pad_token_id == tiny.PAD
    model = loading.load(folder, device="cpu").model
    assert tiny.score_error(model(**tiny.padded(tiny.rows())).logits[:, 0], scores(model)) < 1e-5


def test_as_policy_and_as_tokenizer(base, hub, tmp_path, capsys):
    hub("me/base", base)
    folder = saved(tuned(base, LANGUAGE, task_type="CAUSAL_LM"), tmp_path / "a")
    name = hub("me/policy", moved(folder, "me/base"))
    loaded = loading.load(base, task="causal", tokenizer=name, device="cpu")
    assert loaded.tokenizer("one")["input_ids"] == tiny.tokenizer()("one")["input_ids"]
    row = {"prompt": "one", "chosen": "two", "rejected": "three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments = ["--model", name, "--ref-model", "me/base", "--input", str(tmp_path / "rows.jsonl")]
    assert main(["eval", *arguments, "--device", "cpu"]) == 0
    assert "me/policy against me/base on" in capsys.readouterr().out


# --- resized embeddings


@pytest.mark.parametrize("rows", [ROWS + 1, ROWS + 60, ROWS - 1])
def test_embeddings_that_were_resized(base, tmp_path, rows):
    model = tuned(base, rows=rows)
    folder = saved(model, tmp_path)
    assert same(folder, model)
    table = loading.load(folder, device="cpu").model.get_input_embeddings().weight
    assert torch.equal(table, model.get_input_embeddings().weight)


def test_embeddings_that_were_trained(base, tmp_path):
    model = tuned(base, rows=ROWS + 3, modules_to_save=["embed_tokens", "score"])
    assert same(saved(model, tmp_path), model)


def test_a_language_models_may_begin_a_training(base, tmp_path):
    model = tuned(base, LANGUAGE, rows=ROWS + 2, task_type="CAUSAL_LM")
    began = begin.load_to_train(saved(model, tmp_path))
    assert began.start.new == ["score.weight"]
    theirs = model.merge_and_unload().model.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in began.model.model.state_dict().items())


# --- what would be random


@pytest.mark.parametrize("by_name", [False, True])
def test_a_head_in_neither_is_an_error_everywhere(base, hub, tmp_path, capsys, by_name):
    name = saved(tuned(base, LANGUAGE, task_type="CAUSAL_LM"), tmp_path / "a")
    name = hub("me/lm", name) if by_name else name
    with pytest.raises(UserError, match=r"has no score\.weight: it would be random"):
        loading.load(name, device="cpu")
    capsys.readouterr()
    assert main(["doctor", "--model", name, "--device", "cpu", "--json"]) == 1
    found = {f["name"]: f["status"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["head"] == found["adapter"] == "wrong"


def test_a_head_that_was_not_saved(base, hub, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tuned(base), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    for name in (folder, hub("me/lost", folder)):
        for load in (begin.load_to_train, loading.load):
            with pytest.raises(UserError, match="the head that it was trained with is not in it"):
                load(name)


def test_an_adapter_without_weights(base, tmp_path):
    folder = saved(tuned(base), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"an adapter_config\.json, and no adapter_model"):
        loading.load(folder, device="cpu")


def test_an_adapter_of_no_whole_model(base, tmp_path):
    first = saved(tuned(base, LANGUAGE, task_type="CAUSAL_LM"), tmp_path / "a")
    second = moved(saved(tuned(base), tmp_path / "b"), first)
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(UserError, match=f"was trained on another adapter, {first}: give its"):
            load(second)
        with pytest.raises(UserError, match=r"does not name its model: give its adapter_config"):
            load(moved(saved(tuned(base), tmp_path / "c"), None))


def test_a_reward_models_adapter_is_no_language_models(base, tmp_path):
    folder = saved(tuned(base), tmp_path)
    with pytest.raises(UserError, match=r"has \S*score\S*, and LlamaForCausalLM has no place"):
        loading.load(folder, device="cpu", task="causal")


def test_an_adapter_of_a_larger_model(base, tmp_path):
    larger = tiny.model(num_hidden_layers=4, vocab_size=ROWS, cls=LANGUAGE)
    larger.save_pretrained(tmp_path / "larger")
    folder = moved(saved(tuned(str(tmp_path / "larger")), tmp_path / "a"), base)
    with pytest.raises(UserError, match=r"has \S*model\.layers\.3\.self_attn\.q_proj\.lora_A"):
        loading.load(folder, device="cpu")


# --- quantised models


def test_on_a_quantised_model_it_stays_an_adapter(base, tmp_path, monkeypatch):
    model = tuned(base)
    folder = saved(model, tmp_path)
    monkeypatch.setattr(LlamaForSequenceClassification, "is_quantized", True, raising=False)
    loaded = loading.load(folder, device="cpu").model
    assert isinstance(loaded, peft.PeftModel)
    assert torch.equal(scores(loaded), scores(model))
    with pytest.raises(UserError, match="is the adapter of a quantised model, which cannot be mer"):
        begin.load_to_train(folder)
