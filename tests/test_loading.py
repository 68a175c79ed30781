"""Where training begins: the head, the pad token, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tiny
from rmfast import loading
from rmfast.commands.main import main
from rmfast.errors import UserError
from rmfast.train import begin

ROWS = 300  # of embeddings, more than the tokenizer's tokens


def save(folder: Path, model, tokenizer=None) -> str:
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return str(folder)


def language_model(family: str = "llama", **overrides):
    return tiny.model(family, cls=AutoModelForCausalLM, vocab_size=ROWS, **overrides)


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("sft"), language_model())


# --- the head


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_language_model_gets_a_head_and_keeps_the_rest(tmp_path, family):
    before = language_model(family)
    model, tokenizer, start = begin.load_to_train(save(tmp_path, before))
    assert start.new == ["score.weight"] and model.config.num_labels == 1
    assert start.std == pytest.approx(1 / math.sqrt(32 + 1))
    assert start.unused in ([], ["lm_head.weight"], ["embed_out.weight"]) and not start.warnings
    theirs, ours = before.base_model.state_dict(), model.base_model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert start.pad == ("<pad>", tiny.PAD) == (tokenizer.pad_token, model.config.pad_token_id)
    with torch.no_grad():
        scores = model(**tiny.padded(tiny.rows())).logits
    assert scores.shape == (6, 1) and scores.unique().numel() > 3


def test_the_head_is_normal_with_variance_1_over_h_plus_1(tmp_path):
    hidden = 1024
    options = {"num_hidden_layers": 1, "hidden_size": hidden, "intermediate_size": 8}
    folder = save(tmp_path, language_model(**options))
    heads = [begin.load_to_train(folder, seed=seed).model.score.weight[0] for seed in range(20)]
    scaled = torch.stack(heads).detach().double() * math.sqrt(hidden + 1)
    n = scaled.numel()
    # each within five standard deviations of its estimate for n standard normal numbers
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        mean = scaled.pow(power).mean().item()
        assert abs(mean - expected) < 5 * math.sqrt(variance / n)
    assert len({head.sum().item() for head in heads}) == 20


def test_the_seed_decides_the_head_and_nothing_else_is_touched(sft):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = begin.load_to_train(sft, seed=3).model.score.weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(begin.load_to_train(sft, seed=3).model.score.weight, first)
    assert not torch.equal(begin.load_to_train(sft, seed=4).model.score.weight, first)
    half = begin.load_to_train(sft, seed=3, dtype="bfloat16").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.score.weight, first.bfloat16())


def test_a_bias_begins_at_zero_and_a_deep_head_scores_by_the_rule():
    head = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 1))
    model = torch.nn.ModuleDict({"score": head})
    inner = head[0].weight.clone()
    missing = [f"score.{name}" for name, _ in head.named_parameters()]
    assert begin.new_head(model, missing, 0) == pytest.approx(1 / 7)
    assert torch.equal(head[0].weight, inner) and head[2].bias.item() == 0
    assert 0.5 < head[2].weight.std().item() * 7 < 1.5


def test_a_reward_model_keeps_its_head(tmp_path):
    before = tiny.model(vocab_size=ROWS)
    model, _, start = begin.load_to_train(save(tmp_path, before))
    assert torch.equal(model.score.weight, before.score.weight)
    assert (start.new, start.std, start.unused) == ([], None, [])
    assert "head: kept: this is a reward model already" in str(start)


def test_what_begins_can_be_saved_and_goes_on_as_it_is(sft, tmp_path):
    model, tokenizer, _ = begin.load_to_train(sft)
    again = begin.load_to_train(save(tmp_path, model, tokenizer), seed=9)
    assert torch.equal(again.model.score.weight, model.score.weight) and not again.start.new
    loaded = loading.load(str(tmp_path), device="cpu")
    assert torch.equal(loaded.model.score.weight, model.score.weight)


def test_an_adapter_of_a_language_model_is_merged(sft, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(sft), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _, start = begin.load_to_train(str(tmp_path))
    assert start.new == ["score.weight"] and start.unused == ["lm_head.weight"]
    theirs = tuned.merge_and_unload().base_model.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in model.base_model.state_dict().items())
    changed = AutoModelForCausalLM.from_pretrained(sft).base_model.state_dict()
    assert any(not torch.equal(x, changed[name]) for name, x in theirs.items())
    with pytest.raises(UserError, match=r"has no score\.weight: it would be random"):
        loading.load(str(tmp_path), device="cpu")


# --- what is refused, or told


def test_more_than_one_label_is_refused(tmp_path):
    folder = save(tmp_path, tiny.model(num_labels=2, vocab_size=ROWS))
    with pytest.raises(UserError, match="is a classifier with num_labels=2: a reward model"):
        begin.load_to_train(folder)


def test_a_checkpoint_without_a_layer_is_refused(tmp_path):
    model = language_model()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no model\.layers\.1\.mlp.* more than a head would"):
        begin.load_to_train(str(tmp_path))


def test_only_safetensors_are_read(sft, tmp_path):
    model = language_model()
    save(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        begin.load_to_train(str(tmp_path))


BROKEN = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no header": lambda data: data[:20],
    "a page of the web": lambda data: b"<html>not found</html>",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_file_is_named(tmp_path, how, capsys):
    folder = save(tmp_path / "rm", tiny.model(vocab_size=ROWS))
    file = tmp_path / "rm" / "model.safetensors"
    file.write_bytes(BROKEN[how](file.read_bytes()))
    said = re.escape(f"{folder} cannot be loaded: {file} is cut off or damaged: download")
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(UserError, match=said):
            load(folder)
    assert main(["doctor", "--model", folder]) == 2
    assert "is cut off or damaged" in capsys.readouterr().err


def own_code(folder: Path, auto: str, gives: str = "Output(logits=last)") -> str:
    """A checkpoint whose code is registered for one of transformers' auto classes."""
    save(folder, tiny.model(vocab_size=ROWS))
    (folder / "own.py").write_text(
        "from torch import nn\n"
        "from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel\n"
        "from transformers.modeling_outputs import SequenceClassifierOutput as Output\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaPreTrainedModel):\n    config_class = OwnConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.model = LlamaModel(config)\n"
        "        self.score = nn.Linear(config.hidden_size, 1, bias=False)\n"
        "        self.post_init()\n"
        "    def forward(self, input_ids=None, attention_mask=None, **_):\n"
        "        all = self.score(self.model(input_ids, attention_mask=attention_mask)[0])\n"
        "        last = all[range(len(all)), attention_mask.sum(1) - 1]\n"
        f"        return {gives}\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", auto: "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_code_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "py"))
    monkeypatch.syspath_prepend(tmp_path / "py")
    for load in (loading.load, begin.load_to_train):
        folder = own_code(tmp_path / "a", "AutoModel")
        with pytest.raises(UserError, match=r"code of its own: read that, .* --trust-remote-code$"):
            load(folder)
        with pytest.raises(UserError, match="its own code has no AutoModelForSequenceClassificat"):
            load(folder, trust_remote_code=True)
    folder = own_code(tmp_path / "b", "AutoModelForSequenceClassification")
    assert type(loading.load(folder, trust_remote_code=True).model).__name__ == "Own"


@pytest.mark.parametrize(
    "gives, said",
    [
        ("(last,)", "gives tuple for one"),
        ("last[:, 0]", "gives Tensor for one"),
        ("None", "gives NoneType for one"),
        ("Output(logits=all)", r"gives logits \[1, \d+, 1\] for one"),
        ("Output(logits=last[:, 0])", None),
        ("len(self.head)", r"cannot be loaded: AttributeError: .* has no attribute 'head'"),
    ],
)
def test_own_code_that_gives_no_score(tmp_path, monkeypatch, gives, said):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "py"))
    monkeypatch.syspath_prepend(tmp_path / "py")
    folder = own_code(tmp_path / "own", "AutoModelForSequenceClassification", gives)
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
            load(folder, trust_remote_code=True)


