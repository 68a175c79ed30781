"""What ``rmfast doctor`` sees in a model, its checkpoint and its tokenizer without running it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from rmfast.diagnosis.case import NOTE, OK, WARNING, WRONG, Case, Finding, conversation
from rmfast.loading import first_names
from rmfast.packed import models, survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Verdicts = Iterator[tuple[str, ...]]  # a finding's status and what, and where it has one, its do

_NO_LIMIT = 10**9  # a tokenizer without a limit has model_max_length 1e30
_OTHER_HEADS = re.compile(r"(^|\.)(v|value|reward|rm|regression)_(head|layer)\b")
# Words that no template trims or looks for.
_QUESTION, _ANSWER, _FOLLOW_UP = "alpha beta", "gamma delta", "epsilon zeta"


def run(case: Case) -> Iterator[Finding]:
    """The findings of all checks of this file, each named after its check."""
    checks = [model, labels, head, weights, adapter, mode, dtype]
    if case.tokenizer is not None:
        checks += [pad_ids, vocabulary, padding_side, length, chat_template, bos]
    for check in checks:
        name = check.__name__.replace("_", " ")
        yield from (Finding(name, *verdict) for verdict in check(case))
    if case.tokenizer is None:
        problem = "There is none: padding, BOS and chat template were not checked."
        yield Finding("tokenizer", NOTE, problem, "Pass it: rmfast.doctor(model, tokenizer).")


def model(case: Case) -> Verdicts:
    from transformers import PreTrainedModel

    inner = case.model.get_base_model() if hasattr(case.model, "get_base_model") else case.model
    name = type(case.classifier or inner).__name__
    if case.classifier is not None:
        count = sum(p.numel() for p in case.model.parameters())
        yield OK, f"{name}, {count / 1e6:,.1f} M parameters."
    elif isinstance(inner, PreTrainedModel) and inner.can_generate():
        problem = f"{name} is a language model: it has no reward head and gives no score."
        yield WRONG, problem, "Load it with AutoModelForSequenceClassification."
    else:
        yield NOTE, f"{name} has a head of its own, which the doctor does not inspect."


def labels(case: Case) -> Verdicts:
    count = case.classifier.config.num_labels if case.classifier is not None else None
    if count == 1:
        yield OK, "A conversation gets one score."
    elif count is not None:
        problem = f"config.num_labels is {count}: a conversation gets {count} numbers, no reward."
        yield WRONG, problem, "Load the checkpoint of a reward model, which has num_labels=1."


def head(case: Case) -> Verdicts:
    values = [p.detach() for p in case.head.values() if not p.is_meta]
    name = " and ".join(case.head_modules)
    if not case.head:
        return
    if case.lacks_head:
        problem = f"{name} is not in the checkpoint: it is random, and so are the scores."
        others = [name for name in case.saved if _OTHER_HEADS.search(name)]
        advice = "Name the checkpoint of a reward model, or train this one first."
        if others:
            advice = f"If the head is {others[0]}, save it as {next(iter(case.head))}."
        yield WRONG, problem, advice
    elif values and not any(value.any() for value in values):
        problem = f"{name} is all zeros: every conversation gets the same score."
        yield WRONG, problem, "Load a checkpoint whose head was trained and saved."
    elif case.lacks_head is None and _looks_untrained(case, values):
        problem = f"{name} looks untrained: its weights spread as config.initializer_range says."
        yield NOTE, problem, "Pass source=, the checkpoint's folder, to see whether it has a head."
    else:
        yield OK, f"{name} is {'not zero' if case.lacks_head is None else 'in the checkpoint'}."


def _looks_untrained(case: Case, values: list[torch.Tensor]) -> bool:
    """Whether the weights' standard deviation is the initial one, within four standard errors."""
    std = getattr(case.config, "initializer_range", None)
    tables = [value.float() for value in values if value.ndim > 1]
    return bool(std and tables) and all(
        abs(x.square().mean().sqrt().item() / std - 1) < 4 / math.sqrt(2 * x.numel())
        for x in tables
    )


def weights(case: Case) -> Verdicts:
    broken = [
        name
        for name, p in case.model.named_parameters()
        if p.is_floating_point() and not p.is_meta and not _all_finite(p.detach())
    ]
    absent = [name for name in case.missing or () if not case.has_head([name])]  # head() has those
    if broken:
        yield WRONG, f"NaN or infinity in {first_names(broken)}.", "Take an earlier checkpoint."
    if absent:
        problem = f"Not in the checkpoint, and therefore random: {first_names(absent)}."
        yield WRONG, problem, "Check that the checkpoint is complete and of this architecture."
    if not broken and not absent:
        yield OK, "All are finite."


def _all_finite(x: torch.Tensor) -> bool:
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())  # NaN carries over


