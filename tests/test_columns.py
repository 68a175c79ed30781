"""Which columns hold the conversations, and what the scores' columns are called."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rmfast.data import columns
from rmfast.data.rows import RowReader
from rmfast.errors import RowError, UserError

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "hi"), ("assistant", "good"), ("assistant", "bad"))
)
LISTS = json.dumps([[USER, GOOD], [USER, BAD]])


@pytest.mark.parametrize(
    "row, kind, conversations",
    [
        ({"id": 1, "messages": [USER, GOOD], "prompt": "hi"}, "messages", [[USER, GOOD]]),
        (
            {"prompt": "p", "response": "x", "responses": ["r", "s"]},
            "responses",
            [("p", "r"), ("p", "s")],
        ),
        ({"prompt": "p", "completions": ["r"]}, "responses", [("p", "r")]),
        ({"prompt": [USER], "responses": [[GOOD]]}, "responses", [([USER], [GOOD])]),
        ({"prompt": "p", "response": "r", "chosen": "c"}, "response", [("p", "r")]),
        ({"prompt": [USER], "completion": [GOOD]}, "response", [([USER], [GOOD])]),
        ({"chosen": "c", "rejected": "r", "text": "t"}, "pair", ["c", "r"]),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "pair", [("p", "c"), ("p", "r")]),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "pair", ["c", "r"]),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "pair", ["c", "r"]),
        (
            {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "pair",
            [[USER, GOOD], [USER, BAD]],
        ),
        ({"prompt": "p", "chosen": "c", "rejected": [BAD]}, "pair", [("p", "c"), ("p", [BAD])]),
        ({"prompt": "p q", "response": "r", "question": "q"}, "response", [("p q", "r")]),
        ({"query": "q", "response": "r"}, "response", [("q", "r")]),
        ({"question": "q", "chosen": "c", "rejected": "r"}, "pair", [("q", "c"), ("q", "r")]),
        ({"conversations": [USER, GOOD]}, "messages", [[USER, GOOD]]),
        ({"prompt": "p", "response": "r", "system": ""}, "response", [("p", "r")]),
        ({"messages": [{**USER, "name": None}, GOOD]}, "messages", [[USER, GOOD]]),
        ({"text": "t p", "prompt": "p"}, "text", ["t p"]),
        ({"messages": json.dumps([USER, GOOD])}, "messages", [[USER, GOOD]]),
        ({"prompt": "p", "responses": '["r", "s"]'}, "responses", [("p", "r"), ("p", "s")]),
        ({"prompt": "hi", "responses": LISTS}, "responses", json.loads(LISTS)),
    ],
)
def test_conventions(row, kind, conversations):
    found = columns.choose(row)
    assert found.kind == kind
    assert found.conversations(row) == conversations


def test_no_convention():
    assert columns.choose(["prompt", "chosen", "question"]) is None
    assert columns.choose(["conversations"], {"text": "t"}) is None
    assert columns.choose([]) is None


def test_a_prompt_may_come_with_a_later_row():
    found = columns.choose(["chosen", "rejected"])
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert found.conversations(row) == [("p", "c"), ("p", "r")]


@pytest.mark.parametrize(
    "named, kind",
    [
        ({"text": "q"}, "text"),
        ({"prompt": "q"}, "responses"),
        ({"prompt": "q", "response": "chosen"}, "response"),
        ({"response": "q"}, "response"),
        ({"chosen": "q"}, "pair"),
        ({"chosen": "q", "prompt": "text"}, "pair"),
        ({"text": "nowhere"}, None),
        ({"prompt": "nowhere", "chosen": "q"}, None),
    ],
)
def test_named_columns(named, kind):
    present = ["messages", "prompt", "responses", "response", "chosen", "rejected", "text", "q"]
    found = columns.choose(present, named)
    assert (found and found.kind) == kind
    if found:
        assert named.items() <= found.names.items()


def test_named_columns_that_do_not_go_together():
    with pytest.raises(UserError, match="--messages-column and --text-column do not go together"):
        columns.choose(["a"], {"messages": "a", "text": "b"})


@pytest.mark.parametrize("cells", [True, False])
def test_text_may_hold_messages(cells):
    row = {"prompt": json.dumps([USER]), "response": "[not messages]"}
    (got,) = columns.choose(row, cells=cells).conversations(row)
    assert got == ([USER], "[not messages]")
    text = {"text": row["prompt"]}
    assert columns.choose(text, cells=cells).conversations(text) == [[USER]]
    lists = {"prompt": "p", "responses": json.dumps([json.dumps([GOOD]), "[x"])}
    assert columns.choose(lists, cells=cells).conversations(lists) == [("p", [GOOD]), ("p", "[x")]
    json_text = {"prompt": "p", "response": '[{"a": 1}]'}
    assert columns.choose(json_text, cells=cells).conversations(json_text) == [("p", '[{"a": 1}]')]


def test_a_cell_of_broken_messages_is_not_scored_as_text():
    row = {"prompt": "p", "response": json.dumps([{"role": "assistant"}])}
    with pytest.raises(RowError, match='"response" message 0: "content" must be text, is missing'):
        columns.choose(row, cells=True).conversations(row)


def test_a_dotted_name_is_a_column_within_an_object():
    row = {"data": {"q": "p", "a": "r"}, "data.a": "x"}
    found = columns.choose(row, {"prompt": "data.q", "response": "data.a"})
    assert found.conversations(row) == [("p", "x")]
    del row["data.a"]
    assert found.conversations(row) == [("p", "r")]
    with pytest.raises(RowError, match=r'"data\.q" is missing: there are data'):
        found.conversations({"data": {"a": "r"}})
    assert columns.choose(row, {"prompt": "date.q"}) is None


@pytest.mark.parametrize("kind", ["response", "pair"])
def test_a_row_without_a_column_that_is_named_is_an_error(kind):
    answers = {"response": "r"} if kind == "response" else {"chosen": "c", "rejected": "r"}
    found = columns.choose({"q": "p", **answers}, {"prompt": "q"})
    with pytest.raises(RowError, match='"q" is missing: there are '):
        found.conversations(answers)
    with pytest.raises(RowError, match='"q" is missing: there are prompt'):
        found.conversations({"prompt": "p", **answers})


def test_a_column_that_is_named_is_read():
    row = {"question": "q", "chosen": "c", "rejected": "r"}
    found = columns.choose(row, {"prompt": "question"})
    assert found.conversations(row) == [("q", "c"), ("q", "r")]
    named = {"chosen": "rejected", "rejected": "chosen", "prompt": "question"}
    assert columns.choose(row, named).conversations(row) == [("q", "r"), ("q", "c")]


BAD_ROWS = [
    ({"text": 3}, '"text" must be text, not a number'),
    ({"text": ""}, '"text" is empty'),
    ({"text": "\ud800"}, '"text" has half a surrogate pair'),
    ({"messages": "hello"}, '"messages" must be a list of messages, not text'),
    ({"messages": '"hello"'}, '"messages" must be a list of messages, not text'),
    ({"messages": None}, '"messages" must be a list of messages, not null'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": [[USER]]}, '"messages" message 0 must be an object with role and content'),
    ({"messages": [USER, {"content": "x"}]}, '"messages" message 1: "role" must be text, is miss'),
    ({"messages": [{"role": "user", "content": 5}]}, 'message 0: "content" must be text, is a num'),
    ({"prompt": "p", "response": ""}, '"response" is empty'),
    ({"prompt": "", "response": "r"}, '"prompt" is empty'),
    ({"prompt": None, "response": "r"}, '"prompt" must be text or a list of messages, not null'),
    ({"prompt": "p", "responses": []}, '"responses" is empty'),
    ({"prompt": "p", "responses": "r"}, '"responses" must be a list of responses, not text'),
    ({"prompt": "p", "responses": {"a": 1}}, '"responses" must be a list of responses, not an obj'),
    ({"prompt": "p", "responses": ["r", ""]}, '"responses" item 1 is empty'),
    ({"prompt": "p", "responses": ["r", 7]}, '"responses" item 1 must be text or a list of messa'),
    ({"chosen": "c", "rejected": [BAD]}, '"chosen", "rejected" must all be text, or all be lists'),
    ({"chosen": "c", "rejected": None}, '"rejected" must be text or a list of messages, not null'),
    ({"chosen": "c", "rejected": "r", "prompt": 3}, '"prompt" must be text or a list of messages'),
    ({"messages": [USER, GOOD], "prompt": "p"}, 'has "prompt", which seems to belong to the promp'),
    ({"text": "t", "prompt": "p"}, 'has "prompt", which seems to belong to the prompt'),
    (
        {"messages": [USER], "chosen": "c", "rejected": "r"},
        '"messages" has no answer, and "chos',
    ),
    ({"prompt": "p", "responses": ["r"], "tools": {"a": 1}}, '"tools" must be a list of objects'),
]


@pytest.mark.parametrize("row, reason", BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_bad_rows(row, reason):
    with pytest.raises(RowError) as error:
        columns.choose(row).conversations(row)
    assert reason in error.value.reason
    assert error.value.kind == "bad"


@pytest.mark.parametrize("fields", columns.CONVENTIONS.values(), ids="+".join)
def test_a_missing_column_is_named(fields):
    found = columns.choose(fields)
    for field in fields:
        row = {"prompt": "p", "chosen": "c", "rejected": "r", "response": "r", "responses": ["r"]}
        row.pop(field, None)
        with pytest.raises(RowError, match=f'"{field}" is missing'):
            found.conversations(row)


@pytest.mark.parametrize(
    "present, added",
    [
        (["messages"], ["reward"]),
        (["prompt", "response"], ["reward"]),
        (["prompt", "responses"], ["rewards"]),
        (["chosen", "rejected"], ["chosen_reward", "rejected_reward"]),
    ],
)
def test_names_and_values_of_scores(present, added):
    found = columns.choose(present)
    assert found.added == added
    other = columns.choose(present, stem="r1")
    assert other.added == [name.replace("reward", "r1") for name in added]
    scores = np.array([1, 2], np.float32)[: len(added) if found.kind != "responses" else 2]
    values = found.scores(scores)
    assert len(values) == len(added)
    assert np.array_equal(np.concatenate([np.atleast_1d(value) for value in values]), scores)


@pytest.mark.parametrize("field", ["prompt", "chosen"])
def test_two_fields_of_one_column_are_refused(field):
    with pytest.raises(UserError, match='two options name the column "rejected"'):
        RowReader({field: "rejected", "rejected": "rejected"})
    with pytest.raises(UserError, match='two options name the column "x"'):
        columns.choose(["x", "chosen"], {field: "x", "rejected": "x"}).conversations({"x": "a"})
    RowReader({"prompt": "prompt", "chosen": "chosen", "subset": "prompt"})
