"""Conversations in another coat, prompts in several columns: read as what they are, or refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from rmfast.data import columns, preferences
from rmfast.data.files import Reader
from rmfast.data.rows import RowReader, check_as_it_is
from rmfast.data.values import Chat, is_whole, without_nulls
from rmfast.errors import DataError, RowError


def says(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


ASK, YES, NO = says("user", 'is it\'s "1"?'), says("assistant", "yes"), says("assistant", "no\n")
SYSTEM = says("system", "be kind")
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def shared(messages: list[dict]) -> list[dict]:
    """As ShareGPT has it."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(x["role"], x["role"]), "value": x["content"]} for x in messages]


def in_parts(messages: list[dict]) -> list[dict]:
    def part(text: str) -> dict:
        return {"type": "text", "text": text, "image_url": None}

    return [{**x, "content": [part(y) for y in halves(x["content"])]} for x in messages]


def renamed(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{**x, "role": names.get(x["role"], x["role"])} for x in messages]


def halves(text: str) -> list[str]:
    return [text[: len(text) // 2], text[len(text) // 2 :]]


COATS: dict[str, Callable[[list], Any]] = {
    "a list": lambda x: x,
    "JSON": json.dumps,
    "JSON of JSON": lambda x: json.dumps(json.dumps(x)),
    "a list of JSON": lambda x: [json.dumps(message) for message in x],
    "JSON of a list of JSON": lambda x: json.dumps([json.dumps(message) for message in x]),
    "Python": repr,
    "an object": lambda x: {"messages": x, "id": 3, "system": None},
    "an object as JSON": lambda x: json.dumps({"messages": x, "tools": []}),
    "an object as Python": lambda x: repr({"conversations": x, "source": "x"}),
    "an object of JSON": lambda x: {"messages": json.dumps(x)},
    "ShareGPT": shared,
    "ShareGPT as JSON": lambda x: json.dumps({"conversations": shared(x), "system": ""}),
    "ShareGPT in an object": lambda x: {"conversation": shared(x)},
    "ShareGPT's roles": renamed,
    "parts": in_parts,
    "parts as JSON": lambda x: json.dumps(in_parts(x)),
    "parts written out": lambda x: [
        {**m, "content": json.dumps(in_parts([m])[0]["content"])} for m in x
    ],
    "roles in capitals": lambda x: [{**message, "role": message["role"].title()} for message in x],
    "a byte order mark": lambda x: "\ufeff" + json.dumps(x),
    "a tuple": lambda x: repr(tuple(x)),
    "no calls": lambda x: [{**message, "tool_calls": []} for message in x],
    "nulls": lambda x: [{**message, "name": None, "tool_calls": None} for message in x],
    "nulls as Python": lambda x: repr([{"refusal": None, **message} for message in x]),
}
TEXTS = [name for name, coat in COATS.items() if isinstance(coat([ASK]), str)]


def every_reader(record: dict[str, Any]) -> list[Any]:
    """The conversations of a pair, by each way in; all must be equal."""
    scored = columns.choose(record).conversations(record)
    evaluated = RowReader(lists=True).read(record, "pair")
    assert [*evaluated.chosen, *evaluated.rejected] == scored
    trained = preferences([record], chat=True).records[0]
    assert [as_one(x) for x in scored] == [*trained.whole()]
    return scored


def as_one(conversation: Any) -> Any:
    """Prompt and answer as one list, with what is given to the template."""
    if isinstance(conversation, Chat):
        return Chat(as_one(conversation.conversation), conversation.given)
    if not isinstance(conversation, tuple):
        return conversation
    prompt, answer = conversation
    prompt = prompt if isinstance(prompt, list) else [says("user", prompt)]
    return prompt + (answer if isinstance(answer, list) else [says("assistant", answer)])


@pytest.mark.parametrize("coat", COATS)
def test_a_coat_is_taken_off_by_every_reader(coat):
    wrap, pair = COATS[coat], ([SYSTEM, ASK, YES], [SYSTEM, ASK, NO])
    record = dict(zip(("chosen", "rejected"), map(wrap, pair), strict=True))
    assert every_reader(record) == [*pair]
    record = {"prompt": wrap([ASK]), "chosen": wrap([YES]), "rejected": wrap([NO])}
    assert every_reader(record) == [([ASK], [YES]), ([ASK], [NO])]
    whole = {"messages": wrap([ASK, YES])}
    assert columns.choose(whole).conversations(whole) == [[ASK, YES]]
    several = {"prompt": wrap([ASK]), "responses": [wrap([YES]), wrap([NO])]}
    assert columns.choose(several).conversations(several) == [([ASK], [YES]), ([ASK], [NO])]


def test_a_message_may_stand_alone():
    sides = {"chosen": shared([YES])[0], "rejected": NO}
    want = [([ASK], [YES]), ([ASK], [NO])]
    for turns in ({"conversations": shared([ASK])}, {"conversation": repr([ASK])}):
        assert every_reader({**turns, **sides}) == want
    assert RowReader().read({"messages": [ASK], **sides}, "pair").conversations == want
    with pytest.raises(RowError, match="is text that is one message"):  # or an answer in JSON?
        RowReader().read({"prompt": "q", "response": json.dumps(NO)}, "response")


def test_arrays_of_pandas_are_lists():
    import numpy as np

    record = {
        "chosen": np.array([ASK, YES]),
        "rejected": np.array([ASK, NO]),
        "images": np.array([]),
    }
    assert every_reader(record) == [[ASK, YES], [ASK, NO]]


def test_several_answers_in_a_coat():
    read = RowReader(lists=True).read
    record = {
        "prompt": "p",
        "chosen": json.dumps([[YES]]),
        "rejected": [json.dumps([NO]), {"messages": [YES]}],
    }
    row = read(record, "pair")
    assert (row.chosen, row.rejected) == ([("p", [YES])], [("p", [NO]), ("p", [YES])])
    texts = {"chosen": "['a']", "rejected": '["b", "c"]'}
    row = RowReader(lists=True, cells=True).read(texts, "pair")
    assert (row.chosen, row.rejected) == (["a"], ["b", "c"])
    row = read(texts, "pair")  # text of its own, where a list could be one
    assert (row.chosen, row.rejected) == (["['a']"], ['["b", "c"]'])
    with pytest.raises(RowError, match='"rejected" must be a list of texts, as the other side is'):
        RowReader(lists=True, cells=True).read({**texts, "rejected": "b"}, "pair")


@pytest.mark.parametrize(
    "text",
    [
        "[INST] hi", "[not JSON", "{x}", '{"a": 1}', '[{"name": "Bob", "role": "admin"}]', "[1, 2]",
        '["user", "assistant"]', '{"messages": 3}', '{"messages": ["a"]}', "{'a': 1",
        '{"a": 1, "a": 2}',
        '"quoted"', 'see {"role": "user"}', '[{"from": "Rome", "to": "Oslo"}]',
    ],
)  # fmt: skip
def test_text_that_cannot_be_messages_is_text(text):
    record = {"prompt": text, "chosen": text, "rejected": "b"}
    assert every_reader(record) == [(text, text), (text, "b")]


@pytest.mark.parametrize(
    "value, reason",
    [
        ('[{"role": "user", "content": "x"}', '"chosen" is text that seems to be a conversation'),
        ("[{'role': 'user', 'content': 'x'}\n {'role': 'user'}]", "seems to be a"),  # NumPy
        ("{'messages': array([{'role': 'user'}])}", "seems to be a conversation"),
        ('[{"role": "user", "content": "a", "content": "b"}]', "seems to be a conversation"),
        (
            '[{"speaker": "human", "text": "x"}, {"speaker": "bot", "text": "y"}]',
            "seems to be a conversation",
        ),
        ("[['user', 'x'], ['assistant', 'y']]", "seems to be a conversation"),
        ('{"turns": [{"human": "x", "bot": "y"}]}', "seems to be a conversation"),
        ("array([{'role': 'user', 'content': 'x'}], dtype=object)", "seems to be a conversation"),
        ('[{""role"": ""user"", ""content"": ""x""}]', "seems to be a conversation"),  # CSV of CSV
        ("[{&quot;role&quot;: &quot;user&quot;}]", "seems to be a conversation"),
        ("(('user', 'x'), ('assistant', 'y'))", "seems to be a conversation"),
        ({"messages": [ASK], "choices": [{"message": YES}]}, '"messages" has no answer, and "cho'),
        ('[{"role": "user"}]', '"chosen" message 0: "content" must be text, is missing'),
        ('[{"role": "user", "content": 3}]', '"chosen" message 0: "content" must be text, is a n'),
        ([{"from": "gpt", "value": None}], 'message 0: "content" must be text, is missing'),
        ([{"from": "bot", "value": "x"}], "\"from\" is 'bot', and known are system, user, assist"),
        ({"messages": [ASK, YES], "images": ["x"]}, '"chosen" has "images", which seems to belong'),
        ({"messages": [ASK, {"role": "user"}]}, '"chosen" "messages" message 1: "content" must be'),
        ({"a": 1}, '"chosen" must be text or a list of messages, not an object'),
        ([["user", "x"]], '"chosen" message 0 must be an object with role and content, not a list'),
        ([says("user", [{"type": "image_url", "image_url": "x"}])], "part 0 is of type image_url"),
        ([says("user", ["x"])], '"content" part 0 must be an object with "type"'),
        ([says("user", [{"type": "text"}])], '"content" part 0: "text" must be text, is null'),
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(value, reason):
    with pytest.raises(RowError) as error:
        columns.choose(["chosen", "rejected"]).conversations(
            {"chosen": value, "rejected": [ASK, NO]}
        )
    assert reason in error.value.reason
    with pytest.raises(DataError) as error:
        preferences([{"chosen": value, "rejected": [ASK, NO]}])
    assert reason in str(error.value)


def test_a_call_of_a_tool_needs_no_content():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    for content in ({}, {"content": None}, {"content": ""}):
        asks = {"role": "assistant", "tool_calls": [call], **content, "name": None}
        row = RowReader().read({"messages": [ASK, asks, says("tool", "5"), YES]}, "messages")
        want = {"role": "assistant", "tool_calls": [call]}  # a null of JSON is one
        assert row.answers[0][1][1] == want | without_nulls(content)
        pair = {"prompt": [ASK], "chosen": [asks], "rejected": [NO]}
        assert preferences([pair]).records[0].chosen == [want | without_nulls(content)]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "qwen2_5"])
def test_templates_make_the_same_of_calls_and_parts_as_of_plain_messages(name):
    trl, tokenizer = pytest.importorskip("trl"), tiny.tokenizer()
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    answered = says("tool", "5", name="f")
    plain = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, answered, YES]
    nulls = [{"tool_calls": None, **x, "refusal": None} for x in plain]
    nulls[1]["content"] = None
    parts = [*in_parts([ASK]), nulls[1], *in_parts([answered, YES])]
    rendered = [
        tokenizer.apply_chat_template(
            RowReader().read({"messages": x}, "messages").answers[0][1],
            chat_template=template,
            tokenize=False,
        )
        for x in (plain, nulls, parts, json.dumps(parts))
    ]
    want = tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False)
    assert rendered == [want] * 4
    assert '"x"' in want or "<arg_key>x" in want


