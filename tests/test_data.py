"""Reading pairs from JSON lines, and the embedded pairs."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from rmfast.data import Group, Pair, by_question, preferences
from rmfast.demo import embedded
from rmfast.errors import DataError

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "hi there"), ("assistant", "good"), ("assistant", "bad"))
)


def write(folder: Path, *lines: object, name: str = "pairs.jsonl") -> Path:
    """A file of these lines: bytes and text as they are, anything else as JSON."""
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line))
        for line in lines
    ]
    text = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in raw)
    path = folder / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_reads_text_and_messages_with_and_without_a_prompt(tmp_path, name):
    text = [
        {"chosen": "q a", "rejected": "q b", "margin": 1},
        "",
        {"prompt": "q ", "chosen": "é", "rejected": "b", "margin": 2},
    ]
    messages = [
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    ]
    path = write(tmp_path, *text, name=name)
    pairs = preferences(path)
    assert [pair.whole() for pair in pairs] == [("q a", "q b"), ("q é", "q b")]
    assert [pair.where for pair in pairs] == [f"{path}:{line}" for line in (1, 3)]
    assert [pair.margin for pair in pairs] == [1.0, 2.0]
    pairs = preferences(write(tmp_path, *messages, name=name))
    assert [pair.whole() for pair in pairs] == [([USER, GOOD], [USER, BAD])] * 2
    assert [pair.margin for pair in pairs] == [None, None]


def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"chosen": "a", "rejected": "b"}')
    assert preferences(path).records == [Pair("a", "b")]


FINE = {"chosen": "a", "rejected": "b"}
BAD_LINES = [
    ('{"chosen": "a"', "not JSON: "),
    ("1" * 5000, "not JSON that can be read"),
    (b'{"chosen": "\xff"}', "not UTF-8 at byte 13"),
    ([1], "a line must be a JSON object, this is a list"),
    ("null", "a line must be a JSON object, this is null"),
    ('{"chosen": "a", "rejected": "b", "chosen": "c"}', '"chosen" is twice in one object'),
    ('{"chosen": "a", "rejected": "b", "n": {"m": 1, "m": 1}}', '"m" is twice in one object'),
    ("7", "a line must be a JSON object, this is a number"),
    ({"chosen": "a"}, '"rejected" is missing'),
    ({"rejected": "a"}, '"chosen" is missing'),
    ({"chosen": None, "rejected": "b"}, '"chosen" is missing'),
    ({"chosen": "a", "rejected": True}, '"rejected" must be text or a list of messages, not true'),
    ({"chosen": {}, "rejected": "b"}, '"chosen" must be text or a list of messages, not an object'),
    ({"chosen": "a", "rejected": [BAD]}, '"chosen", "rejected" must all be text, or all be lists'),
    ({"prompt": [USER], **FINE}, "is messages, and the first one ("),
    ({"prompt": 3, **FINE}, '"prompt" must be text or a list of messages, not a number'),
    ({"chosen": ["a"], "rejected": [BAD]}, '"chosen" message 0 must be an object with role'),
    (
        {"chosen": [USER, {"role": "assistant"}], "rejected": [BAD]},
        '"chosen" message 1: "content" must be text, is missing',
    ),
    (
        {"chosen": [GOOD], "rejected": [{"role": 1, "content": "x"}]},
        '"rejected" message 0: "role" must be text, is a number',
    ),
    (
        {"chosen": [GOOD], "rejected": [{"role": "user", "content": [{"type": "audio"}]}]},
        '"rejected" message 0: "content" part 0 is of type audio, and only text is scored',
    ),
    ('{"chosen": "ab\\ud800", "rejected": "b"}', '"chosen" has half a surrogate pair at character'),
    ({"margin": "1", **FINE}, '"margin" must be a number, not text'),
    ({"margin": True, **FINE}, '"margin" must be a number, not true or false'),
    (
        '{"chosen": "a", "rejected": "b", "margin": NaN}',
        '"margin" must be a finite number, not nan',
    ),
    ({"margin": 10**400, **FINE}, '"margin" is too large a number'),
]


@pytest.mark.parametrize("line, reason", BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_is_named_with_the_reason(tmp_path, line, reason):
    path = write(tmp_path, FINE, "", line, FINE)
    with pytest.raises(DataError) as error:
        preferences(path)
    assert str(error.value).startswith(f"{path}:3: {reason}")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        preferences(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"pairs\.jsonl: no preferences in 0 rows"):
        preferences(write(tmp_path, "", " "))
    with pytest.raises(DataError, match=r"plain\.jsonl\.gz:1: damaged gzip file"):
        (tmp_path / "plain.jsonl.gz").write_text("not compressed")
        preferences(tmp_path / "plain.jsonl.gz")
    with pytest.raises(DataError, match="damaged gzip file"):
        whole = gzip.compress(json.dumps(FINE).encode())
        (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-6])
        preferences(tmp_path / "cut.jsonl.gz")


def test_pairs_of_one_question_are_found():
    texts = [Pair("Q: x\nA: yes", "Q: x\nA: yet no"), Pair("Q: x\nA: so", "Q: x\nA: never")]
    chats = [Pair([USER, GOOD], [USER, BAD]), Pair([GOOD], [BAD], prompt=[USER])]
    other = Pair("a", "b", prompt="Q: y\n")
    groups = [
        Group([[USER, BAD], [USER, GOOD], [USER]], [2, 1, 3]),
        Group([[BAD], [GOOD]], [1, 1], prompt=[USER]),
    ]
    records = [texts[0], chats[0], other, *texts[1:], *groups, *chats[1:]]
    assert by_question(records) == [texts, [chats[0], *groups, chats[1]], [other]]


# --- the embedded pairs


def answers(pair: Pair) -> tuple[str, str]:
    return pair.chosen[1]["content"], pair.rejected[1]["content"]


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_embedded_pairs_are_balanced_siblings(split):
    pairs = embedded.pairs(split)
    assert len(pairs) >= (400 if split == "train" else 100)
    chosen, rejected = (Counter(side) for side in zip(*map(answers, pairs), strict=True))
    assert chosen == rejected  # an answer alone says nothing about which side it is on
    asked = {pair.chosen[1]["content"]: pair.where.rpartition(".")[0] for pair in pairs}
    for pair in pairs:
        assert pair.chosen[0] == pair.rejected[0]
        left, right = answers(pair)
        assert left != right
        assert asked[left] == asked[right]  # the same class, or functions of the same module
        assert 8 <= len(left.split()) <= 50
    assert set(Counter(pair.question() for pair in pairs).values()) == {2}


def test_embedded_pairs_are_split_by_module_and_share_no_text():
    train, held_out = embedded.pairs("train"), embedded.pairs("held-out")
    texts = [{text for pair in split for text in answers(pair)} for split in (train, held_out)]
    assert not texts[0] & texts[1]
    words = [[set(text.lower().split()) for text in sorted(split)] for split in texts]
    assert all(len(a & b) <= 0.5 * len(a | b) for a in words[0] for b in words[1])
    modules = [
        {pair.where.split()[-1].split(".")[0] for pair in split} for split in (train, held_out)
    ]
    assert len(modules[0]) >= 20 and len(modules[1]) >= 8
    both = modules[0] & modules[1]  # packages, of which whole modules are on one side
    assert both <= {"email", "http", "urllib", "xml"}
