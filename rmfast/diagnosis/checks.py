"""What ``rmfast doctor`` sees of a model, its files and its tokenizer without running it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rmfast.packed import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


OK, NOTE, WARNING, WRONG = STATUSES = ("ok", "note", "warning", "wrong")


_NO_LIMIT = 10**9  # a tokenizer without a limit of its own says 1e30
_NOT_A_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|wte|inv_freq|bias|masked_bias)\b")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the checklist.

    Attributes:
        name: of the check, the same in every release.
        status: ``"ok"``; ``"note"``, good to know; ``"warning"``, scores depend on who computes
            them, or some calls fail; ``"wrong"``, scores are wrong, random, or cannot be had.
        what: what was found.
        do: what to do about it; empty where nothing needs doing.
        figures: numbers behind it, for programs.
    """

    name: str
    status: str
    what: str
    do: str = ""
    figures: dict[str, float | int | None] = dataclasses.field(default_factory=dict)


Findings = Iterator[Finding]


@dataclasses.dataclass
class Case:
    """A model under examination.

    Attributes:
        source: the checkpoint's folder, as the user named it; None: not known.
        missing: parameters the checkpoint is known to lack; None: not known.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    source: str | None = None
    missing: list[str] | None = None

    @functools.cached_property
    def classifier(self) -> PreTrainedModel | None:
        """The sequence classifier, whoever wrote its forward."""
        from transformers import PreTrainedModel

        return next(
            (
                module
                for module in self.model.modules()
                if isinstance(module, PreTrainedModel)
                and type(module).__name__.endswith("ForSequenceClassification")
            ),
            None,
        )

    @functools.cached_property
    def base(self) -> nn.Module | None:
        """The decoder; None where there is none, or several."""
        try:
            return models.find(self.model)[1]
        except ValueError:
            return None

    @functools.cached_property
    def config(self) -> Any:
        """The text part of the configuration; None for a model without one."""
        holder = self.classifier or self.base or self.model
        config = getattr(holder, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @functools.cached_property
    def head(self) -> dict[str, nn.Parameter]:
        """Parameters of the classifier outside of its backbone, by name."""
        if self.classifier is None:
            return {}
        inside = f"{self.classifier.base_model_prefix}."
        return {n: p for n, p in self.classifier.named_parameters() if not n.startswith(inside)}

    @property
    def head_modules(self) -> list[str]:
        return sorted({name.split(".")[0] for name in self.head})

    @property
    def head_name(self) -> str:
        return " and ".join(self.head_modules)

    @functools.cached_property
    def vocabulary(self) -> int | None:
        """Rows of the input embeddings."""
        holder = self.classifier or self.base
        table = holder.get_input_embeddings() if holder is not None else None
        return table.weight.shape[0] if hasattr(table, "weight") else None

    @property
    def pad(self) -> int | None:
        """The token Hugging Face's rule passes over."""
        return getattr(self.config, "pad_token_id", None)

    @property
    def positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def is_head(self, name: str) -> bool:
        """Whether a parameter's name, with whatever before it, is the head's."""
        return any(part in self.head_modules for part in name.split("."))

    def lacks_head(self) -> bool | None:
        """Whether the checkpoint is without the head; None: not known."""
        saved = _saved_names(self.source)
        if saved is not None:
            return not any(map(self.is_head, saved))
        return any(map(self.is_head, self.missing)) if self.missing is not None else None


def look(case: Case) -> Findings:
    """All checks of this file."""
    checks = (kind, labels, head, weights, adapter, forward, mode, dtype, pad_token, normalization)
    for check in checks:
        yield from check(case)
    if case.tokenizer is None:
        yield Finding(
            "tokenizer",
            NOTE,
            "none was given: padding, BOS and chat template were not checked",
            "pass the tokenizer: rmfast.doctor(model, tokenizer)",
        )
        return
    for check in (pad_ids, vocabulary, padding_side, length, chat_template, bos):
        yield from check(case)


# --- the model


