"""Rows of published data sets, as pairs and groups: what is read, dropped, and wrong."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from rmfast.data import Group, Pair, Preferences, preferences
from rmfast.errors import DataError


def needs(package: str):
    return pytest.importorskip(package, reason=f"{package} is not installed: rmfast[train]")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASK, YES, NO = user("is it?"), says("yes"), says("no")
DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello \n\nHuman: is it?\n\nAssistant: "
# rows with the fields that these data sets have on the hub
HH = {"chosen": DIALOGUE + "yes", "rejected": DIALOGUE + "no\n"}
ULTRAFEEDBACK = {
    "source": "flan",
    "instruction": "is it?",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "no", "overall_score": 6.5, "fine-grained_score": 4.0},
        {"model": "b", "response": "yes", "overall_score": 9.0, "fine-grained_score": 3.5},
        {"model": "c", "response": "so", "overall_score": 6.5, "fine-grained_score": 3.0},
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
BINARIZED = {
    "prompt": "is it?",
    "prompt_id": "x",
    "chosen": [ASK, YES],
    "rejected": [ASK, NO],
    "messages": [ASK, YES],
    "score_chosen": 8.5,
    "score_rejected": 7.0,
}
NECTAR = {
    "prompt": DIALOGUE,
    "answers": [
        {"answer": "no", "model": "a", "rank": 3},
        {"answer": "yes", "model": "b", "rank": 1},
        {"answer": "so", "model": "c", "rank": 3},
    ],
    "turns": 2,
    "num_responses": 3,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
TURNS = [user("hi"), says("hello"), ASK]


def one(row: dict, **options) -> Pair | Group:
    found = preferences([row], **options)
    assert len(found) == 1
    return found.records[0]


# --- kinds of rows


TRL_FORMATS = [
    Pair("The sky is blue.", "The sky is green."),
    Pair(" blue.", " green.", "The sky is"),
    Pair([ASK, YES], [ASK, NO]),
    Pair([YES], [NO], [ASK]),
    Pair([YES], [NO], [ASK], 0.5),
]


@pytest.mark.parametrize("pair", TRL_FORMATS)
def test_trl_formats_are_taken_as_they_are(pair):
    row = {k: v for k, v in vars(pair).items() if v is not None}
    assert one(row) == pair
    is_conversational = needs("trl.data_utils").is_conversational
    back = preferences([row]).dataset()
    assert back[0] == {k: v for k, v in row.items() if k != "where"}
    assert is_conversational(back[0]) == (not isinstance(pair.chosen, str))


def test_dialogues_stay_byte_for_byte_unless_turns_are_asked_for():
    assert one(HH) == one(HH, chat=False) == Pair(HH["chosen"], HH["rejected"])
    assert one(HH, chat=True) == Pair([*TURNS, YES], [*TURNS, NO])
    twice = {**HH, "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: yes\n\nNot Human: c"}
    assert one(twice, chat=True).chosen == [user("a\n\nb"), says("yes\n\nNot Human: c")]


def test_prompts_and_answers_of_text_become_turns_if_asked_for():
    row = {"prompt": "is it?", "chosen": "yes", "rejected": "no"}
    assert one(row) == Pair("yes", "no", "is it?")
    assert one(row, chat=True) == Pair([YES], [NO], [ASK])
    mixed = {"prompt": [ASK], "chosen": "yes", "rejected": [NO]}
    assert one(mixed) == one(mixed, chat=False) == Pair([YES], [NO], [ASK])
    row["instruction"] = row.pop("prompt")
    assert one(row) == Pair([YES], [NO], [ASK])
    assert one(row, chat=False) == Pair("yes", "no", "is it?")


def test_a_prompt_that_the_answers_have_is_not_repeated():
    want = Pair([ASK, YES], [ASK, NO])
    assert one(BINARIZED) == want
    assert one({**BINARIZED, "prompt": [ASK]}) == want
    assert one(BINARIZED, margins=True).margin == 1.5
    system = {"role": "system", "content": "be kind"}
    sides = {"chosen": [system, ASK, YES], "rejected": [system, ASK, NO]}
    assert one({"prompt": "is it?", **sides}) == Pair(*sides.values())
    with pytest.raises(DataError, match='"chosen" is a whole conversation that does not have "pro'):
        preferences([{**BINARIZED, "prompt": "was it?"}])


def test_ultrafeedback():
    answers = [[says(x)] for x in ("no", "yes", "so")]
    prompt = [ASK]
    assert one(ULTRAFEEDBACK) == Pair(answers[1], answers[0], prompt)
    assert one(ULTRAFEEDBACK, chat=False) == Pair("yes", "no", "is it?")
    assert one(ULTRAFEEDBACK, ratings="groups") == Group(answers, [2, 1, 2], prompt)
    every = preferences([ULTRAFEEDBACK], ratings="all_pairs", margins=True)
    assert every.records == [Pair(answers[1], answers[i], prompt, 2.5) for i in (0, 2)]
    fine = preferences([ULTRAFEEDBACK], ratings="all_pairs", rating="fine-grained_score")
    assert fine.records == [
        Pair(answers[i], answers[j], prompt) for i, j in ((0, 1), (0, 2), (1, 2))
    ]


def test_lists_of_ratings_are_as_completions_with_them():
    texts, numbers = zip(
        *((x["response"], x["overall_score"]) for x in ULTRAFEEDBACK["completions"]), strict=True
    )
    for names in itertools.product(("responses", "completions"), ("ratings", "scores")):
        row = {"prompt": "is it?", **dict(zip(names, (list(texts), list(numbers)), strict=True))}
        for options in ({}, {"ratings": "groups"}, {"ratings": "all_pairs", "margins": True}):
            assert (
                preferences([row], **options).records
                == preferences([ULTRAFEEDBACK], **options).records
            )
    dialogue = {"prompt": DIALOGUE, "responses": ["yes", "no"], "scores": [2, 1]}
    assert one(dialogue) == Pair("yes", "no", DIALOGUE)  # its turns are in the text already


def test_ranked_responses():
    assert one(NECTAR) == Group(["no", "yes", "so"], [3, 1, 3], DIALOGUE)
    turns = one(NECTAR, chat=True)
    assert turns == Group([[NO], [YES], [says("so")]], [3, 1, 3], TURNS)
    assert one(NECTAR, ranks="pairs") == Pair("yes", "no", DIALOGUE)
    assert preferences([NECTAR], ranks="all_pairs").records == [
        Pair("yes", "no", DIALOGUE), Pair("yes", "so", DIALOGUE),
    ]  # fmt: skip
    plain = {"prompt": "1 + 1 =", "responses": [" 2", " 3"], "ranks": [0, 0.5]}
    assert one(plain) == Group([" 2", " 3"], [0, 0.5], "1 + 1 =")
    whole = {"responses": [[ASK, YES], [ASK, NO]], "ranks": [2, 1]}
    assert one(whole) == Group(whole["responses"], [2, 1])


# --- what is dropped


PAIR = {"chosen": "a", "rejected": "b"}
SAYS_NOTHING = [
    ({"chosen": "a", "rejected": "a"}, "identical chosen and rejected"),
    ({"chosen": [ASK, NO], "rejected": [ASK, NO]}, "identical chosen and rejected"),
    ({"chosen": "a", "rejected": " \n"}, "empty response"),
    ({"prompt": [ASK], "chosen": [], "rejected": [NO]}, "empty response"),
    ({"chosen": [ASK, YES], "rejected": [ASK, says("")]}, "empty response"),
    ({"chosen": DIALOGUE, "rejected": DIALOGUE + "a"}, "empty response"),
    ({"responses": ["a"], "ranks": [1]}, "fewer than two responses"),
    ({"prompt": "a", "completions": []}, "fewer than two responses"),
    ({"responses": ["a", "b"], "ranks": [2, 2]}, "all responses tied"),
    ({"prompt": "a", "responses": ["a", "b"], "ratings": [2, 2.0]}, "all responses tied"),
    ({"responses": ["a", "a"], "ranks": [1, 2]}, "all responses the same"),
]


@pytest.mark.parametrize("row, reason", SAYS_NOTHING)
def test_what_says_nothing_is_dropped_and_counted(row, reason):
    other = PAIR if "chosen" in row else {"responses": ["a", "b"], "ranks": [1, 2]}
    if isinstance(row.get("chosen"), list):
        other = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
    if "ratings" in row or "completions" in row:
        other = ULTRAFEEDBACK
    found = preferences([row, other, row])
    assert (len(found), found.rows) == (1, 3)
    assert found.dropped == {reason: 2} and found.first == {reason: "list[0]"}
    assert f"2 × {reason}, first at list[0]" in str(found)
    with pytest.raises(DataError, match=rf"^list\[1\]: {reason}$"):
        preferences([other, row], strict=True)
    with pytest.raises(DataError, match=f"list: no preferences in 1 rows; dropped: 1 × {reason}"):
        preferences([row])


def test_an_empty_response_among_several_goes_alone():
    row = {"prompt": "a", "responses": ["a", "", "b", " "], "ranks": [1, 2, 3, 4]}
    found = preferences([row])
    assert found.records == [Group(["a", "b"], [1, 3], "a")]
    assert found.dropped == {"empty response among several": 2}
    assert preferences([row, PAIR], ranks="pairs").records == [Pair("a", "b", "a"), Pair("a", "b")]


def test_pairs_made_of_a_group_leave_identical_ones_out():
    row = {"prompt": "a", "responses": ["a", "b", "a"], "ranks": [1, 2, 3]}
    found = preferences([row], ranks="all_pairs")
    assert found.records == [Pair("a", "b", "a"), Pair("b", "a", "a")]
    assert found.dropped == {"identical chosen and rejected": 1}


def test_scores_that_contradict_the_choice_make_no_margin():
    row = {**BINARIZED, "score_chosen": 1}
    assert len(preferences([row])) == 1
    found = preferences([row, BINARIZED], margins=True)
    assert found.dropped == {"score_rejected above score_chosen": 1}


# --- what is wrong


GROUP = {"prompt": "a", "responses": ["a", "b"]}
WRONG = [
    (3, "must be an object, with a value for each column, not a number"),
    ({"text": "a", "label": 1}, "has the fields text, label; understood are chosen and rejected; "),
    ({"chosen": "a", "rejected": None}, '"rejected" is missing'),
    ({"chosen": "a", "rejected": [NO]}, '"chosen", "rejected" must all be text, or all be lists'),
    ({"chosen": 1, "rejected": "b"}, '"chosen" must be text or a list of messages, not a number'),
    ({"chosen": ["a"], "rejected": ["b"]}, '"chosen" message 0 must be an object with role'),
    ({**PAIR, "prompt": 3}, '"prompt" must be text or a list of messages, not a number'),
    ({**PAIR, "margin": math.nan}, '"margin" must be a finite number, not nan'),
    ({**PAIR, "margin": -math.inf}, '"margin" must be a finite number, not -inf'),
    ({**PAIR, "margin": "1"}, '"margin" must be a number, not text'),
    ({**PAIR, "context": "q"}, 'has "context", which seems to belong to the prompt'),
    ({**PAIR, "system": "s"}, 'has "system", which seems to belong to the prompt'),
    ({**PAIR, "prompt": "q", "images": ["s"]}, 'has "images", which seems to belong to the prompt'),
    ({**PAIR, "tools": [{"a": 1}]}, "has tools for a chat template, and its answers are text"),
    ({**PAIR, "prompt": "q", "tools": [{"a": 1}]}, "has tools, which go with messages: chat=True"),
    (GROUP, '"responses" needs one of ranks, ratings, scores'),
    ({**GROUP, "ranks": [1]}, '"ranks" has 1 numbers for 2 responses'),
    ({**GROUP, "ranks": [1, 2, 3]}, '"ranks" has 3 numbers for 2 responses'),
    ({**GROUP, "ranks": 1}, '"ranks" must be a list of numbers, not a number'),
    ({**GROUP, "ranks": [1, None]}, '"ranks" item 1 must be a number, not null'),
    ({**GROUP, "ratings": [math.nan, 1]}, '"ratings" item 0 must be a finite number, not nan'),
    ({**GROUP, "scores": [True, 1]}, '"scores" item 0 must be a number, not true or false'),
    ({"responses": "ab", "ranks": [1, 2]}, '"responses" must be a list of responses, not text'),
    ({"responses": ["a", 1], "ranks": [1, 2]}, '"responses" item 1 must be text or a list of mess'),
    (
        {"completions": [{"response": "a"}]},
        '"completions" item 0 has none of overall_score, rating',
    ),
    ({"completions": [{"score": 1}]}, '"completions" item 0 has none of response, text, answer'),
    ({"completions": [{"text": "a", "score": 1}, "b"]}, '"completions" item 1 must be an object'),
    (
        {"completions": [{"text": "a", "score": 1}, {"text": "b"}]},
        '"completions" item 1: "score" must be a number, not null',
    ),
    (
        {"answers": [{"answer": 1, "rank": 1}]},
        '"answers" item 0 must be text or a list of messages',
    ),
]


@pytest.mark.parametrize("row, reason", WRONG, ids=[reason for _, reason in WRONG])
def test_a_wrong_row_is_named_with_its_field(row, reason):
    with pytest.raises(DataError) as error:
        preferences([PAIR, row])
    assert str(error.value).startswith(f"list[1]: {reason}")


def test_rows_that_chat_or_margins_cannot_serve():
    with pytest.raises(
        DataError, match='"chosen" is text that is no dialogue, and there is no pro'
    ):
        preferences([PAIR], chat=True)
    half = {"prompt": DIALOGUE + "well,", "chosen": " a", "rejected": " b"}
    with pytest.raises(DataError, match='"prompt" ends within an answer'):
        preferences([half], chat=True)
    with pytest.raises(DataError, match="has ranks, of which no margins can be made"):
        preferences([NECTAR], margins=True)
    with pytest.raises(DataError, match='"score_chosen" must be a number, not null'):
        preferences([PAIR], margins=True)
    with pytest.raises(
        ValueError, match="ratings must be one of pairs, all_pairs, groups, got 'x'"
    ):
        preferences([PAIR], ratings="x")


def test_all_records_are_of_one_kind():
    chat = {"chosen": [YES], "rejected": [NO]}
    margin = {**PAIR, "margin": 1}
    ranked = {**GROUP, "ranks": [1, 2]}
    for rows, reason in (
        ([PAIR, chat], r"is messages, and the first one \(list\[0\]\) is text"),
        ([margin, PAIR], r"has no margin, and the first one \(list\[0\]\) has a margin"),
        ([PAIR, ranked], r"is a group of responses, and the first one \(list\[0\]\) is a pair"),
    ):
        with pytest.raises(DataError, match=rf"^list\[1\]: {reason}$"):
            preferences(rows)


# --- sources


ROWS = [{"prompt": "é", "chosen": "[a]", "rejected": "b", "margin": 0.5}, {**PAIR, "margin": 2.0}]
WANT = [Pair("[a]", "b", "é", 0.5), Pair("a", "b", None, 2.0)]


def write(folder: Path, name: str) -> Path:
    datasets = needs("datasets")
    path, data = folder / name, datasets.Dataset.from_list(ROWS)
    if name.endswith(".parquet"):
        data.to_parquet(path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif name == "folder":
        data.save_to_disk(path)
    else:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "folder"])
def test_every_file_that_can_be_scored_can_be_trained_on(tmp_path, name):
    path = write(tmp_path, name)
    found = preferences(path)
    assert found.records == WANT
    first = 2 if name == "a.csv" else 1  # a header is a line
    assert [pair.where for pair in found] == [f"{path}:{first + i}" for i in range(2)]
    assert preferences(path, limit=1).records == WANT[:1]


def test_lists_and_messages_in_cells_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    rows = [("prompt", "completions"), ("is it?", json.dumps(ULTRAFEEDBACK["completions"]))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert preferences(path).records == preferences([ULTRAFEEDBACK]).records
    rows = [("chosen", "rejected"), (json.dumps([ASK, YES]), json.dumps([ASK, NO]))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert preferences(path).records == [Pair([ASK, YES], [ASK, NO])]
    path.write_text("chosen,rejected,margin\na,b,nan\n")
    with pytest.raises(DataError, match=r"a\.csv:2: \"margin\" must be a finite number, not nan"):
        preferences(path)


def test_data_sets_and_iterables_in_memory():
    datasets = needs("datasets")
    data = datasets.Dataset.from_list(ROWS)
    for source in (data, data.with_format("torch"), data.to_iterable_dataset(), iter(ROWS)):
        found = preferences(source)
        assert found.records == WANT
        assert found.records[1].where == f"{type(source).__name__}[1]"
    assert preferences(iter(ROWS), limit=1).rows == 1
    with pytest.raises(DataError, match="a DatasetDict of train, test: give one of them"):
        preferences(datasets.DatasetDict(train=data, test=data))
    with pytest.raises(DataError, match="list: no preferences in 0 rows"):
        preferences([])


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen"')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        preferences(path)


# --- data sets


def test_prompts_that_only_some_have_go_into_the_answers():
    needs("datasets")
    data = Preferences([Pair("a", "b", "p "), Pair("c", "d")]).dataset()
    assert data.to_list() == [
        {"chosen": "p a", "rejected": "p b"}, {"chosen": "c", "rejected": "d"},
    ]  # fmt: skip
    groups = [Group([[YES], [NO]], [1, 2], [ASK]), Group([[ASK, NO], [ASK, YES]], [1.5, 1])]
    assert Preferences(groups).dataset().to_list() == [
        {"responses": [[ASK, YES], [ASK, NO]], "ranks": [1.0, 2.0]},
        {"responses": [[ASK, NO], [ASK, YES]], "ranks": [1.5, 1.0]},
    ]


def test_a_summary_for_people():
    found = preferences([*[ULTRAFEEDBACK] * 2, {**GROUP, "ratings": [1, 1]}], ratings="groups")
    assert str(found).splitlines() == [
        "list: 2 groups of messages, from 3 rows, 3 responses each",
        "  dropped: 1 × all responses tied, first at list[2]",
    ]
    assert "1 pair of text, from 1 rows, with margins" in str(preferences(ROWS[:1]))


text = st.text(st.characters(codec="utf-8"), max_size=12)
filled = text.filter(str.strip)
assistant = st.builds(says, filled)
# a prompt ends with the user, an answer begins with the assistant: neither can be in the other
messages = st.lists(st.builds(user, text), min_size=1, max_size=2)
answer = st.lists(assistant, min_size=1, max_size=2)
ranked = st.lists(st.floats(-9, 9), min_size=2, max_size=5).filter(lambda x: len(set(x)) > 1)


@st.composite
def records(draw):
    chat = draw(st.booleans())
    sides, prompts = (answer, messages) if chat else (filled, filled)
    prompts = draw(st.sampled_from([prompts, st.none()]))
    if draw(st.booleans()):
        margins = draw(st.sampled_from([st.none(), st.floats(-99, 99)]))
        pair = st.builds(Pair, sides, sides, prompts, margins)
        return draw(st.lists(pair.filter(lambda x: x.chosen != x.rejected), min_size=1, max_size=4))
    out = []
    for _ in range(draw(st.integers(1, 3))):
        ranks = draw(ranked)
        k = len(ranks)
        several = st.lists(sides, min_size=k, max_size=k).filter(
            lambda x: any(y != x[0] for y in x)
        )
        out.append(Group(draw(several), ranks, draw(prompts)))
    return out


@settings(max_examples=60, deadline=None)
@given(records())
def test_records_come_back_from_their_data_set(records):
    needs("datasets")
    kept = Preferences(records)
    assert preferences(kept.dataset()).records == records
    assert preferences(kept.dataset().to_list()).records == records


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=5))
def test_all_pairs_are_those_of_the_definition(numbers):
    texts = [f"answer {i}" for i in range(len(numbers))]
    both = [(i, j) for i in range(len(texts)) for j in range(len(texts))]
    if len(set(numbers)) == 1:
        return
    row = {"prompt": DIALOGUE, "responses": texts}
    rated = preferences([{**row, "ratings": numbers}], ratings="all_pairs", margins=True)
    want = {
        (texts[i], texts[j], float(numbers[i] - numbers[j]))
        for i, j in both
        if numbers[i] > numbers[j]
    }
    assert {(x.chosen, x.rejected, x.margin) for x in rated} == want and len(rated) == len(want)
    by_rank = preferences([{**row, "ranks": numbers}], ranks="all_pairs")
    assert {(x.rejected, x.chosen) for x in by_rank} == {x[:2] for x in want}
    group = one({**row, "ratings": numbers}, ratings="groups")
    assert min(group.ranks) == 1
    for i, j in both:
        assert (group.ranks[i] < group.ranks[j]) == (numbers[i] > numbers[j])


@pytest.mark.parametrize("row", [HH, ULTRAFEEDBACK, BINARIZED, {**PAIR, "prompt": "p"}])
@pytest.mark.parametrize("chat", [None, True])
def test_trl_makes_the_same_tokens_of_it(row, chat):
    """The tokens of whole(), by TRL's own preparation of the data set."""
    trl = needs("trl")
    found = preferences([row], chat=chat)
    trainer = object.__new__(trl.RewardTrainer)  # preparing data takes no model
    tokenizer = tiny.tokenizer()
    args = type("Args", (), {"max_length": None, "dataset_num_proc": None})
    data = trainer._prepare_dataset(found.dataset(), tokenizer, args, "train")
    for name, side in zip(("chosen", "rejected"), found.records[0].whole(), strict=True):
        if isinstance(side, str):
            want = tokenizer(side + tokenizer.eos_token)["input_ids"]
        else:
            want = tokenizer.apply_chat_template(side, return_dict=True)["input_ids"]
        assert data[0][f"{name}_ids"] == want
