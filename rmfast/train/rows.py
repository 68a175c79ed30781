"""The data of ``rmfast train``: preferences read, held out by question, and tokenised."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from rmfast import data
from rmfast.data.encoding import Encoder
from rmfast.data.form import Form
from rmfast.data.records import Group, Pair, Preferences
from rmfast.errors import DataError, RowError, UserError
from rmfast.packed import models
from rmfast.train.begin import Started
from rmfast.train.objective import LARGEST_GROUP
from rmfast.train.options import TrainOptions

_MOST_HELD_OUT = 1000  # pairs, where nobody says how many: an interval of 3 points each way
_CHUNK = 1024  # records tokenised together


def read(options: TrainOptions) -> tuple[Preferences, Preferences | None]:
    """What to train on, and what is held out."""
    how = {
        "name": options.name,
        "limit": options.limit,
        "chat": options.chat,
        "ratings": options.ratings,
        "ranks": options.ranks,
        "margins": options.margin == "ratings",
    }
    train = data.preferences(options.data, split=options.split, **how)
    print(train)
    if options.margin == "none" and train.kind == "pairs":
        bare = [dataclasses.replace(pair, margin=None) for pair in train]
        train = dataclasses.replace(train, records=bare)
    if options.eval_data is None:
        return hold_out(train, options.eval_split, options.seed)
    how["limit"] = None
    held_out = data.preferences(options.eval_data, split=options.eval_data_split, **how)
    print(f"held out: {held_out}")
    for mine, other in ((train.kind, held_out.kind), (_form(train), _form(held_out))):
        if mine != other:
            raise DataError(
                f"{options.eval_data}: it has {other}, and {options.data} has {mine}: both "
                "must be of one kind"
            )
    both = len({x.question() for x in train} & {x.question() for x in held_out})
    if both:
        print(f"! {both:,} questions of --eval-data are in --data, too: figures will flatter")
    return train, held_out


def _form(records: Preferences) -> str:
    return "messages" if records.conversational else "text"


def hold_out(
    found: Preferences, share: float | None, seed: int
) -> tuple[Preferences, Preferences | None]:
    """Hold out a share, so that no question is on both sides."""
    if share == 0:
        return found, None
    wanted = round(len(found) * (0.05 if share is None else share)) or 1
    wanted = min(wanted, _MOST_HELD_OUT) if share is None else wanted
    questions = data.by_question(found)
    if len(questions) < 2:
        raise DataError(
            f"{found.source}: all {len(found):,} {found.kind} have one question, or begin alike: "
            "nothing can be held out; --eval-data names another file, --eval-split 0 goes without"
        )
    held: list[list[Any]] = []
    for question in random.Random(seed).sample(questions, len(questions)):
        if sum(map(len, held)) + len(question) <= wanted:
            held.append(question)
    held = held or [min(questions, key=len)]
    chosen = {id(record) for question in held for record in question}
    sides = ([x for x in found if id(x) not in chosen], [x for x in found if id(x) in chosen])
    print(f"held out: {len(sides[1]):,} {found.kind} of {len(held):,} questions")
    return tuple(dataclasses.replace(found, records=side) for side in sides)


def tokens(records: Preferences, encoder: Encoder) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows as trainers take them, and why others were dropped.

    Raises:
        DataError: a record cannot be tokenised; the message begins with its place.
    """
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for at in range(0, len(records), _CHUNK):
        chunk = records.records[at : at + _CHUNK]
        whole = [_sides(record, encoder.segments) for record in chunk]
        ids = iter(encoder([side for sides in whole for side in sides]))
        for record, sides in zip(chunk, whole, strict=True):
            row = _row(record, [next(ids) for _ in sides])
            if isinstance(row, str):
                dropped[row] += 1
            else:
                rows.append(row)
    return rows, dropped


def _sides(record: Pair | Group, segments: bool) -> Any:
    """The answers with their prompt, which is a segment of its own for encoders."""
    if not segments or record.prompt is None:
        return record.whole()
    return [(record.prompt, answer) for answer in record.answers]


def _row(record: Pair | Group, ids: list[np.ndarray | RowError]) -> dict[str, Any] | str:
    """A row, or why there is none."""
    for one in ids:
        if isinstance(one, RowError):
            if one.kind == "overlong":
                return "longer than --max-length"
            raise DataError(f"{record.where}: {one.reason}")
    if all(np.array_equal(ids[0], one) for one in ids[1:]):
        return "identical tokens"
    if isinstance(record, Group):
        if len(ids) > LARGEST_GROUP:
            raise DataError(
                f"{record.where}: {len(ids)} answers, more than {LARGEST_GROUP}: "
                "--ratings pairs or --ranks pairs trains on the best and the worst"
            )
        return {"responses_ids": ids, "ranks": [float(rank) for rank in record.ranks]}
    row = {"chosen_ids": ids[0], "rejected_ids": ids[1]}
    return row if record.margin is None else {**row, "margin": float(record.margin)}


class Rows(NamedTuple):
    """What to train on and what is held out, as token ids.

    Attributes:
        train: rows of ``chosen_ids`` and ``rejected_ids``, or ``responses_ids`` and ``ranks``.
        held_out: the same; None: nothing is held out.
        source: what ``train`` was made of.
        form: how conversations became tokens.
        example: a conversation that was trained on.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]] | None
    source: Preferences
    form: Form
    example: Any


def tokenised(
    started: Started,
    train: Preferences,
    held_out: Preferences | None,
    max_length: int,
    special_tokens: bool = False,
) -> Rows:
    """Preferences as token ids; prints what was dropped.

    Raises:
        UserError, DataError: they cannot be tokenised, or none is short enough.
    """
    tokenizer, model = started.tokenizer, started.model
    if train.conversational and not tokenizer.chat_template:
        raise UserError(
            f"{train.source} has messages, and the tokenizer has no chat template to make text of "
            "them: --chat-template FILE names one"
        )
    positions = models.positions(model)
    encoder = Encoder(
        tokenizer,
        max_length=min(positions or max_length, max_length),
        special_tokens=special_tokens,
        end_of_text=True,  # as TRL has it; messages end as their template ends them
        chat=train.conversational,
        segments=models.takes_pairs(model.config.get_text_config(), tokenizer),
        vocabulary=model.get_input_embeddings().num_embeddings,
    )
    found = []
    for records, prefix, purpose in ((train, "", "train on"), (held_out, "held out: ", "hold out")):
        if records is None:
            found.append(None)
            continue
        rows, dropped = tokens(records, encoder)
        for reason, count in dropped.items():
            print(f"{prefix}dropped: {count:,} × {reason}")
        if not rows:
            raise DataError(f"{records.source}: no {records.kind} left to {purpose}")
        found.append(rows)
    for warning in encoder.told():
        print(f"! {warning}")
    first = dataclasses.replace(train.records[0], given=None)
    return Rows(*found, train, encoder.form_of_training(), first.whole()[0])