def kind(case: Case) -> Findings:
    from transformers import PreTrainedModel

    model = case.model
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(bare).__name__
    if case.classifier is not None:
        count = sum(p.numel() for p in model.parameters())
        kind = type(case.classifier).__name__
        yield Finding("model", OK, f"{kind}, {count / 1e6:,.1f} M parameters")
    elif isinstance(bare, PreTrainedModel) and bare.can_generate():
        yield Finding(
            "model",
            WRONG,
            f"{name} is a language model: it has no reward head",
            "load it with AutoModelForSequenceClassification",
        )
    else:
        yield Finding(
            "model", NOTE, f"{name} scores by a head of its own, which was not looked into"
        )


def labels(case: Case) -> Findings:
    if case.classifier is None:
        return
    count = case.classifier.config.num_labels
    if count == 1:
        yield Finding("labels", OK, "one score for a conversation")
    else:
        yield Finding(
            "labels",
            WRONG,
            f"config.num_labels is {count}: a conversation gets {count} numbers, and none of them "
            "is the reward",
            "load a reward model with num_labels=1, or score each label for what it is",
        )


def head(case: Case) -> Findings:
    if not case.head:
        return
    wrong = list(_head_is_wrong(case))
    if wrong:
        yield from wrong
        return
    lacks = case.lacks_head()
    origin = getattr(case.classifier, "name_or_path", None)
    hint = _saved_names(origin) if lacks is None else None
    if hint is not None and not any(map(case.is_head, hint)):
        yield Finding(
            "head",
            WARNING,
            f"the model was loaded from {origin}, which holds no {case.head_name}: the head was "
            "random then",
            "nothing, if you have trained it since; else load a reward model's checkpoint",
        )
    elif lacks is None and hint is None and _is_as_drawn(case):
        yield Finding(
            "head",
            NOTE,
            f"{case.head_name} looks freshly drawn: mean 0 and a standard deviation of "
            f"config.initializer_range, {case.config.initializer_range}",
            "pass source=, the checkpoint's folder, to see whether the head is in it",
        )
    else:
        where = "" if lacks is None and hint is None else ", and in the checkpoint"
        yield Finding("head", OK, f"{case.head_name}: finite{where}")


def _head_is_wrong(case: Case) -> Findings:
    values = [p.detach() for p in case.head.values() if not p.is_meta]
    if case.lacks_head():
        do = "name the checkpoint of a reward model, or train this one first"
        like = [name for name in _unread(case) if not _NOT_A_HEAD.search(name)]
        if like:
            do = (
                f"the checkpoint has {_few(like)}, which the model does not read: if that is the "
                f"head, save it as {next(iter(case.head))}"
            )
        yield Finding(
            "head",
            WRONG,
            f"{case.head_name} is not in the checkpoint: it is random, and so are the scores",
            do,
        )
    if not all(map(_all_finite, values)):
        yield Finding(
            "head", WRONG, f"NaN or infinity in {case.head_name}", "take an earlier checkpoint"
        )
    elif values and not any(value.any() for value in values):
        yield Finding(
            "head",
            WRONG,
            f"{case.head_name} is all zeros: every conversation scores 0",
            "load a checkpoint whose head was trained and saved",
        )


def _is_as_drawn(case: Case) -> bool:
    std = getattr(case.config, "initializer_range", None)
    tables = [p.detach().float() for p in case.head.values() if p.ndim > 1 and not p.is_meta]
    if not std or not tables:
        return False
    # four standard errors of the mean and of the standard deviation of that many numbers
    return all(
        abs(table.mean().item()) < 4 * std / math.sqrt(table.numel())
        and abs(table.square().mean().sqrt().item() / std - 1) < 4 / math.sqrt(2 * table.numel())
        for table in tables
    )


def weights(case: Case) -> Findings:
    bad = [
        name
        for name, p in case.model.named_parameters()
        if p.is_floating_point() and not p.is_meta and not _all_finite(p.detach())
    ]
    bad = [name for name in bad if not case.is_head(name)]  # the head has a line of its own
    absent = [name for name in case.missing or () if not case.is_head(name)]
    if bad:
        yield Finding(
            "weights", WRONG, f"NaN or infinity in {_few(bad)}", "take an earlier checkpoint"
        )
    if absent:
        yield Finding(
            "weights",
            WRONG,
            f"not in the checkpoint, and random: {_few(absent)}",
            "see that the checkpoint is whole and of this architecture",
        )
    if not bad and not absent:
        yield Finding("weights", OK, "all finite")


