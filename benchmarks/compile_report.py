"""Compiles every kernel for chips that are not there: registers, spills, shared memory, occupancy.

    python -m rmfast.benchmarks.compile_report

No GPU is needed, and nothing is timed. ``tests/compile`` asserts what the cases promise.
"""

from __future__ import annotations

import argparse
import csv
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rmfast.benchmarks import offline
from rmfast.kernels import chips

COLUMNS = (
    "kernel case chip num_warps num_stages registers spills scalar_spills local_bytes shared "
    "programs occupancy"
).split()


class Case(NamedTuple):
    """A launcher called once. Kernels are named as ``file.function``."""

    call: Callable[[], object]  # with CPU tensors; nothing is run
    wide: tuple[str, ...] = ()  # kernels that must have 16-byte global loads
    dots: tuple[str, ...] = ()  # kernels that must have tensor-core instructions
    narrow: tuple[str, ...] = ()  # of those: tiles of less than 64 rows, no wgmma on Hopper


CASES: dict[str, Case] = {}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# every block size of the rules; both large widths have the largest block, one in a loop
WIDTHS = ("64 bf16", "576 bf16", "4096 bf16", "16384 bf16", "4096 fp16", "576 fp32", "4096 fp32")
BATCH, TOKENS = 16, 1024  # a launch's grid, and strides: no code depends on them


def head_cases() -> Iterable[tuple[str, Case]]:
    def forward(width: int, dtype: torch.dtype, labels: int, pooling: str | None) -> None:
        from rmfast.kernels import reward_head

        weight = torch.empty(labels, width, dtype=dtype)
        bias = torch.empty(labels, dtype=dtype) if labels > 1 else None
        if pooling is None:
            hidden = torch.empty(TOKENS, width, dtype=dtype)
            index = torch.empty(BATCH, dtype=torch.int64)
            reward_head.reward_head(hidden, index, weight, bias)
        else:
            hidden = torch.empty(BATCH, 64, width, dtype=dtype)
            ids = torch.empty(BATCH, 64, dtype=torch.int64)
            reward_head.reward_head(hidden, None, weight, bias, ids, ids != 0, 7, pooling)

    def backward(width: int, dtype: torch.dtype, labels: int, batch: int) -> None:
        from rmfast.kernels import reward_head

        reward_head.reward_head_backward(
            torch.empty(batch, labels),
            torch.empty(TOKENS, width, dtype=dtype),
            torch.empty(batch, dtype=torch.int64),
            torch.empty(labels, width, dtype=dtype),
            torch.empty(labels, dtype=dtype) if labels > 1 else None,
        )

    wide = ("reward_head._forward_kernel",)
    for width, name in _widths():
        case = Case(_bind(forward, width, DTYPES[name], 1, None), wide if width >= 1024 else ())
        yield f"head forward, H {width}, {name}", case
    five = Case(_bind(forward, 4096, torch.bfloat16, 5, None), wide)
    yield "head forward, H 4096, bf16, 5 labels", five
    for pooling in ("hf", "mask"):
        case = Case(_bind(forward, 4096, torch.bfloat16, 1, pooling), wide)
        yield f"head forward, H 4096, bf16, pooled by {pooling}", case
    wide = ("reward_head._backward_kernel",)
    for width, name in _widths():
        case = Case(_bind(backward, width, DTYPES[name], 1, BATCH), wide if width >= 1024 else ())
        yield f"head backward, H {width}, {name}", case
    five = Case(_bind(backward, 4096, torch.bfloat16, 5, BATCH))
    yield "head backward, H 4096, bf16, 5 labels", five


def pairwise_cases() -> Iterable[tuple[str, Case]]:
    def call(
        batch: int, dtype: torch.dtype, layout: str, all_options: bool, gamma: float = 0.0
    ) -> None:
        from rmfast.kernels import pairwise_loss

        count = batch // 2
        pairs = torch.empty(count, 2, dtype=torch.int64) if layout == "index" else None
        each = [torch.empty(count) if all_options else None for _ in ("margin", "target", "weight")]
        _, _, grads = pairwise_loss.pairwise_loss(
            torch.empty(batch, dtype=dtype), pairs, *each, layout, 0.0, 0.01 * all_options, gamma,
            "mean",
        )  # fmt: skip
        grad = torch.empty((), dtype=grads.dtype)
        pairwise_loss.pairwise_loss_backward(grad, grads, pairs, layout, batch, dtype)

    for batch in (BATCH, 4096):
        case = Case(_bind(call, batch, torch.float32, "halves", False))
        yield f"pairwise loss, halves, B {batch}, fp32", case
    for layout in ("interleaved", "index"):
        case = Case(_bind(call, 4096, torch.bfloat16, layout, True))
        yield f"pairwise loss, {layout}, B 4096, bf16, all options", case
    case = Case(_bind(call, 4096, torch.float32, "halves", False, 2.0))
    yield "pairwise loss, halves, B 4096, fp32, focal", case


