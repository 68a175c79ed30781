"""What the trie attention kernels do beyond what they must: tiles visited, instructions a tile."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import torch

import rmfast
from rmfast.benchmarks import launches
from rmfast.kernels import chips

# --- tiles


def tiles(trie: rmfast.PackedTrie, rows: int, nodes: int, window: int | None) -> tuple[int, int]:
    """Tiles that the kernels visit, and those with an allowed pair, from the mask itself."""
    from rmfast.kernels import trie_attention

    who = trie_attention._rule(trie.subtree_end, trie.position_ids, None, window)
    visited = int(trie_attention.plan(who, rows, nodes).counts[:, 1].sum())
    end, position = trie.subtree_end.numpy(), trie.position_ids.numpy()
    node = np.arange(len(trie))
    needed = 0
    for start in range(0, len(trie), rows):
        q = node[start : start + rows, None]
        allowed = (node <= q) & (q < end)
        if window is not None:
            allowed &= position[q] - position < window
        columns = np.pad(allowed.any(axis=0), (0, -len(trie) % nodes))
        needed += int(columns.reshape(-1, nodes).any(axis=1).sum())
    return visited, needed


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

    from rmfast.kernels import trie_attention

    if plain:

        @triton.jit
        def one_after_the_other(tiles, i, SIZE):
            return i * SIZE

        trie_attention._listed = one_after_the_other
    trie = rmfast.pack([torch.arange(1024)])
    q, k = (
        torch.empty(1, 1024, heads, width, dtype=torch.bfloat16).transpose(1, 2) for heads in (4, 2)
    )
    rest = (trie.subtree_end, trie.position_ids, None, None, 0.1, None, None)
    with chips.launching_for(chip), launches.record() as recorded:
        out, lse = trie_attention.trie_attention(q, k, k, *rest, True)
        trie_attention.trie_attention_backward(out, q, k, k, *rest, out, lse)
    compiled = [launches.compile(launch, chip) for launch in recorded]
    return {one.kernel.partition(".")[2]: loop_instructions(one) for one in compiled}


def instructions(
    chip_names: Iterable[str], widths: Iterable[int]
) -> Iterable[tuple[str, str, int, int]]:
    """Kernel, case, instructions of its full-tile loop, those of plain causal attention's."""
    cases = [(chip, width) for chip in chip_names for width in widths]
    found: dict[bool, list[dict[str, int]]] = {}
    for plain in (False, True):  # a process sees one of the two sources
        with launches.processes() as pool:
            found[plain] = list(pool.map(_loops, *zip(*cases, strict=True), [plain] * len(cases)))
    for (chip, width), ours, theirs in zip(cases, found[False], found[True], strict=True):
        for kernel, count in ours.items():
            yield kernel, f"{chip}, D {width}", count, theirs[kernel]