def adapter(case: Case) -> Verdicts:
    if case.adapter is None or not case.head:
        return
    if case.has_head(case.adapter):
        yield OK, "The adapter trains and saves the head."
    elif case.lacks_head is False:
        yield OK, "The model under the adapter has the head."
    else:
        certain = "." if case.lacks_head else ", unless the model under the adapter has one."
        yield (
            WRONG if case.lacks_head else WARNING,
            f"The adapter neither trains nor saves the head: it is random{certain}",
            f'Train with LoraConfig(task_type="SEQ_CLS") or modules_to_save={case.head_modules}.',
        )


def mode(case: Case) -> Verdicts:
    if survey.draws_noise(case.model, active=True):
        problem = "The model is in training mode and has dropout: each call gives other scores."
        yield WRONG, problem, "Call model.eval() before you score."
    else:
        yield OK, "No dropout is on."


def dtype(case: Case) -> Verdicts:
    found = {p.dtype for p in case.model.parameters() if p.is_floating_point()}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    if torch.float16 in found:
        problem = "float16 ends at 65504: a model trained in bfloat16 may exceed that and give NaN."
        yield WARNING, problem, "Load it in bfloat16, unless it was trained in float16."
    elif len(found) > 1:
        yield NOTE, f"Dtypes are mixed: {names}."
    else:
        yield OK, f"{names or 'No weights are floating-point numbers'}."


def pad_ids(case: Case) -> Verdicts:
    """The tokenizer's pad token against the one that the model skips."""
    pad, skipped = case.tokenizer.pad_token_id, case.pad
    if case.classifier is None or skipped is None:
        return
    if pad is None:
        advice = f"Set tokenizer.pad_token = tokenizer.convert_ids_to_tokens({skipped})."
        yield WARNING, "The tokenizer has no pad token: calls with padding=True fail.", advice
    elif pad != skipped:
        yield (
            WRONG,
            f"The tokenizer pads with {pad} ({case.tokenizer.pad_token!r}), but the model skips "
            f"{skipped}: rows padded on the right are scored at their padding.",
            f"Set config.pad_token_id = {pad}.",
        )
    else:
        yield OK, f"Tokenizer and config have the same pad token, {pad}."


def vocabulary(case: Case) -> Verdicts:
    size, ids = case.vocabulary, case.tokenizer.get_vocab()
    if size is None:
        return
    beyond = sorted(repr(token) for token, i in ids.items() if i >= size)
    if case.pad is not None and not 0 <= case.pad < size:
        problem = f"config.pad_token_id is {case.pad}, but embeddings are for 0 to {size - 1}."
        yield WRONG, problem, "Set a pad token that the model has an embedding for."
    elif beyond:
        problem = f"The model has no embedding for {first_names(beyond)}: texts with these fail."
        advice = "Take this checkpoint's tokenizer, or resize the embeddings and train."
        yield WRONG, problem, advice
    else:
        yield OK, f"{len(ids)} tokens, {size} embeddings."


def padding_side(case: Case) -> Verdicts:
    advice = 'Set tokenizer.padding_side = "right"'
    if case.tokenizer.padding_side != "left":
        yield OK, "The tokenizer pads on the right."
    elif case.base is not None and models.has_absolute_positions(case.base):
        problem = "Padding on the left changes scores: this model learns a vector per position."
        yield WRONG, problem, f"{advice}."
    else:
        problem = "Padding on the left gives wrong scores in calls without an attention_mask."
        yield NOTE, problem, f"{advice}, or always pass the attention_mask."


def length(case: Case) -> Verdicts:
    limit, positions = case.tokenizer.model_max_length, case.positions
    if positions is None:
        yield OK, "The model sets no limit."
    elif not limit or limit >= _NO_LIMIT:
        problem = f"The model has {positions} positions, and the tokenizer has no limit."
        yield NOTE, problem, f"Pass max_length={positions}, if conversations can be longer."
    elif limit > positions:
        problem = f"The tokenizer passes {limit} tokens, but the model has {positions} positions."
        yield WARNING, problem, f"Set tokenizer.model_max_length = {positions}."
    elif limit < positions:
        end = "end" if case.tokenizer.truncation_side == "right" else "beginning"
        problem = f"With truncation=True the tokenizer cuts the {end} beyond {limit} tokens"
        yield NOTE, f"{problem}; the model has {positions} positions, and rmfast cuts nothing."
    else:
        yield OK, f"Model and tokenizer both end at {positions} tokens."