def test_a_config_that_is_no_classifiers(tmp_path):
    from transformers import CLIPVisionConfig

    CLIPVisionConfig().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(
            UserError, match=r"no AutoModelForSequenceClassification in transformers$"
        ):
            load(str(tmp_path))


@pytest.mark.parametrize(
    "broken, said",
    [
        ({"tokenizer.json": None}, "it has no tokenizer: name one with --tokenizer"),
        ({"config.json": None}, "it has no config.json that names a kind"),
        ({"config.json": "{"}, "config.json is cut off or damaged: download or copy it again"),
        ({"tokenizer.json": "{"}, "tokenizer.json is cut off or damaged"),
        ({"tokenizer_config.json": ""}, "tokenizer_config.json is cut off or damaged"),
        ({"model.safetensors": None}, "no file named model.safetensors"),
        ({"hidden_size": 48}, "its weights have other sizes than its config.json says"),
        ({"pad_token_id": 10**6}, "its config.pad_token_id has no embedding"),
        ({"model_type": "zork"}, "has model type `zork` but Transformers does not recognize"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path, broken, said):
    folder = save(tmp_path, tiny.model(vocab_size=ROWS))
    for name, value in broken.items():
        if "." not in name:
            config = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        elif value is None:
            (tmp_path / name).unlink()
            (tmp_path / name.replace(".json", "_config.json")).unlink(missing_ok=True)
        else:
            (tmp_path / name).write_text(value)
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(UserError, match=re.escape(said)) as refused:
            load(folder)
        assert len(str(refused.value)) < len(folder) + 280


@pytest.mark.parametrize(
    "name, said",
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("a/b/c", "there is no folder a/b/c"),
        ("~/models", "there is no folder ~/models"),
        ("models/", "there is no folder models/"),
        ("/nowhere/rm", "there is no folder /nowhere/rm"),
        (__file__, f"{__file__} is a file: name the folder of the model"),
        ("nobody/rm", "nobody/rm cannot be loaded: there is no such folder, and the hub did not"),
    ],
)
def test_a_mistyped_folder(name, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (loading.load, begin.load_to_train):
        with pytest.raises(UserError, match=f"^{re.escape(said)}"):
            load(name)


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99"])
def test_a_device_that_computes_nothing(sft, name):
    with pytest.raises(UserError, match=f"^--device {name}: .*; cpu, cuda and cuda:N are devices"):
        loading.load(sft, device=name)


# --- another tokenizer


def test_a_tokenizer_from_elsewhere(tmp_path, capsys):
    tiny.model(vocab_size=ROWS).save_pretrained(tmp_path / "rm")
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    both = save(tmp_path / "both", tiny.model(vocab_size=ROWS))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two or three"}\n')
    named = ["--model", str(tmp_path / "rm"), "--tokenizer", str(tmp_path / "tokenizer")]
    written = []
    for model in (named, ["--model", both]):
        files = ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        assert main(["score", *model, *files, "--device", "cpu", "--overwrite"]) == 0
        written.append((tmp_path / "out.jsonl").read_text())
    assert written[0] == written[1]
    report = json.loads((tmp_path / ".out.jsonl.report.json").read_text())
    assert report["tokenizer"] == both
    capsys.readouterr()
    assert main(["doctor", *named, "--device", "cpu"]) == 0
    assert "Tokenizer and config have the same pad token" in capsys.readouterr().out
    assert main(["doctor", *named[:2], "--device", "cpu"]) == 2


# --- quantised models


QUANTISED = {
    "awq": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"format": "float-quantized", "config_groups": {}, "ignore": ["score"]},
    "quanto": {"weights": "int8"},
}


def quantised(folder: Path, method: str, settings: dict) -> str:
    save(folder, tiny.model(vocab_size=ROWS))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings | {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_not_trained(tmp_path, method):
    folder = quantised(tmp_path, method, QUANTISED[method])
    (tmp_path / "model.safetensors").unlink()  # nothing is read of it
    said = f"is quantised \\({method}\\): its weights cannot be trained; .* --lora-rank"
    with pytest.raises(UserError, match=said):
        begin.load_to_train(folder)
    with pytest.raises(UserError) as refused:  # of the library that loads it, or of the weights
        begin.load_to_train(folder, lora=True)
    assert "is quantised" not in str(refused.value)
    assert len(str(refused.value)) < len(folder) + 280


def test_fp8_that_is_read_as_another_dtype_is_trained(tmp_path, monkeypatch):
    settings = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = quantised(tmp_path, "fp8", settings)
    model = begin.load_to_train(folder).model  # a CPU has no kernels for fp8
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    monkeypatch.setattr(type(model), "is_quantized", True, raising=False)
    with pytest.raises(UserError, match=r"is quantised \(as cpu reads it\): its weights cannot"):
        begin.load_to_train(save(tmp_path / "a", model))


def test_a_head_of_another_name_is_told(tmp_path):
    model = language_model()
    state = {**model.state_dict(), "value_head.weight": torch.ones(1, 32)}
    model.save_pretrained(tmp_path, state_dict=state)
    tiny.tokenizer().save_pretrained(tmp_path)
    start = begin.load_to_train(str(tmp_path)).start
    assert "value_head.weight" in start.unused
    assert "! value_head.weight of the checkpoint is not used: if that is a head" in str(start)


# --- the pad token


def tokenizer(*added: str, pad: str | None = None, eos: str | None = "</s>"):
    """One that has these special tokens besides, and this pad token."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token=eos, pad_token=pad
    )
    out.add_special_tokens({"additional_special_tokens": list(added)})
    return out


@pytest.mark.parametrize(
    "added, pad",
    [
        (["<|im_start|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], 261),
        (["<|tool|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], 260),
        ([">>UNUSED_7<<"], 259),
        (["[control_8]"], 259),
        (["<|padding|>"], 259),
        (["<unused0>", "[PAD]"], 260),
        (["<fim_pad>", "<|vision_pad|>", "<|placeholder1|>"], 261),  # the first two mean something
    ],
)
def test_a_token_that_no_text_holds_pads(tmp_path, added, pad):
    folder = save(tmp_path, language_model(pad_token_id=None), tokenizer(*added))
    model, tokens, start = begin.load_to_train(folder)
    assert start.pad == (tokens.pad_token, pad) and start.pad_from == "which no text holds"
    assert model.config.pad_token_id == tokens.pad_token_id == pad
    assert tokens.convert_tokens_to_ids(tokens.pad_token) == pad and not start.warnings
    assert len(tokens) == len(AutoTokenizer.from_pretrained(folder))  # nothing was added


def test_the_end_of_text_pads_at_last_with_a_warning(tmp_path):
    made = tokenizer("<|im_start|>", "<|reserved_0|>", "<|far|>", "<|unused_far|>")
    made.chat_template = "{{ '<|reserved_0|>' }}"  # so it is not free
    folder = save(tmp_path, language_model(pad_token_id=None), made)
    start = begin.load_to_train(folder).start
    assert start.pad[0] == "<|unused_far|>"
    small = tiny.model("llama", cls=AutoModelForCausalLM, vocab_size=262, pad_token_id=None)
    model, _, start = begin.load_to_train(save(tmp_path / "small", small, made))
    assert start.pad == ("</s>", 2) and model.config.pad_token_id == 2  # the free one is beyond
    assert len(start.warnings) == 1
    assert start.warnings[0].startswith("pad_token_id equals eos_token_id (2): Hugging Face's rule")
    with pytest.raises(UserError, match="has neither a pad token, nor a reserved one, nor an end"):
        none = tokenizer(eos=None)
        begin.load_to_train(save(tmp_path / "none", small, none))


def test_a_token_of_any_named_template_is_not_free(tmp_path):
    made = tokenizer("<|reserved_0|>", "<|reserved_1|>")
    made.chat_template = {"default": "{{ messages }}", "tool_use": "<|reserved_0|>{{ messages }}"}
    folder = save(tmp_path, language_model(pad_token_id=None), made)
    assert begin.load_to_train(folder).start.pad[0] == "<|reserved_1|>"


def test_named_templates_are_trained_with_and_saved(tmp_path):
    pytest.importorskip("trl")
    made = tiny.tokenizer()
    made.chat_template = {"default": made.chat_template, "tool_use": "{{ tools }}"}
    folder = save(tmp_path / "rm", tiny.model(vocab_size=ROWS), made)
    asked = [{"role": "user", "content": "which one?"}]
    sides = {
        side: [*asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(sides)}\n" * 4)
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    arguments += ["--max-steps", "2", "--device", "cpu", "--dtype", "float32", "--eval-split", "0"]
    assert main(["train", "--model", folder, *arguments]) == 0
    again = loading.load(str(tmp_path / "out"), device="cpu").tokenizer
    assert again.chat_template == made.chat_template


def test_the_pad_token_that_is_there_stays(tmp_path):
    made = tokenizer("<|reserved_0|>", pad="<|pad|>")
    of_config = save(tmp_path / "a", language_model(pad_token_id=7), tokenizer("<|reserved_0|>"))
    start = begin.load_to_train(of_config).start
    assert start.pad[1] == 7 and start.pad_from == "the config's" and not start.warnings
    both = begin.load_to_train(save(tmp_path / "b", language_model(pad_token_id=7), made))
    assert both.start.pad == ("<|pad|>", made.pad_token_id)
    assert both.model.config.pad_token_id == made.pad_token_id
    assert both.start.warnings[0].startswith("the config had pad_token_id=7, and now has 2")
    beyond = tiny.model("llama", cls=AutoModelForCausalLM, vocab_size=259, pad_token_id=None)
    only = tokenizer(pad="[PAD]")
    start = begin.load_to_train(save(tmp_path / "c", beyond, only)).start
    assert start.pad == ("</s>", 2)
    assert start.warnings[0].startswith("the tokenizer's pad token '[PAD]' (259) has no embedding")


def test_the_report_for_people(sft):
    assert str(begin.load_to_train(sft).start).splitlines() == [
        f"{sft}: start of training",
        "  head: new (score.weight), drawn with a standard deviation of 0.174",
        "  not used: lm_head.weight",
        "  pad token: '<pad>' (0), the tokenizer's",
    ]