# --- the prompt in several columns


SYSTEMS = [
    ({"system": "be kind", "question": "q"}, [SYSTEM, says("user", "q")]),
    ({"system_prompt": "be kind", "prompt": "q"}, [SYSTEM, says("user", "q")]),
    ({"System": "be kind", "instruction": "q", "input": ""}, [SYSTEM, says("user", "q")]),
    ({"system_message": "be kind", "query": "q"}, [SYSTEM, says("user", "q")]),
    ({"system": "be kind", "prompt": [ASK]}, [SYSTEM, ASK]),
    ({"system": "kind", "prompt": [SYSTEM, ASK]}, [SYSTEM, ASK]),
    ({"system": "be kind", "conversations": shared([ASK])}, [SYSTEM, ASK]),
    ({"prompt": {"messages": shared([ASK]), "system": "be kind"}}, [SYSTEM, ASK]),
    ({"system": None, "question": "q", "context": [], "history": [None]}, "q"),
    ({"question": "q", "prompt": "c q", "context": "c"}, "c q"),
]


@pytest.mark.parametrize("record, prompt", SYSTEMS)
def test_parts_of_a_prompt_are_put_together(record, prompt):
    found = every_reader({**record, "chosen": "yes", "rejected": "no\n"})
    assert found == [(prompt, "yes"), (prompt, "no\n")]
    several = {**record, "responses": ["yes", "no"]}
    if "conversations" not in record:
        assert columns.choose(several).conversations(several) == [(prompt, "yes"), (prompt, "no")]


