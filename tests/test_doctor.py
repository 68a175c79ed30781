"""``rmfast doctor``: each check where it fires and where it does not, on tiny models."""

from __future__ import annotations

import copy
import json
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import rmfast
import tiny
from rmfast.commands.main import main
from rmfast.diagnosis import checks, trials
from rmfast.diagnosis.case import Case, Finding
from rmfast.errors import UserError
from rmfast.loading import load

BOS, EOS, SIZE = 1, 2, 260  # as in tiny.tokenizer
TURN = "{{ m['role'] + ': ' + m['content'] + eos_token + '\\n' }}"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def transformers_speaks_as_before():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def tokenizer(template: str | None = TEMPLATE, adds_bos: bool = False, **settings):
    out = tiny.tokenizer(adds_bos)
    out.chat_template = template
    for name, value in {"model_max_length": 2048, **settings}.items():
        setattr(out, name, value)
    return out


def model(family: str = "llama", **overrides):
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    return tiny.model(family, **({"vocab_size": SIZE, positions: 2048} | overrides))


@pytest.fixture(scope="module")
def sound():
    return model()


def seen(case: Case, check) -> list[tuple[str, str]]:
    found = [Finding("", *verdict) for verdict in check(case)]
    return [(finding.status, finding.what + " | " + finding.do) for finding in found]


def only(case: Case, check) -> tuple[str, str]:
    (found,) = seen(case, check)
    return found


def named(diagnosis: rmfast.Diagnosis, name: str) -> rmfast.Finding:
    (found,) = [finding for finding in diagnosis.findings if finding.name == name]
    return found


def with_head(m, value: float):
    m = copy.deepcopy(m)
    torch.nn.init.constant_(m.score.weight, value)
    return m


# --- the whole


def test_a_sound_model(sound):
    found = rmfast.doctor(sound, tokenizer())
    statuses = {finding.name: finding.status for finding in found.findings}
    assert set(statuses.values()) == {"ok"}
    assert not found.wrong
    assert str(found).endswith("0 note, 0 warning, 0 wrong: nothing that gives wrong scores")
    parity = named(found, "parity").figures
    assert parity["conversations"] == len(trials.CONVERSATIONS)
    assert parity["largest_difference"] < 1e-4
    assert parity["rank_flips"] == 0
    assert named(found, "scores").figures["conversations"] == 16


def test_without_a_tokenizer(sound):
    found = rmfast.doctor(sound)
    assert named(found, "tokenizer").status == "note"
    assert named(found, "parity").status == "ok"
    assert not {"bos", "pooling", "chat template"} & {f.name for f in found.findings}


def test_as_dict_is_json(sound):
    found = rmfast.doctor(with_head(sound, float("nan")), tokenizer())
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert back["wrong"] is True
    assert back["model"] == "LlamaForSequenceClassification"
    assert sum(back["counts"].values()) == len(back["findings"])
    assert set(back["findings"][0]) == {"name", "status", "what", "do", "figures"}
    assert set(back["versions"]) == {"rmfast", "torch", "transformers"}


def test_not_a_module():
    with pytest.raises(TypeError, match=r"doctor takes a torch\.nn\.Module, got str"):
        rmfast.doctor("Qwen")


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_comes_out_as_it_went_in(patched):
    m = model()
    m.train()
    m.model.layers[0].eval()
    batch = tiny.padded([[5, 6, 7], [5, 9]], pad=tiny.PAD)
    if patched:
        rmfast.patch(m, pooling="mask", share_prefixes=False)
        m(**batch, use_cache=True)  # a call that does not run packed
    modes = [module.training for module in m.modules()]
    config, report = m.config.to_dict(), str(rmfast.report(m)) if patched else None
    weights = {name: p.clone() for name, p in m.state_dict().items()}
    keys = [set(module.__dict__) for module in m.modules()]
    precision = torch.get_float32_matmul_precision()

    rmfast.doctor(m, tokenizer())

    assert [module.training for module in m.modules()] == modes
    assert m.config.to_dict() == config
    assert [set(module.__dict__) for module in m.modules()] == keys
    assert all(torch.equal(p, weights[name]) for name, p in m.state_dict().items())
    assert torch.get_float32_matmul_precision() == precision
    if patched:
        assert str(rmfast.report(m)) == report
        m(**batch)
        assert rmfast.report(m).packed.total() == 1
    else:
        with pytest.raises(ValueError, match="is not patched"):
            rmfast.report(m)


