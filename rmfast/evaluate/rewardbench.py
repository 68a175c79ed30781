"""The files that RewardBench's ``rewardbench`` command leaves behind, for tools that read them.

``{model}.json`` has the accuracy, ``{model}_outputs.jsonl`` a line for each row scored, and
``{model}_all.jsonl`` the scores alone. Rows that could not be scored are in none of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from rmfast.errors import RowError

if TYPE_CHECKING:
    from rmfast.data.encoding import Conversation, Encoder


class Files(contextlib.ExitStack):
    """Writes them, row by row; use as a context manager.

    Args:
        folder: where they go; made if it is not there.
        model: the model's name as it was given, which becomes part of their names; of a path,
            what leads out of ``folder`` is left out.
        encoder: makes the texts that were scored.
        save_all: write ``{model}_all.jsonl`` too.
    """

    def __init__(
        self, folder: str | Path, model: str, encoder: Encoder, save_all: bool = False
    ) -> None:
        super().__init__()
        path = PurePath(model)
        inside = [part for part in path.parts if part not in (path.anchor, "..")] or ["model"]
        self.stem = Path(folder, *inside)
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.encoder = encoder
        self.results: list[float] = []
        self._outputs = self._open("_outputs.jsonl")
        self._all = self._open("_all.jsonl") if save_all else None

    def _open(self, ending: str) -> Any:
        return self.enter_context(self._path(ending).open("w", encoding="utf-8"))

    def _path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    def add(
        self,
        record: dict[str, Any],
        prompt: Any,
        chosen: Sequence[Conversation],
        rejected: Sequence[Conversation],
        scores: Sequence[float],
        credit: float,
    ) -> None:
        """A row.

        Args:
            record: its columns, which follow what is computed.
            prompt: text or messages, or None.
            chosen, rejected: conversations.
            scores: of chosen, then of rejected.
            credit: as :func:`rmfast.evaluate.measures.credits` has it. A pair's result is 1 or 0,
                a tie being 0; a group's is its credit, as in RewardBench 2.
        """
        pair = len(chosen) == len(rejected) == 1
        result = int(credit == 1) if pair else credit
        count = len(chosen)
        line = {
            "prompt": self._prompt(prompt, chosen[0]),
            "results": result,
            "scores_chosen": _only(list(scores[:count])),
            "scores_rejected": _only(list(scores[count:])),
            "text_chosen": _only([self.encoder.text(side) for side in chosen]),
            "text_rejected": _only([self.encoder.text(side) for side in rejected]),
        }
        _write(self._outputs, {**line, **{k: v for k, v in record.items() if k not in line}})
        if self._all is not None:
            _write(
                self._all, {"chosen": line["scores_chosen"], "rejected": line["scores_rejected"]}
            )
        self.results.append(result)

    def _prompt(self, prompt: Any, chosen: Conversation) -> Any:
        """The prompt as the chat template has it; as it came where the template will not."""
        if prompt is None:
            if not isinstance(chosen, list) or len(chosen) < 2:
                return ""
            prompt = chosen[:-1]
        alone = prompt
        if isinstance(prompt, str) and self.encoder.chat is not False:
            alone = [{"role": "user", "content": prompt}]
        try:
            return self.encoder.text(alone)
        except RowError:
            return prompt

    def finish(
        self,
        *,
        model: str,
        ref_model: str | None,
        tokenizer: str,
        chat_template: str | None,
        subsets: dict[str, float] | None,
    ) -> list[Path]:
        """Write ``{model}.json``.

        Args:
            subsets: accuracy by subset, as ``extra_results``.

        Returns:
            Paths of all files written.
        """
        count = len(self.results)
        about = {
            "accuracy": sum(self.results) / count if count else None,
            "num_prompts": count,
            "model": model,
            "ref_model": ref_model,
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "extra_results": subsets,
        }
        path = self._path(".json")
        path.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        more = [Path(file.name) for file in (self._outputs, self._all) if file is not None]
        return [path, *more]


def _only(values: list[Any]) -> Any:
    """One answer stands for itself."""
    return values[0] if len(values) == 1 else values


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