def _all_finite(x: torch.Tensor) -> bool:
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())  # NaN carries over


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def adapter(case: Case) -> Findings:
    """A head that an adapter neither trains nor saves comes back random when it is loaded."""
    holds = _adapter_holds(case)
    if holds is None or not case.head:
        return
    lacks = case.lacks_head()
    if holds:
        yield Finding("adapter", OK, f"it trains and saves the head, {case.head_name}")
    elif lacks is False:
        yield Finding("adapter", OK, f"the head, {case.head_name}, is that of the model under it")
    else:
        yield Finding(
            "adapter",
            WRONG if lacks else WARNING,
            f"it leaves out the head, {case.head_name}, which is then neither trained nor saved"
            + (": it is random" if lacks else ": random, unless the model under it has one"),
            f'LoraConfig(task_type="SEQ_CLS"), or modules_to_save={case.head_modules}; then train '
            "again",
        )


def _adapter_holds(case: Case) -> bool | None:
    """Whether an adapter's settings or files hold the whole head; None: there is no adapter."""
    settings = _adapter_settings(case.source)
    configs = [vars(c) for c in (getattr(case.model, "peft_config", None) or {}).values()]
    if settings is not None:
        configs.append(settings)
        if any(case.is_head(n) and "lora_" not in n for n in _tensors(_folder(case.source)) or ()):
            return True
    if not configs:
        return None
    return any(case.is_head(name) for c in configs for name in c.get("modules_to_save") or ())


def forward(case: Case) -> Findings:
    module = case.classifier
    if module is None:
        return
    function = module.__dict__.get("forward", type(module).forward)
    origins = []
    while function is not None and len(origins) < 20:
        function = getattr(function, "func", function)  # functools.partial
        function = getattr(function, "__func__", function)
        origins.append(getattr(function, "__module__", None) or type(function).__module__)
        function = getattr(function, "__wrapped__", None)
    kind = type(module).__name__
    if any(origin.startswith("liger_kernel") for origin in origins):
        yield Finding(
            "forward",
            WRONG,
            f"Liger has put its language-model forward on this {kind}, which has no lm_head",
            "apply Liger with fused_linear_cross_entropy=False, or leave use_liger_kernel off",
        )
    elif "forward" in module.__dict__:
        yield Finding(
            "forward",
            NOTE,
            f"forward of this {kind} was replaced ({origins[0]}): rmfast runs what is inside it",
        )
    else:
        yield Finding("forward", OK, f"{kind}'s own")


def mode(case: Case) -> Findings:
    if not any(module.training for module in case.model.modules()):
        yield Finding("mode", OK, "eval")
    elif models.draws_noise(case.model, active=True):
        yield Finding(
            "mode",
            WRONG,
            "training mode with dropout: each call gives other scores",
            "model.eval() before scoring",
        )
    else:
        yield Finding("mode", NOTE, "training mode; nothing in the model draws noise")


def dtype(case: Case) -> Findings:
    counts: dict[torch.dtype, int] = {}
    for p in case.model.parameters():
        if p.is_floating_point():
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    names = [str(t).removeprefix("torch.") for t in sorted(counts, key=counts.get, reverse=True)]
    if torch.float16 in counts:
        yield Finding(
            "dtype",
            WARNING,
            f"{' and '.join(names)}: fp16 ends at 65504, and activations of models trained in "
            "bf16 may go beyond, to infinity",
            "dtype=torch.bfloat16, unless the model was trained in fp16",
        )
    elif len(names) > 1:
        yield Finding("dtype", NOTE, f"mixed: most weights in {names[0]}, some in {names[1]}")
    elif names == ["float32"]:
        yield Finding(
            "dtype",
            NOTE,
            "float32: bf16 takes half the memory and less time where the hardware has it",
            "dtype=torch.bfloat16, if its rounding of the scores is fine for you (see parity)",
        )
    else:
        yield Finding("dtype", OK, " and ".join(names) or "no weights")


