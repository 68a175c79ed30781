"""Kernels alone on a GPU: their launches, tiles, and times beside those of others."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
import triton
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import rmfast
from rmfast import ops
from rmfast.benchmarks import kernels as bench
from rmfast.benchmarks.gpu_common import (
    BF16,
    DEV,
    DRY,
    KINDS,
    ROUNDS,
    Row,
    goal,
    heads_of,
    noise,
    on_gpu,
    rows_of,
)  # fmt: skip
from rmfast.kernels import trie_attention as kernels
from rmfast.kernels import trie_configs, trie_plan


def launches(timed: bool) -> Iterator[Row]:
    """The launches of attention alone, with and without a start that all rows share."""
    cold = torch.empty(1 << (10 if DRY else 28), dtype=torch.uint8, device=DEV)
    cases = [(kind, 4, 128, (32, 8)) for kind in (*KINDS, "wide")]
    cases += [("pairs", 0, 128, (32, 8)), ("apart", 0, 128, (32, 8)), ("pairs", 4, 128, (16, 8))]
    cases += [("pairs", 4, 64, (32, 8)), ("groups", 4, 64, (32, 8)), ("groups", 4, 256, (8, 4))]
    for kind, start, d, h in cases[:2] if DRY else cases:
        d, h = (16, (2, 1)) if DRY else (d, h)
        trie = rmfast.pack(rows_of(kind, start)).to(DEV)
        q, k, v = heads_of(trie, d, h)
        grad = noise(len(trie), h[0], d, dtype=BF16)[None]
        rest = (trie.subtree_end, trie.position_ids, None, None, d**-0.5, None, None)

        made: dict = {}  # plans, as layers of a batch share them

        def run(times: int = 1, q=q, k=k, v=v, grad=grad, rest=rest, made=made) -> None:
            for _ in range(times):
                cold.zero_()
                out, lse = kernels.trie_attention(q, k, v, *rest, True, made=made)
                kernels.trie_attention_backward(grad, q, k, v, *rest, out, lse, made=made)

        run()
        if not timed:
            continue
        seen = [] if DRY else on_gpu(lambda run=run: run(7))[0]
        pairs = bench.allowed_pairs(trie.to("cpu"))
        config = trie_configs.config("dkv", q, d, False, False)
        rule = trie_plan.rule(*rest[:3], len(trie), None)
        lists = trie_plan.plan(rule, config.rows, config.nodes, True).counts[:, 1].float()
        row = {"kind": kind, "start": start, "D": d, "heads": h, "nodes": len(trie),
               "M pairs": pairs / 1e6, "dkv list, mean": float(lists.mean()),
               "longest": float(lists.max())}  # fmt: skip
        for part, flops in (("forward", 4), ("dq", 6), ("dkv", 8), ("add", 0)):
            us = [e.time_range.elapsed_us() for e in seen if f"_{part}_kernel" in e.name]
            if us:
                row[f"{part} us"] = median(us)
            if us and flops:
                row[f"{part} TFLOP/s"] = flops * d * h[0] * pairs / median(us) / 1e6
        yield row


# --- kernels beside others


def against(timed: bool) -> Iterator[Row]:
    """Attention beside FlexAttention and torch's kernels, forward and with backward."""
    clock = bench.Clock(DEV)
    shape = bench.Shape(*(4, 2, 16, 64) if DRY else (32, 8, 128, 4096))
    product, flops = bench.roof("flops", DEV, DRY)
    for kind in ("groups",) if DRY else ("long", "groups", "apart"):
        trie = rmfast.pack(rows_of(kind))
        who = bench.attentions(shape, trie, DEV)
        plain = who["torch SDPA, nothing shared"]
        for backend in () if DRY else ("FLASH_ATTENTION", "CUDNN_ATTENTION"):

            def forced(q, k, v, backend=backend):
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

            who[f"nothing shared, {backend}"] = plain._replace(forward=forced)
        work = bench.allowed_pairs(trie) * shape.heads * shape.head_dim
        whats = ("forward", bench.forward_of, 4), ("forward + backward", bench.step_of, 14)
        for what, call, each in whats:
            calls = {name: call(one) for name, one in who.items()} | {"matmul": product}
            took = bench.measure(calls, (5 * ROUNDS if not DRY else 1) * timed, clock)
            took = {name: median(times) for name, times in took.items() if times}
            for name, s in took.items():
                yield {"kind": kind, "what": what, "who": name, "ms": 1e3 * s}
            if timed:
                ours, flex, most = map(took.get, ("rmfast", "FlexAttention", "matmul"))
                label = f"attention {what}, {kind}, D {shape.head_dim}"
                speed = flex / ours if ours and flex else None
                yield goal(f"{label}: times as fast as FlexAttention", speed, 1.0)
                share = each * work / ours / (flops / most) if ours and most else None
                yield goal(f"{label}: share of the matmul rate", share, 0.6)