def chat_template(case: Case) -> Verdicts:
    tokenizer, advice = case.tokenizer, "Take the chat template of the model's own release."
    templates = tokenizer.chat_template
    if case.takes_pairs:
        yield OK, "None is needed: the model reads prompt and response as two segments."
        return
    if isinstance(templates, dict) and "default" not in templates:
        problem = f"The tokenizer has the chat templates {', '.join(templates)}, and no default."
        yield WRONG, problem, "Pass the one that the model was trained with: --chat-template FILE."
        return
    if not templates:
        advice = "Pass the one that the model was trained with: --chat-template FILE."
        yield WARNING, "The tokenizer has no chat template: only plain text can be scored.", advice
        return
    try:
        short = _text(tokenizer, _QUESTION, _ANSWER)
        long = _text(tokenizer, _QUESTION, _ANSWER, _FOLLOW_UP)
    except Exception as error:  # whatever a template's own code raises
        yield WRONG, f"The chat template refuses a user's turn with an answer: {error}", advice
        return
    turns = (_QUESTION, _ANSWER, _FOLLOW_UP)
    if not all(turn in short for turn in turns[:2]) or not all(turn in long for turn in turns):
        problem = "The chat template leaves out the text of a turn: the score ignores that text."
        yield WRONG, problem, advice
        return
    problems = [*_generation_prompt(short, long), *_date_and_system_turn(tokenizer)]
    problems += _reasoning(tokenizer)
    yield from problems or [(OK, "The chat template keeps every turn and ends with the answer.")]


def _text(tokenizer: PreTrainedTokenizerBase, *turns: str, system: str | None = None) -> str:
    """A conversation as the chat template writes it."""
    return tokenizer.apply_chat_template(conversation(*turns, system=system), tokenize=False)


def _generation_prompt(short: str, long: str) -> Verdicts:
    """What comes before an answer, but not before a question, must not come after the answer."""
    before_answer = short[short.index(_QUESTION) + len(_QUESTION) : short.index(_ANSWER)].strip()
    before_question = long[long.index(_ANSWER) + len(_ANSWER) : long.index(_FOLLOW_UP)].strip()
    end = short[short.index(_ANSWER) + len(_ANSWER) :].strip()
    if before_answer and before_answer != before_question and end.endswith(before_answer):
        yield (
            WARNING,
            "The chat template ends a finished conversation with the beginning of another answer, "
            f"{before_answer!r}: the score is that of the beginning.",
            "Let it write that where add_generation_prompt is true, unless it was trained so.",
        )


def _date_and_system_turn(tokenizer: PreTrainedTokenizerBase) -> Verdicts:
    if "strftime_now" in str(tokenizer.chat_template):
        problem = "The chat template writes the date: scores of a conversation change every day."
        yield WARNING, problem, "Pass a chat template with a fixed date."
    try:
        if _FOLLOW_UP not in _text(tokenizer, _QUESTION, _ANSWER, system=_FOLLOW_UP):
            problem = "The chat template leaves out system turns: the score ignores them."
            yield WARNING, problem, "Put what matters of a system turn into the first user's turn."
    except Exception:
        yield NOTE, "The chat template refuses system turns: conversations with one are errors."


def _reasoning(tokenizer: PreTrainedTokenizerBase) -> Verdicts:
    answer = f"<think>\n{_FOLLOW_UP}\n</think>\n\n{_ANSWER}"
    if _FOLLOW_UP not in _text(tokenizer, _QUESTION, answer):
        problem = "The chat template leaves out what the last answer says in <think>: answers that "
        problem += "differ there alone get the same score."
        yield WRONG, problem, "Pass a chat template that keeps it: --chat-template FILE."


def bos(case: Case) -> Verdicts:
    tokenizer, templated = case.tokenizer, bool(case.tokenizer.chat_template)
    if tokenizer.bos_token_id is None:
        yield OK, "The tokenizer has no BOS."
        return
    try:
        text = _text(tokenizer, _QUESTION, _ANSWER) if templated else _QUESTION
    except Exception:  # chat_template() reports it
        return
    written, tokenized = (_leading_bos(tokenizer, text, special) for special in (False, True))
    if written > 1:
        problem = f"The chat template writes {written} of them; rmfast keeps one."
        yield WARNING, problem, "Let the template write one, unless the model was trained so."
    elif tokenized > 1:
        problem = "The chat template writes one and the tokenizer adds another; rmfast keeps one."
        advice = "Elsewhere, tokenise text of the template with add_special_tokens=False."
        yield WARNING, problem, advice
    elif templated and tokenized > written:
        problem = "The chat template writes none; tokenizer(text) and rmfast add one, and "
        problem += "apply_chat_template(tokenize=True) does not: their scores differ."
        advice = "Let the template write bos_token, if the model was trained with a BOS."
        yield WARNING, problem, advice
    else:
        subject = "A conversation" if templated else "Plain text"
        yield OK, f"{subject} begins with {'one' if tokenized else 'none'}."


def _leading_bos(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> int:
    """The number of BOS at the beginning of a text's tokens."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return next((i for i, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