def normalization(case: Case) -> Findings:
    found = {n: getattr(case.config, n) for n in ("mean", "std") if hasattr(case.config, n)}
    if found:
        values = ", ".join(f"config.{name} = {value}" for name, value in found.items())
        yield Finding(
            "normalization",
            NOTE,
            f"{values}: OpenRLHF subtracts and divides by these; Hugging Face and rmfast do not",
            "normalize=True (--normalize), where scores must be on that scale",
        )
    else:
        yield Finding("normalization", OK, "no mean and std in the config: scores are raw")


# --- pad token, tokenizer


def pad_token(case: Case) -> Findings:
    if case.classifier is None:
        return
    pad, eos = case.pad, getattr(case.config, "eos_token_id", None)
    ends = {*(eos if isinstance(eos, list) else [eos])}
    ends.add(getattr(case.tokenizer, "eos_token_id", None))
    if pad is None:
        known = getattr(case.tokenizer, "pad_token_id", None)
        do = "config.pad_token_id = tokenizer.pad_token_id"
        if known is None:
            do = "give tokenizer and config the same pad token, one that no conversation holds"
        yield Finding(
            "pad token",
            WARNING,
            "config.pad_token_id is not set: Hugging Face refuses batches of more than one",
            do,
        )
    elif pad in ends:
        yield Finding(
            "pad token",
            WARNING,
            f"config.pad_token_id is the eos token ({pad}): Hugging Face passes over an eos at the "
            "end and scores the token before it, others do not (see pooling)",
            "leave it as the model was trained; set a pad token of its own before training",
        )
    else:
        yield Finding("pad token", OK, f"config.pad_token_id {pad}, not an eos token")


def pad_ids(case: Case) -> Findings:
    """The tokenizer's pad against the one the model passes over."""
    theirs, ours = case.tokenizer.pad_token_id, case.pad
    if case.classifier is None or ours is None:
        return
    if theirs is None:
        yield Finding(
            "pad ids",
            WARNING,
            "the tokenizer has no pad token: padding=True is an error",
            f"tokenizer.pad_token = tokenizer.convert_ids_to_tokens({ours})",
        )
    elif theirs != ours:
        yield Finding(
            "pad ids",
            WRONG,
            f"the tokenizer pads with {theirs} ({case.tokenizer.pad_token!r}) and the model passes "
            f"over {ours}: right-padded rows are scored at their padding",
            f"config.pad_token_id = {theirs}",
        )
    else:
        yield Finding("pad ids", OK, f"tokenizer and config agree on {ours}")


def vocabulary(case: Case) -> Findings:
    size, tokenizer = case.vocabulary, case.tokenizer
    if size is None:
        return
    ids = tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in ids.items() if i >= size)
    pad = case.pad
    if pad is not None and not 0 <= pad < size:
        yield Finding(
            "vocabulary",
            WRONG,
            f"config.pad_token_id is {pad}, and there are embeddings for 0 to {size - 1}",
            "set a pad token that the model has an embedding for",
        )
    elif beyond:
        tokens = ", ".join(repr(token) for _, token in beyond[:3])
        yield Finding(
            "vocabulary",
            WRONG,
            f"{len(beyond)} token{'s' if len(beyond) > 1 else ''} of the tokenizer ({tokens}"
            f"{', …' if len(beyond) > 3 else ''}) from {size} on, where the model has no embedding",
            "model.resize_token_embeddings(len(tokenizer)) and train, or the tokenizer of this "
            "checkpoint",
        )
    else:
        yield Finding("vocabulary", OK, f"{len(ids)} tokens, {size} embeddings")


def padding_side(case: Case) -> Findings:
    side = case.tokenizer.padding_side
    absolute = case.base is not None and models.has_absolute_positions(case.base)
    if side != "left":
        yield Finding("padding side", OK, side)
    elif absolute:
        yield Finding(
            "padding side",
            WRONG,
            "left, and the model learns a vector for each position: padding moves a row's tokens "
            "to other positions, and its score with them",
            'tokenizer.padding_side = "right"',
        )
    else:
        yield Finding(
            "padding side",
            NOTE,
            "left: right with an attention_mask, wrong in calls that leave it out",
            'tokenizer.padding_side = "right", or always pass the attention_mask',
        )