def test_a_model_that_raises_comes_out_as_it_went_in(sound):
    m = copy.deepcopy(sound).train()
    del m.score
    found = rmfast.doctor(m, tokenizer())
    assert named(found, "scores").status == "wrong"
    assert "The model cannot score: AttributeError" in named(found, "scores").what
    assert m.training


def test_the_package_has_it_by_name():
    from rmfast.diagnosis.doctor import doctor

    assert rmfast.doctor is doctor
    with pytest.raises(AttributeError, match="module 'rmfast' has no attribute 'nurse'"):
        rmfast.nurse  # noqa: B018


# --- the model


def test_kind(sound):
    assert only(Case(sound), checks.model)[0] == "ok"
    assert only(Case(torch.nn.Linear(2, 1)), checks.model)[0] == "note"
    causal = model(cls=AutoModelForCausalLM)
    status, text = only(Case(causal), checks.model)
    assert status == "wrong"
    assert "LlamaForCausalLM is a language model: it has no reward head" in text
    assert rmfast.doctor(causal, tokenizer()).wrong


def test_labels(sound):
    assert only(Case(sound), checks.labels)[0] == "ok"
    status, text = only(Case(model(num_labels=3)), checks.labels)
    assert status == "wrong"
    assert "config.num_labels is 3" in text


def save(m, folder) -> str:
    m.save_pretrained(folder)
    return str(folder)


def test_head_in_the_checkpoint(sound, tmp_path):
    source = save(sound, tmp_path)
    assert only(Case(sound, source=source), checks.head) == (
        "ok",
        "score is in the checkpoint. | ",
    )


def test_head_absent_from_the_checkpoint(sound, tmp_path):
    source = save(model(cls=AutoModelForCausalLM), tmp_path)
    status, text = only(Case(sound, source=source), checks.head)
    assert status == "wrong"
    assert "score is not in the checkpoint: it is random" in text
    assert "lm_head" not in text  # nobody takes that for a reward head


def test_head_under_another_name(sound, tmp_path):
    from safetensors.torch import save_file

    weights = {n: p.clone() for n, p in sound.state_dict().items()}
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors")
    status, text = only(Case(sound, source=str(tmp_path)), checks.head)
    assert status == "wrong"
    assert "If the head is value_head.weight, save it as score.weight" in text


def test_head_missing_as_the_loader_says(sound):
    wrong = Case(sound, missing=["score.weight"])
    assert only(wrong, checks.head)[0] == "wrong"
    assert only(wrong, checks.weights)[0] == "ok"  # the head has a line of its own
    assert only(Case(sound, missing=[]), checks.head)[0] == "ok"


def test_a_head_as_drawn(sound):
    m = copy.deepcopy(sound)
    assert only(Case(m), checks.head)[0] == "ok"  # drawn far wider by tiny.model
    torch.manual_seed(0)
    m.score.weight.data.normal_(0, m.config.initializer_range)
    status, text = only(Case(m), checks.head)
    assert status == "note"
    assert "score looks untrained" in text


@pytest.mark.parametrize(
    "value, check, said",
    [(float("nan"), checks.weights, "NaN or infinity in score"), (0, checks.head, "all zeros")],
)
def test_head_of_no_use(sound, value, check, said):
    m = with_head(sound, value)
    status, text = only(Case(m), check)
    assert status == "wrong"
    assert said in text
    assert named(rmfast.doctor(m, tokenizer()), "scores").status == "wrong"


def test_weights(sound):
    assert only(Case(sound), checks.weights)[0] == "ok"
    m = copy.deepcopy(sound)
    m.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    status, text = only(Case(m), checks.weights)
    assert status == "wrong"
    assert "NaN or infinity in model.layers.1.mlp.up_proj.weight" in text
    absent = ["model.norm.weight", "score.weight"]
    status, text = only(Case(sound, missing=absent), checks.weights)
    assert status == "wrong"
    assert "Not in the checkpoint, and therefore random: model.norm.weight. |" in text


# --- adapters


def lora(m, **kwargs) -> PeftModel:
    return get_peft_model(m, LoraConfig(target_modules=["q_proj"], **kwargs))


def test_no_adapter(sound):
    assert seen(Case(sound), checks.adapter) == []


