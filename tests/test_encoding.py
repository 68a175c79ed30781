"""Conversations to token ids: the template once, one BOS, and what becomes of long ones."""

import numpy as np
import pytest
import torch

import tiny
from rmfast.data import Pair
from rmfast.data.encoding import Encoder, counted
from rmfast.data.form import Form, digest
from rmfast.data.values import Chat, Side
from rmfast.errors import DataError, RowError
from rmfast.trie import SEGMENT

BOS, EOS = 1, 2
TALK = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yes"}]


def letters(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


def test_every_kind_of_conversation():
    tokenizer = tiny.tokenizer()
    whole = [*letters("user: hé"), EOS, *letters("assistant: yes"), EOS]
    given = [
        TALK, ("hé", "yes"), (TALK[:1], "yes"), (TALK[:1], TALK[1:]), ("hé", TALK),
        (TALK[:1], TALK),
        "plain", whole, np.array(whole), torch.tensor(whole), tuple(whole), (7, 8),
    ]  # fmt: skip
    expected = [whole] * 6 + [letters("plain")] + [whole] * 4 + [[7, 8]]
    got = Encoder(tokenizer)(given)
    assert [x.tolist() for x in got] == expected
    assert all(x.dtype == np.int32 for x in got)
    assert whole == tokenizer.apply_chat_template(TALK)["input_ids"]


def test_prompts_and_responses_as_plain_text():
    encode = Encoder(tiny.tokenizer(template=False), chat=False)
    text, messages = encode([("a b", " c"), ("a", TALK)])
    assert text.tolist() == letters("a b c")
    assert "chat template" in messages.reason


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_one_bos(adds, writes):
    """One where the tokenizer or the template gives any, and none where neither does."""
    tokenizer = tiny.tokenizer(adds_bos=adds, writes_bos=writes)
    talk, plain, twice, ids = Encoder(tokenizer)([TALK, "x", "<s><s>x", [BOS, BOS, 9]])
    for got, some in ((talk, adds or writes), (plain, adds), (twice, True)):
        assert (got[:1] == BOS).sum() == some and (got[1:] != BOS).all()
    assert ids.tolist() == [BOS, BOS, 9]  # taken as they are
    assert twice.tolist()[1:] == letters("x")


def test_a_bos_is_only_dropped_where_it_stands_twice():
    """The template of one prompt may write a BOS and that of another not: each is looked at."""
    tokenizer = tiny.tokenizer(adds_bos=True)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + tokenizer.chat_template
    )
    with_bos = [{"role": "system", "content": "s"}, *TALK]
    for got in Encoder(tokenizer)([with_bos, TALK]):
        assert got[0] == BOS and got[1] != BOS


@pytest.mark.parametrize("length", [8, 7, 3, 2, 1])
def test_too_long(length):
    tokenizer = tiny.tokenizer(adds_bos=True)
    for policy in ("error", "skip"):
        (got,) = Encoder(tokenizer, max_length=length, on_overlong=policy)(["1234567"])
        if length == 8:
            assert len(got) == 8
        else:
            assert got.kind == "overlong" and "8 tokens" in got.reason and str(length) in got.reason
    (got,) = Encoder(tokenizer, max_length=length, on_overlong="truncate_left")(["1234567"])
    end = letters("1234567")
    assert got.tolist() == (end[-1:] if length == 1 else [BOS, *end[len(end) + 1 - length :]])


def test_left_truncation_without_a_bos_keeps_the_end():
    (got,) = Encoder(tiny.tokenizer(), max_length=3, on_overlong="truncate_left")(["abcdef"])
    assert got.tolist() == letters("def")


def test_system_prompt():
    encode = Encoder(tiny.tokenizer(), system_prompt="be good")
    own = [{"role": "system", "content": "mine"}, *TALK]
    added, kept, text = encode([TALK, own, "plain"])
    assert added.tolist()[: len("system: be good")] == letters("system: be good")
    assert kept.tolist() == Encoder(tiny.tokenizer())([own])[0].tolist()
    assert "system prompt" in text.reason


def test_missing_template_says_what_to_pass():
    with pytest.raises(DataError, match=r"chat_template .* plain text, or chat=False"):
        Encoder(tiny.tokenizer(template=False))([TALK])
    template = tiny.tokenizer().chat_template
    got = Encoder(tiny.tokenizer(template=False), chat_template=template)([TALK])
    assert got[0].tolist() == Encoder(tiny.tokenizer())([TALK])[0].tolist()


def test_no_tokenizer():
    assert Encoder(None)([[3, 4]])[0].tolist() == [3, 4]
    for given in ("text", TALK):
        with pytest.raises(DataError, match="need a tokenizer"):
            Encoder(None)([given])


