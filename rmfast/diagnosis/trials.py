"""What ``rmfast doctor`` finds out by scoring a few conversations, patched and unpatched."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rmfast import reference
from rmfast.data.encoding import Encoder
from rmfast.diagnosis.case import NOTE, OK, WARNING, WRONG, Case, Finding, conversation
from rmfast.errors import DataError, RowError, UserError
from rmfast.packed import models, patching
from rmfast.score import memory
from rmfast.score.scorer import Scorer

Rows = list[list[int]]
Exact = tuple[Tensor, Tensor] | None  # fp32 scores of a batch and of single rows; None: unknown

_BREAD = "How do I keep a loaf of bread fresh for a few days?"
_LOOP = (
    "My loop never ends: while x < 10: print(x). What is wrong?",
    "Nothing inside the loop changes x. Add x += 1 as its last line.",
    "And if I want to count down instead?",
)
_WORD = "Explica en una frase qué significa la palabra japonesa 木漏れ日 🙂"
_SHOP = "You answer for a small bicycle shop. Be short, and never promise a price."
_WHEEL = "Can you fix a bent wheel by Friday?"

# Prompts with several answers, several turns, a conversation inside a longer one, other scripts.
CONVERSATIONS = [
    conversation(_BREAD, "Wrap it in a clean cloth and keep it in a closed box, cut side down."),
    conversation(_BREAD, "Put it in the fridge."),
    conversation(_BREAD, "Slice it, freeze it, and toast the slices as you need them."),
    conversation(_BREAD, "Bread is a food made of flour, water and yeast, and it is very old."),
    conversation(*_LOOP[:2]),
    conversation(*_LOOP, "Start at 10 and write while x > 0, with x -= 1 as the last line."),
    conversation(*_LOOP, "for x in range(10, 0, -1): print(x)"),
    conversation(*_LOOP, "You can't."),
    conversation(*_LOOP, "Use while x > 0.", "Does that print 0?", "No, it stops after 1."),
    conversation(_WORD, "Es la luz del sol que se filtra entre las hojas de los árboles."),
    conversation(_WORD, "«Komorebi»: ☀️ a través de 🍃."),
    conversation(_WORD, "No lo sé."),
    conversation(_WHEEL, "Yes, if you bring it in by Wednesday. The rim decides.", system=_SHOP),
    conversation(_WHEEL, "Sure, 20 dollars, no matter what!", system=_SHOP),
    conversation(_WHEEL, "We sell bicycles.", system=_SHOP),
    conversation("Thanks!", "You're welcome."),
]


def run(case: Case) -> Iterator[Finding]:
    """All checks of this file, on a model in eval mode that is not patched."""
    rows, refused = token_rows(case)
    if len(rows) < 3:
        problem = "Not tried: too few built-in conversations give tokens"
        yield Finding("scores", WRONG if refused else NOTE, f"{problem}{refused}.")
        return
    try:
        own, single = exact = scores(case, case.model, rows)
        dtypes = {p.dtype for p in case.model.parameters()} & {torch.bfloat16, torch.float16}
        if case.quantised:
            exact = None
        elif dtypes:
            exact = fp32_scores(case, rows)
    except Exception as error:  # the model's own code: the kinds are many
        advice = "See the other findings."
        if "lm_head" in str(error):
            advice = "Apply Liger with fused_linear_cross_entropy=False."
        problem = f"The model cannot score: {type(error).__name__}: {error}"
        yield Finding("scores", WRONG, problem, advice)
        return
    found = score_range(own)
    yield found
    if found.status == WRONG:
        return
    noise = None
    if case.quantised:
        lowest = max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
        noise = difference(own, single) + rounding(own, lowest)
    yield padding(own, single, exact, noise)
    try:
        with patching.patched(case.model):
            patched, report = batch_scores(case, case.model, rows), patching.report(case.model)
    except Exception as error:
        problem = f"It does not run patched: {type(error).__name__}: {error}"
        yield Finding("level", WRONG, problem, "Report this as a bug of rmfast.")
        return
    status = OK if report.level == "trie" else NOTE
    yield Finding("level", status, f"{report.level}: {'; '.join(report.reasons)}.")
    yield from (Finding("patch", WARNING, f"{text}.") for text in report.warnings)
    yield from (Finding("patch", NOTE, f"A call ran unpacked: {x}.") for x in report.fallbacks)
    exact_own, exact_single = exact or (None, None)
    yield parity("parity", "Patched", own, patched, exact_own, noise)
    yield from bulk(case, "scorer", rows, single, exact_single, noise)
    if case.takes_pairs:
        pairs = [(turns[-2]["content"], turns[-1]["content"]) for turns in CONVERSATIONS]
        own = torch.cat([pair_score(case, *pair) for pair in pairs])
        is_exact = exact is not None and not dtypes  # not in half precision
        yield from bulk(case, "pairs", pairs, own, own if is_exact else None, noise)
    if case.tokenizer is not None and models.find(case.model)[0] is not None:
        yield pooling(case, rows)


def token_rows(case: Case) -> tuple[Rows, str]:
    """The built-in conversations as tokens, and why the last that has none was refused.

    Without a tokenizer, random rows that share as much.
    """
    reasons = [""]
    if case.tokenizer is None:
        special = {getattr(case.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
        tokens = [i for i in range(min(case.vocabulary or 0, 1000)) if i not in special]
        draw = random.Random(0)
        prompts = [draw.choices(tokens, k=k) for k in (12, 40, 25, 6)] if tokens else []
        rows = [prompt + draw.choices(tokens, k=k) for prompt in prompts for k in (3, 11, 17, 30)]
    else:
        plain = ["\n\n".join(m["content"] for m in messages) for messages in CONVERSATIONS]
        try:
            encode = Encoder(case.tokenizer, vocabulary=case.vocabulary)
            found = encode(CONVERSATIONS if case.tokenizer.chat_template else plain)
        except (DataError, UserError) as error:
            found = [RowError(str(error))]
        reasons += [f": {row.reason}" for row in found if isinstance(row, RowError)]
        rows = [row.tolist() for row in found if not isinstance(row, RowError)]
    rows = [list(row) for row in dict.fromkeys(tuple(row[: case.positions]) for row in rows)]
    return rows, reasons[-1]


def scores(case: Case, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:  # fp64 [len(rows)]
    """Scores of one batch, and of single rows."""
    single = [batch_scores(case, model, [row]) for row in rows]
    return batch_scores(case, model, rows), torch.cat(single)


def batch_scores(case: Case, model: nn.Module, rows: Rows) -> Tensor:  # fp64 [len(rows)]
    """Scores of one batch, padded as the tokenizer would; row by row without a pad token."""
    pads = (getattr(case.tokenizer, "pad_token_id", None), case.pad)
    size = case.vocabulary or math.inf
    pad = next((pad for pad in pads if pad is not None and 0 <= pad < size), None)
    if pad is None or (case.classifier is not None and case.pad is None):
        if len(rows) > 1:
            return torch.cat([batch_scores(case, model, [row]) for row in rows])
        pad = 0
    side = getattr(case.tokenizer, "padding_side", "right")
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, True, pad, side).to(models.device(model))
    mask = pad_sequence([torch.ones_like(row) for row in tensors], True, 0, side).to(ids.device)
    return first_label(case, model(input_ids=ids, attention_mask=mask), len(rows))


def first_label(case: Case, output: Any, count: int) -> Tensor:  # fp64 [count]
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, Tensor):
        raise ValueError(f"it gives {type(found).__name__}, and no logits")
    labels = getattr(case.config, "num_labels", 1)  # another number than 1 is found by its check
    if found.shape not in ((count,), (count, 1), (count, labels)):
        raise ValueError(f"it gives {list(found.shape)} numbers for {count} conversations")
    return found.reshape(count, -1)[:, 0].cpu().double()


def pair_score(case: Case, prompt: str, response: str) -> Tensor:  # fp64 [1]
    """What an encoder gives the two segments that its tokenizer makes."""
    inputs = case.tokenizer(prompt, response, return_tensors="pt")
    return first_label(case, case.model(**inputs.to(models.device(case.model))), 1)


def fp32_scores(case: Case, rows: Rows) -> Exact:
    """Scores of an fp32 copy; None where memory has no room for it and a fifth of it for work."""
    needed = 1.2 * 4 * sum(p.numel() for p in case.model.parameters())
    free = memory.free_bytes(models.device(case.model))
    if free is not None and needed > free:
        return None
    try:
        twin = copy.deepcopy(case.model).float()
    except Exception:  # a model that cannot be copied may score all the same
        return None
    return scores(case, twin, rows)


def judge(name: str, right: bool, what: str, advice: str, figures: dict) -> Finding:
    """A finding; comparisons with NaN are False, so NaN is wrong."""
    return Finding(name, OK if right else WRONG, what, "" if right else advice, figures)


def score_range(scores: Tensor) -> Finding:
    bad, low, high = int((~scores.isfinite()).sum()), scores.min().item(), scores.max().item()
    what = f"{len(scores)} built-in conversations score from {low:.4g} to {high:.4g}."
    advice = "See the other findings: the head is zero, or the same wrong token is scored."
    if bad:
        what = f"{bad} of {len(scores)} built-in conversations score NaN or infinity."
        advice = "Load it in bfloat16 or float32. If that does not help, the checkpoint is broken."
    figures = {"conversations": len(scores), "lowest": low, "highest": high}
    return judge("scores", not bad and low < high, what, advice, figures)


def difference(scores: Tensor, others: Tensor) -> float:
    """The largest difference, in standard deviations of the scores."""
    return ((scores - others).abs().max() / others.std()).item()


def fp32_bound(scores: Tensor) -> float:
    """What fp32 may make of the difference."""
    return 1e-4 + rounding(scores, torch.float32)


def rounding(scores: Tensor, dtype: torch.dtype) -> float:
    """The last place of the largest score, in standard deviations of the scores."""
    return (torch.finfo(dtype).eps * scores.abs().max() / scores.std()).item()


_NO_COPY = ". Memory has no room for an fp32 copy, which would tell rounding from error."


def padding(own: Tensor, single: Tensor, exact: Exact, noise: float | None) -> Finding:
    """Whether a row's score depends on the rows of its batch."""
    figures = {"largest_difference": difference(own, single)}
    what = "Between a padded batch and single rows, scores differ by up to "
    what += f"{figures['largest_difference']:.1e} standard deviations"
    if exact is None:
        why = _NO_COPY if noise is None else ": the model is quantised, which may depend on it."
        return Finding("padding", NOTE, what + why, "", figures)
    figures["largest_difference_fp32"] = fp32 = difference(*exact)
    what += f" ({fp32:.1e} in fp32)."
    advice = "See pad ids and padding side, or score row by row."
    return judge("padding", fp32 <= fp32_bound(exact[0]), what, advice, figures)