def fused_cases() -> Iterable[tuple[str, Case]]:
    def call(
        width: int, dtype: torch.dtype, batch: int, layout: str, all_options: bool,
        gamma: float = 0.0, pooling: str | None = None,
    ) -> None:  # fmt: skip
        from rmfast.kernels import fused_loss

        count = batch // 2
        hidden, weight = torch.empty(TOKENS, width, dtype=dtype), torch.empty(1, width, dtype=dtype)
        given = index = torch.empty(batch, dtype=torch.int64)
        rule: tuple = (None, None, None, "hf")
        if pooling is not None:
            given, ids = None, torch.empty(batch, 64, dtype=torch.int64)
            hidden, rule = hidden.expand(batch, -1, -1)[:, :64], (ids, ids != 0, 7, pooling)
        bias = torch.empty(1, dtype=dtype) if all_options else None
        pairs = torch.empty(count, 2, dtype=torch.int64) if layout == "index" else None
        each = [torch.empty(count) if all_options else None for _ in ("margin", "target", "weight")]
        *_, grads, partial = fused_loss.fused_loss(
            hidden, given, weight, bias, pairs, *each, *rule, layout, 0.0, 0.01 * all_options,
            gamma, "mean",
        )  # fmt: skip
        fused_loss.fused_loss_backward(
            torch.empty(()), grads, partial, index, weight, bias, pairs, layout, hidden.shape, dtype
        )

    wide = ("fused_loss._forward_kernel",)
    for width, name in _widths():
        call_ = _bind(call, width, DTYPES[name], BATCH, "halves", False)
        yield f"head and loss, H {width}, {name}", Case(call_, wide if width >= 1024 else ())
    widest = Case(_bind(call, 8192, torch.bfloat16, BATCH, "halves", False), wide)
    yield "head and loss, H 8192, bf16", widest  # the widest rows that are held whole
    for layout in ("interleaved", "index"):
        case = Case(_bind(call, 4096, torch.bfloat16, BATCH, layout, True), wide)
        yield f"head and loss, H 4096, bf16, {layout}, all options", case
    for width, name in ((4096, "bf16"), (4096, "fp32"), (8192, "bf16")):
        case = Case(_bind(call, width, DTYPES[name], BATCH, "halves", False, 2.0), wide)
        yield f"head and loss, H {width}, {name}, focal", case
    for width, pooling in ((64, "hf"), (4096, "mask"), (16384, "hf")):
        call_ = _bind(call, width, torch.bfloat16, BATCH, "halves", False, pooling=pooling)
        case = Case(call_, wide if width >= 1024 else ())
        yield f"head and loss, H {width}, bf16, pooled by {pooling}", case
    case = _bind(call, 4096, torch.bfloat16, BATCH, "index", True, pooling="hf")
    yield "head and loss, H 4096, bf16, pooled by hf, index, all options", Case(case, wide)
    case = Case(_bind(call, 5, torch.float32, BATCH, "halves", True))
    yield "head and loss, H 5, fp32, all options", case
    many = Case(_bind(call, 4096, torch.bfloat16, 4096, "halves", False), wide)
    yield "head and loss, H 4096, bf16, B 4096", many


def listwise_cases() -> Iterable[tuple[str, Case]]:
    offsets = torch.zeros(33, dtype=torch.int64)

    def forward(kind: str, dtype: torch.dtype, ranks: torch.dtype, size: int) -> None:
        from rmfast.kernels import listwise_loss

        scores, order = torch.empty(512, dtype=dtype), torch.empty(512, dtype=ranks)
        listwise_loss.listwise_loss(scores, order, offsets, kind, size)

    def backward(dtype: torch.dtype, size: int) -> None:
        from rmfast.kernels import listwise_loss

        slope = torch.empty(512, dtype=torch.promote_types(dtype, torch.float32))
        grad = slope.new_empty(32)
        listwise_loss.listwise_loss_backward(grad, slope, offsets, size, dtype)

    for kind in ("all_pairs", "plackett_luce"):
        for size in (4, 32, 64):
            case = Case(_bind(forward, kind, torch.float32, torch.int64, size))
            yield f"{kind} forward, K {size}, fp32", case
        case = Case(_bind(forward, kind, torch.bfloat16, torch.bfloat16, 64))
        yield f"{kind} forward, K 64, bf16, ranks too", case
    yield "listwise backward, K 4, fp32", Case(_bind(backward, torch.float32, 4))
    yield "listwise backward, K 64, bf16", Case(_bind(backward, torch.bfloat16, 64))