def length(case: Case) -> Findings:
    most, positions = case.tokenizer.model_max_length, case.positions
    most = most if most and most < _NO_LIMIT else None
    if positions is None:
        yield Finding("length", OK, "the model sets no limit")
    elif most is None:
        yield Finding(
            "length",
            NOTE,
            f"the model has {positions} positions, the tokenizer knows no limit: nothing is cut",
            f"max_length={positions}, if your conversations can be longer",
        )
    elif most > positions:
        yield Finding(
            "length",
            WARNING,
            f"the tokenizer lets {most} tokens through, the model has {positions} positions",
            f"tokenizer.model_max_length = {positions}, or max_length={positions}",
        )
    elif most < positions:
        end = "end" if case.tokenizer.truncation_side == "right" else "beginning"
        yield Finding(
            "length",
            NOTE,
            f"the model has {positions} positions; truncation=True cuts at {most}, at the {end}. "
            "rmfast cuts nothing unless told to",
        )
    else:
        yield Finding("length", OK, f"{positions} positions in model and tokenizer")


# Words that no template trims or looks for.
_USER, _ANSWER, _MORE = "alpha beta", "gamma delta", "epsilon zeta"


def _turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def chat_template(case: Case) -> Findings:
    tokenizer = case.tokenizer
    if not tokenizer.chat_template:
        yield Finding(
            "chat template",
            WARNING,
            "the tokenizer has none: conversations cannot be scored, only plain text",
            "--chat-template FILE, or tokenizer.chat_template = the one it was trained with",
        )
        return
    problems = []
    try:
        two, three = (
            tokenizer.apply_chat_template(_turns(*texts), tokenize=False)
            for texts in ((_USER, _ANSWER), (_USER, _ANSWER, _MORE))
        )
        again = tokenizer.apply_chat_template(_turns(_USER, _ANSWER), tokenize=False)
    except Exception as error:  # whatever a template's own code raises
        yield Finding(
            "chat template",
            WRONG,
            f"it refuses a user's turn with an answer: {' '.join(str(error).split())}",
            "take the chat template of the model's own release",
        )
        return
    dropped = [t for t in (_USER, _ANSWER, _MORE) if t not in three]
    if dropped or _ANSWER not in two:
        yield Finding(
            "chat template",
            WRONG,
            "the text of a turn does not come out of it: scores cannot depend on what is left out",
            "take the chat template of the model's own release",
        )
        return
    if two != again or "strftime_now" in str(tokenizer.chat_template):
        problems.append(
            Finding(
                "chat template",
                WARNING,
                "it writes the date, or something else that changes: the same conversation "
                "scores differently another day",
                "pass a chat template with that part fixed",
            )
        )
    extra = _generation_prompt(two, three)
    if extra:
        problems.append(
            Finding(
                "chat template",
                WARNING,
                f"it ends a finished conversation with the beginning of another answer, {extra!r}: "
                "that is what gets scored",
                "keep it only if the model was trained so; else write it only where "
                "add_generation_prompt is true",
            )
        )
    elif not three.startswith(two):
        problems.append(
            Finding(
                "chat template",
                NOTE,
                "a turn that follows changes the text before it: longer and shorter versions of "
                "a conversation share less, and none of that is wrong",
            )
        )
    problems += _system_turn(tokenizer)
    if problems:
        yield from problems
    else:
        yield Finding("chat template", OK, "keeps every turn, ends with the answer")


def _generation_prompt(two: str, three: str) -> str:
    """What a template writes after the last answer that a further user's turn does not need."""
    header = two[two.index(_USER) + len(_USER) : two.index(_ANSWER)]  # before an answer
    tail = two[two.index(_ANSWER) + len(_ANSWER) :]
    between = three[three.index(_ANSWER) + len(_ANSWER) : three.index(_MORE)]  # before a question
    same = 0
    while same < min(len(tail), len(between)) and tail[same] == between[same]:
        same += 1
    extra = tail[same:]
    return extra if extra.strip() and header.rstrip().endswith(extra.rstrip()) else ""


