"""The files that RewardBench's ``rewardbench`` command writes, for tools that read them.

``{model}.json`` has the accuracy, ``{model}_outputs.jsonl`` a line for each row scored, and
``{model}_all.jsonl`` the scores alone. Rows that could not be scored are in none of them.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from rmfast.errors import RowError

if TYPE_CHECKING:
    from rmfast.data.encoding import Encoder
    from rmfast.data.rows import Row


class Files(contextlib.ExitStack):
    """Writes the files row by row; a context manager.

    Args:
        folder: made if it does not exist.
        model: name or path, which the files' names begin with; parts that lead out of ``folder``
            are left out.
        encoder: makes the texts that were scored.
        save_all: write ``{model}_all.jsonl`` too.
    """

    def __init__(
        self, folder: str | Path, model: str, encoder: Encoder, save_all: bool = False
    ) -> None:
        super().__init__()
        path = PurePath(model)
        inside = [part for part in path.parts if part not in (path.anchor, "..")] or ["model"]
        self.stem = str(Path(folder, *inside))
        Path(self.stem).parent.mkdir(parents=True, exist_ok=True)
        self.encoder, self.results = encoder, []
        endings = ("_outputs.jsonl", "_all.jsonl")[: 1 + save_all]
        paths = [Path(self.stem + ending) for ending in endings]
        self.files = [self.enter_context(path.open("w", encoding="utf-8")) for path in paths]

    def add(self, row: Row, scores: list[float], credit: float) -> None:
        """Write a row, with its scores (chosen first) and :func:`rmfast.evaluate.measures.credit`.

        The result of a pair is 1, or 0 for a tie too; that of a group is its credit, as in
        RewardBench 2.
        """
        count, text = len(row.chosen), self.encoder.text
        self.results.append(credit if len(scores) > 2 else int(credit == 1))
        line = {
            "prompt": self._prompt(row),
            "results": self.results[-1],
            "scores_chosen": single(scores[:count]),
            "scores_rejected": single(scores[count:]),
            "text_chosen": single([text(answer) for answer in row.chosen]),
            "text_rejected": single([text(answer) for answer in row.rejected]),
        }
        alone = {"chosen": line["scores_chosen"], "rejected": line["scores_rejected"]}
        whole = {**line, **{k: v for k, v in row.record.items() if k not in line}}
        for file, values in zip(self.files, (whole, alone), strict=False):
            file.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")

    def _prompt(self, row: Row) -> Any:
        """The prompt in the chat template, or as it is where the template refuses it."""
        prompt, first = row.prompt, row.chosen[0]
        if prompt is None:
            if not isinstance(first, list) or len(first) < 2:
                return ""
            prompt = first[:-1]
        chat = isinstance(prompt, str) and self.encoder.chat is not False
        try:
            return self.encoder.text([{"role": "user", "content": prompt}] if chat else prompt)
        except RowError:
            return prompt

    def finish(self, subsets: dict[str, float] | None, **about: str | None) -> list[Path]:
        """Write ``{model}.json``, and return the paths of all files.

        Args:
            subsets: accuracy by subset, as ``extra_results``.
            about: ``model``, ``ref_model``, ``tokenizer`` and ``chat_template``, in this order.
        """
        count = len(self.results)
        accuracy = sum(self.results) / count if count else None
        summary = {"accuracy": accuracy, "num_prompts": count, **about, "extra_results": subsets}
        path = Path(self.stem + ".json")
        path.write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")
        return [path, *(Path(file.name) for file in self.files)]


def single(values: list[Any]) -> Any:
    """The value where there is one, else the list."""
    return values[0] if len(values) == 1 else values