@pytest.mark.parametrize("nothing", ["", "[]", "{}", "nan", "NaN", "None", "null"])
def test_a_cell_that_says_nothing(nothing):
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "system": nothing, "context": nothing}
    assert RowReader(cells=True).read(record, "pair").conversations == [("p", "a"), ("p", "b")]


def test_a_system_prompt_is_no_plain_text():
    record = {"system": "be kind", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert preferences([record]).records[0].prompt == [SYSTEM, says("user", "q")]
    with pytest.raises(DataError, match="has a system prompt, which goes with turns"):
        preferences([record], chat=False)
    messages = {**record, "prompt": json.dumps([SYSTEM, ASK])}
    assert preferences([messages], chat=False).records[0].prompt == [SYSTEM, ASK]


def test_a_system_prompt_comes_before_whole_conversations():
    sides = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
    whole = [[SYSTEM, ASK, YES], [SYSTEM, ASK, NO]]
    assert every_reader({"system": "be kind", **sides}) == whole
    assert every_reader({"system": "be kind", "chosen": whole[0], "rejected": whole[1]}) == whole
    record = {"system": "be kind", "messages": [ASK, YES]}
    assert columns.choose(record).conversations(record) == whole[:1]


@pytest.mark.parametrize(
    "record, column",
    [
        ({"prompt": "p", "context": "c"}, "context"),
        ({"prompt": "p", "Article": "c"}, "Article"),
        ({"user_query": "p"}, "user_query"),
        ({"prompt": "p", "History": [["a", "b"]]}, "History"),
        ({"prompt": "p", "images": ["x.png"]}, "images"),
        ({"prompt": "p", "documents": [{"text": "d"}]}, "documents"),
        ({"prompt": "p", "question": "q"}, "question"),
        ({"instruction": "p", "input": "i"}, "input"),  # joined in more than one way
        ({"prompt": [SYSTEM, ASK], "system": "be rude"}, "system"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "system": "of s"}, "system"),
        ({"prompt": "p", "system": ["s"]}, "system"),
        ({"system": "s"}, "system"),
        ({"passage": "s"}, "passage"),
        ({"prompt": "p", "chat_history": [ASK, YES]}, "chat_history"),
    ],
)
def test_other_parts_of_a_prompt_are_refused(record, column):
    record = {**record, "chosen": "a", "rejected": "b"}
    reason = f'has "{column}", which seems to belong to the prompt'
    for read in (
        columns.choose(record).conversations,
        lambda x: RowReader(lists=True).read(x, "pair"),
        lambda x: preferences([x]),
    ):
        with pytest.raises(DataError, match=reason):
            read(record)


