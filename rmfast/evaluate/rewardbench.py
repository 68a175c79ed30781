"""What RewardBench's ``rewardbench`` command writes, for tools that read its files.

``{model}.json`` has the accuracy, ``{model}_outputs.jsonl`` a line for each row scored, and
``{model}_all.jsonl`` the scores alone. Rows that could not be scored are in none of them.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast.errors import RowError
from rmfast.evaluate import measures

if TYPE_CHECKING:
    from rmfast.data.encoding import Encoder
    from rmfast.data.rows import Row


def stem(folder: str, model: str) -> str:
    """The beginning of the files' paths: ``model`` is a name or a path, and stays in ``folder``."""
    path = PurePath(model)
    inside = [part for part in path.parts if part not in (path.anchor, "..")] or ["model"]
    return str(Path(folder, *inside))


def output(row: Row, scores: list[float], encoder: Encoder) -> dict[str, Any]:
    """The line of a row in ``{model}_outputs.jsonl``; ``scores`` has the chosen answers first.

    The result of a pair is 1, or 0 for a tie too; that of a group is its
    :func:`rmfast.evaluate.measures.credit`, as in RewardBench 2.
    """
    count = len(row.chosen)
    credit = float(measures.credit(np.array(scores), count))
    line = {
        "prompt": _prompt(row, encoder),
        "results": credit if len(scores) > 2 else int(credit == 1),
        "scores_chosen": single(scores[:count]),
        "scores_rejected": single(scores[count:]),
        "text_chosen": single(list(map(encoder.text, row.chosen))),
        "text_rejected": single(list(map(encoder.text, row.rejected))),
    }
    return line | {name: value for name, value in row.record.items() if name not in line}


def _prompt(row: Row, encoder: Encoder) -> Any:
    """The prompt in the chat template, or as it is where the template refuses it."""
    prompt, first = row.prompt, row.answers[0][1]
    if prompt is None:
        if not isinstance(first, list) or len(first) < 2:
            return ""
        prompt = first[:-1]
    chat = isinstance(prompt, str) and encoder.chat is not False
    try:
        return encoder.text([{"role": "user", "content": prompt}] if chat else prompt)
    except RowError:
        return prompt


def single(values: list[Any]) -> Any:
    """The value where there is one, else the list."""
    return values[0] if len(values) == 1 else values
