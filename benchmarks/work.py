"""Counts work instead of timing it: what kernels move and launch, against the least there is to do.

    python -m rmfast.benchmarks.work

No GPU is needed. Bytes are counted while Triton's interpreter runs the kernels, launch by launch:
each address that is read once, whatever read it how often (a repeat is served by the cache as long
as the rows of a batch fit into it), and each store each time. Launches are counted in one training
step of head and loss, forward and backward: Triton's, and torch's operations that write memory
(views and allocations launch nothing; an operation counts as one, though on a GPU some launch
several kernels). The gradient of the loss, a one, is given. Attention: tiles visited, against the
mask itself; instructions of the loop over full tiles, against those of plain causal attention
compiled from the same source. Of a decoder layer what runs element by element is counted on meta
tensors, with the kernels and as transformers runs it: there the ratio is what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmfast
from rmfast.benchmarks import attention_work, launches
from rmfast.kernels import chips


class Figure(NamedTuple):
    what: str
    case: str
    counted: float
    least: float | None
    ratio: float | None  # counted / least
    limit: float | None  # that the ratio, or without one the count, may have


def figure(
    what: str, case: str, counted: float, least: float | None = None, limit: float | None = None
) -> Figure:
    ratio = None if least is None else counted / least
    return Figure(what, case, counted, least, ratio, limit)


# --- bytes


class Traffic(NamedTuple):
    """Bytes of one launch."""

    kernel: str
    read: int
    written: int


@contextlib.contextmanager
def traffic() -> Iterator[list[Traffic]]:
    """Launches inside the block, in a process where Triton interprets."""
    from triton.runtime import interpreter

    done: list[Traffic] = []
    reads: dict[int, list[np.ndarray]] = {}  # addresses by bytes of an element
    written = [0]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, rmw = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    )  # fmt: skip
    launch = executor.__call__

    def size(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def read(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        reads.setdefault(size(pointers), []).append(np.unique(addresses))

    def write(pointers: Any, mask: Any) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        written[0] += size(pointers) * int(np.broadcast_to(mask.data, shape).sum())

    def loads(self, pointers, mask, *rest):
        read(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stores(self, pointers, value, mask, *rest):
        write(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def atomics(self, operation, pointers, value, mask, *rest):
        read(pointers, mask)
        write(pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest)

    def launches_(self, *args, **kwargs):
        reads.clear()
        written[0] = 0
        launch(self, *args, **kwargs)
        distinct = sum(k * np.unique(np.concatenate(v)).size for k, v in reads.items())
        name = f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}"
        done.append(Traffic(name, distinct, written[0]))

    builder.create_masked_load, builder.create_masked_store = loads, stores
    builder.create_atomic_rmw, executor.__call__ = atomics, launches_
    try:
        yield done
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, executor.__call__ = rmw, launch


TOKENS, WIDTH, BATCH = 512, 4096, 32  # rows of hidden; sequences, half of them chosen


def bytes_moved() -> list[Figure]:
    """All but attention. The least is what the kernels' own docstrings say, tensor by tensor."""
    kinds = (_head_bytes, _fused_bytes, _pairwise_bytes, _listwise_bytes, _elementwise_bytes)
    cases = [case for kind in kinds for case in kind()]
    out = []
    for name, call, least in cases:
        with traffic() as moved:
            call()
        counted = sum(one.read + one.written for one in moved)
        out.append(figure("bytes moved", name, counted, least, 1.05))
    return out