def test_a_prompt_beside_whole_conversations_must_be_in_them():
    for first in ([], [SYSTEM], [says("developer", "d")], [says("tool", "t"), SYSTEM]):
        sides = {"chosen": [*first, ASK, YES], "rejected": [*first, ASK, NO]}
        for prompt in (ASK["content"], [ASK], [*first, ASK], json.dumps([ASK])):
            assert every_reader({"prompt": prompt, **sides}) == [*sides.values()]
        assert is_whole(sides["chosen"])
        for prompt in ("was it?", [says("user", "was it?")], [says("system", "?"), ASK]):
            with pytest.raises(
                RowError, match='"chosen" is a whole conversation that does not have'
            ):
                RowReader().read({"prompt": prompt, **sides}, "pair")
        with pytest.raises(RowError, match='"rejected" is no whole conversation'):
            RowReader().read({"prompt": "is it", **sides, "rejected": [NO]}, "pair")
    more = says("user", "more")
    goes_on = {"prompt": [ASK], "chosen": [YES, more, NO], "rejected": [NO, more, NO]}
    assert every_reader(goes_on)[0] == ([ASK], [YES, more, NO])
    for prompt in (ASK["content"], [ASK], [SYSTEM, ASK]):
        with pytest.raises(RowError, match='"chosen" begins with an answer and has the prompt'):
            RowReader().read({"prompt": prompt, "chosen": [YES, ASK, NO], "rejected": [NO]}, "pair")
    text = {"prompt": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    row = RowReader().read({**text, "chosen": "\n\nHuman: q\n\nAssistant: a"}, "pair")
    assert row.prompt is None
    with pytest.raises(RowError, match='does not have "prompt"'):
        RowReader().read({**text, "chosen": "\n\nHuman: r\n\nAssistant: a"}, "pair")


def test_turns_beside_answers():
    read = RowReader().read
    row = read({"messages": [ASK, YES], "chosen": [ASK, YES], "rejected": [ASK, NO]}, "pair")
    assert row.chosen == [[ASK, YES]]
    for turns in ([ASK, YES], "plain text"):
        with pytest.raises(RowError, match="is beside the answers, and ends with no user's turn"):
            read({"conversation": turns, "chosen": "a", "rejected": "b"}, "pair")


def test_columns_are_passed_over_by_name_and_ids_by_themselves():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    plain = [("q", "a"), ("q", "b")]
    assert every_reader({**pair, "conversation": "c-17"}) == plain
    for column, value in (("conversation", "My name is Bob."), ("context", ["c"]), ("context", 5)):
        with pytest.raises(RowError, match=f'"{column}", which seems to belong'):
            RowReader().read({**pair, column: value}, "pair")
        row = RowReader(ignored=[column]).read({**pair, column: value}, "pair")
        assert row.conversations == plain
        (found,) = preferences([{**pair, column: value}], ignored=[column])
        assert (found.prompt, *found.answers) == ("q", "a", "b")
    whole = {"messages": [ASK, says("assistant", "a")], **pair, "prompt": ASK["content"]}
    assert RowReader().read(whole, "pair").prompt == ASK["content"]  # as UltraFeedback has it


@pytest.mark.parametrize(
    "answer",
    ['[{"user": "bob"}]', '{"accounts": [{"type": "user"}]}', '[["user", 1], ["model", 2]]',
     '{"role": "user", "permissions": []}', '{"value": 42}\nThis is it.', "<s>old</s> new"],
)  # fmt: skip
def test_an_answer_may_be_json(answer):
    row = RowReader().read({"prompt": "q", "response": answer}, "response")
    assert row.conversations == [("q", answer)]


def test_columns_that_no_row_has_are_named():
    with pytest.raises(RowError, match='"domian" is missing: there are chosen, rejected, domain'):
        RowReader({"subset": "domian"}).read(
            {"chosen": "a", "rejected": "b", "domain": "x"}, "pair"
        )
    record = {"chosen": "a", "rejected": "b", "meta": {"domain": "x"}}
    assert RowReader({"subset": "meta.domain"}).read(record, "pair").subset == "x"
    assert RowReader({"subset": "subset"}).read(record, "pair").subset is None


# --- what a row gives its template


def test_tools_and_chat_template_kwargs_go_with_the_conversations():
    sides = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
    for tools in (TOOLS, json.dumps(TOOLS), repr(TOOLS), [json.dumps(TOOLS[0])]):
        kwargs = {"enable_thinking": False, "documents": [{"text": "d"}], "other": None}
        given = {"enable_thinking": False, "documents": [{"text": "d"}], "tools": TOOLS}
        found = every_reader({**sides, "tools": tools, "chat_template_kwargs": kwargs})
        assert found == [Chat(x, given) for x in sides.values()]
    wrapped = {name: {"messages": x, "tools": TOOLS} for name, x in sides.items()}
    assert every_reader(wrapped) == [Chat(x, {"tools": TOOLS}) for x in sides.values()]
    prompt = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": TOOLS}
    assert every_reader(prompt) == [Chat(("q", x), {"tools": TOOLS}) for x in "ab"]
    for nothing in (None, [], "[]", "", {}):
        assert every_reader({**sides, "tools": nothing}) == [*sides.values()]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"tools": {"a": 1}}, '"tools" must be a list of objects, not an object'),
        ({"tools": "search"}, '"tools" must be a list of objects, not text'),
        ({"tools": ["search"]}, '"tools" must be a list of objects, one is text'),
        ({"chat_template_kwargs": "x"}, '"chat_template_kwargs" must be an object, not text'),
        ({"chosen": {"messages": [ASK, YES], "tools": TOOLS}, "tools": [{"a": 1}]}, "has another"),
        (
            {"chosen": "a", "rejected": "b", "tools": TOOLS},
            "has tools for a chat template, and its",
        ),
    ],
)
def test_what_cannot_be_given_to_a_template_is_refused(record, reason):
    with pytest.raises(RowError, match=reason):
        RowReader().read({"chosen": [ASK, YES], "rejected": [ASK, NO], **record}, "pair")