def parity(
    name: str, whose: str, own: Tensor, ours: Tensor, exact: Tensor | None, noise: float | None
) -> Finding:
    """Scores of rmfast against the model's own.

    In half precision both are roundings of the fp32 scores, ``exact``. The largest error of ours
    may be four times that of the model's own: with two sets of 16 independent normal errors, the
    ratio exceeds that once in 60,000 models. To this comes what fp32 itself may add. Of a quantised
    model the error is not known; ``noise``, what its own scores change by from batch to batch, is.
    """
    i, j = torch.triu_indices(len(own), len(own), offset=1)
    flips = int(((own[i] - own[j]) * (ours[i] - ours[j]) < 0).sum())
    figures = {"conversations": len(own), "largest_difference": difference(ours, own)}
    figures |= {"comparisons": len(i), "rank_flips": flips}
    what = f"{whose} and the model's own scores differ by up to {figures['largest_difference']:.1e}"
    what += f" standard deviations; {flips} of {len(i)} pairs change their order"
    if noise is not None:
        error, allowed = figures["largest_difference"], noise
        what += f". Its own change by {noise:.1e} from batch to batch: it is quantised."
    elif exact is None:
        return Finding(name, NOTE, what + _NO_COPY, "", figures)
    else:
        error, allowed = difference(ours, exact), difference(own, exact)
        figures |= {"error_patched": error, "error_unpatched": allowed}
        what += f". Errors against fp32: {error:.1e} and {allowed:.1e}." if allowed else "."
    advice = "Call rmfast.unpatch(model)" if name == "parity" else "Call the model itself"
    advice += ", and report this with the output of rmfast doctor --json."
    bound = 4 * allowed + fp32_bound(own if exact is None else exact)
    return judge(name, error <= bound, what, advice, figures)


