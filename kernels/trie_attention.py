"""Flash attention over a packed trie: query ``q`` sees key ``k`` iff ``k <= q < subtree_end[k]``.

The mask is an interval per key, so it is known tile by tile before anything is multiplied:
:func:`rmfast.kernels.trie_plan.plan` lists for a tile of queries the blocks of keys in which some
pair is allowed, those in which all are first. A block that is not listed costs nothing, a full one
runs without a mask.

Forward: one launch; a program per query tile and head, online softmax in base 2 (Dao, 2023, arXiv
2307.08691). Backward: three launches; ``dQ`` by query tile, then ``dK`` and ``dV`` by key block
over the query heads that share it. A block that far more tiles see than others, as they see a first
token common to all, is cut among several programs; the third launch adds their sums in order. All
sums are fp32, without atomics: the same bits in every run.

The queries are the last M nodes, or those that are given (``queries``, rising packed indices): then
key ``k`` is seen by the rows between those indices' insertion points of ``k`` and
``subtree_end[k]``, an interval again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels import trie_configs, trie_plan
from rmfast.kernels.trie_backward import _add_kernel, _dkv_kernel, _dq_kernel
from rmfast.kernels.trie_configs import Config
from rmfast.kernels.trie_forward import _forward_kernel
from rmfast.kernels.trie_plan import Rule


def _tile(
    kernel: str, query: Tensor, value: Tensor, pooled: bool, capped: bool, windowed: bool,
    config: Config | None,
) -> tuple[Config, dict]:  # fmt: skip
    """Configuration, and the constants that the three kernels share."""
    interpreted = not isinstance(_forward_kernel, triton.JITFunction)
    width, v_width = query.shape[-1], value.shape[-1]
    d, dv = (max(16, triton.next_power_of_2(w)) for w in (width, v_width))
    chosen = config or trie_configs.config(kernel, query, max(d, dv), pooled, capped, windowed)
    low = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return chosen, {
        "GROUP": query.shape[1] // value.shape[1],
        "POOLED": pooled,
        "WIDTH": width,
        "V_WIDTH": v_width,
        "D": d,
        "DV": dv,
        "M": chosen.rows,
        "N": chosen.nodes,
        # numpy multiplies bf16 as raw bits, and fp16 slowly
        "DOT": tl.float32 if interpreted else low.get(query.dtype, tl.float32),
        "PRECISION": "ieee",  # fp32 stays fp32: no TF32
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


# a share of dK and dV is at most this much of what a processor has to do on average: so the longest
# one ends soon after the others, whatever the order in which they begin
_LONGEST = 0.3
_LEAST_STEPS = 32  # tiles times query heads; for less, a sum's way through memory does not pay
_ADDED = 16  # rows of a block that a program adds up


def most_shares(processors: int, kv_heads: int) -> int:
    """How many shares of that length there are in all lists of a head together."""
    return math.ceil(processors / (_LONGEST * kv_heads))


def least_share(group: int) -> int:
    """The least tiles of a share, whatever there is to do in all."""
    return -(-_LEAST_STEPS // group)


def _planned(
    subtree_end: Tensor, position_ids: Tensor, queries: Tensor | None, rows: int,
    window: int | None, config: Config, by_block: bool, made: dict,
) -> tuple[Rule, trie_plan.Plan]:  # fmt: skip
    """The rule and the plan, from ``made`` where a layer before this one has put them there."""
    seen = (subtree_end, position_ids, queries, rows, window)
    who = trie_plan.once(made, ("rule", window), lambda: trie_plan.rule(*seen))
    key, tile = (config.rows, config.nodes, by_block, window), (config.rows, config.nodes)
    return who, trie_plan.once(made, key, lambda: trie_plan.plan(who, *tile, by_block))


def _cut(
    counts: Tensor, heads: int, kv_heads: int, config: Config, window: int | None, made: dict
) -> trie_plan.Cut:
    processors = 132  # off the GPU, an H100's
    if counts.is_cuda:
        processors = torch.cuda.get_device_properties(counts.device).multi_processor_count
    limits = (most_shares(processors, kv_heads), least_share(heads // kv_heads))
    key = ("cut", config.rows, config.nodes, window, limits)
    return trie_plan.once(made, key, lambda: trie_plan.cut(counts, *limits))


def _mask(who: Rule) -> tuple[Tensor, ...]:
    first = who.last if who.first is None else who.first  # not read
    return first, who.last, who.row_position, who.node_position


def trie_attention(
    query: Tensor,  # [1, Hq, M, D], any strides
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    queries: Tensor | None,  # int64 [M], rising packed indices; None: the last M nodes
    sinks: Tensor | None,  # [Hq]
    scale: float,  # above zero
    window: int | None,
    softcap: float | None,
    keep: bool,  # the log-sum-exp too, for the backward
    config: Config | None = None,
    made: dict | None = None,  # rules and plans of this batch, for other layers
) -> tuple[Tensor, Tensor]:  # [1, M, Hq, Dv]; fp32 [Hq, M rounded up] in base 2, or empty
    _, heads, rows, _ = query.shape
    pooled = queries is not None
    sinks = None if sinks is None else sinks.contiguous()
    options = (pooled, softcap is not None, window is not None)
    chosen, constants = _tile("forward", query, value, *options, config)
    seen = (subtree_end, position_ids, queries, rows, window)
    who, tiles = _planned(*seen, chosen, False, {} if made is None else made)
    out = query.new_empty(1, rows, heads, value.shape[-1])
    # each head's begins at 64 bytes
    lse = query.new_empty((heads, -(-rows // 16) * 16) if keep else (1, 0), dtype=torch.float32)
    _forward_kernel[(tiles.counts.shape[0], heads)](
        query, key, value, out, lse, lse if sinks is None else sinks,
        *_mask(who), *tiles,
        rows, key.shape[2], tiles.blocks.shape[1], window or 0, scale, softcap or 1.0,
        *query.stride()[1:], *key.stride()[1:], *value.stride()[1:],
        out.stride(2), out.stride(1), lse.stride(0),
        WINDOW=window is not None, CAPPED=softcap is not None, SINKS=sinks is not None, KEEP=keep,
        **constants,
    )  # fmt: skip
    return out, lse


def trie_attention_backward(
    grad: Tensor,  # [1, M, Hq, Dv], any strides
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,  # as the forward gave it
    lse: Tensor,
    configs: tuple[Config | None, Config | None] = (None, None),  # dQ; dK and dV
    made: dict | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # query, key, value, sinks
    _, heads, rows, _ = query.shape
    kv_heads, nodes = key.shape[1:3]
    pooled = queries is not None
    seen, made = (subtree_end, position_ids, queries, rows, window), {} if made is None else made
    sinks = None if sinks is None else sinks.contiguous()
    grad_q, grad_k, grad_v = (
        torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for x in (query, key, value)
    )
    strides = (*query.stride()[1:], *key.stride()[1:], *value.stride()[1:])
    g_strides = (grad.stride(2), grad.stride(1), grad.stride(3))
    flags = {"WINDOW": window is not None, "CAPPED": softcap is not None}

    options = (pooled, softcap is not None, window is not None)
    chosen, constants = _tile("dq", query, value, *options, configs[0])
    who, tiles = _planned(*seen, chosen, False, made)
    delta = torch.empty_like(lse)
    partial = lse.new_empty(tiles.counts.shape[0], heads) if sinks is not None else lse
    _dq_kernel[(tiles.counts.shape[0], heads)](
        query, key, value, out, grad, lse, delta, grad_q, lse if sinks is None else sinks, partial,
        *_mask(who), *tiles,
        rows, nodes, tiles.blocks.shape[1], window or 0, scale, softcap or 1.0,
        *strides, out.stride(2), out.stride(1), *g_strides,
        grad_q.stride(1), grad_q.stride(2), lse.stride(0),
        SINKS=sinks is not None, **flags, **constants,
    )  # fmt: skip

    chosen, constants = _tile("dkv", query, value, *options, configs[1])
    _, tiles = _planned(*seen, chosen, True, made)
    of_item, lists = _cut(tiles.counts, heads, kv_heads, chosen, window, made)
    of_grads = (grad_k.stride(1), grad_k.stride(2), grad_v.stride(1), grad_v.stride(2))
    sizes = {name: constants[name] for name in ("WIDTH", "V_WIDTH", "D", "DV", "N")}
    slots = 2 * (len(of_item) - len(lists))
    partial_kv = lse.new_empty(slots, kv_heads, chosen.nodes, sizes["D"] + sizes["DV"])
    _dkv_kernel[(len(of_item), kv_heads)](
        query, key, value, grad, lse, delta, grad_k, grad_v, partial_kv,
        *_mask(who), tiles.blocks, of_item, lists,
        rows, nodes, tiles.blocks.shape[1], window or 0, scale, softcap or 1.0,
        *strides, *g_strides, *of_grads, lse.stride(0),
        **flags, **constants,
    )  # fmt: skip
    _add_kernel[(len(lists), kv_heads, chosen.nodes // _ADDED)](
        partial_kv, lists, grad_k, grad_v, nodes, *of_grads, **sizes, M=_ADDED, num_warps=4
    )
    grad_sinks = None if sinks is None else partial.sum(0).to(sinks.dtype)
    return grad_q, grad_k, grad_v, grad_sinks


def tune(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rule, timer: Callable | None = None
) -> dict[str, Config]:
    """Time the configurations of all chips on these inputs, and use the fastest from now on.

    ``rule`` is ``subtree_end`` to ``softcap`` as :func:`trie_attention` takes them. What is found
    holds in this process for inputs of the same head_dim, dtype and options on this device.
    """
    timer = timer or triton.testing.do_bench
    _, _, queries, _, _, window, softcap = rule
    inputs = (query, key, value, *rule)
    width = max(16, *(triton.next_power_of_2(x.shape[-1]) for x in (query, value)))
    pooled, capped, windowed = (x is not None for x in (queries, softcap, window))
    made: dict = {}  # a plan is no layer's time
    out, lse = trie_attention(*inputs, True, made=made)
    runs = {
        "forward": lambda c: trie_attention(*inputs, True, c, made),
        "dq": lambda c: trie_attention_backward(grad, *inputs, out, lse, (c, None), made),
        "dkv": lambda c: trie_attention_backward(grad, *inputs, out, lse, (None, c), made),
    }
    best = {}
    for i, (kernel, run) in enumerate(runs.items()):
        tables = (trie_configs.TABLE, trie_configs.WINDOWED)
        if query.dtype == torch.float32:
            tables = (trie_configs.FP32,)
        known = [row[i] for table in tables for row in table.values()]
        times = {}
        for config in dict.fromkeys(c._replace(rows=16) if pooled else c for c in known):
            try:
                times[config] = timer(lambda c=config, run=run: run(c))
            except triton.runtime.errors.OutOfResources:
                continue  # made for a chip with more shared memory
        best[kernel] = min(times, key=times.__getitem__)
        kind = kernel, query.device, query.dtype, width, pooled, capped, windowed
        trie_configs.TUNED[kind] = best[kernel]
    return best