def test_a_data_set_keeps_what_is_given_to_the_template():
    pytest.importorskip("datasets")
    row = {"chosen": [ASK, YES], "rejected": [ASK, NO], "tools": TOOLS}
    found = preferences([row, {**row, "tools": None}])
    assert preferences(found.dataset()).records == found.records
    kwargs = [{**row, "chat_template_kwargs": {x: 1}} for x in "ab"]
    assert preferences(preferences(kwargs[:1]).dataset()).records == preferences(kwargs[:1]).records
    with pytest.raises(DataError, match="different keys in chat_template_kwargs"):
        preferences(kwargs).dataset()


# --- other ways in


def test_a_scorer_reads_pairs_as_files_are_read():
    from rmfast import Scorer

    scorer = Scorer(tiny.model("llama", vocab_size=tiny.WORDS), tiny.tokenizer())
    plain = {"chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]}
    want = scorer.score_pairs([plain])
    coats = ("JSON", "Python", "an object", "ShareGPT", "parts", "nulls")
    given = [{name: COATS[coat](x) for name, x in plain.items()} for coat in coats]
    given.append(
        {"system": "be kind", "question": ASK["content"], "chosen": "yes", "rejected": "no\n"}
    )
    assert (scorer.score_pairs(given) == want).all()


AS_IT_IS = [
    {"chosen": "a", "rejected": "b", "prompt": "p"},
    {"chosen": [ASK, YES], "rejected": [ASK, {**NO, "name": None}], "system": ""},
    {"chosen": [YES], "rejected": [NO], "prompt": [ASK], "tools": TOOLS},
    {"responses": ["a", "b"], "ranks": [1, 2], "prompt": "p"},
]
NOT_AS_IT_IS = [
    {"chosen": "a", "rejected": "b", "question": "q"},
    {"chosen": [YES], "rejected": [NO], "prompt": [ASK], "system": "be kind"},
    {"chosen": [ASK, YES], "rejected": [ASK, NO], "prompt": [ASK]},
    {"chosen": shared([ASK, YES]), "rejected": shared([ASK, NO])},
    {"chosen": in_parts([ASK, YES]), "rejected": in_parts([ASK, NO])},
    {"responses": [json.dumps([ASK, YES]), json.dumps([ASK, NO])], "ranks": [1, 2]},
    {"responses": ["a", "b"], "ranks": [1, 2], "context": "q", "prompt": "p"},
]


@pytest.mark.parametrize("row", NOT_AS_IT_IS)
def test_a_trainer_refuses_rows_that_are_not_what_they_mean(row):
    for fine in AS_IT_IS:
        check_as_it_is(fine)
    with pytest.raises(RowError, match=r"seems to belong|are in a coat"):
        check_as_it_is(row)
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from rmfast.integrations.trl import RewardTrainer

    trainer = object.__new__(RewardTrainer)  # preparing data takes no model
    trainer.dropped, trainer._data = {}, {}
    args = trl.RewardConfig("unused", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="row 0: "):
        trainer._prepare_dataset(datasets.Dataset.from_list([row]), None, args, "train")


@pytest.mark.parametrize(
    "first, said",
    [
        ([says("developer", "d")], r"row 0: .* leaves out turn 0 \(developer\) of 3"),
        ([says("user", "upper")], r"row 0: .* a part of turn 0 \(user\), or changes it"),
        ([says("tool", "t")], r"row 0: the chat template refuses the messages"),
        ([], None),
    ],
)
def test_a_trainer_refuses_what_a_template_leaves_out(first, said):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from rmfast.integrations.trl import RewardTrainer

    trainer = object.__new__(RewardTrainer)
    trainer.dropped, trainer._data = {}, {}
    args = trl.RewardConfig("unused", use_cpu=True, bf16=False)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% elif m.role != 'developer' %}{{ m.content | replace('upper', 'UPPER') }}|{% endif %}"
        "{% endfor %}"
    )
    row = {"chosen": [*first, ASK, YES], "rejected": [*first, ASK, NO]}
    if said is None:
        found = trainer._prepare_dataset(
            datasets.Dataset.from_list([row]), tokenizer, args, "train"
        )
        assert len(found[0]["chosen_ids"]) == len(ASK["content"] + YES["content"]) + 2
        return
    for shape in (row, {"prompt": [*first, ASK], "chosen": [YES], "rejected": [NO]}):
        with pytest.raises(ValueError, match=said):
            trainer._prepare_dataset(datasets.Dataset.from_list([shape]), tokenizer, args, "train")


