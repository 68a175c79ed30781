"""What ``rmfast doctor`` finds out by scoring a few conversations, patched and unpatched."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rmfast import reference
from rmfast.data.encoding import Encoder
from rmfast.diagnosis.checks import NOTE, OK, WARNING, WRONG, Case, Finding, Findings
from rmfast.errors import RowError
from rmfast.packed import models, patching, state

Rows = list[list[int]]
_BOUND = 1e-4  # of the scores' spread, in fp32
_SIGMAS = 4  # how unlikely chance must be before it is called wrong


def _conversation(*turns: str) -> list[dict[str, str]]:
    """Turns from the user's first on; one that begins with ``system:`` comes before them."""
    out = []
    for turn in turns:
        if turn.startswith("system:"):
            out.append({"role": "system", "content": turn.removeprefix("system:").strip()})
        else:
            asked = out and out[-1]["role"] == "user"
            out.append({"role": "assistant" if asked else "user", "content": turn})
    return out


_BREAD = "How do I keep a loaf of bread fresh for a few days?"
_LOOP = (
    "My loop never ends: while x < 10: print(x). What is wrong?",
    "Nothing inside the loop changes x. Add x += 1 as its last line.",
    "And if I want to count down instead?",
)


_WORD = "Explica en una frase qué significa la palabra japonesa 木漏れ日 🙂"
_SHOP = (
    "system: You answer for a small bicycle shop. Be short, and never promise a price.",
    "Can you fix a bent wheel by Friday?",
)


# Prompts with several answers, several turns, a conversation inside a longer one, other scripts.
CONVERSATIONS = [
    _conversation(_BREAD, "Wrap it in a clean cloth and keep it in a closed box, cut side down."),
    _conversation(_BREAD, "Put it in the fridge."),
    _conversation(_BREAD, "Slice it, freeze it, and toast the slices as you need them."),
    _conversation(_BREAD, "Bread is a food made of flour, water and yeast, and it is very old."),
    _conversation(*_LOOP[:2]),
    _conversation(*_LOOP, "Start at 10 and write while x > 0, with x -= 1 as the last line."),
    _conversation(*_LOOP, "for x in range(10, 0, -1): print(x)"),
    _conversation(*_LOOP, "You can't."),
    _conversation(*_LOOP, "Use while x > 0.", "Does that print 0?", "No, it stops after 1."),
    _conversation(_WORD, "Es la luz del sol que se filtra entre las hojas de los árboles."),
    _conversation(_WORD, "«Komorebi»: ☀️ a través de 🍃."),
    _conversation(_WORD, "No lo sé."),
    _conversation(*_SHOP, "Yes, if you bring it in by Wednesday. The price depends on the rim."),
    _conversation(*_SHOP, "Sure, 20 dollars, no matter what!"),
    _conversation(*_SHOP, "We sell bicycles."),
    _conversation("Thanks!", "You're welcome."),
]


def run(case: Case) -> Findings:
    """All checks of this file, on a model in eval mode that is not patched."""
    rows = _rows(case)
    if len(rows) < 3:
        yield Finding(
            "scores", NOTE, "not tried: too few of the built-in conversations can be made tokens"
        )
        return
    try:
        theirs = _scores(case, case.model, rows)
        alone = torch.cat([_scores(case, case.model, [row]) for row in rows])
    except Exception as error:  # the model's own code: the kinds are many
        yield Finding("scores", WRONG, f"the model cannot score: {_line(error)}")
        return
    spread = _range(theirs)
    yield spread
    if spread.status == WRONG:
        return
    exact = _exact(case, rows)
    yield _padding(case, theirs, alone, exact)
    try:
        with patching.patched(case.model):
            ours = _scores(case, case.model, rows)
            report = patching.report(case.model)
    except Exception as error:
        yield Finding("level", WRONG, f"it does not run patched: {_line(error)}", "report this")
        return
    yield from _level(report)
    yield _parity(case, theirs, ours, exact)
    if case.tokenizer is not None and models.find(case.model)[0] is not None:
        yield _pooling(case, rows, theirs)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- rows and scores


def _rows(case: Case) -> Rows:
    """The built-in conversations as tokens; without a tokenizer, tokens with the same sharing."""
    limit = case.positions or None
    if case.tokenizer is None:
        return [row[:limit] for row in _drawn(case)]
    encode = Encoder(case.tokenizer, vocabulary=case.vocabulary)
    if case.tokenizer.chat_template:
        found = [
            (with_system if not isinstance(with_system, RowError) else without)
            for with_system, without in zip(
                encode(CONVERSATIONS),
                encode([[m for m in c if m["role"] != "system"] for c in CONVERSATIONS]),
                strict=True,
            )
        ]
    else:
        found = encode(["\n\n".join(m["content"] for m in c) for c in CONVERSATIONS])
    rows = [row[:limit].tolist() for row in found if not isinstance(row, RowError)]
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