# responses, prompt, milliseconds forward + backward on one H100; responses of 2,048, 32 and 8 heads
# of 128, fp16: arXiv 2605.15422, and experiments/reproduce_table1.py of its repository
DUALKV = ((28, 4096, 133), (28, 16384, 468), (16, 32768, 679), (28, 32768, 1018))


def dualkv(timed: bool) -> Iterator[Row]:
    """Responses to one long prompt, attention alone."""
    clock, (h, d) = bench.Clock(DEV), ((2, 1), 16) if DRY else ((32, 8), 128)
    for responses, prompt, published in DUALKV[:1] if DRY else DUALKV:
        count, begins, answer = (2, 40, 8) if DRY else (responses, prompt, 2048)
        stop = begins + answer * torch.arange(1, count + 1)
        end = torch.cat([stop[-1].expand(begins), stop.repeat_interleave(answer)]).int()
        position = torch.cat([torch.arange(begins), begins + torch.arange(answer).repeat(count)])
        trie = rmfast.PackedTrie(torch.zeros_like(position), position, end, stop - 1).to(DEV)

        plan = ops.TriePlan(trie.subtree_end, trie.position_ids)

        def attend(q, k, v, plan=plan):
            return ops.trie_attention(q, k, v, plan, backend="sdpa" if DRY else "triton")

        leaves = [x.requires_grad_() for x in heads_of(trie, d, h, torch.float16)]
        one = bench.Contestant(attend, leaves)
        calls = {"forward": bench.forward_of(one), "forward + backward": bench.step_of(one)}
        took = bench.measure(calls, ROUNDS * timed, clock)
        if not timed:
            return
        ms = {what: 1e3 * median(times) for what, times in took.items()}
        flops = 14 * bench.allowed_pairs(trie.to("cpu")) * h[0] * d
        name = f"{responses} responses to {prompt:,} tokens"
        whole = ms.get("forward + backward")
        rate = flops / whole / 1e9 if whole else None
        yield {"who": name, "nodes": len(trie), **ms, "TFLOP/s": rate}
        what = f"DualKV's shape, {name}: ms forward + backward"
        yield goal(what, whole, published, most=True)


def heads(timed: bool) -> Iterator[Row]:
    who, work = bench.heads(2 if DRY else 512, 32 if DRY else 4096, DEV)
    copy, size = bench.roof("bytes", DEV, DRY)
    calls = {name: bench.step_of(one) for name, one in who.items()} | {"copy": copy}
    took = bench.measure(calls, 5 * ROUNDS * timed, bench.Clock(DEV))
    rate = {n: (size if n == "copy" else work) / median(t) / 1e12 for n, t in took.items() if t}
    for name, x in rate.items():
        yield {"who": name, "ms": 1e3 * median(took[name]), "TB/s": x}
    if timed:
        what = "head and loss, 65,536 rows of 4,096: copy's rate over its own"
        ours, most = map(rate.get, ("rmfast, one op", "copy"))
        yield goal(what, most / ours if ours and most else None, 1.15, most=True)


