"""The model card that ``rmfast train`` writes: how to score, what from, what on, how well."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rmfast.evaluate import show
from rmfast.train.options import TrainOptions

if TYPE_CHECKING:
    from rmfast.train.begin import Started
    from rmfast.train.rows import Rows


_PATHS = ("model", "data", "eval_data", "output", "tokenizer", "chat_template")
_LOSSES = {
    "bradley_terry": "Bradley-Terry",
    "focal": "Bradley-Terry, focal",
    "all_pairs": "InstructGPT's loss of all pairs",
    "plackett_luce": "Plackett-Luce",
}
_CARD = """\
---
{metadata}
---

# {name}

A reward model: it gives a prompt with an answer one score, and higher is better. Compare only the
scores of answers to one prompt: σ(score - score') is the probability that the first is preferred.

Trained from `{model}` (its head: {head}) on {count:,} {records} of {of} of
`{data}`{method}; loss: {loss}.
{warnings}
## Score with it

With rmfast, in bulk:

```python
import rmfast
{load}
scorer = rmfast.Scorer(model, tokenizer)
print(scorer.score([conversation])[0])
```

With transformers alone:

```python
import torch
{load}
{ids}
with torch.inference_mode():
    print(model({call}).logits[0, 0].item())
```

Trained on {trained_on}.
{figures}
## Training

`rmfast train --config config.yaml`, {steps}, with {versions}. In config.yaml:

```yaml
{config}```
"""
_FIGURES = """
## Held-out figures

Of {count:,} {records} of {source}:

```
{table}
```
"""
_LOAD = """\
{imports}

name = {name}  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = {model}
conversation = {conversation}"""
_IMPORTS = "from transformers import AutoModelForSequenceClassification, AutoTokenizer"
_MODEL = "AutoModelForSequenceClassification.from_pretrained(name)"
_PEFT_IMPORTS = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer"""
_PEFT_MODEL = """\
AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1)
model.config.pad_token_id = tokenizer.pad_token_id"""
_MESSAGES = """\
[
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
]"""
_TWO = '("How many legs has a spider?", "Eight.")'
_TEXT = '"How many legs has a spider? Eight."'


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the card tells of a finished run."""

    options: TrainOptions  # as the run resolved them
    started: Started
    rows: Rows
    loss: str  # one of train.objective.KINDS
    steps: int
    best: int  # the step whose weights are written
    is_adapter: bool  # the folder has LoRA's adapter alone
    summary: dict[str, Any] | None  # the last held-out figures
    versions: dict[str, str]  # of the libraries
    warnings: list[str]  # what to know before it is used

    @property
    def is_text(self) -> bool:
        return not self.rows.source.conversational

    @property
    def records(self) -> str:
        return "pairs" if self.rows.source.kind == "pairs" else "ranked groups of answers"


def write(run: Finished, folder: Path) -> None:
    """Write the card, ``README.md``. It has no path of this machine in it."""
    options = run.options
    given = {name: getattr(options, name) for name in _PATHS}
    names = {name: base_name(path) for name, path in given.items() if path is not None}
    public = dataclasses.replace(options, **names)
    conversation, trained_on = _MESSAGES, "messages; the tokenizer has the chat template"
    if run.is_text:
        conversation, trained_on = _TEXT, "text as it is"
        if run.started.tokenizer.eos_token is not None:
            conversation += " + tokenizer.eos_token"
            trained_on = "text, each with the end of text after it"
    if run.rows.form.segments:
        conversation, trained_on = _TWO, "prompt and answer as the tokenizer's two segments"
    method, imports, model = "", _IMPORTS, _MODEL
    if options.lora_rank is not None:
        method = f", by LoRA of rank {options.lora_rank}, merged into the weights"
    if run.is_adapter:
        method = f", by LoRA of rank {options.lora_rank}; this is the adapter alone"
        imports, model = _PEFT_IMPORTS, _PEFT_MODEL
    steps = f"{run.steps:,} steps"
    if run.best != run.steps:
        steps += f" (kept: step {run.best:,}, the best held-out accuracy, which that flatters)"
    name = json.dumps(public.output, ensure_ascii=False)
    text = _CARD.format(
        metadata=_metadata(run, public).to_yaml(),
        name=public.output,
        model=public.model,
        head="new" if run.started.start.new else "kept",
        count=len(run.rows.train),
        records=run.records,
        of=run.rows.source.content,
        data=public.data,
        method=method,
        loss=_LOSSES[run.loss],
        warnings="".join(f"\n**Warning: {warning}.**\n" for warning in run.warnings),
        load=_LOAD.format(name=name, imports=imports, model=model, conversation=conversation),
        ids=_ids(run),
        call="**ids" if run.rows.form.segments else "torch.tensor([ids])",
        trained_on=trained_on,
        figures=_figures(run, public),
        steps=steps,
        versions=", ".join(f"{name} {version}" for name, version in run.versions.items()),
        config=public.as_yaml(),
    )
    if (folder / "training.png").exists():
        text += "\n![loss and held-out accuracy](training.png)\n"
    ModelCard(text).save(folder / "README.md")


def base_name(value: str) -> str:
    """Of a local path its last part; a name on the hub as it is."""
    return Path(value).resolve().name if Path(value).exists() else value


def _metadata(run: Finished, public: TrainOptions) -> ModelCardData:
    """What the hub reads: where the model is from, and its held-out accuracy."""
    options, results = run.options, None
    if run.summary is not None:
        source = public.eval_data or public.data
        results = EvalResult(
            task_type="text-classification",
            dataset_type=source,
            dataset_name=source if public.eval_data else f"{source}, held-out prompts",
            metric_type="accuracy",
            metric_name="Held-out accuracy",
            metric_value=run.summary["rows"]["accuracy"],
        )
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "rmfast"],
        base_model=None if Path(options.model).exists() else options.model,
        datasets=None if Path(options.data).exists() else [options.data],
        model_name=public.output,
        eval_results=None if results is None else [results],
    )


def _figures(run: Finished, public: TrainOptions) -> str:
    if run.summary is None:
        return ""
    source = f"`{public.eval_data}`"
    if not public.eval_data:
        source = "the same data, no prompt of which was trained on"
    count, table = len(run.rows.held_out), show.table(run.summary)
    return _FIGURES.format(count=count, records=run.records, source=source, table=table)


def _ids(run: Finished) -> str:
    """The lines that make the tokens that were trained on."""
    if run.rows.form.segments:
        return 'ids = tokenizer(*conversation, return_tensors="pt")'
    if run.is_text:
        return 'ids = tokenizer(conversation)["input_ids"]'
    lines = 'ids = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]'
    tokenizer, example = run.started.tokenizer, run.rows.example
    first = tokenizer.apply_chat_template(example, return_dict=True)["input_ids"][:1]
    if run.rows.form.bos and first != [tokenizer.bos_token_id]:
        lines += "\nids = [tokenizer.bos_token_id, *ids]"
    return lines
