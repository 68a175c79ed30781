"""The model card that ``rmfast train`` writes: how to score, what from, what on, how well."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rmfast.evaluate import show

if TYPE_CHECKING:
    from rmfast.train.job import _Job


_PATHS = ("model", "data", "eval_data", "output", "tokenizer", "chat_template")
_LOSSES = {
    "bradley_terry": "Bradley-Terry",
    "focal": "Bradley-Terry, focal",
    "all_pairs": "InstructGPT's loss of all pairs",
    "plackett_luce": "Plackett-Luce",
}


_SCORER = """\
import rmfast
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name = "{name}"  # this folder, or where it is on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
scorer = rmfast.Scorer(model, tokenizer)
conversation = {conversation}
print(scorer.score([conversation])[0])"""


_PLAIN = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name = "{name}"  # this folder, or where it is on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
conversation = {conversation}
{ids}
with torch.inference_mode():
    print(model(torch.tensor([ids])).logits[0, 0].item())"""


_MESSAGES = """\
[
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
]"""


_TEXT = '"How many legs has a spider? Eight."'


def base_name(value: str) -> str:
    """Of a local path its last part; a name on the hub as it is."""
    return Path(value).resolve().name if Path(value).exists() else value


def write(job: _Job) -> str:
    """The card of a finished run. It has no path of this machine in it."""
    import yaml

    options, start = job.options, job.start
    paths = {name: getattr(options, name) for name in _PATHS}
    named = {name: base_name(path) for name, path in paths.items() if path is not None}
    public = dataclasses.replace(options, **named)
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "rmfast"],
    }
    if not Path(options.model).exists():
        head["base_model"] = options.model
    if not Path(options.data).exists():
        head["datasets"] = [options.data]
    name, tokenizer = public.output, job.tokenizer
    ends = tokenizer.eos_token is not None and not job.conversational
    conversation = _TEXT if not job.conversational else _MESSAGES
    if ends:
        conversation += " + tokenizer.eos_token"
    codes = [
        _SCORER.format(name=name, conversation=conversation),
        _PLAIN.format(name=name, conversation=conversation, ids=_ids(job)),
    ]
    kind = "messages" if job.conversational else "text"
    what = "pairs" if job.kind == "pairs" else "ranked groups of answers"
    loss = _LOSSES[job.trainer.objective.kind]
    rank = options.lora_rank
    how = "" if rank is None else f", by LoRA of rank {rank}, which is merged into the weights"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"A reward model: it gives a prompt with an answer one score, and higher is better. Only "
        f"differences between answers to one prompt mean something: σ(score - score') is the "
        f"chance that the first one is preferred.\n\nTrained from `{public.model}` (its head: "
        f"{'new' if start.new else 'kept'}) on {job.counts[0]:,} {what} of {kind} of "
        f"`{public.data}`{how}; loss: {loss}.",
        "## Score with it",
        "With rmfast, in bulk:",
        f"```python\n{codes[0]}\n```",
        "With transformers alone:",
        f"```python\n{codes[1]}\n```",
        f"Trained on {kind}"
        + (", each with the end of text after it." if ends else "; the chat template is in here."),
    ]
    if job.watch.summary is not None:
        of = f"`{public.eval_data}`" if public.eval_data else "the same data"
        parts += [
            "## Held-out figures",
            f"Of {job.counts[1]:,} {what} of {of}, "
            + ("no question of which was trained on:" if not public.eval_data else "as it is:"),
            f"```\n{show.table(job.watch.summary)}\n```",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in job.state.versions.items())
    parts += [
        "## Training",
        f"`rmfast train --config config.yaml`, {job.trainer.state.global_step:,} steps, with "
        f"{versions}. In config.yaml:",
        f"```yaml\n{public.as_yaml()}```",
    ]
    if (job.folder / "training.png").exists():
        parts.append("![loss and held-out accuracy](training.png)")
    return "\n\n".join(parts) + "\n"


def _ids(job: _Job) -> str:
    """The line that makes the tokens that were trained on."""
    if not job.conversational:
        return 'ids = tokenizer(conversation)["input_ids"]'
    line = 'ids = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]'
    first = job.tokenizer.apply_chat_template(job.example, return_dict=True)["input_ids"][:1]
    if job.begins_with_bos and first != [job.tokenizer.bos_token_id]:
        line += "\nids = [tokenizer.bos_token_id, *ids]"
    return line