def _head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype)
    return hidden, torch.randperm(TOKENS)[:BATCH], torch.randn(1, WIDTH).to(dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


_Case = tuple[str, Callable[[], object], int]


def _head_bytes() -> Iterable[_Case]:
    from rmfast.kernels import reward_head as kernel

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hidden, index, weight = _head(dtype)
        scores = torch.randn(BATCH, 1)
        rows = hidden[index]
        yield (
            f"head forward, {name}",
            lambda args=(hidden, index, weight): kernel.reward_head(*args, None),
            _bytes(rows, weight, index, scores),
        )
        yield (
            f"head backward, {name}",
            lambda args=(scores, hidden, index, weight): kernel.reward_head_backward(*args, None),
            _bytes(scores, rows, index, weight) + _bytes(hidden, weight),
        )


def _fused_bytes() -> Iterable[_Case]:
    from rmfast import ops

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hidden, index, weight = _head(dtype)
        scores, pairs, metrics, loss = (torch.empty(n) for n in (BATCH, BATCH, 6, 1))
        forward = _bytes(hidden[index], weight, index, scores, pairs, metrics, loss)
        backward = _bytes(weight, index, pairs, loss) + _bytes(hidden, weight)

        def step(hidden=hidden, index=index, weight=weight) -> None:
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            loss = ops.reward_head_pairwise_loss(leaves[0], index, leaves[1]).loss
            loss.backward(torch.ones(()))

        yield f"head and loss, forward and backward, {name}", step, forward + backward


def _pairwise_bytes() -> Iterable[_Case]:
    from rmfast import ops

    scores = torch.randn(4096)
    pairs, metrics, loss = torch.empty(4096), torch.empty(6), torch.empty(1)

    def step() -> None:
        ops.pairwise_loss(scores.clone().requires_grad_()).loss.backward(torch.ones(()))

    least = _bytes(scores, loss, metrics, pairs) + _bytes(loss, pairs, scores)
    yield "pairwise loss, forward and backward", step, least


def _listwise_bytes() -> Iterable[_Case]:
    from rmfast import ops

    scores, ranks, offsets = torch.randn(512), torch.arange(512) % 16, torch.arange(0, 513, 16)
    losses, slope = torch.empty(32), torch.empty(512)
    least = _bytes(scores, ranks, offsets, losses, slope) + _bytes(losses, slope, offsets, scores)
    for kind in ("all_pairs", "plackett_luce"):

        def step(kind=kind) -> None:
            leaf = scores.clone().requires_grad_()
            loss = ops.listwise_loss(
                leaf, ranks, offsets, kind=kind, reduction="none", max_size=16
            )  # fmt: skip
            loss.backward(torch.ones(32))

        yield f"{kind}, forward and backward", step, least


def _elementwise_bytes() -> Iterable[_Case]:
    from rmfast.kernels import elementwise as kernel

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, grad, up = torch.randn(3, 64, 1024).to(dtype)
        weight, eps = torch.randn(1024).to(dtype), 1e-6
        q, k = (torch.randn(1, 32, heads, 128).to(dtype).transpose(1, 2) for heads in (16, 8))
        cos, sin = torch.randn(2, 1, 32, 128).to(dtype)
        turned, norms = 2 * _bytes(q, k) + _bytes(cos, sin), 3 * _bytes(x) + _bytes(weight)
        parts = torch.empty(2, 32, 1024)  # of two rows each, written and read
        cases = {
            "RMSNorm": (kernel.rms_norm, (x, weight, eps, 0.0, False), norms - _bytes(x)),
            "RMSNorm backward, frozen": (
                kernel.rms_norm_backward, (grad, x, weight, eps, 0.0, False), norms,
            ),
            "RMSNorm backward": (
                kernel.rms_norm_backward, (grad, x, weight, eps, 0.0),
                norms + _bytes(parts, weight),
            ),
            "rotary": (kernel.rotary, (q, k, cos, sin), turned),
            "rotary backward": (kernel.rotary, (q, k, cos, sin, True), turned),
            "SwiGLU": (kernel.gated, (x, up, False), 3 * _bytes(x)),
            "SwiGLU backward": (kernel.gated_backward, (grad, x, up, False), 5 * _bytes(x)),
        }  # fmt: skip
        for case, (function, arguments, least) in cases.items():
            yield f"{case}, {name}", functools.partial(function, *arguments), least


class _Layer(TorchDispatchMode):
    """Bytes of what runs element by element: each operand of each operation once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not (view or name in _FREE or name in ("mm", "addmm")):
            self.bytes += _bytes(*(x for x in tree_leaves((args, out)) if isinstance(x, Tensor)))
            self.launches += 1
        return out


def layers() -> list[Figure]:
    """A decoder layer without matmuls and attention: with kernels, and as transformers runs it."""
    transformers.AttentionInterface.register(
        "none", lambda module, query, *_, **__: (torch.empty_like(query.transpose(1, 2)), None)
    )
    out = []
    for name, cls, hidden, inner, heads in (
        ("Llama-8B", transformers.LlamaConfig, 4096, 14336, 32),
        ("Qwen3-0.6B", transformers.Qwen3Config, 1024, 3072, 16),
    ):
        config = cls(
            hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=128, num_hidden_layers=1, vocab_size=8,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(
                config, dtype=torch.bfloat16, attn_implementation="none"
            )
            x, *tables = torch.empty(3, 1, TOKENS, hidden, dtype=torch.bfloat16)
        tables = [table[..., :128].contiguous() for table in tables]
        counted = []
        for _ in range(2):
            with torch.no_grad(), _Layer() as seen:
                model.model.layers[0](x, position_embeddings=tables)
            counted.append(seen)
            rmfast.patch(model)
        theirs, ours = ((one.bytes // TOKENS, one.launches) for one in counted)
        for unit, a, b in zip(("bytes a token", "launches"), ours, theirs, strict=True):
            what = f"{unit}, a layer element by element, forward, bf16, of transformers' own"
            out.append(figure(what, name, a, b, 0.35))
    return out


# --- launches

# allocations, and the one view whose schema does not say so
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of what runs on the device inside the block, in a process where Triton interprets."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._interpreting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rmfast":  # opaque to torch: what is inside counts
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not (self._interpreting or view or name in _FREE):
            self.names.append(name)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def and_triton(self) -> Iterator[Launches]:
        from triton.runtime import interpreter

        launch = interpreter.GridExecutor.__call__

        def run(executor, *args, **kwargs):
            self.names.append(executor.fn.__name__)
            self._interpreting = True  # the interpreter's own use of torch is nobody's launch
            try:
                launch(executor, *args, **kwargs)
            finally:
                self._interpreting = False

        interpreter.GridExecutor.__call__ = run
        try:
            with self:
                yield self
        finally:
            interpreter.GridExecutor.__call__ = launch


def launches_per_step() -> list[Figure]:
    """A training step of head and loss, on the rows of a packed batch and on a padded one."""
    from rmfast import ops

    def rmfast(hidden, index, weight):
        return ops.reward_head_pairwise_loss(hidden, index, weight).loss

    def rmfast_apart(hidden, index, weight):
        return ops.pairwise_loss(ops.reward_head(hidden, index, weight)).loss

    def eager(hidden, index, weight):
        chosen, rejected = F.linear(hidden[index].float(), weight.float())[:, 0].chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def hugging_face(hidden, ids, weight):  # its sequence classifiers' pooling, and TRL's loss
        logits = F.linear(hidden, weight)
        columns = torch.arange(ids.shape[-1], dtype=torch.int32)
        last = (columns * (ids != 0).to(torch.int32)).argmax(-1)
        pooled = logits[torch.arange(len(ids)), last]
        chosen, rejected = pooled.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    hidden, index, weight = _head(torch.bfloat16)
    ids = torch.randint(1, 9, (BATCH, TOKENS // BATCH))
    padded = hidden.view(*ids.shape, WIDTH)
    contestants: list[tuple[str, Callable, Tensor, Tensor, int | None]] = [
        ("rmfast, one op", rmfast, hidden, index, 2),
        ("rmfast, head and loss apart", rmfast_apart, hidden, index, 4),
        ("eager torch on the pooled rows", eager, hidden, index, None),
        ("Hugging Face and TRL on the padded batch", hugging_face, padded, ids, None),
    ]
    out = []
    for name, loss, states, rows, limit in contestants:
        leaves = [x.clone().requires_grad_() for x in (states, weight)]
        # once before: what is made at the first launch and kept does not count
        one = torch.ones((), dtype=loss(leaves[0], rows, leaves[1]).dtype)
        with Launches().and_triton() as seen:
            loss(leaves[0], rows, leaves[1]).backward(one)
        out.append(figure("launches a step", name, len(seen.names), limit=limit))
    return out


# --- attention

TILES = ((128, 64, None), (64, 128, None), (128, 64, 128))  # queries, keys, sliding window


def tiles_visited(data: Path | None = None) -> list[Figure]:
    """Tiles that the kernels visit, against those that hold a pair the mask allows."""
    out = []
    for name, trie in attention_work.tries(data).items():
        for rows, nodes, window in TILES:
            case = f"{name}, {len(trie)} nodes, {rows} x {nodes}"
            case += "" if window is None else f", window {window}"
            counted, least = attention_work.tiles(trie, rows, nodes, window)
            out.append(figure("tiles visited", case, counted, least, 1.0))
    return out


def loop_instructions(chip_names: Iterable[str]) -> list[Figure]:
    """Instructions of the full-tile loop, against plain causal attention of the same source."""
    out = []
    for kernel, chip, width, counted, least in attention_work.instructions(chip_names, (64, 128)):
        # AMD's loops are short, and looking up a tile takes 8 scalar instructions there
        limit = 1.025 if chips.CHIPS[chip].backend == "cuda" else 1.05
        what, case = f"instructions a full tile, {kernel}", f"{chip}, D {width}"
        out.append(figure(what, case, counted, least, limit))
    return out


def count(chip_names: Iterable[str], data: Path | None = None) -> list[Figure]:
    """Every figure."""
    with launches.processes(1, interpret=True) as pool:
        functions = (bytes_moved, layers, launches_per_step)
        interpreted = [pool.submit(function) for function in functions]
        figures = [one for done in interpreted for one in done.result()]
    return [*figures, *tiles_visited(data), *loop_instructions(chip_names)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("work", description=__doc__.partition("\n")[0])
    results = Path(__file__).with_name("results")
    default = results / "work.csv" if results.is_dir() else None
    parser.add_argument("--csv", type=Path, default=default, help="written anew: %(default)s")
    parser.add_argument("--chips", nargs="*", default=list(chips.CHIPS), choices=chips.CHIPS)
    parser.add_argument("--data", type=Path, help="preference pairs as JSON lines, for the tiles")
    args = parser.parse_args(argv)
    figures = [
        one._replace(ratio=one.ratio and round(one.ratio, 4))._asdict()
        for one in count(args.chips, args.data)
    ]
    print(f"| {' | '.join(Figure._fields)} |\n|{'---|' * len(Figure._fields)}")
    for one in figures:
        print(f"| {' | '.join('' if x is None else str(x) for x in one.values())} |")
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, Figure._fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(figures)


if __name__ == "__main__":
    main()