def test_ray_reads_a_table_as_files_are_read():
    pyarrow = pytest.importorskip("pyarrow")
    from rmfast.integrations import ray

    class Worker(ray.Worker):
        def score(self, rows):
            self.rows = rows
            raise InterruptedError

    table = {
        "system": ["be kind"],
        "question": ["q"],
        "response": pyarrow.array([json.dumps([YES])], pyarrow.json_()),
    }
    worker = Worker("", {}, {})
    with pytest.raises(InterruptedError):
        worker(pyarrow.table(table))
    assert worker.rows == [[([SYSTEM, says("user", "q")], [YES])]]


# --- every coat in every container


def write(path: Path, rows: list[Any]) -> Path:
    """A file with one column, of conversations."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["messages"], *([row] for row in rows)])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"messages": rows}), path)
    return path


def read(path: Path) -> list[Any]:
    reader = Reader(path)
    rows = RowReader(cells=reader.format == "csv")
    return [rows.read(record.value, "messages").answers[0][1] for record in reader.read()]


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
turns = st.builds(says, st.sampled_from(["user", "assistant", "tool"]), text)
conversation = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from([[], [SYSTEM]]),
    st.lists(turns, min_size=1, max_size=3),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data(), st.sampled_from([".jsonl", ".csv", ".parquet"]))
def test_every_coat_in_every_container(tmp_path, data, suffix):
    coat = data.draw(st.sampled_from(TEXTS if suffix == ".csv" else [*COATS]))
    given = data.draw(st.lists(conversation, min_size=1, max_size=3))
    assert read(write(tmp_path / f"a{suffix}", [COATS[coat](x) for x in given])) == given


def test_arrows_json_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, kind = tmp_path / "a.parquet", pyarrow.json_()
    whole = pyarrow.array([json.dumps([ASK, YES])], kind)
    each = pyarrow.array([[json.dumps(ASK), json.dumps(YES)]], pyarrow.list_(pyarrow.string()))
    message = pyarrow.struct([("role", pyarrow.string()), ("content", kind)])
    storage = [[{"role": x["role"], "content": json.dumps(x["content"])} for x in (ASK, YES)]]
    plain = pyarrow.struct([(name, pyarrow.string()) for name in ("role", "content")])
    content = pyarrow.array(storage, pyarrow.list_(plain)).cast(pyarrow.list_(message))
    for column in (whole, each, content):
        parquet.write_table(pyarrow.table({"messages": column}), path)
        assert read(path) == [[ASK, YES]]