def elementwise(timed: bool) -> Iterator[Row]:
    """What a layer of 8B does element by element, with its backward, beside transformers' own."""
    n, h, inner, heads, d = (9, 16, 24, (2, 1), 8) if DRY else (16384, 4096, 14336, (32, 8), 128)
    norm = LlamaRMSNorm(h).to(DEV, BF16)
    x, gate, up = (noise(n, size, dtype=BF16).requires_grad_() for size in (h, inner, inner))
    q, k = (noise(n, m, d, dtype=BF16)[None].transpose(1, 2).requires_grad_() for m in heads)
    cos, sin = noise(2, 1, n, d, dtype=BF16)
    cases = {  # ours, theirs, leaves, bytes there and back
        "RMSNorm": (lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, _: norm(x), (x, norm.weight),
                    5 * x.nbytes),
        "rotary": (lambda q, k: ops.rotary(q, k, cos, sin),
                   lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), (q, k),
                   4 * (q.nbytes + k.nbytes + cos.nbytes)),
        "SwiGLU": (ops.gated, lambda g, u: F.silu(g) * u, (gate, up), 8 * gate.nbytes),
    }  # fmt: skip

    def step(function: Callable, leaves: Sequence) -> None:
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(out, leaves, [y.detach() for y in out])

    copy, size = bench.roof("bytes", DEV, DRY)
    for what, (ours, theirs, leaves, least) in cases.items():
        who = {"rmfast": ours, "transformers": theirs}
        if not DRY:
            who["torch.compile"] = torch.compile(theirs)
        calls = {name: functools.partial(step, call, leaves) for name, call in who.items()}
        took = bench.measure({**calls, "copy": copy}, 5 * ROUNDS * timed, bench.Clock(DEV))
        for name, times in took.items():
            if times:
                rate = (size if name == "copy" else least) / median(times) / 1e12
                yield {"what": what, "who": name, "ms": 1e3 * median(times), "TB/s": rate}


def tuning(timed: bool, d: int) -> Iterator[Row]:
    """Tiles of the three kernels, in microseconds by shape of trie."""
    cold = torch.empty(1 << (10 if DRY else 27), dtype=torch.uint8, device=DEV)
    # edge of a tile that warps share, 64 rows for each four; warps; its other edge
    edges, others = [(64, 4), (128, 8)], (32, 64, 128)
    if DRY:
        d, edges, others = 16, [(16, 4)], (16,)
    took: dict[tuple, Row] = {}
    for kind in KINDS if timed else KINDS[:1]:
        trie, h = rmfast.pack(rows_of(kind)).to(DEV), (2, 1) if DRY else (32, 8)
        q, k, v = heads_of(trie, d, h)
        grad = noise(len(trie), h[0], d, dtype=BF16)[None]
        rule = (trie.subtree_end, trie.position_ids, None, None, d**-0.5, None, None)
        made: dict = {}  # plans
        out, lse = kernels.trie_attention(q, k, v, *rule, True, made=made)

        def run(name, config, inputs=(q, k, v, *rule), grad=grad, out=out, lse=lse, made=made):
            if name == "forward":
                return kernels.trie_attention(*inputs, True, config, made)
            both = (config, None) if name == "dq" else (None, config)
            return kernels.trie_attention_backward(grad, *inputs, out, lse, both, made)

        for name in ("forward", "dq", "dkv"):
            fit = []
            for (edge, warps), other, stages in itertools.product(edges, others, (2, 3)):
                tile = (other, edge) if name == "dkv" else (edge, other)
                config = trie_configs.Config(*tile, warps, stages)
                with contextlib.suppress(triton.runtime.errors.OutOfResources):
                    run(name, config)
                    fit.append(config)

            def each(name=name, fit=fit, run=run) -> None:
                for config in fit:
                    for _ in range(5):
                        cold.zero_()
                        run(name, config)

            us = [
                e.time_range.elapsed_us() for e in (on_gpu(each)[0] if timed else ())
                if f"_{name}_kernel" in e.name
            ]  # fmt: skip
            for i, config in enumerate(fit):
                row = took.setdefault((name, config), {"D": d, "kernel": name, "tile": config})
                if us:
                    row[f"{kind} us"] = median(us[5 * i : 5 * i + 5])
    yield from took.values()