def bulk(
    case: Case, name: str, rows: list, own: Tensor, exact: Tensor | None, noise: float | None
) -> Iterator[Finding]:
    """Scorer's scores against those of the model's own forward, row by row."""
    try:
        ours = torch.from_numpy(bulk_scores(case, rows)).double()
    except Exception as error:
        yield Finding(name, WARNING, f"Scorer and rmfast score do not work: {error}")
    else:
        yield parity(name, "Scorer's", own, ours, exact, noise)


def bulk_scores(case: Case, rows: list) -> np.ndarray:  # fp32 [len(rows)]
    with patching.patched(case.model):
        most = case.positions or 1 << 20  # also where training kept to less
        return Scorer(case.model, case.tokenizer, max_length=most).score(rows)


RULES = {
    "hf": "Hugging Face and TRL (the last token that is not the pad token)",
    "mask": "OpenRLHF, vLLM and SGLang (the last token)",
    "first_pad": "ms-swift and DeepSpeed-Chat (the token before the first pad token)",
}


def pooling(case: Case, rows: Rows) -> Finding:
    """Which token each rule scores, and how far that moves the scores from Hugging Face's."""
    pad = case.pad if case.pad is not None else case.tokenizer.pad_token_id
    places = {
        "hf": [int(reference.last_token(torch.tensor([row]), None, pad, "hf")) for row in rows],
        "mask": [len(row) - 1 for row in rows],
        # a pad token at the very beginning is no padding
        "first_pad": [((row.index(pad) if pad in row else 0) or len(row)) - 1 for row in rows],
    }
    count = sum(len(set(tokens)) > 1 for tokens in zip(*places.values(), strict=True))
    if not count:
        return Finding("pooling", OK, "All frameworks score the same token of each conversation.")
    figures, found = {"conversations": len(rows), "differ": count}, {}
    what = f"Frameworks score different tokens in {count} of {len(rows)} conversations."
    for rule, frameworks in RULES.items():
        # a token sees only the tokens before it: its score is that of the row cut after it
        cut = [row[: place + 1] for row, place in zip(rows, places[rule], strict=True)]
        with patching.patched(case.model, pooling="mask"):
            found[rule] = batch_scores(case, case.model, cut)
        moved = [i for i, place in enumerate(places[rule]) if place != places["hf"][i]]
        apart = difference(found[rule], found["hf"])
        figures |= {f"differ_{rule}": len(moved), f"difference_{rule}": apart}
        if moved:
            token = case.tokenizer.decode(cut[moved[0]][-1:])
            what += f" {frameworks}: such as {token!r}, up to {apart:.2g} standard deviations from "
            what += "Hugging Face."
    advice = "Score with the rule of the training (pooling='hf' or 'mask'), or train with a pad "
    advice += "token that no conversation holds."
    return Finding("pooling", WARNING, what, advice, figures)
