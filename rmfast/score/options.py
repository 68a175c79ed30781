"""Options of ``rmfast score``, and those that ``rmfast eval`` shares with it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rmfast.arguments import Options, option

MODEL = "Model"
CONVERSATIONS = "Conversations"
INPUT = "Input"
RUN = "Run"
FILES = (
    ".jsonl, .csv (.gz or .zst too) or .parquet file; several of one kind, as a quoted pattern or "
    "with commas between; - for JSON lines from stdin; or a folder or hub name of a data set."
)


@dataclasses.dataclass(kw_only=True)
class LoadingOptions(Options):
    """How a model is loaded."""

    # fmt: off
    model: str = option("Score with this reward model: a folder or a name on the hub.")

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "Load the weights in this dtype; auto: the checkpoint's.", "auto", group=MODEL)
    device: str | None = option(
        "Run on cpu, cuda or cuda:N (default: a GPU if there is one).", None, MODEL)
    revision: str | None = option(
        "Take this branch, tag or commit of a model on the hub.", None, MODEL)
    tokenizer: str | None = option(
        "Use this tokenizer, a folder or hub name (default: the model's).",
        None, metavar="NAME", group=MODEL)
    trust_remote_code: bool = option("Run code that comes with the model.", False, MODEL)
    # fmt: on

    @property
    def ignored(self) -> list[str]:
        return (self.ignore_columns or "").split(",")

    def for_loading(self) -> dict[str, Any]:
        """Keyword arguments of :func:`rmfast.loading.load` for ``--model``."""
        names = ("dtype", "device", "revision", "tokenizer", "trust_remote_code")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(kw_only=True)
class ScoringOptions(LoadingOptions):
    """How conversations are read and scored."""

    # fmt: off
    attention: Literal["auto", "triton", "sdpa"] = option(
        "Choose the attention backend; auto: triton on a GPU where it can, else sdpa.",
        "auto", group=MODEL)
    pooling: Literal["hf", "mask"] | None = option(
        "Choose the token that carries the score; hf: the last that is not the pad token, as in "
        "Hugging Face; mask: the last one (default: hf, or as the model was trained).",
        None, group=MODEL)

    system_prompt: str | None = option(
        "Put this before messages that have no system prompt.",
        None, metavar="TEXT", group=CONVERSATIONS)
    chat_template: str | None = option(
        "Use the Jinja template in this file instead of the tokenizer's.",
        None, metavar="FILE", group=CONVERSATIONS)
    chat: bool | None = option(
        "Read text as turns of a chat, or not: join prompt and response (default: as in the "
        "model's training if rmfast trained it, else prompts with responses as turns).",
        None, group=CONVERSATIONS)
    end_of_text: bool | None = option(
        "End plain text with the end of text, or not (default: as in the training, else only "
        "chosen and rejected, as TRL does).", None, group=CONVERSATIONS)
    special_tokens: bool = option(
        "Take special tokens of the chat template in messages as they are, instead of refusing "
        "the row.", False, group=CONVERSATIONS)
    max_length: int | None = option(
        "Allow this many tokens a conversation (default: that of the training if rmfast trained "
        "the model, else the model's own limit).",
        None, metavar="TOKENS", least=1, group=CONVERSATIONS)
    on_overlong: Literal["error", "skip", "truncate_left"] = option(
        "Choose what happens to a longer conversation; error: leave it out and list it as an "
        "error; skip: leave it out; truncate_left: score its last tokens.",
        "error", group=CONVERSATIONS)

    name: str | None = option("Read this configuration of a data set.", None, INPUT)
    ignore_columns: str | None = option(
        "Pass over these columns, with commas between, whose names seem to belong to the prompt.",
        None, metavar="NAMES", group=INPUT)
    limit: int | None = option(
        "Stop after this many rows.", None, metavar="ROWS", least=1, group=INPUT)

    max_tokens: int | None = option(
        "Run this many distinct prefixes a micro-batch (default: what the device's memory holds).",
        None, metavar="TOKENS", least=1, group=RUN)
    batch_window: int = option(
        "Share prefixes among this many conversations.", 1024, metavar="N", least=1, group=RUN)
    strict: bool = option("Stop at the first row that cannot be scored.", False, RUN)
    # fmt: on

    def for_scorer(self, template: str | None) -> dict[str, Any]:
        """Keyword arguments of a scorer, with the text of ``--chat-template``."""
        names = """max_tokens max_length on_overlong system_prompt chat end_of_text special_tokens
        attention""".split()
        options = {name: getattr(self, name) for name in names}
        return options | {"chat_template": template, "window": self.batch_window}


def column(help: str) -> str | None:
    return option(f"Read {help} from this column.", None, metavar="NAME", group=INPUT)


@dataclasses.dataclass(kw_only=True)
class ScoreOptions(ScoringOptions):
    """Options of ``rmfast score``."""

    # fmt: off
    input: str = option(f"Read this {FILES}", metavar="FILE", several=True)
    output: str = option(
        "Write this file; its name says which kind, whatever the input is; - for JSON lines to "
        "stdout, which cannot be resumed.", metavar="FILE")

    messages_column: str | None = column("a list of messages")
    prompt_column: str | None = column("what comes before, as text or messages,")
    responses_column: str | None = column("a list of responses, each as text or messages,")
    response_column: str | None = column("the response, as text or messages,")
    chosen_column: str | None = column("the preferred response, or the conversation with it,")
    rejected_column: str | None = column("the other response")
    text_column: str | None = column("plain text")
    split: str = option("Read this split of a data set.", "train", group=INPUT)
    shard: str | None = option(
        "Score a part of the rows: i/n takes row i and each n-th after it, counted from 0, so that "
        "0/4 to 3/4 are all of them.", None, metavar="I/N", group=INPUT)

    normalize: bool = option(
        "Write (score - mean) / std, with both from the model's config.", False, "Scores")
    sigmoid: bool = option("Write scores between 0 and 1.", False, "Scores")
    reward_column: str = option(
        "Name the new column, or the base of its name: chosen_NAME and rejected_NAME, or NAMEs for "
        "several responses.", "reward", metavar="NAME", group="Scores")

    ray: int | None = option(
        "Score with this many processes on a Ray cluster, each with its own copy of the model (pip "
        "install 'rmfast[ray]').", None, metavar="ACTORS", least=1, group=RUN)
    resume: bool = option(
        "Continue where a run with the same options stopped, or start.", False, RUN)
    overwrite: bool = option("Replace the output.", False, RUN)
    report: str | None = option(
        "Write the JSON report here (default: .OUTPUT.report.json).",
        None, metavar="FILE", group=RUN)
    # fmt: on

    def for_scorer(self, template: str | None) -> dict[str, Any]:
        scores = {"normalize": self.normalize, "sigmoid": self.sigmoid}
        return super().for_scorer(template) | scores | {"pooling": self.pooling}