def elementwise_cases() -> Iterable[tuple[str, Case]]:
    """Widths of heads and of hidden states, to the widest that a program holds."""

    def norm(width: int, dtype: torch.dtype, late: bool, needs_weight: bool) -> None:
        from rmfast.kernels import elementwise

        x, weight = torch.empty(TOKENS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        out = elementwise.rms_norm(x, weight, 1e-6, float(late), late)
        elementwise.rms_norm_backward(out, x, weight, 1e-6, float(late), needs_weight)

    def rotary(size: int, dtype: torch.dtype, heads: tuple[int, int]) -> None:
        from rmfast.kernels import elementwise

        q, k = (torch.empty(1, TOKENS, n, size, dtype=dtype).transpose(1, 2) for n in heads)
        cos, sin = torch.empty(2, 1, TOKENS, size, dtype=dtype)
        for backward in (False, True):
            elementwise.rotary(q, k, cos, sin, backward)

    def gated(dtype: torch.dtype, gelu: bool) -> None:
        from rmfast.kernels import elementwise

        gate, up = torch.empty(2, TOKENS, 3072, dtype=dtype)
        elementwise.gated_backward(elementwise.gated(gate, up, gelu), gate, up, gelu)

    wide = ("elementwise._norm_kernel", "elementwise._norm_backward_kernel")
    for width, name in ((128, "bf16"), (4096, "bf16"), (8192, "fp32")):
        yield (
            f"RMSNorm, H {width}, {name}",
            Case(_bind(norm, width, DTYPES[name], False, True), wide),
        )
    case = Case(_bind(norm, 2304, torch.bfloat16, True, False), wide)
    yield "RMSNorm of Gemma, frozen, H 2304, bf16", case
    wide = ("elementwise._rotary_kernel",)
    for size, name, heads in ((64, "bf16", (14, 2)), (96, "fp16", (8, 8)), (128, "bf16", (32, 8))):
        yield f"rotary, D {size}, {name}", Case(_bind(rotary, size, DTYPES[name], heads), wide)
    wide = ("elementwise._gated_kernel", "elementwise._gated_backward_kernel")
    yield "SwiGLU, bf16", Case(_bind(gated, torch.bfloat16, False), wide)
    yield "GEGLU, fp32", Case(_bind(gated, torch.float32, True), wide)


def attention_cases() -> Iterable[tuple[str, Case]]:
    """Every row of the table of configurations, and each option on one of them."""

    def call(
        width: int, dtype: torch.dtype, *, value_width: int | None = None, pooled: bool = False,
        window: int | None = None, softcap: float | None = None, sinks: bool = False,
        keep: bool = True,
    ) -> None:  # fmt: skip
        import rmfast
        from rmfast.kernels import trie_attention

        trie = rmfast.pack([torch.arange(TOKENS)])
        queries = torch.arange(0, TOKENS, 32) if pooled else None
        rows = TOKENS if queries is None else len(queries)
        q, k, v = (
            torch.empty(1, length, heads, size, dtype=dtype).transpose(1, 2)
            for length, heads, size in (
                (rows, 4, width),
                (TOKENS, 2, width),
                (TOKENS, 2, value_width or width),
            )
        )
        rest = (
            *(trie.subtree_end, trie.position_ids, queries),
            *(torch.empty(4, dtype=dtype) if sinks else None, 0.1, window, softcap),
        )
        out, lse = trie_attention.trie_attention(q, k, v, *rest, keep)
        if keep:
            trie_attention.trie_attention_backward(out, q, k, v, *rest, out, lse)

    forward = "trie_forward._forward_kernel"
    dq, dkv, add = (f"trie_backward._{name}_kernel" for name in ("dq", "dkv", "add"))
    every = (forward, dq, dkv)
    wide = (*every, add)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for width in (64, 128):
        yield f"attention, D {width}, bf16", Case(_bind(call, width, bf16), wide, every)
        yield f"attention, D {width}, fp32", Case(_bind(call, width, fp32), wide)
    # two fp32 sums of head_dim 256 leave no room for 64 keys
    yield "attention, D 256, bf16", Case(_bind(call, 256, bf16), wide, every, (dkv,))
    case = Case(_bind(call, 256, bf16, softcap=50.0, window=64), wide, every, (dkv,))
    yield "attention, D 256, bf16, soft cap, window", case
    for width in (64, 128):
        case = Case(_bind(call, width, bf16, window=64, sinks=True), wide, every)
        yield f"attention, D {width}, bf16, window, sinks", case
    case = Case(_bind(call, 128, bf16, pooled=True), wide, every, (forward, dq))
    yield "attention, D 128, bf16, pooled queries", case
    case = Case(_bind(call, 192, bf16, value_width=128), wide, every, (dkv,))
    yield "attention, D 192 and 128, bf16", case
    case = Case(_bind(call, 80, fp16, keep=False), (forward,), (forward,))
    yield "attention, D 80, fp16, inference", case


def _widths() -> Iterable[tuple[int, str]]:
    for case in WIDTHS:
        width, name = case.split()
        yield int(width), name


def _bind(call: Callable, *arguments: object, **options: object) -> Callable[[], object]:
    return lambda: call(*arguments, **options)


for _cases in (
    head_cases, pairwise_cases, fused_cases, listwise_cases, elementwise_cases, attention_cases
):  # fmt: skip
    CASES.update(_cases())


def compile_cases(names: Iterable[str], chip: str) -> dict[str, list[offline.Compiled] | str]:
    """Every kernel each case launches, as ``chip`` would run it; the traceback of one that fails.

    All cases of a chip in one process: what they have in common is compiled once.
    """
    out: dict[str, list[offline.Compiled] | str] = {}
    for name in names:
        try:
            with chips.launching_for(chip), offline.record() as recorded:
                CASES[name].call()
            looked_at = {*CASES[name].wide, *CASES[name].dots}
            out[name] = [
                offline.compile(launch, chip, offline.name(launch) in looked_at)
                for launch in recorded
            ]
        except Exception:
            out[name] = traceback.format_exc()
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default="", help="only those with this in their name")
    parser.add_argument("--chips", nargs="+", default=list(chips.CHIPS), choices=chips.CHIPS)
    parser.add_argument("--jobs", type=int, help="processes; as many as CPUs if not given")
    parser.add_argument(
        "--all", action="store_true", help="print all cases, not each kernel's worst"
    )
    results = Path(__file__).with_name("results")
    default = results / "compile.csv" if results.is_dir() else None
    parser.add_argument("--csv", type=Path, default=default, help="written anew: %(default)s")
    args = parser.parse_args(argv)
    names = [name for name in CASES if args.cases in name]
    rows = []
    with offline.processes(args.jobs) as pool:
        for chip, cases in zip(
            args.chips, pool.map(compile_cases, [names] * len(args.chips), args.chips), strict=True
        ):
            for case, compiled in cases.items():
                if isinstance(compiled, str):
                    raise SystemExit(f"{case}, {chip}:\n{compiled}")
                rows += [{"case": case, **one._asdict()} for one in compiled]
    rows.sort(key=lambda row: (row["kernel"], names.index(row["case"])))  # chips stay in order
    _show(rows if args.all else _worst(rows))
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"occupancy": f"{row['occupancy']:.2f}"} for row in rows)
    bad = [row for row in rows if row["spills"] or row["local_bytes"]]
    if bad:
        names = [f"{row['kernel']}, {row['case']}, {row['chip']}" for row in bad]
        raise SystemExit("\n".join(["spilled registers or local memory:", *names]))


def _worst(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel on each chip the case of least occupancy; of those, of most registers."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kept = worst.setdefault((row["kernel"], row["chip"]), row)
        if (row["occupancy"], -row["registers"]) < (kept["occupancy"], -kept["registers"]):
            worst[row["kernel"], row["chip"]] = row
    return list(worst.values())


def _show(rows: Iterable[dict[str, Any]]) -> None:
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        cells = row | {"occupancy": f"{row['occupancy']:.2f}"}
        print(f"| {' | '.join(str(cells[column]) for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