def test_adapter_with_the_head():
    m = lora(model(), task_type="SEQ_CLS")
    assert only(Case(m), checks.adapter) == (
        "ok",
        "The adapter trains and saves the head. | ",
    )
    assert not rmfast.doctor(m, tokenizer()).wrong


def test_adapter_without_the_head(tmp_path):
    m = lora(model())
    status, text = only(Case(m), checks.adapter)
    assert status == "warning"
    assert "modules_to_save=['score']" in text
    assert only(Case(m, missing=["score.weight"]), checks.adapter)[0] == "wrong"
    under = save(model(), tmp_path)
    assert only(Case(m, source=under), checks.adapter)[0] == "ok"


@pytest.mark.parametrize(
    "head, under, status",
    [(True, "causal", "ok"), (False, "reward", "ok"), (False, "causal", "wrong")],
)
def test_adapter_in_a_folder(tmp_path, capsys, head, under, status):
    reward = model()
    base = save(reward if under == "reward" else model(cls=AutoModelForCausalLM), tmp_path / "base")
    m = lora(reward, **({"task_type": "SEQ_CLS"} if head else {}))
    m.peft_config["default"].base_model_name_or_path = base
    folder = save(m, tmp_path / "adapter")
    tokenizer().save_pretrained(folder)
    capsys.readouterr()
    code = main(["doctor", "--model", folder, "--json"])
    findings = {f["name"]: f["status"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["adapter"] == findings["head"] == status
    assert code == (status == "wrong")
    if status == "wrong":
        with pytest.raises(UserError, match=r"has no score\.weight"):
            load(folder)
    else:
        trained = m.get_base_model().score
        trained = getattr(trained, "modules_to_save", {"default": trained})["default"]
        assert torch.equal(load(folder).model.score.weight, trained.weight)


# --- forward, mode, dtype


def liger_forward(self, **kwargs):
    raise AttributeError("lm_head")


def test_ligers_forward_of_language_models(sound):
    m = copy.deepcopy(sound)
    m.forward = types.MethodType(liger_forward, m)
    found = named(rmfast.doctor(m, tokenizer()), "scores")
    assert found.status == "wrong"
    assert "fused_linear_cross_entropy=False" in found.do


def test_mode(sound):
    assert only(Case(sound), checks.mode)[0] == "ok"
    noisy = model(attention_dropout=0.1)
    assert only(Case(noisy), checks.mode)[0] == "ok"
    assert only(Case(noisy.train()), checks.mode)[0] == "wrong"
    assert only(Case(copy.deepcopy(sound).train()), checks.mode)[0] == "ok"


def test_dtype(sound):
    m = copy.deepcopy(sound)
    assert only(Case(m), checks.dtype) == ("ok", "float32. | ")
    assert only(Case(m.bfloat16()), checks.dtype)[0] == "ok"
    m.score.float()
    status, text = only(Case(m), checks.dtype)
    assert status == "note"
    assert "mixed: bfloat16 and float32" in text
    assert only(Case(m.half()), checks.dtype)[0] == "warning"


# --- pad token and tokenizer


def test_a_model_without_a_pad_token_is_tried_row_by_row():
    found = rmfast.doctor(model(pad_token_id=None), tokenizer())
    assert not found.wrong
    assert named(found, "parity").status == "ok"
    assert named(found, "patch").status == "warning"
    assert "set config.pad_token_id" in named(found, "patch").what


@pytest.mark.parametrize("eos", [tiny.PAD, [EOS, tiny.PAD]])
def test_a_pad_token_that_ends_texts(eos):
    found = named(rmfast.doctor(model(eos_token_id=eos), tokenizer()), "patch")
    assert found.status == "warning"
    assert "pad_token_id equals eos_token_id (0)" in found.what


def test_pad_ids(sound):
    assert only(Case(sound, tokenizer()), checks.pad_ids)[0] == "ok"
    without = Case(sound, tokenizer(pad_token=None))
    assert only(without, checks.pad_ids)[0] == "warning"


def test_another_pad_than_the_models_is_scored(sound):
    found = rmfast.doctor(sound, tokenizer(pad_token="<s>"))
    assert named(found, "pad ids").status == "wrong"
    assert named(found, "pad ids").do == f"Set config.pad_token_id = {BOS}."
    assert named(found, "padding").status == "wrong"
    assert named(found, "parity").status == "ok"  # bug for bug


def test_vocabulary(sound):
    assert only(Case(sound, tokenizer()), checks.vocabulary)[0] == "ok"
    longer = tokenizer()
    longer.add_tokens(["<think>", "</think>"])
    status, text = only(Case(sound, longer), checks.vocabulary)
    assert status == "wrong"
    assert "no embedding for '</think>': texts with these fail" in text
    beyond = model()
    beyond.config.pad_token_id = -1
    assert "config.pad_token_id is -1" in only(Case(beyond, tokenizer()), checks.vocabulary)[1]


@pytest.mark.parametrize("family, status", [("llama", "note"), ("gpt2", "wrong")])
def test_padding_side(family, status):
    m = model(family)
    assert only(Case(m, tokenizer()), checks.padding_side)[0] == "ok"
    found = rmfast.doctor(m, tokenizer(padding_side="left"))
    assert named(found, "padding side").status == status
    assert named(found, "padding").status == ("ok" if status == "note" else "wrong")
    assert named(found, "parity").status == "ok"


@pytest.mark.parametrize(
    "most, status, said",
    [
        (2048, "ok", "both end at 2048 tokens"),
        (int(1e30), "note", "the tokenizer has no limit"),
        (4096, "warning", "tokenizer.model_max_length = 2048"),
        (512, "note", "cuts the end beyond 512 tokens"),
    ],
)
def test_length(sound, most, status, said):
    found = only(Case(sound, tokenizer(model_max_length=most)), checks.length)
    assert found[0] == status
    assert said in found[1]


def test_rows_stay_within_the_positions():
    found = rmfast.doctor(model("gpt2", n_positions=64), tokenizer())
    assert named(found, "parity").status == "ok"


# --- chat template and BOS


def template(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


@pytest.mark.parametrize(
    "text, status, said",
    [
        (None, "warning", "The tokenizer has no chat template"),
        (TEMPLATE, "ok", "keeps every turn"),
        (template(TURN), "ok", "keeps every turn"),
        (template("{{ m['content'] + eos_token }}"), "ok", "keeps every turn"),
        (template("{% if m['role'] != 'system' %}" + TURN + "{% endif %}"), "warning",
         "leaves out system turns"),
        (template("{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURN),
         "note", "refuses system turns"),
        (template("{{ raise_exception('never') }}"), "wrong", "refuses a user's turn"),
        (template("{% if m['role'] != 'assistant' %}" + TURN + "{% endif %}"), "wrong",
         "leaves out the text of a turn"),
        ("{{ strftime_now('%Y') }}" + template(TURN), "warning", "writes the date"),
        (template(TURN) + "assistant: ", "warning", "another answer, '</s>\\nassistant:'"),
    ],
)  # fmt: skip
def test_chat_template(sound, text, status, said):
    found = only(Case(sound, tokenizer(text)), checks.chat_template)
    assert found[0] == status
    assert said in found[1]


@pytest.mark.parametrize(
    "answer, status",
    [
        ("m['content']", "ok"),
        ("m['content'].split('</think>')[-1]", "wrong"),
        ("m['content'].split('</think>')[-1] if not loop.last else m['content']", "ok"),
        ("'…' if '<think>' in m['content'] else m['content']", "wrong"),
    ],
)
def test_a_template_that_leaves_out_reasoning(sound, answer, status):
    text = template("{{ m['role'] + ': ' }}{{ " + answer + " }}{{ eos_token }}")
    found = only(Case(sound, tokenizer(text)), checks.chat_template)
    assert found[0] == status
    assert ("what the last answer says in <think>" in found[1]) == (status == "wrong")


@pytest.mark.parametrize(
    "templates, status",
    [
        ({"default": TEMPLATE, "tool_use": "{{ tools }}"}, "ok"),
        ({"default": "{{ raise_exception('never') }}", "rag": TEMPLATE}, "wrong"),
        ({"rag": TEMPLATE, "tool_use": TEMPLATE}, "wrong"),
    ],
)
def test_several_templates(sound, templates, status):
    found = only(Case(sound, tokenizer(templates)), checks.chat_template)
    assert found[0] == status
    assert ("the chat templates rag, tool_use, and no default" in found[1]) == (
        "default" not in templates
    )


BARE = template(TURN)


@pytest.mark.parametrize(
    "text, adds, status, said",
    [
        (TEMPLATE, False, "ok", "A conversation begins with one"),
        (BARE, False, "ok", "A conversation begins with none"),
        (None, True, "ok", "Plain text begins with one"),
        (TEMPLATE, True, "warning", "the tokenizer adds another"),
        (BARE, True, "warning", "The chat template writes none"),
        ("{{ bos_token }}" + TEMPLATE, False, "warning", "The chat template writes 2"),
    ],
)
def test_bos(sound, text, adds, status, said):
    found = only(Case(sound, tokenizer(text, adds)), checks.bos)
    assert found[0] == status
    assert said in found[1]


def test_no_bos_token(sound):
    case = Case(sound, tokenizer(BARE, bos_token=None))
    assert only(case, checks.bos) == ("ok", "The tokenizer has no BOS. | ")


def test_plain_text_where_there_is_no_template(sound):
    found = rmfast.doctor(sound, tokenizer(None))
    assert named(found, "chat template").status == "warning"
    assert named(found, "scores").figures["conversations"] == 16


# --- trials


def test_built_in_conversations():
    keys = [json.dumps(c) for c in trials.CONVERSATIONS]
    assert len(set(keys)) == len(keys)
    assert all(c[-1]["role"] == "assistant" for c in trials.CONVERSATIONS)
    assert any(not key.isascii() or "\\u" in key for key in keys)
    assert any(c[0]["role"] == "system" for c in trials.CONVERSATIONS)
    assert max(map(len, trials.CONVERSATIONS)) > 4


def test_parity_that_is_broken(sound, monkeypatch):
    from rmfast.packed import patching

    def shifted(self, *args, **kwargs):
        return forward(self, *args, **kwargs).sort(0).values

    forward = patching.ScoringForward.scores
    monkeypatch.setattr(patching.ScoringForward, "scores", shifted)
    for dtype in (torch.float32, torch.bfloat16):
        found = named(rmfast.doctor(copy.deepcopy(sound).to(dtype), tokenizer()), "parity")
        assert found.status == "wrong"
        assert found.figures["rank_flips"] > 0
        assert "report this" in found.do


@pytest.mark.parametrize(
    "last, status", [(3, "ok"), (1, "wrong"), (float("nan"), "wrong"), (float("inf"), "wrong")]
)
def test_score_range(last, status):
    assert trials.score_range(torch.tensor([1, 1, last])).status == status


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_nan(sound, monkeypatch, dtype):
    from rmfast.packed import patching

    forward = patching.ScoringForward.scores
    monkeypatch.setattr(
        patching.ScoringForward, "scores", lambda *a, **k: forward(*a, **k) * float("nan")
    )
    found = rmfast.doctor(copy.deepcopy(sound).to(dtype), tokenizer())
    assert named(found, "parity").status == "wrong"


def test_a_model_that_does_not_run_patched(sound, monkeypatch):
    from rmfast.packed import patching

    monkeypatch.setattr(patching.ScoringForward, "scores", None)
    found = rmfast.doctor(sound, tokenizer())
    assert named(found, "level").status == "wrong"
    assert "It does not run patched: TypeError" in named(found, "level").what


def test_a_template_that_refuses_everything(sound):
    found = rmfast.doctor(sound, tokenizer(template("{{ raise_exception('never') }}")))
    assert "with an answer: never" in named(found, "chat template").what
    assert named(found, "scores").status == "wrong"
    assert named(found, "scores").what.endswith("the chat template refuses the messages: never.")
    assert not {"bos", "parity"} & {finding.name for finding in found.findings}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_against_fp32(sound, dtype):
    found = rmfast.doctor(copy.deepcopy(sound).to(dtype), tokenizer())
    assert named(found, "parity").status == named(found, "padding").status == "ok"
    figures = named(found, "parity").figures
    assert figures["error_patched"] > 0
    assert figures["error_unpatched"] > 1e-5
    assert named(found, "padding").figures["largest_difference_fp32"] < 1e-4


def test_no_room_for_an_fp32_copy(sound, monkeypatch):
    monkeypatch.setattr(trials.memory, "free_bytes", lambda device: 0)
    found = rmfast.doctor(copy.deepcopy(sound).bfloat16(), tokenizer())
    for name in ("parity", "padding"):
        assert named(found, name).status == "note"
        assert "no room for an fp32 copy" in named(found, name).what


def test_level_and_why():
    found = rmfast.doctor(model("bloom"), tokenizer())
    assert named(found, "level").status == "note"
    assert "head: BloomModel (bloom) is not among the backbones" in named(found, "level").what
    assert named(found, "parity").status == "ok"


def test_a_head_of_its_own(sound):
    class Scalar(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.value = copy.deepcopy(sound.model), torch.nn.Linear(32, 1)

        def forward(self, input_ids, attention_mask):
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
            last = attention_mask.sum(1) - 1
            return (self.value(hidden[torch.arange(len(last)), last])[:, 0],)

    found = rmfast.doctor(Scalar(), tokenizer())
    assert not found.wrong
    assert named(found, "model").status == "note"
    assert named(found, "level").what.startswith("backbone: ")
    assert named(found, "parity").status == "ok"


class Valued(torch.nn.Module):
    """A head of its own on a decoder, which scores the last attended token."""

    def __init__(self, decoder):
        super().__init__()
        self.config = decoder.config
        self.backbone, self.value = copy.deepcopy(decoder), torch.nn.Linear(32, 1)

    def forward(self, input_ids, attention_mask):
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        last = attention_mask.sum(1) - 1
        scores = self.value(hidden[torch.arange(len(last)), last])
        return types.SimpleNamespace(logits=scores)


@pytest.mark.parametrize("give", [lambda x: x.repeat(1, 2), lambda x: x[None], lambda x: x[:1]])
def test_own_code_that_gives_no_score_each(sound, give):
    made = Valued(sound.model)
    inner = made.forward
    made.forward = lambda **x: types.SimpleNamespace(logits=give(inner(**x).logits))
    found = rmfast.doctor(made, tokenizer())
    assert "numbers for" in named(found, "scores").what and named(found, "scores").status == "wrong"


@pytest.mark.parametrize("level", ["trie", "backbone", "head"])
def test_the_scorer_at_each_level(sound, monkeypatch, level):
    made = {"trie": sound, "backbone": Valued(sound.model), "head": model("bloom")}[level]
    found = rmfast.doctor(made, tokenizer())
    assert named(found, "level").what.startswith(f"{level}: ") and not found.wrong
    assert named(found, "scorer").figures["largest_difference"] < 1e-4
    scores = trials.bulk_scores
    shift = lambda case, rows: scores(case, [row[:-2] for row in rows])  # noqa: E731
    monkeypatch.setattr(trials, "bulk_scores", shift)
    found = rmfast.doctor(made, tokenizer())
    assert [f.name for f in found.findings if f.status == "wrong"] == ["scorer"]
    assert named(found, "scorer").do.startswith("Call the model itself, and report this")


def test_a_model_that_the_scorer_cannot_read(sound):
    m = Valued(sound.model)
    m.forward = lambda forward=m.forward, **inputs: (forward(**inputs).logits[:, 0],)
    found = named(rmfast.doctor(m, tokenizer()), "scorer")
    assert found.status == "warning" and found.what.startswith("Scorer and rmfast score do not")


class Rounded(torch.nn.Linear):
    """Rounds its inputs to 8 bits, by the largest of the whole batch."""

    def forward(self, x):
        scale = x.abs().max() / 127
        return super().forward((x / scale).round() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["trie", "backbone"])
def test_noise_of_quantisation_is_no_fault(sound, monkeypatch, level, dtype):
    m = copy.deepcopy(sound).to(dtype)
    m = m if level == "trie" else Valued(m.model).to(dtype)
    for layer in m.modules():
        if type(layer) is torch.nn.Linear and layer.out_features > 1:
            layer.__class__ = Rounded
    m.is_quantized = True
    found = rmfast.doctor(m.eval(), tokenizer())
    assert not found.wrong
    assert named(found, "padding").status == "note"
    assert "the model is quantised" in named(found, "padding").what
    for name in ("parity", "scorer"):
        assert named(found, name).status == "ok"
        assert 1e-3 < named(found, name).figures["largest_difference"] < 1
    scores = trials.bulk_scores
    monkeypatch.setattr(trials, "bulk_scores", lambda case, rows: 100 * scores(case, rows))
    assert named(rmfast.doctor(m, tokenizer()), "scorer").status == "wrong"


def encoder():
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    return model("bert", vocab_size=len(words), max_position_embeddings=512), tokens


def test_an_encoder_of_two_segments(monkeypatch):
    m, tokens = encoder()
    right = lambda case, rows: torch.cat([  # noqa: E731
        m(**tokens(*row, return_tensors="pt")).logits[0] for row in rows
    ]).numpy()  # fmt: skip
    plain = lambda case, rows: torch.cat([  # noqa: E731
        m(**tokens("".join(row), return_tensors="pt")).logits[0] for row in rows
    ]).numpy()  # fmt: skip
    scores = trials.bulk_scores
    for of_pairs, status in ((right, "ok"), (plain, "wrong")):
        monkeypatch.setattr(trials, "bulk_scores", lambda case, rows, of_pairs=of_pairs: (
            of_pairs if isinstance(rows[0], tuple) else scores
        )(case, rows))  # fmt: skip
        found = rmfast.doctor(m, tokens)
        assert named(found, "pairs").status == status
        assert named(found, "chat template").status == "ok"
    assert "pairs" not in {f.name for f in rmfast.doctor(model(), tokenizer()).findings}


@pytest.mark.parametrize("family, pad", [("llama", -1), ("gpt2", 5000), ("bloom", -1)])
def test_a_pad_token_without_an_embedding_is_never_looked_up(family, pad):
    m = model(family)
    m.config.pad_token_id = pad
    for tokens in (tokenizer(), tokenizer(pad_token=None)):
        found = rmfast.doctor(m, tokens)
        assert named(found, "scorer").status == named(found, "parity").status == "ok"
        assert f"config.pad_token_id is {pad}" in named(found, "vocabulary").what


def test_pooling_rules_agree(sound):
    assert named(rmfast.doctor(sound, tokenizer()), "pooling").status == "ok"


def test_pooling_rules_are_for_models_that_score_by_a_token():
    found = rmfast.doctor(model("bert", max_position_embeddings=512), tokenizer())
    assert not {"pooling"} & {finding.name for finding in found.findings}
    assert named(found, "parity").status == "ok"


def test_pooling_rules_differ():
    m = model(pad_token_id=EOS)
    found = rmfast.doctor(m, tokenizer(TEMPLATE.replace(" + '\\n'", ""), pad_token="</s>"))
    figures = named(found, "pooling").figures
    assert named(found, "pooling").status == "warning"
    assert figures["differ"] == figures["differ_mask"] == 16
    assert figures["difference_hf"] == 0 < figures["difference_mask"]

    # a line break after the last eos: the rightmost rule and the last token agree again
    found = rmfast.doctor(m, tokenizer(pad_token="</s>"))
    figures = named(found, "pooling").figures
    assert figures["differ_mask"] == 0 < figures["differ_first_pad"]
    assert "OpenRLHF" not in named(found, "pooling").what


def test_scores_of_the_pooling_rules_are_those_of_their_tokens():
    m = model(pad_token_id=EOS)
    tokens = tokenizer(TEMPLATE.replace(" + '\\n'", ""), pad_token="</s>")
    case = Case(m, tokens)
    rows, _ = trials.token_rows(case)
    with torch.no_grad():
        hf, last = torch.stack([
            m.score(m.model(torch.tensor([row]))[0][0, -2:])[:, 0] for row in rows
        ]).T.double()  # fmt: skip
        figures = named(rmfast.doctor(m, tokens), "pooling").figures
    expected = ((last - hf).abs().max() / hf.std()).item()
    assert figures["difference_mask"] == pytest.approx(expected, rel=1e-4)


# --- the command


@pytest.fixture(scope="module")
def folder(sound, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer().save_pretrained(folder)
    return save(sound, folder)


def test_command(folder, capsys):
    assert main(["doctor", "--model", folder]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"rmfast doctor: {folder}\n  ok       model ")
    assert out.endswith("0 wrong: nothing that gives wrong scores\n")
    assert max(map(len, out.splitlines()[1:])) <= 100
    assert err == ""


def test_command_on_a_model_without_a_head(tmp_path, capsys):
    save(model(cls=AutoModelForCausalLM), tmp_path)
    tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["doctor", "--model", str(tmp_path), "--json", "--dtype", "bfloat16"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["wrong"] is True
    assert {f["name"] for f in found["findings"] if f["status"] == "wrong"} == {"head"}
    assert err == ""


def test_command_that_cannot_run(tmp_path, capsys):
    assert main(["doctor", "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("rmfast doctor: ")
    assert main(["doctor"]) == 2
