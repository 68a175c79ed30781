"""Sequences laid end to end in one row, as trainers give them that remove padding.

OpenRLHF (``packing_samples``), verl (``use_remove_padding``), SkyRL and AReaL call a model with ids
``[1, N]``, no mask, and positions that are 0 again where a sequence begins; transformers keeps the
sequences apart. Pads at the end are one more sequence, or some.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rmfast.packed.stand_in import Unservable

_WHERE = ("cu_seq_lens_q", "cu_seq_lens_k")  # int32 [S + 1], for flash attention
_LENGTHS = (*_WHERE, "max_length_q", "max_length_k")


def plain(call: dict[str, Any], attention: str) -> tuple[dict[str, Any], list[Tensor | None]]:
    """A call without what says a second time where sequences begin, and where that says so.

    Args:
        attention: the name of the model's own attention function.
    """
    where = [call.get(name) for name in _WHERE]
    if not all(isinstance(x, (Tensor, type(None))) for x in where):
        raise Unservable("cu_seq_lens_q or cu_seq_lens_k that is no tensor")
    call = {name: value for name, value in call.items() if name not in _LENGTHS}
    mask = call.get("attention_mask")
    # with other functions it means that all tokens before are seen, whatever the positions say
    if isinstance(mask, dict) and "flash" in attention and all(x is None for x in mask.values()):
        call["attention_mask"] = None
    return call, where


def begins(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, where: list[Tensor | None]
) -> list[int] | None:
    """The columns where the sequences of one row begin; None: a batch of a sequence a row.

    Args:
        ids: int64 ``[B, T]``, on the CPU like the rest.
        where: what :func:`plain` found.

    Raises:
        Unservable: positions and ``where`` differ, or a sequence begins at another position than 0.
    """
    found = None
    if ids.shape[0] == 1 and mask is None and positions is not None and positions.ndim == 2:
        found = [0, *((positions[0].diff() != 1).nonzero()[:, 0] + 1).tolist()]
    for one in where:
        if one is not None and one.tolist() != [*(found or ()), ids.shape[1]]:
            raise Unservable("cu_seq_lens_q or cu_seq_lens_k, which positions do not agree with")
    if found is None or len(found) == 1:
        return None
    if positions[0, found].any():
        raise Unservable("position_ids that do not rise by one with each token")
    return found


@functools.cache
def masks(forward: Callable) -> bool:
    """Whether a backbone's forward makes its mask by positions too, which keeps sequences apart.

    Some families leave them out. Code that cannot be read is taken for one of those.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    making: list[set[str | None]] = []  # the arguments of each call that makes a mask
    apart: list[bool] = []  # of those that are collected first, with a config: whether by positions
    for part in ast.walk(tree):
        if isinstance(part, ast.Call):
            name = getattr(part.func, "id", getattr(part.func, "attr", ""))
            names = {keyword.arg for keyword in part.keywords}
            if "mask" in name and "bidirectional" not in name and names & {"config", None}:
                making.append(names)
        elif isinstance(part, ast.Dict):
            keys = {key.value for key in part.keys if isinstance(key, ast.Constant)}
            apart += ["position_ids" in keys] if "config" in keys else []
    collected = bool(apart) and all(apart)  # None: of ``**``
    return bool(making) and all(
        "position_ids" in names or (None in names and collected) for names in making
    )