BAD = {
    "empty text": "", "empty list": [], "empty response": ("a", ""), "empty prompt": ("", "a"),
    "no messages": (TALK, []), "null": None, "a number": 3, "floats": [1.0, 2.0],
    "nested": [[1], [2]],
    "ragged": [[1], [2, 3]], "texts": ["a", "b"], "a negative id": [4, -1], "a huge id": [2**31],
    "beyond the vocabulary": [97], "a set": {1, 2}, "role missing": [{"content": "x"}],
    "content missing": [{"role": "user"}], "content a number": [{"role": "user", "content": 1}],
    "role a list": [{"role": [], "content": "x"}], "a later message text": [TALK[0], "x"],
    "an unknown role": [{"role": "robot", "content": "x"}], "half a surrogate": "a\ud800",
    "one in a message": [{"role": "user", "content": "\udfff"}],
    "a pair of numbers and text": ("a", 3),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_do_not_stop_the_others(name):
    encode = Encoder(tiny.tokenizer(), vocabulary=97)
    first, bad, last = encode([[5, 6], BAD[name], [7]])
    assert first.tolist() == [5, 6] and last.tolist() == [7]
    assert isinstance(bad, RowError) and bad.kind == "bad" and bad.reason


def test_unknown_options():
    with pytest.raises(ValueError, match="on_overlong"):
        Encoder(None, on_overlong="cut")
    with pytest.raises(ValueError, match="max_length"):
        Encoder(None, max_length=0)


@pytest.mark.parametrize("adds, writes", [(False, False), (True, False), (True, True)])
def test_prompts_alone_begin_the_whole(adds, writes):
    encode = Encoder(tiny.tokenizer(adds, writes), max_length=3, on_overlong="truncate_left")
    whole = Encoder(tiny.tokenizer(adds, writes))([("hé", "yes"), TALK])
    for prompt in ("hé", TALK[:1]):
        alone = encode.prompt((prompt, "yes"), [])
        assert alone.dtype == np.int32
        assert alone.tolist() == [
            *([BOS] if adds else []), *letters("user: hé"), EOS, *letters("assistant: "),
        ]  # fmt: skip
        assert all(ids[: alone.size].tolist() == alone.tolist() for ids in whole)
    plain = Encoder(tiny.tokenizer(adds), chat=False)
    assert plain.prompt(("hé", "yes"), []).tolist() == [*([BOS] if adds else []), *letters("hé")]
    for prompt in ("", [], [{"role": "nobody", "content": "x"}]):
        with pytest.raises(RowError):
            encode.prompt((prompt, "yes"), [])
    assert [encode.prompt(x, []) for x in ("hé", TALK, [5, 6], (5, 6), ("hé", TALK))] == [None] * 5


def test_a_prompt_of_many_answers_is_tokenised_once(monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + tokenizer.chat_template
    encode, known, seen = Encoder(tokenizer), [], []
    ids = encode._ids
    monkeypatch.setattr(encode, "_ids", lambda *a: seen.append(a) or ids(*a))
    one, two = encode.prompt(("hé", "yes"), known), encode.prompt(("hé", "no"), known)
    assert one.tolist() == two.tolist() and len(seen) == 1
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for other in (("he", "yes"), Chat(("hé", "yes"), {"tools": tools})):
        encode.prompt(other, known)
    assert len(seen) == len(known) == 3


def test_text_that_is_tokenised():
    encode = Encoder(tiny.tokenizer(writes_bos=True), system_prompt=None)
    assert encode.text(TALK) == encode.text(("hé", "yes")) == "<s>user: hé</s>assistant: yes</s>"
    assert encode.text("plain") == "plain"
    assert encode.text(letters("plain")) == "plain"
    with pytest.raises(RowError):
        encode.text("")


# --- preference pairs


def test_pairs():
    encode = Encoder(tiny.tokenizer(adds_bos=True))
    text = encode(Pair("yes", "no", "hé").whole())
    assert [x.tolist() for x in text] == [[BOS, *letters(x)] for x in ("héyes", "héno")]
    chosen, rejected = encode(Pair(TALK[1:], [*TALK, *TALK], TALK[:1]).whole())
    assert chosen.tolist() == [BOS, *tiny.tokenizer().apply_chat_template(TALK)["input_ids"]]
    assert len(rejected) > len(chosen)


# --- the form of a training

HH = "\n\nHuman: hé\n\nAssistant: yes"
BODY = [*letters("hé"), EOS, *letters("yes"), EOS]


def form(**kinds):
    template = digest(tiny.tokenizer().chat_template) if kinds["chat"] else None
    return Form(**{"ends": False, "bos": False, "template": template, "max_length": 99} | kinds)


def test_text_is_read_as_in_training():
    tokenizer = tiny.tokenizer()
    given = ["hé", Side("hé"), ("hé", "yes"), ("hé", Side("yes")), HH, ("\n\nHuman: hé", " yes")]
    talk = Encoder(tokenizer)([TALK])[0].tolist()
    joined, ended = letters("héyes"), [*letters("héyes"), EOS]
    apart = [*letters("hé"), EOS]
    body = letters(HH)
    asked = letters("\n\nHuman: hé yes")
    as_user = Encoder(tokenizer)([[{**TALK[0], "content": "\n\nHuman: hé"},
                                   {**TALK[1], "content": " yes"}]])[0].tolist()  # fmt: skip
    expected = {
        None: [letters("hé"), apart, talk, talk, body, as_user],
        form(chat=False): [letters("hé"), letters("hé"), joined, joined, body, asked],
        form(chat=False, ends=True): [apart, apart, ended, ended, [*body, EOS], [*asked, EOS]],
        form(chat=True): [letters("hé"), letters("hé"), talk, talk, talk, talk],
    }
    for kind, want in expected.items():
        encode = Encoder(tokenizer, form=kind)
        assert [x.tolist() for x in encode(given)] == want, kind
        assert encode.about()["as_recorded_in_training"] == (kind is not None)


def test_the_form_is_told_otherwise_by_name():
    tokenizer = tiny.tokenizer()
    ended = form(chat=False, ends=True)
    turns, plain = (Encoder(tokenizer, form=ended, chat=True)([x])[0] for x in (("hé", "yes"), HH))
    assert turns.tolist() == plain.tolist() == Encoder(tokenizer)([TALK])[0].tolist()
    (text,) = Encoder(tokenizer, form=ended, end_of_text=False)(["hé"])
    assert text.tolist() == letters("hé")
    (text,) = Encoder(tokenizer, end_of_text=True)(["hé</s>"])
    assert text.tolist() == [*letters("hé"), EOS]  # not twice
    assert "trained on text" in Encoder(tokenizer, form=ended)([TALK])[0].reason
    assert not isinstance(Encoder(tokenizer, form=ended, chat=True)([TALK])[0], RowError)


def test_another_tokenizer_than_in_training_is_told():
    encode = Encoder(tiny.tokenizer(), form=form(chat=True))
    encode(["text"])
    assert counted(encode.warnings) == [
        "text was scored as it is, and the model was trained on messages: 1 conversation"
    ]
    other = Encoder(tiny.tokenizer(adds_bos=True, writes_bos=True), form=form(chat=True))
    bos, template = other.differences()
    assert "put no BOS before text, and this one puts one" in bos and "template is not" in template
    assert Encoder(None, form=form(chat=True)).differences() == []


def test_the_form_is_kept_in_the_config(tmp_path):
    model, kind = tiny.model("llama"), form(chat=False, ends=True)
    assert Form.of(model) is None and Form.of(object()) is None
    kind.record(model.config)
    model.save_pretrained(tmp_path)
    assert Form.of(type(model).from_pretrained(tmp_path)) == kind
    model.config.rmfast_form = {"chat": False, "unknown": 1}
    with pytest.raises(ValueError, match=r"cannot be read.*unknown"):
        Form.of(model)


# --- whole conversations, long ones, two segments


@pytest.mark.parametrize("first", ["system", "developer", "tool"])
def test_whole_conversations_are_not_put_after_their_prompt(first):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    whole = [{"role": first, "content": "be brief"}, *TALK]
    prompts = ["hé", TALK[:1], whole[:2]]
    *got, other = Encoder(tokenizer)([*((x, whole) for x in prompts), ("ho", whole)])
    assert [x.tolist() for x in got] == [Encoder(tokenizer)([whole])[0].tolist()] * 3
    assert "without the prompt" in other.reason


def test_a_text_that_is_far_too_long_is_not_tokenised_whole(monkeypatch):
    encode, seen = Encoder(tiny.tokenizer(), max_length=20), []
    inner = encode._ids
    monkeypatch.setattr(encode, "_ids", lambda texts, *a: (seen.extend(texts), inner(texts, *a))[1])
    long, short = encode(["x" * 10**6, "x" * 20])
    assert long.kind == "overlong" and "more than max_length 20" in long.reason
    assert short.size == 20 and max(map(len, seen)) < 10**5
    assert encode(["y" * 10**6])[0].kind == "overlong"


def bert():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[SEP]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    takes = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=takes, **names)


def test_two_segments():
    encode = Encoder(bert(), segments=True, max_length=7)
    turns = [{"role": "user", "content": "a b"}], [{"role": "assistant", "content": "c"}]
    text, messages, single, several, long = encode(
        [("a b", "c"), turns, "a b c", (turns[0] * 2, "c"), ("a b c d", "a")]
    )
    assert text.tolist() == messages.tolist() == [1, 3, 4, 2, 5 + SEGMENT, 2 + SEGMENT]
    assert single.tolist() == [1, 3, 4, 5, 2]
    assert "several turns" in several.reason and long.kind == "overlong"
    assert encode.text("a b") == "a b"


def test_a_cut_text_keeps_the_first_token_of_an_encoder():
    encode = Encoder(bert(), max_length=4, on_overlong="truncate_left")
    assert encode(["a b c d"])[0].tolist() == [1, 5, 6, 2]
