"""Counts what a GPU would be given, without one: launches, copies each way, waits, bytes.

    python -m rmfast.benchmarks.launches

The meta device plays the GPU: tensors on it have shapes and no numbers, and what would run on them
is listed instead. Whole numbers keep their values beside it, so that what depends on them goes the
way of a real batch. An operation of torch counts as one launch, though some launch several kernels;
views, allocations and empty outputs launch nothing. A wait is where the host stops until the device
is done: a copy that is not ``non_blocking`` or whose memory on the host is not pinned, and every
operation whose output's shape, or whose result, depends on values. Bytes are of all launches but
matrix products and the kernels of attention, head and loss: what is read and written, a broadcast
input once.

Models have 2 and 3 layers; a layer is the difference, and the whole is as deep as the real one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

import rmfast
from rmfast import ops
from rmfast.benchmarks import contestants, gpu_common, offline
from rmfast.kernels import chips
from rmfast.packed.step import Step
from rmfast.train.batches import Collator
from rmfast.train.objective import Objective

GPU = "meta"

# --- the device that is not there

# allocations, and views whose schema does not say so
_FREE = set("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view".split())
_PRODUCTS = set("mm addmm bmm baddbmm linear".split())
_LOOKS_UP = set("embedding gather index index_select".split())  # and reads no other row
_INDEXES = set("index index_put index_put_ _index_put_impl_".split())
_FILLS = set("copy_ fill_ zero_".split())  # what was there is not read
_KNOWN = 1 << 20  # elements up to which values are kept


def _there(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == GPU


def _bytes(x: Tensor) -> int:
    shape = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.element_size() * int(torch.Size(shape).numel()) if x.numel() else 0


class Device(TorchDispatchMode):
    """What the block gives to the device.

    Attributes:
        launches: how often each operation was launched, and each kernel of Triton.
        counts: ``to device`` and ``to host`` (copies), ``waits``, ``bytes``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._values = WeakTensorKeyDictionary()
        self._pinned: dict[int, Any] = {}  # storages on the host, by address

    def total(self) -> Counter[str]:
        return Counter(launches=self.launches.total(), **self.counts)

    def put(self, x: Tensor) -> Tensor:
        """``x`` on the device, where it has been all along: no copy is counted."""
        return self._know(torch.empty_like(x, device=GPU), x)

    def kernel(self, launch: offline.Launch) -> None:
        """A launch of Triton's."""
        name = offline.name(launch)
        self.launches[name] += 1
        if name.startswith("elementwise."):
            tensors = {id(x): x for x in launch.arguments.values() if _there(x)}
            self.counts["bytes"] += sum(map(_bytes, tensors.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if func.namespace == "rmfast":  # opaque to torch: what is inside counts
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        if not any(map(_there, inputs)) and torch.device(kwargs.get("device") or "cpu").type != GPU:
            return self._on_host(func, name, args, kwargs)
        with self:  # below autograd an operation made of others comes as it is
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        target = args[0].device if name == "copy_" else kwargs.get("device")
        if name in ("_to_copy", "copy_") and target is not None:
            source = args[name == "copy_"]
            if torch.device(target).type != source.device.type:
                return self._copy(func, name, source, args, kwargs)
        for x in inputs if name.startswith("index") else ():  # it copies indices first
            if x.dim() and not _there(x):
                self.counts.update({"to device": 1, "waits": 1})
        return self._launch(func, name, inputs, args, kwargs)

    def _on_host(self, func, name, args, kwargs):
        pinned = kwargs.get("pin_memory") or name == "_pin_memory"
        if name == "is_pinned":
            return args[0].untyped_storage().data_ptr() in self._pinned
        if name == "_pin_memory":
            out = args[0].clone()
        else:
            out = func(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})
        if pinned:
            self._pinned[out.untyped_storage().data_ptr()] = out.untyped_storage()
        return out

    def _copy(self, func, name, source, args, kwargs):
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        host = args[0] if _there(source) else source
        # a copy to the host that does not block goes to pinned memory, unless it is given some
        if not (name == "_to_copy" and _there(source)):
            blocking |= host.untyped_storage().data_ptr() not in self._pinned
        if source.numel():
            self.counts.update({"to host" if _there(source) else "to device": 1, "waits": blocking})
        if not _there(source):
            out = func(*args, **kwargs)
            return self._know(out, source.to(out.dtype, copy=True))
        values = self._values.get(source)
        values = torch.zeros(source.shape, dtype=source.dtype) if values is None else values
        if name == "copy_":
            return args[0].copy_(values)
        return func(values, **kwargs)

    def _launch(self, func, name, inputs, args, kwargs):
        tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        waits = bool(tags & set(func.tags))
        if name in _INDEXES:  # by a mask only
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        self.counts["waits"] += waits
        out = self._run(func, args, kwargs) if waits else func(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if _there(x)]
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if name == "_local_scalar_dense":
            self.counts["to host"] += 1
        elif (waits or any(x.numel() for x in outs)) and not view and name not in _FREE:
            self.launches[name] += 1
            if name not in _PRODUCTS:
                read = inputs[name in _FILLS :]
                if name in _LOOKS_UP:
                    read = [*outs, *inputs[1:]]
                self.counts["bytes"] += sum(map(_bytes, [*filter(_there, read), *outs]))
        known = all(x in self._values for x in inputs if _there(x)) and name not in _FREE
        small = all(x.numel() <= _KNOWN and not x.is_floating_point() for x in outs)
        if not waits and known and small:
            leaves = tree_leaves(self._run(func, args, kwargs, values=True))
            for x, value in zip(outs, filter(lambda x: isinstance(x, Tensor), leaves), strict=True):
                self._know(x, value)
        elif not (waits or view):
            for x in outs:
                self._values.pop(x, None)
        return out

    def _run(self, func, args, kwargs, values: bool = False):
        """On the values, ones where they are not known; its output on the device, or its values."""

        def value(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            if not _there(x):
                return x
            known = self._values.get(x)
            return torch.ones(x.shape, dtype=x.dtype) if known is None else known

        out = func(*tree_map(value, args), **tree_map(value, kwargs))
        return out if values else tree_map(lambda x: self.put(x) if _on_host(x) else x, out)

    def _know(self, x: Tensor, values: Tensor) -> Tensor:
        if x.numel() <= _KNOWN and not x.is_floating_point():
            self._values[x] = values
        return x


def _on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and not _there(x)


@contextlib.contextmanager
def played() -> Iterator[Device]:
    """Inside the block ``meta`` is an H100: it says so itself, and kernels of Triton run there."""
    seen, tensor = Device(), torch.tensor

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:  # on the host, then moved
        return tensor(data, **options).to(device)

    def made_like(x: Tensor, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return made(data, device=device or x.device, **{"dtype": x.dtype, **options})

    changes: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(_there)),
        (torch.Tensor, "is_meta", property(lambda x: False)),
        (torch.Tensor, "new_tensor", made_like),
        (torch, "tensor", made),
        (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
        (torch, "is_autocast_enabled", lambda *_: False),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, new in changes:
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(chips.launching_for("sm_90"))
        stack.enter_context(offline.record(seen.kernel))
        yield stack.enter_context(seen)


# --- what is counted

SHAPES = {"Qwen3-0.6B": "0.6B", "Llama-8B": "8B"}  # as they are called in gpu_common
PAIRS = 16
Run = Callable[[nn.Module, Device], Counter[str]]


def build(name: str, layers: int) -> nn.Module:
    """A patched reward model in bf16, on the device."""
    made, *sizes = gpu_common.SHAPES[SHAPES[name]]
    sizes = dict(zip(gpu_common.SIZES, sizes, strict=True)) | {"num_hidden_layers": layers}
    config = made.config_class(num_labels=1, pad_token_id=0, use_cache=False, **sizes)
    with torch.device(GPU):
        model = made._from_config(config, dtype=torch.bfloat16)
    return rmfast.patch(model.eval())


def twice(seen: Device, run: Callable[[], object]) -> Counter[str]:
    """Counts of the second run: what is made once does not count."""
    run()
    before = seen.total()
    run()
    return _minus(seen.total(), before)


def _minus(a: Counter[str], b: Counter[str], times: int = 1) -> Counter[str]:
    return Counter({name: a[name] - times * b[name] for name in a | b})


def _padded(seen: Device) -> dict[str, Tensor]:
    inputs = contestants.padded(gpu_common.rows_of("pairs"), range(2 * PAIRS), 0)
    return {name: seen.put(x) for name, x in inputs.items()}


def scored(model: nn.Module, seen: Device) -> Counter[str]:
    def run() -> None:
        with torch.no_grad():
            model(**inputs)

    inputs = _padded(seen)
    return twice(seen, run)


def with_gradients(model: nn.Module, seen: Device) -> Counter[str]:
    def run() -> None:
        model.zero_grad()
        model(**inputs).logits.backward(torch.empty(2 * PAIRS, 1, device=GPU))

    inputs = _padded(seen)
    return twice(seen, run)


def window(model: nn.Module, seen: Device) -> Counter[str]:
    scorer = rmfast.Scorer(model, max_tokens=1 << 16)
    return twice(seen, lambda: scorer.score(gpu_common.rows_of("pairs")))


def piece(model: nn.Module, seen: Device) -> Counter[str]:
    """From the end of the second piece to that of the third, both in the midst of a group."""
    ends: list[Counter[str]] = []
    scorer = rmfast.Scorer(model, max_tokens=512, progress=lambda *_: ends.append(seen.total()))
    scorer.score(gpu_common.rows_of("groups")[:8])  # 600 tokens that all share, 8 times 200
    return _minus(ends[2], ends[1])


def step(model: nn.Module, seen: Device) -> Counter[str]:
    """With the copies of the batch, as a trainer makes them."""
    rows = gpu_common.rows_of("pairs")[: 2 * PAIRS]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    batch = Collator(0)([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs])
    batch = {k: x.pin_memory() if isinstance(x, Tensor) else x for k, x in batch.items()}

    def move(x: Any) -> Any:
        return x.to(GPU, non_blocking=True) if isinstance(x, Tensor) else x

    def run() -> None:
        model.train().zero_grad()
        moved = {name: move(x) for name, x in batch.items()}
        loss = model(
            input_ids=moved["input_ids"][None], rmfast_step=Step(moved, Objective(), PAIRS)
        ).loss
        loss.backward()

    return twice(seen, run)


CASES: dict[str, Run] = {
    "padded batch, no gradients": scored,
    "padded batch, forward and backward": with_gradients,
    "window of a Scorer": window,
    "carried piece of a Scorer": piece,
    "training step": step,
}


class Figure(NamedTuple):
    what: str
    case: str
    figure: float


def of_models(names: Sequence[str] = tuple(SHAPES)) -> Iterator[Figure]:
    for name in names:
        depth = gpu_common.SHAPES[SHAPES[name]][3]
        for case, run in CASES.items():
            found = []
            for layers in (2, 3):
                with played() as seen:
                    found.append(run(build(name, layers), seen))
            layer = _minus(*found[::-1])
            whole = _minus(found[0], layer, 2 - depth)
            for what in ("launches", "to device", "to host", "waits"):
                yield Figure(what, f"{case}, {name}", whole[what])
            yield Figure("launches a layer", f"{case}, {name}", layer["launches"])
            if run is scored:
                nodes = len(rmfast.pack(gpu_common.rows_of("pairs")[: 2 * PAIRS]))
                figure = round(layer["bytes"] / nodes)
                yield Figure("elementwise bytes a token and layer, forward", name, figure)


def plan(nodes: int, carried: bool, window: int | None, backward: bool) -> Counter[str]:
    """What a first call of attention has beyond a second one."""
    first = 1024 if carried else 0
    rows = [torch.cat([torch.zeros(first), torch.arange(1, 513) + i]).long() for i in range(1024)]
    trie = rmfast.pack(rows[: (nodes - first) // 512])
    with played() as seen:
        heads = (
            torch.empty(1, n, h, 128, dtype=torch.bfloat16, device=GPU)
            for n, h in ((len(trie) - first, 16), (len(trie), 8), (len(trie), 8))
        )
        q, k, v = (x.transpose(1, 2).requires_grad_(backward) for x in heads)
        trie = rmfast.PackedTrie(*(seen.put(x) for x in vars(trie).values()))
        counts, made = [seen.total()], None
        for _ in range(2):
            if made is None:
                rows = torch.arange(first, len(trie), device=GPU) if first else None
                made = ops.TriePlan(trie.subtree_end, trie.position_ids, rows)
            out = ops.trie_attention(q, k, v, made, window=window)
            if backward:
                out.backward(torch.empty_like(out))
                q.grad = k.grad = v.grad = None
            counts.append(seen.total())
    return _minus(_minus(counts[1], counts[0]), _minus(counts[2], counts[1]))


def of_plans() -> Iterator[Figure]:
    for nodes in (1 << 14, 1 << 16):
        for carried in (False, True):
            for window in (None, 4096):
                for backward in (False,) if carried else (False, True):
                    case = f"{nodes >> 10}k nodes, " + ("carried" if carried else "whole")
                    case += f", window {window}" if window else ""
                    case += ", forward and backward" if backward else ""
                    found = plan(nodes, carried, window, backward)
                    yield Figure("launches of a plan", case, found["launches"])
                    yield Figure("waits of a plan", case, found["waits"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("launches", description=__doc__.partition("\n")[0])
    results = Path(__file__).with_name("results")
    default = results / "launches.csv" if results.is_dir() else None
    parser.add_argument("--csv", type=Path, default=default, help="written anew: %(default)s")
    args = parser.parse_args(argv)
    figures = sorted([*of_models(), *of_plans()])
    print(f"| {' | '.join(Figure._fields)} |\n|{'---|' * len(Figure._fields)}")
    for one in figures:
        print(f"| {' | '.join(map(str, one))} |")
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Figure._fields, *figures])


if __name__ == "__main__":
    main()
