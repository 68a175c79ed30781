"""Random conversations in every coat and container: ``rmfast score`` gives their scores, or says
why not."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from rmfast import Scorer
from rmfast.data.values import TURN
from rmfast.score import job
from rmfast.score.options import ScoreOptions
from rmfast.score.windows import Stats

NULLS = {"name": None, "tool_calls": None, "audio": None}
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def shared(messages: list[dict]) -> list[dict]:
    return [{"from": NAMES[m["role"]], "value": m["content"]} for m in messages]


COATS = {
    "as it is": lambda x: x,
    "nulls": lambda x: [{**m, **NULLS} for m in x],
    "parts": lambda x: [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in x],
    "ShareGPT": shared,
    "wrapped": lambda x: {"messages": x},
    "wrapped ShareGPT": lambda x: {"conversations": shared(x)},
    "JSON": json.dumps,
    "indented JSON": lambda x: json.dumps(x, indent=1, ensure_ascii=False),
    "JSON of JSON": lambda x: json.dumps(json.dumps(x)),
    "JSON of ShareGPT": lambda x: json.dumps(shared(x)),
    "wrapped JSON": lambda x: json.dumps({"messages": x, "tools": []}),
    "Python": lambda x: str([{**m, **NULLS} for m in x]),
    "JSON each": lambda x: [json.dumps(m) for m in x],
}
words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
words |= st.sampled_from(
    ["[1, 2]", '{"a": "b"}', "a<s>", "a</s>", "\n\nHuman: hi", " x ", "None", "yes\n"]
)
words = words.filter(str.strip)


@st.composite
def conversations(draw: Any) -> list[dict]:
    system = draw(st.sampled_from([[], [{"role": "system", "content": "be good"}]]))
    texts = draw(st.lists(words, min_size=1, max_size=2))
    turns = [(("user", text), ("assistant", draw(words))) for text in texts]
    return system + [{"role": r, "content": t} for two in turns for r, t in two]


def rows_of(kind: str, given: list[list[dict]], coats: list[str]) -> list[dict]:
    """One row a conversation; each with a coat of its own."""
    rows = []
    for i, (messages, coat) in enumerate(zip(given, coats, strict=True)):
        *prompt, answer = messages
        wear = COATS[coat]
        rows.append(
            {"id": str(i)}
            | {
                "messages": {"messages": wear(messages)},
                "pair": {"chosen": wear(messages), "rejected": wear(given[0])},
                "prompt": {"prompt": wear(prompt), "response": wear([answer])},
                "text answer": {"prompt": wear(prompt), "response": answer["content"]},
            }[kind]
        )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, rows[0].keys())
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    model = tiny.model("llama", vocab_size=tiny.WORDS, max_position_embeddings=512)
    return Scorer(model, tiny.tokenizer())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_same_scores_or_a_refusal(data, scorer, tmp_path, capsys):
    kind = data.draw(st.sampled_from(["messages", "pair", "prompt", "text answer"]))
    suffix = data.draw(st.sampled_from([".jsonl", ".jsonl.gz", ".csv", ".parquet", ".json"]))
    whole = data.draw(st.lists(conversations(), min_size=1, max_size=4))
    names = [*COATS]
    if suffix == ".csv":  # a cell is text
        names = [name for name in names if isinstance(COATS[name](whole[0]), str)]
    coats = data.draw(st.lists(st.sampled_from(names), min_size=len(whole), max_size=len(whole)))
    if suffix == ".parquet":  # a column has one type
        coats = coats[:1] * len(whole)
    source, output = tmp_path / f"in{suffix}", tmp_path / "out.jsonl"
    write(source, rows_of(kind, whole, coats))
    options = ScoreOptions(model="m", input=str(source), output=str(output), overwrite=True)
    scorer.stats = Stats()
    job.run(options, lambda *_: scorer)

    read = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    errors, reasons = tmp_path / "out.jsonl.errors.jsonl", {}
    if errors.exists():
        found = map(json.loads, errors.read_text(encoding="utf-8").split("\n")[:-1])
        reasons = {error["line"]: error["reason"] for error in found}
    assert len(read) + len(reasons) == len(whole) and all(reasons.values())
    encoded = scorer.encoder(whole)
    scored = [i for i, ids in enumerate(encoded) if isinstance(ids, np.ndarray)]
    expected = dict(zip(scored, scorer.score([whole[i] for i in scored]), strict=True))
    for row in read:
        got = row.get("reward", row.get("chosen_reward"))
        assert got == pytest.approx(expected[int(row["id"])], abs=1e-4)
    clear = set(coats) <= {"as it is", "JSON", "ShareGPT"}
    if kind == "text answer":  # which must not begin as a dialogue does
        clear = clear and not any(TURN.match(messages[-1]["content"]) for messages in whole)
    if len(scored) == len(whole) and clear:
        assert not reasons