def _drawn(case: Case) -> Rows:
    if case.vocabulary is None:
        return []
    special = {getattr(case.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    tokens = [i for i in range(min(case.vocabulary, 1000)) if i not in special]
    draw = random.Random(0)
    out = []
    for length in (12, 40, 25, 6):
        prompt = draw.choices(tokens, k=length)
        out += [prompt + draw.choices(tokens, k=k) for k in (3, 11, 17, 30)]
    return out


def _scores(case: Case, model: nn.Module, rows: Rows) -> Tensor:  # fp64 [len(rows)]
    """Scores of one padded call, padded as the tokenizer would; row by row without a pad token."""
    pad = getattr(case.tokenizer, "pad_token_id", None)
    pad = case.pad if pad is None else pad
    if pad is None or (case.classifier is not None and case.pad is None):
        if len(rows) > 1:
            return torch.cat([_scores(case, model, [row]) for row in rows])
        pad = 0
    left = getattr(case.tokenizer, "padding_side", "right") == "left"
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    device = models.device(model)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device))
    scores = out.logits if hasattr(out, "logits") else out[0]
    if scores.shape[0] != len(rows) or scores.ndim > 2:
        raise ValueError(f"it gives {list(scores.shape)} numbers for {len(rows)} conversations")
    return scores.reshape(len(rows), -1)[:, 0].cpu().double()


def _exact(case: Case, rows: Rows) -> tuple[Tensor, Tensor] | None:
    """Scores of an fp32 copy of a half-precision model, in one batch and one by one.

    None for a model in fp32, and where a copy of it finds no room.
    """
    if not _is_half(case.model) or getattr(case.model, "is_quantized", False):
        return None
    if not _fits(case.model):
        return None
    wide = copy.deepcopy(case.model).float()
    return _scores(case, wide, rows), torch.cat([_scores(case, wide, [row]) for row in rows])


def _is_half(model: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def _fits(model: nn.Module) -> bool:
    """Whether there is memory for a copy in fp32, and a fifth of it for the work."""
    needed = 1.2 * 4 * sum(p.numel() for p in model.parameters())
    device = models.device(model)
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info(device)[0]
    try:
        return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, AttributeError):  # not on this system
        return True


# --- what the scores say


def _range(scores: Tensor) -> Finding:
    count = len(scores)
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        return Finding(
            "scores",
            WRONG,
            f"NaN or infinity for {bad} of {count} built-in conversations",
            "try dtype=torch.bfloat16 or float32; if they stay, the checkpoint is broken",
            {"conversations": count, "not_finite": bad},
        )
    low, high = scores.min().item(), scores.max().item()
    figures = {"conversations": count, "lowest": low, "highest": high}
    if low == high:
        return Finding(
            "scores",
            WRONG,
            f"all {count} built-in conversations score {low:.4g}",
            "see the other findings: a head of zeros, or the same wrong token scored each time",
            figures,
        )
    return Finding(
        "scores",
        OK,
        f"{count} built-in conversations score from {low:.4g} to {high:.4g}",
        "",
        figures,
    )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, of the spread of the scores."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


