"""What the trie attention kernels do beyond what they must: tiles visited, instructions a tile.

Counted for :mod:`rmfast.benchmarks.work`, which says what for.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import rmfast
from rmfast import reference
from rmfast.benchmarks import launches
from rmfast.data import preferences
from rmfast.demo import embedded
from rmfast.kernels import chips
from rmfast.packed import pieces

if TYPE_CHECKING:
    from rmfast.kernels.trie_configs import Config

# --- tiles


def tries(data: Path | None) -> dict[str, rmfast.PackedTrie]:
    """Random batches, and batches of real text by bytes: a few pairs, groups of 8 answers.

    The last is a micro-batch of training: pairs by words, after a first token common to all.
    """
    rng = np.random.default_rng(0)
    out = {}
    for name, values, length in (("random, much shared", 2, 300), ("random", 5, 700)):
        rows = [rng.integers(values, size=rng.integers(1, length + 1)) for _ in range(64)]
        out[name] = rmfast.pack(rows)
    found = embedded.pairs("held-out") if data is None else preferences(data, ranks="pairs").records
    texts = [_text(side) for pair in found[:84] for side in pair.whole()]
    sides = [list(text.encode()) for text in texts[:128]]
    out["8 pairs"] = rmfast.pack(sides[:16])
    out["64 pairs"] = rmfast.pack(sides)
    # a prompt and eight answers: those of other questions, as long as real ones
    prompts, answers = sides[:16:2], sides[1::2]
    rows = [
        prompt + answers[(8 * i + j) % len(answers)]
        for i, prompt in enumerate(prompts)
        for j in range(8)
    ]
    out["8 groups of 8"] = rmfast.pack(rows)
    ids: dict[str, int] = {}
    words = [re.findall(r"\w+|\n|[^\w\s]", text) for text in texts]
    out[WORDS] = rmfast.pack([[0, *(ids.setdefault(w, len(ids) + 1) for w in ws)] for ws in words])
    return out


WORDS = "84 pairs by words"


def _text(side: str | list[dict]) -> str:
    return side if isinstance(side, str) else "\n".join(turn["content"] for turn in side)


def carried(trie: rmfast.PackedTrie, most: int) -> tuple[rmfast.PackedTrie, int]:
    """The piece after the first, of ``most`` nodes, and how many nodes of it ran before."""
    piece = pieces.cut(trie, pieces.cut(trie, 0, most).stop, most)
    return piece.trie, piece.carried


def tiles(
    trie: rmfast.PackedTrie, rows: int, nodes: int, window: int | None, first: int = 0
) -> tuple[int, int]:
    """Tiles that the kernels visit, and those with an allowed pair, by the mask itself."""
    from rmfast.kernels import trie_plan

    who = trie_plan.rule(trie.subtree_end, trie.position_ids, None, len(trie) - first, window)
    visited = int(trie_plan.plan(who, rows, nodes).counts[:, 1].sum())
    node = torch.arange(len(trie))
    needed = 0
    for start in range(first, len(trie), rows):
        allowed = reference.trie_mask(
            node[start : start + rows], node, trie.subtree_end, trie.position_ids, window
        )
        seen = torch.nn.functional.pad(allowed.any(0), (0, -len(trie) % nodes))
        needed += int(seen.view(-1, nodes).any(1).sum())
    return visited, needed


PROCESSORS = 132  # an H100's


def critical_path(
    trie: rmfast.PackedTrie, heads: int, kv_heads: int, config: Config, cut: bool
) -> tuple[int, float]:
    """Tile steps of dK and dV until the last program ends, and a processor's on average.

    Programs begin in the order of their launch, each where one has ended: as many run at a time
    as there are processors. Without ``cut`` each list is one program's.
    """
    from rmfast.kernels import trie_attention, trie_plan

    who = trie_plan.rule(trie.subtree_end, trie.position_ids, None, len(trie), None)
    counts = trie_plan.plan(who, config.rows, config.nodes, by_block=True).counts
    group, steps = heads // kv_heads, []
    least = trie_attention.least_share(group) if cut else len(trie)
    lists = trie_plan.cut(counts, trie_attention.most_shares(PROCESSORS, kv_heads), least).lists
    for _, shares, _, tiles in lists.tolist():
        bounds = [i * tiles // shares for i in range(shares + 1)]
        steps += [group * (b - a) for a, b in itertools.pairwise(bounds)]
    ends = [0] * PROCESSORS
    for step in steps * kv_heads:
        heapq.heapreplace(ends, ends[0] + step)
    return max(ends), round(sum(steps) * kv_heads / PROCESSORS, 1)


# --- instructions


def loop_instructions(compiled: launches.Compiled) -> int:
    """Instructions of the full-tile loop: the shortest innermost loop with tensor-core ones."""
    cuda = chips.CHIPS[compiled.chip].backend == "cuda"
    label = re.compile(r"^(\.L\w+):")
    if cuda:
        op = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
        jump, dot = re.compile(r"`\((\.L\w+)\)"), re.compile(r"\w*MMA")
    else:
        op = re.compile(r"^\t([a-z]\w*)(.*)")
        jump, dot = re.compile(r"(\.L\w+)"), re.compile(r"v_mfma")
    at: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in compiled.text.splitlines():
        if found := label.match(line):
            at[found[1]] = len(names)
        elif found := op.match(line):
            names.append(found[1])
            if found[1].startswith(("BRA", "s_cbranch", "s_branch")):
                target = jump.search(found[2])
                if target and target[1] in at:  # backwards
                    loops.append((at[target[1]], len(names)))
    lengths = []
    for start, stop in loops:
        inner = any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in loops)
        if not inner and any(dot.match(name) for name in names[start:stop]):
            lengths.append(stop - start)
    return min(lengths)


def _loops(chip: str, width: int, plain: bool) -> dict[str, int]:
    """By kernel. ``plain``: the same source with tiles one after the other, no list."""
    import triton

    from rmfast.kernels import trie_attention, trie_backward, trie_forward

    if plain:

        @triton.jit
        def one_after_the_other(tiles, i, SIZE):
            return i * SIZE

        trie_forward.listed = trie_backward.listed = one_after_the_other
    trie = rmfast.pack([torch.arange(1024)])
    q, k = (
        torch.empty(1, 1024, heads, width, dtype=torch.bfloat16).transpose(1, 2) for heads in (4, 2)
    )
    rest = (trie.subtree_end, trie.position_ids, None, None, 0.1, None, None)
    with chips.launching_for(chip), launches.record() as recorded:
        out, lse = trie_attention.trie_attention(q, k, k, *rest, True)
        trie_attention.trie_attention_backward(out, q, k, k, *rest, out, lse)
    compiled = [launches.compile(launch, chip) for launch in recorded[:3]]  # the last only adds
    return {one.kernel.partition(".")[2]: loop_instructions(one) for one in compiled}


def instructions(
    chip_names: Iterable[str], widths: Iterable[int]
) -> Iterable[tuple[str, str, int, int, int]]:
    """Kernel, chip, head_dim, instructions of its full-tile loop, those of plain causal's."""
    cases = [(chip, width) for chip in chip_names for width in widths]
    found: dict[bool, list[dict[str, int]]] = {}
    for plain in (False, True):  # a process sees one of the two sources
        with launches.processes() as pool:
            found[plain] = list(pool.map(_loops, *zip(*cases, strict=True), [plain] * len(cases)))
    for (chip, width), ours, theirs in zip(cases, found[False], found[True], strict=True):
        for kernel, count in ours.items():
            yield kernel, chip, width, count, theirs[kernel]
