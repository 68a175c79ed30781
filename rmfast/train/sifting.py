"""Rows of a trainer's data set: which are dropped or refused, and their token ids."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
import trl
from trl.data_utils import _tokenize

from rmfast.data.records import is_blank, useless_group, useless_pair
from rmfast.data.rendering import Renderer
from rmfast.data.rows import check_as_it_is
from rmfast.data.values import as_messages, check_number, without_nulls
from rmfast.errors import RowError
from rmfast.train.objective import LARGEST_GROUP


def map_options(dataset: Any, args: trl.RewardConfig, title: str) -> dict[str, Any]:
    """What ``map`` takes besides; of streamed data nothing."""
    if not isinstance(dataset, datasets.Dataset):
        return {}
    return {"num_proc": args.dataset_num_proc, "desc": title}


def sift(
    dataset: Any,
    why_not: Callable[[dict[str, Any], int], str],
    name: str,
    args: trl.RewardConfig,
    dropped: Counter[str],
) -> Any:
    """The rows for which ``why_not`` has no reason; of others the reasons are counted."""
    if not isinstance(dataset, datasets.Dataset):
        return dataset.filter(lambda row, i: not why_not(row, i), with_indices=True)
    reasons = dataset.map(
        lambda row, i: {"reason": why_not(row, i)},
        with_indices=True,
        remove_columns=dataset.column_names,
        **map_options(dataset, args, f"Checking {name}"),
    )["reason"]
    dropped.update(reason for reason in reasons if reason)
    kept = dataset.select([i for i, reason in enumerate(reasons) if not reason])
    if not len(kept):
        raise ValueError(f"the {name} data set has no row left: {dict(dropped)}")
    return kept


def why_not_tokens(row: dict[str, Any], place: int, max_length: int | None) -> str:
    """Why a tokenised row is dropped; nothing where it is not."""
    sides = row.get("responses_ids") or [row["chosen_ids"], row["rejected_ids"]]
    if max_length is not None and max(map(len, sides)) > max_length:
        return "longer than max_length"
    return "identical tokens" if all(side == sides[0] for side in sides[1:]) else ""


def why_not_pair(row: dict[str, Any], place: int, processing_class: Any) -> str:
    """Why a pair is dropped; nothing where it is not."""
    if "margin" in row:
        check_number(f"row {place}: margin", row["margin"])
    chosen, rejected = (row.get(f"{name}_ids", row.get(name)) for name in ("chosen", "rejected"))
    return useless_pair(chosen, rejected, row.get("prompt")) or _as_it_is(
        row, place, processing_class
    )


def why_not_group(row: dict[str, Any], place: int, processing_class: Any) -> str:
    responses, ranks = row.get("responses_ids", row.get("responses")), row["ranks"]
    if ranks is None or len(ranks) != len(responses):
        count = "no" if ranks is None else len(ranks)
        raise ValueError(f"row {place}: {len(responses)} responses and {count} ranks")
    for rank in ranks:
        check_number(f"row {place}: each of ranks", rank)
    if len(responses) > LARGEST_GROUP:
        raise ValueError(
            f"row {place}: {len(responses)} responses, more than {LARGEST_GROUP}: split it"
        )
    if len(responses) > 1 and any(is_blank(x, row.get("prompt")) for x in responses):
        return "empty response"
    return useless_group(responses, ranks) or _as_it_is(row, place, processing_class)


def _as_it_is(row: dict[str, Any], place: int, processing_class: Any) -> str:
    """Nothing; ValueError where TRL would make something else of a row than is meant."""
    if "chosen_ids" not in row and "responses_ids" not in row:
        try:
            check_as_it_is(row)
            conversations, options = _conversations(row)
            if getattr(processing_class, "chat_template", None):
                for conversation in conversations:
                    if isinstance(conversation, list):
                        _renderer(processing_class)(conversation, options)
        except RowError as error:
            raise ValueError(f"row {place}: {error.reason}") from None
    return ""


@functools.lru_cache(maxsize=2)
def _renderer(processing_class: Any) -> Renderer:
    return Renderer(processing_class, special_tokens=True)


def _conversations(row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The conversations of a row, text or messages, and what it gives the chat template.

    Keys that are null are dropped: Arrow gives every message the keys of all, and a template may
    only look whether a key is there.
    """
    prompt, options = without_nulls([row.get("prompt"), row.get("chat_template_kwargs") or {}])
    if row.get("tools"):
        tools = row["tools"]
        options["tools"] = json.loads(tools) if isinstance(tools, str) else without_nulls(tools)
    responses = without_nulls(row.get("responses") or [row["chosen"], row["rejected"]])
    if isinstance(prompt, list):
        responses = [as_messages("assistant", response) for response in responses]
    return [x if prompt is None else prompt + x for x in responses], options


def tokenize_row(row: dict[str, Any], processing_class: Any) -> dict[str, Any]:
    """Token lists of a pair or a group, as TRL makes them of chosen and rejected."""
    eos, ids = processing_class.eos_token or "", []
    conversations, options = _conversations(row)
    for whole in conversations:
        if isinstance(whole, str):
            whole = whole if whole.endswith(eos) else whole + eos
            ids.append(_tokenize(processing_class, whole)["input_ids"])
        else:
            ids.append(_tokenize(processing_class, whole, **options)["input_ids"])
    if "responses" in row:
        return {"responses_ids": ids}
    return {"chosen_ids": ids[0], "rejected_ids": ids[1]}