def _rounding(scores: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of the largest score, of their spread."""
    return (torch.finfo(dtype).eps * scores.abs().max() / scores.std()).item()


def _padding(
    case: Case, batch: Tensor, alone: Tensor, exact: tuple[Tensor, Tensor] | None
) -> Finding:
    """Whether a row's score depends on the rows it is padded to."""
    apart = _apart(batch, alone)
    figures = {"largest_difference": apart}
    if exact is not None:
        figures["largest_difference_fp32"] = _apart(*exact)
    elif _is_half(case.model):
        return Finding(
            "padding",
            NOTE,
            f"scores of a padded batch and of single rows differ by up to {apart:.1e} of their "
            "spread; there was no room for an fp32 copy to tell rounding from error",
            "",
            figures,
        )
    judged = exact if exact is not None else (batch, alone)
    if _apart(*judged) > _BOUND + _rounding(judged[0], torch.float32):
        return Finding(
            "padding",
            WRONG,
            f"the same row scores differently alone and in a padded batch, by up to "
            f"{_apart(*judged):.1e} of the spread, in fp32 too",
            "see pad ids and padding side; or score row by row",
            figures,
        )
    rounding = f"; in half precision by up to {apart:.1e}, which is rounding" if exact else ""
    return Finding(
        "padding",
        OK,
        f"a row scores the same alone and in a padded batch, to {_apart(*judged):.1e} of the "
        f"spread{rounding}",
        "",
        figures,
    )


def _level(report: state.Report) -> Findings:
    what = f"{report.level}: {'; '.join(report.reasons)}"
    yield Finding("level", OK if report.level == "trie" else NOTE, what)
    for reason in report.fallbacks:
        yield Finding("level", NOTE, f"a call ran unpacked: {reason}")


def _parity(
    case: Case, theirs: Tensor, ours: Tensor, exact: tuple[Tensor, Tensor] | None
) -> Finding:
    apart = _apart(ours, theirs)
    i, j = torch.triu_indices(len(ours), len(ours), offset=1)
    before, after = theirs[i] - theirs[j], ours[i] - ours[j]
    figures = {
        "conversations": len(ours),
        "largest_difference": apart,
        "comparisons": len(i),
        "rank_flips": int((before * after < 0).sum()),
        "ties_unpatched": int((before == 0).sum()),
        "ties_patched": int((after == 0).sum()),
    }
    what = (
        f"patched and unpatched scores differ by up to {apart:.1e} of their spread; of {len(i)} "
        f"comparisons {figures['rank_flips']} flipped, {figures['ties_unpatched']} tied unpatched, "
        f"{figures['ties_patched']} patched"
    )
    do = "call rmfast.unpatch(model) and report this with the output of rmfast doctor --json"
    if not _is_half(case.model):
        wrong = apart > _BOUND + _rounding(theirs, torch.float32)
        return Finding("parity", WRONG if wrong else OK, what, do if wrong else "", figures)
    if exact is None:
        what += "; there was no room for an fp32 copy to tell rounding from error"
        return Finding("parity", NOTE, what, "", figures)
    mine, other = ((x - exact[0]).square().mean().sqrt().item() for x in (ours, theirs))
    figures |= {"rms_error_patched": mine, "rms_error_unpatched": other}
    half = next(p.dtype for p in case.model.parameters() if p.element_size() == 2)
    # two samples of the same error: the logarithm of their ratio has a standard deviation of
    # 1 / sqrt(n) (Fisher's z)
    chance = math.exp(_SIGMAS / math.sqrt(len(ours)))
    ulp = torch.finfo(half).eps * exact[0].abs().max().item()
    wrong = mine > 1.1 * chance * other + ulp
    what += f"; RMS error against fp32: {mine:.1e} patched, {other:.1e} unpatched"
    return Finding("parity", WRONG if wrong else OK, what, do if wrong else "", figures)


# --- pooling rules


def _hugging_face(row: list[int], pad: int | None) -> int:
    return int(reference.last_token(torch.tensor([row]), None, pad, "hf"))


def _last(row: list[int], pad: int | None) -> int:
    return len(row) - 1


def _before_first_pad(row: list[int], pad: int | None) -> int:
    return row.index(pad) - 1 if pad in row[1:] and row[0] != pad else len(row) - 1


_RULES: dict[str, tuple[str, Callable[[list[int], int | None], int]]] = {
    "hf": ("Hugging Face, TRL (rightmost but the pad token)", _hugging_face),
    "mask": ("OpenRLHF, vLLM, SGLang (last attended)", _last),
    "first_pad": ("ms-swift, DeepSpeed-Chat (before the first pad token)", _before_first_pad),
}


def _pooling(case: Case, rows: Rows, theirs: Tensor) -> Finding:
    """Which token each rule scores, and how far that moves the scores from Hugging Face's."""
    pad = case.pad if case.pad is not None else case.tokenizer.pad_token_id
    where = {name: [rule(row, pad) for row in rows] for name, (_, rule) in _RULES.items()}
    differ = [i for i in range(len(rows)) if len({places[i] for places in where.values()}) > 1]
    if not differ:
        return Finding("pooling", OK, "all rules score the same token of each conversation")
    scores = {}
    # a token sees what comes before it alone: its score is that of the row cut behind it
    with patching.patched(case.model, pooling="mask"):
        for name, places in where.items():
            cut = [row[: i + 1] for row, i in zip(rows, places, strict=True)]
            scores[name] = _scores(case, case.model, cut)
    figures: dict[str, float | int | None] = {"conversations": len(rows), "differ": len(differ)}
    parts = []
    for name, (users, _) in _RULES.items():
        others = [i for i in differ if where[name][i] != where["hf"][i]]
        apart = ((scores[name] - scores["hf"]).abs().max() / theirs.std()).item()
        figures |= {f"differ_{name}": len(others), f"difference_{name}": apart}
        i = (others or differ)[0]
        token = repr(case.tokenizer.decode([rows[i][where[name][i]]]))
        if others:
            parts.append(f"{users}: {token}, which moves scores by up to {apart:.2g} of the spread")
        else:
            parts.append(f"{users}: {token if name == 'hf' else 'the same'}")
    return Finding(
        "pooling",
        WARNING,
        f"frameworks score different tokens in {len(differ)} of {len(rows)} conversations. "
        + "; ".join(parts),
        "score with the rule it was trained with (pooling='hf' or 'mask'); a pad token that no "
        "conversation holds makes them agree",
        figures,
    )
