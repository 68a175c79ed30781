"""A GPU that is not there: what it would be given is counted instead.

    with played.gpu() as gpu:
        model(**{name: gpu.put(x) for name, x in inputs.items()})  # the model on the meta device
    gpu.total(), gpu.launches

Tensors of the meta device, which have shapes and no numbers, say that they are on a GPU, and what
would run on them is listed. Whole numbers keep their values beside it, so that what depends on them
goes the way of a real batch. An operation of torch counts as one launch, though some launch several
kernels; views, allocations and empty outputs launch nothing. A wait is where the host stops until
the GPU is done: a copy that is not ``non_blocking`` or whose memory on the host is not pinned, and
every operation whose result, or the shape of it, the host must know. Bytes are of all launches but
matrix products and the kernels of attention, head and loss: what is read and written, a broadcast
input once.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from rmfast.benchmarks import offline
from rmfast.kernels import chips

GPU, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
# allocations, and a view whose schema does not say so
_FREE = set("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view".split())
_PRODUCTS = set("mm addmm bmm baddbmm".split())
_INDEXES = set("index index_put index_put_ _index_put_impl_".split())
_LOOKS_UP = set("embedding gather index index_select".split())  # and reads no other row
_FILLS = set("copy_ fill_ zero_".split())  # what was there is not read
_ASKED = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_KNOWN = 1 << 20  # elements up to which values are kept

_device, _there = torch._C.TensorBase.device.__get__, torch._C.TensorBase.is_meta.__get__


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _bytes(x: Tensor) -> int:
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * torch.Size(sizes).numel() if x.numel() else 0


class Gpu(TorchDispatchMode):
    """What the block gives to the GPU.

    Attributes:
        launches: how often each operation of torch and each kernel of Triton was launched.
        counts: ``copies to the GPU``, ``copies to the host``, ``waits`` and ``bytes``.
    """

    # under such a mode torch makes tensors on CUDA without starting it
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.honest = False  # while torch works out shapes: tensors are on the meta device
        self._values = WeakTensorKeyDictionary()
        self._pinned: dict[int, Any] = {}  # storages on the host, by address

    def total(self) -> Counter[str]:
        return Counter(launches=self.launches.total(), **self.counts)

    def put(self, x: Tensor) -> Tensor:
        """``x`` on the GPU, where it has been all along: no copy is counted."""
        return self._know(torch.empty_like(x, device=META), x)

    def twice(self, run: Callable[[], object]) -> Counter[str]:
        """Counts of the second run: what is made once does not count."""
        run()
        before = self.total()
        run()
        return minus(self.total(), before)

    def triton(self, launch: offline.Launch) -> None:
        name = offline.name(launch)
        self.launches[name] += 1
        if name.startswith("elementwise."):
            tensors = {id(x): x for x in _tensors(launch.arguments)}
            self.counts["bytes"] += sum(map(_bytes, tensors.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if func.namespace == "rmfast":  # opaque to torch: what is inside counts
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        inputs, target = _tensors((args, kwargs)), kwargs.get("device")
        if not any(map(_there, inputs)) and (target or CPU).type == "cpu":
            return self._on_host(func, name, args, kwargs)
        with self:  # where autograd is off, operations made of others come here whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            to_host = (args[0].device if name == "copy_" else target or source.device).type == "cpu"
            if _there(source) == to_host:
                return self._copy(func, name, source, args, kwargs)
            if target is not None and kwargs.get("dtype") in (None, source.dtype):
                return source.detach()  # it is there
        for x in inputs if name.startswith("index") else ():  # indices are moved first
            self._count_copy("copies to the GPU", x.dim() and not _there(x), True)
        return self._launch(func, name, inputs, args, kwargs)

    def _on_host(self, func, name, args, kwargs):
        kwargs = dict(kwargs)
        pinning = name in ("pin_memory", "_pin_memory")
        pins = kwargs.pop("pin_memory", None) or pinning
        if name == "is_pinned":
            return self._is_pinned(args[0])
        out = args[0].clone() if pinning else func(*args, **kwargs)
        if pins:
            self._pinned[out.untyped_storage().data_ptr()] = out.untyped_storage()
        return out

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned

    def _count_copy(self, way: str, some: bool | int, waits: bool) -> None:
        self.counts.update({way: bool(some), "waits": bool(some) and waits})

    def _copy(self, func, name, source, args, kwargs):
        """Between the host and the GPU."""
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        if not _there(source):
            self._count_copy(
                "copies to the GPU", source.numel(), waits or not self._is_pinned(source)
            )
            out = self._shaped(func, args, kwargs)
            return self._know(out, source.to(out.dtype, copy=True))
        # torch pins what it makes for a copy that does not wait
        waits |= name == "copy_" and not self._is_pinned(args[0])
        self._count_copy("copies to the host", source.numel(), waits)
        args, kwargs = self._valued((args, kwargs))
        return func(*args, **kwargs)

    def _launch(self, func, name, inputs, args, kwargs):
        waits = bool(_ASKED & set(func.tags))
        if name in _INDEXES:  # by a mask only
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        known = all(x in self._values for x in inputs if _there(x))
        out = None if waits else self._shaped(func, args, kwargs)
        small = all(x.numel() <= _KNOWN and not x.is_floating_point() for x in _tensors(out))
        if waits or (known and small):
            args, kwargs = self._valued((args, kwargs))
            values = func(*args, **kwargs)
            if waits:
                out = tree_map(lambda x: self.put(x) if isinstance(x, Tensor) else x, values)
            for x, value in zip(_tensors(out), _tensors(values), strict=True):
                self._know(x, torch.zeros_like(value) if "empty" in name else value)
        elif not view:
            for x in _tensors(out):
                self._values.pop(x, None)
        outs = _tensors(out)
        self.counts.update({"waits": waits, "copies to the host": name == "_local_scalar_dense"})
        if not view and name not in _FREE and (waits or any(x.numel() for x in outs)):
            self.launches[name] += name != "_local_scalar_dense"
            if name not in _PRODUCTS:
                read = [*outs, *inputs[1:]] if name in _LOOKS_UP else inputs[name in _FILLS :]
                self.counts["bytes"] += sum(_bytes(x) for x in (*read, *outs) if _there(x))
        return out

    def _shaped(self, func, args, kwargs):
        """What it returns, without numbers."""
        kwargs = {k: META if isinstance(x, torch.device) else x for k, x in kwargs.items()}
        self.honest = True
        try:
            return func(*args, **kwargs)
        finally:
            self.honest = False

    def _valued(self, tree):
        """Values on the host, ones where they are not known."""

        def value(x: Any) -> Any:
            if isinstance(x, torch.device):
                return CPU
            if not (isinstance(x, Tensor) and _there(x)):
                return x
            return self._values.get(x, torch.ones(x.shape, dtype=x.dtype))

        return tree_map(value, tree)

    def _know(self, x: Tensor, values: Tensor) -> Tensor:
        if x.numel() <= _KNOWN and not x.is_floating_point():
            self._values[x] = values
        return x


@contextlib.contextmanager
def gpu() -> Iterator[Gpu]:
    """Inside the block tensors of the meta device are on an H100, as all Python code sees it."""
    there, nothing, tensor = Gpu(), contextlib.nullcontext, torch.tensor
    stream = types.SimpleNamespace(cuda_stream=-1)  # no real one: kernels keep counters by it
    h100 = types.SimpleNamespace(multi_processor_count=132)

    def device(x: Tensor) -> torch.device:
        return GPU if _there(x) and not there.honest else _device(x)

    def made(data: Any, device: Any = None, **options: Any) -> Tensor:  # no mode sees that copy
        return tensor(data, **options).to(device or CPU)

    changes: list[tuple[Any, str, Any]] = [
        (torch, "tensor", made),
        (torch.Tensor, "new_tensor", lambda x, data: made(data, x.device, dtype=x.dtype)),
        (torch.Tensor, "device", property(device)),
        (torch.Tensor, "is_cuda", property(lambda x: device(x).type == "cuda")),
        (torch.Tensor, "is_meta", property(lambda x: device(x).type == "meta")),
        (torch, "autocast", lambda *_, **__: nothing()),
        (torch.cuda, "device", nothing),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_properties", lambda *_: h100),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, new in changes:
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(chips.launching_for("sm_90"))
        stack.enter_context(offline.record(there.triton))
        yield stack.enter_context(there)


def minus(a: Counter[str], b: Counter[str], times: int = 1) -> Counter[str]:
    return Counter({name: a[name] - times * b[name] for name in a | b})