def _system_turn(tokenizer: PreTrainedTokenizerBase) -> Findings:
    system = [{"role": "system", "content": _MORE}, *_turns(_USER, _ANSWER)]
    try:
        kept = _MORE in tokenizer.apply_chat_template(system, tokenize=False)
    except Exception:  # whatever a template's own code raises
        yield Finding("chat template", NOTE, "it refuses a system turn: such rows are errors")
        return
    if not kept:
        yield Finding(
            "chat template",
            WARNING,
            "it leaves out a system turn without a word",
            "put what matters of it into the first user's turn",
        )


_HOW_MANY = ("none", "one")


def bos(case: Case) -> Findings:
    tokenizer = case.tokenizer
    token = tokenizer.bos_token_id
    if token is None:
        yield Finding("bos", OK, "the tokenizer has no BOS")
        return
    plain = _starts(tokenizer, _USER, True, token)
    if not tokenizer.chat_template:
        yield Finding("bos", OK, f"{_HOW_MANY[plain]} before plain text")
        return
    try:
        text = tokenizer.apply_chat_template(_turns(_USER, _ANSWER), tokenize=False)
    except Exception:  # whatever a template's own code raises; chat_template() has told
        return
    written = _starts(tokenizer, text, False, token)
    again = _starts(tokenizer, text, True, token)
    figures = {"template": written, "template_tokenized_again": again, "plain_text": plain}
    if written > 1:
        yield Finding(
            "bos",
            WARNING,
            f"the chat template writes {written} of them; rmfast keeps one",
            "take one out of the template, unless the model was trained so",
            figures,
        )
    elif again > 1:
        yield Finding(
            "bos",
            WARNING,
            "the chat template writes one and the tokenizer another when it is given that text; "
            "rmfast keeps one",
            "elsewhere: tokenizer(text, add_special_tokens=False) for text of the template",
            figures,
        )
    elif again != written:
        yield Finding(
            "bos",
            WARNING,
            "the chat template writes none, and the tokenizer one before any text: "
            "apply_chat_template(tokenize=True) gives other tokens than text that is tokenised "
            "afterwards. rmfast sets one",
            "write bos_token into the template, if the model was trained with one",
            figures,
        )
    else:
        yield Finding("bos", OK, f"{_HOW_MANY[written]} before a conversation", figures=figures)


def _starts(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, token: int) -> int:
    """How often ``token`` comes at the beginning, one after the other."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return next((i for i, found in enumerate(ids) if found != token), len(ids))


# --- files


def _adapter_settings(name: str | None) -> dict[str, Any] | None:
    folder = _folder(name)
    file = folder / "adapter_config.json" if folder else None
    if file is None or not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _saved_names(name: str | None) -> frozenset[str] | None:
    """Tensors in a checkpoint, and under an adapter; None where that cannot be told."""
    folder = _folder(name)
    found = _tensors(folder) if folder else None
    settings = _adapter_settings(name)
    if settings is None or found is None:
        return found
    under = _saved_names(settings.get("base_model_name_or_path"))
    return found | under if under is not None else None


def _folder(name: str | None) -> Path | None:
    """Where a checkpoint's files lie: a folder, or what the hub's cache has of it."""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    from huggingface_hub import try_to_load_from_cache

    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        for kind in ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"):
            for file in (kind, f"{kind}.index.json"):
                found = try_to_load_from_cache(name, file)
                if isinstance(found, str):
                    return Path(found).parent
    return None


def _tensors(folder: Path) -> frozenset[str] | None:
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        names |= json.loads(index.read_text(encoding="utf-8"))["weight_map"].keys()
    if names:
        return frozenset(names)
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                names |= set(opened.keys())
        if not names:
            for file in (*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")):
                names |= torch.load(file, map_location="meta", mmap=True, weights_only=True).keys()
    except (OSError, SafetensorError, RuntimeError):
        return None
    return frozenset(names) or None


def _unread(case: Case) -> list[str]:
    """Tensors of the checkpoint that the model has no place for."""
    saved = _saved_names(case.source) or frozenset()
    known = case.classifier.state_dict().keys()
    prefix = f"{case.classifier.base_model_prefix}."
    return sorted(n for n in saved if n not in known and prefix + n not in known)
