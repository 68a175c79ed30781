"""Is everything right on this machine's GPU? The answer takes under four minutes, whatever fails.

    python -m rmfast.benchmarks.gpu_check --out FOLDER

Each check is a process, forked from one that has imported all and touched no GPU: a kernel that
writes elsewhere, or never ends, fails its own check alone. Most of the time goes into compiling, so
checks run beside each other and beside the tests. Memory that nobody wrote is NaN, as is what lies
behind each input. Kernels are held against their definition in fp64, and against torch in the same
dtype; models against Hugging Face's. Verdicts come last; ``FOLDER/<device>.json`` has figures and
tracebacks, ``FOLDER/*.log`` what the tests said. The exit status is 1 unless all went well.
``TRITON_INTERPRET=1 … --dry`` tries it out on a CPU, tiny.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import rmfast
from rmfast import ops, reference
from rmfast.benchmarks import gpu_common
from rmfast.benchmarks.gpu_common import BF16, DEV, DRY, heads_of, noise, padded, rows_of
from rmfast.kernels import trie_attention as kernels
from rmfast.ops import _cpu as cpu
from rmfast.packed import patching

ROOT = Path(__file__).resolve().parents[1]
FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
# of an answer; torch's error may be more. The interpreter's bf16 is cut off, not rounded
ROUND = {FP32: 2.0**-20, FP16: 2.0**-9, BF16: 2.0 ** (-6 if DRY else -7)}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated inside is NaN, or a large negative integer."""
    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    before = [getattr(owner, name) for owner, name in places]

    def spoiled(make: Callable, *args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -(2**31) + 7)

    try:
        for (owner, name), make in zip(places, before, strict=True):
            setattr(owner, name, lambda *a, make=make, **k: spoiled(make, *a, **k))
        yield
    finally:
        for (owner, name), make in zip(places, before, strict=True):
            setattr(owner, name, make)


def off(got: Tensor, true: Tensor) -> tuple[float, float]:
    """Distance over size, of all and of the worst row; a small row counts as of mean size."""
    assert bool((got.isfinite() & true.isfinite()).all()), "NaN or infinity in an answer"
    true = true.detach().double()
    far, size = (x.norm(dim=-1) for x in (got.detach().double() - true, true))
    worst = (far / size.clamp_min(size.mean()).clamp_min(1e-300)).max()
    return float(far.norm() / size.norm().clamp_min(1e-300)), float(worst)


def same_bits(run: Callable[[], Any], want: Any, times: int) -> None:
    for turn in range(1 if DRY else times):
        for i, (a, b) in enumerate(zip(run(), want, strict=True)):
            assert torch.equal(a, b), f"answer {i} has other bits in run {turn}"


# --- kernels


def head(m: int, h: int, b: int) -> Iterator[dict]:
    """Head and loss as one op and as two; no row of the gradient is left out."""
    m, h, b = (40, 24, 12) if DRY else (m, h, b)
    hidden = noise(m, h, dtype=BF16).requires_grad_()
    weight = noise(1, h, dtype=BF16).div_(h**0.5).requires_grad_()
    index = torch.randint(m, (b,), device=DEV)
    index[-2:] = m - 1  # the last row, twice

    def run(two: bool) -> tuple[Tensor, ...]:
        with poisoned():
            if two:
                scores = ops.reward_head(hidden, index, weight)
                loss = ops.pairwise_loss(scores, center=0.01).loss
            else:
                loss, scores, *_ = ops.reward_head_pairwise_loss(hidden, index, weight, center=0.01)
            grads = torch.autograd.grad(loss, [hidden, weight])
        return loss.detach(), scores.detach().flatten(), *grads

    used, place = index.unique(return_inverse=True)
    w, rows = weight.detach().double(), hidden.detach()[index].double()
    scores = rows @ w[0]
    loss = reference.pairwise_loss(scores.requires_grad_(), "halves", center=0.01)[0]
    (slope,) = torch.autograd.grad(loss, scores)
    scores = scores.detach()
    by_row = torch.zeros(len(used), dtype=FP64, device=DEV).index_add_(0, place, slope)
    true = (loss.detach(), scores, by_row[:, None] * w, slope[None] @ rows)
    idle = torch.ones(m, dtype=torch.bool, device=DEV)
    idle[used] = False
    for two in (False, True):
        got = run(two)
        far = [off(a, b) for a, b in zip((*got[:2], got[2][used], got[3]), true, strict=True)]
        assert all(x < 1e-5 for x, _ in far[:2]), far
        assert all(x < ROUND[BF16] / 2 and row < ROUND[BF16] for x, row in far[2:]), far
        for part, none in zip(got[2].split(1 << 16), idle.split(1 << 16), strict=True):
            assert not part[none].any(), "a row of no score has a gradient"
        same_bits(functools.partial(run, two), got, 30)
        yield {"ops": 1 + two, "loss, scores, hidden, weight": far}


def losses() -> Iterator[list[float]]:
    """Pairs in each layout, ragged groups by both losses."""

    def checked(got: list[Tensor], true: list[Tensor]) -> list[float]:
        far = [off(a, b)[0] for a, b in zip(got, true, strict=True)]
        assert all(x < 1e-5 for x in far), far
        return far

    b = 64 if DRY else 65536
    for pairs in ("halves", "interleaved", torch.randint(b, (b, 2), device=DEV)):
        s = (3 * noise(b)).requires_grad_()
        wide = s.detach().double().requires_grad_()
        with poisoned():
            got = ops.pairwise_loss(s, pairs, label_smoothing=0.1).loss
            got = [got, *torch.autograd.grad(got, s)]
        true = reference.pairwise_loss(wide, pairs, label_smoothing=0.1)[0]
        yield checked(got, [true, *torch.autograd.grad(true, wide)])
    sizes = torch.randint(1, 65, (9 if DRY else 4000,))
    offsets = F.pad(sizes.cumsum(0), (1, 0)).to(DEV)
    for kind in ("all_pairs", "plackett_luce"):
        s = (3 * noise(int(sizes.sum()))).requires_grad_()
        ranks = torch.randint(40, s.shape, device=DEV)
        with poisoned():
            out = ops.listwise_loss(s, ranks, offsets, kind=kind, reduction="none")
            got = [out, *torch.autograd.grad(out.sum(), s)]
        wide = s.detach().double().requires_grad_()
        true = reference.listwise_loss(wide, ranks, offsets, kind, 64)
        yield checked(got, [true, *torch.autograd.grad(true.sum(), wide)])


def elementwise(h: int = 4096, d: int = 128, dtype: torch.dtype = BF16) -> Iterator[dict]:
    """RMSNorm, rotary embedding and SwiGLU, forward and backward; the same bits again."""
    n, h, d = (20, 24, 8) if DRY else (16384, h, d)
    x, up = (noise(n, h, dtype=dtype).requires_grad_() for _ in range(2))
    weight = noise(h, dtype=dtype).requires_grad_()
    q, k = (noise(n, m, d, dtype=dtype)[None].transpose(1, 2).requires_grad_() for m in (8, 2))
    cos, sin = noise(2, 1, n, d, dtype=dtype)
    calls = {
        "llama": (lambda f, *args: (f.rms_norm(*args, 1e-6),), (x, weight)),
        "gemma": (lambda f, *args: (f.rms_norm(*args, 1e-6, offset=1.0, late=True),), (x, weight)),
        "rotary": (lambda f, q, k: f.rotary(q, k, cos.to(q.dtype), sin.to(q.dtype)), (q, k)),
        "silu": (lambda f, *args: (f.gated(*args),), (x, up)),
        "gelu": (lambda f, *args: (f.gated(*args, gelu=True),), (x, up)),
    }
    for name, (call, leaves) in calls.items():
        grads = [noise(*y.shape, dtype=dtype) for y in call(ops, *leaves)]

        def run(call=call, leaves=leaves, grads=grads) -> tuple[Tensor, ...]:
            with poisoned():
                out = call(ops, *leaves)
                return *(y.detach() for y in out), *torch.autograd.grad(out, leaves, grads)

        got, wide = run(), [y.detach().double().requires_grad_() for y in leaves]
        same_bits(run, got, 10)
        out = call(reference, *wide)
        true = *out, *torch.autograd.grad(out, wide, [g.double() for g in grads])
        far = [off(a, b) for a, b in zip(got, true, strict=True)]
        # Llama's norm rounds twice
        assert all(a < ROUND[dtype] and row < 4 * ROUND[dtype] for a, row in far), (name, far)
        yield {"what": name, "answers, gradients": far}


def attention(
    kind: str = "pairs", d: int = 128, h: tuple[int, int] = (32, 8), dtype: torch.dtype = BF16,
    pooled: bool = False, window: int | None = None, softcap: float | None = None,
    sinks: bool = False, times: int = 10,
) -> Iterator[dict]:  # fmt: skip
    """All launches, bit by bit again ``times`` times; two groups of heads against fp64."""
    d, h, window = (16, (2, 1), window and 9) if DRY else (d, h, window)
    torch.manual_seed(0)
    trie = rmfast.pack(rows_of(kind)).to(DEV)
    queries = trie.pool_index.unique() if pooled else None
    rows = len(trie) if queries is None else len(queries)
    q, k, v = heads_of(trie, d, h, dtype)
    q = q if queries is None else noise(rows, h[0], d, dtype=dtype)[None].transpose(1, 2)
    grad = noise(rows, h[0], d, dtype=dtype)[None]
    extra = noise(h[0], dtype=dtype) if sinks else None
    mask, rest = (trie.subtree_end, trie.position_ids, queries), (d**-0.5, window, softcap)

    def run() -> list[Tensor]:
        with poisoned():
            out, lse = kernels.trie_attention(q, k, v, *mask, extra, *rest, True)
            got = kernels.trie_attention_backward(grad, q, k, v, *mask, extra, *rest, out, lse)
        return [x for x in (out, *got) if x is not None]

    got = run()
    same_bits(run, got, times)
    assert all(bool(x.isfinite().all()) for x in got), "NaN or infinity in some head"

    def defined(in_dtype: torch.dtype, those: slice, key: slice) -> list[Tensor | None]:
        a, b, c, g = q[:, those], k[:, key], v[:, key], grad[:, :, those]
        a, b, c, g = (x.to(in_dtype) for x in (a, b, c, g))
        whole = (a, b, c, *mask, extra[those].to(in_dtype) if sinks else None, *rest)
        return [cpu.trie_attention(*whole), *cpu.trie_attention_backward(g, *whole)]

    for group in sorted({0, h[1] - 1}):  # of heads that share a key; the last: largest offsets
        those, key = (slice(n * group, n * group + n) for n in (h[0] // h[1], 1))
        some = [got[0][:, :, those], got[1][:, those], got[2][:, key], got[3][:, key]]
        some += [x[those] for x in got[4:]]
        out, bad = {"nodes": len(trie), "rows": rows, "group": group}, []
        answers = zip(some, defined(FP64, those, key), defined(dtype, those, key), strict=False)
        for name, (ours, true, torchs) in zip("out q k v sinks".split(), answers, strict=False):
            out[name] = far, theirs = [off(x, true) for x in (ours, torchs)]
            bad += [name] * (not far[0] <= max(ROUND[dtype], 1.5 * theirs[0]))
            # a row that sees little has almost no gradient, all of it the stored output's rounding
            most = (32 if name == "q" else 4) * max(ROUND[dtype], theirs[1])
            bad += [f"{name}'s worst row"] * (not far[1] <= most)
        assert not bad, f"{bad} too far from fp64 (ours, torch's; all, worst row): {out}"
        yield out


def small() -> Iterator[str]:
    """Each kernel on little, for a checker."""
    size = 10 if DRY else 150
    rows = [np.arange(9), np.r_[np.arange(size), 7], np.r_[np.arange(size), 8, 8]]
    for dtype in (BF16,) if DRY else (BF16, FP32):
        hidden, weight = (noise(n, 2 * size, dtype=dtype).requires_grad_() for n in (90, 1))
        index, trie = torch.arange(80, device=DEV), rmfast.pack(rows).to(DEV)
        loss = ops.reward_head_pairwise_loss(hidden, index, weight).loss
        loss = loss + ops.pairwise_loss(ops.reward_head(hidden, index, weight)).loss
        ids = torch.arange(90, device=DEV).view(10, 9) % 7
        at = {"input_ids": ids, "pad_token_id": 3}
        loss = loss + ops.reward_head_pairwise_loss(hidden.view(10, 9, -1), None, weight, **at).loss
        turned = ops.rotary(*hidden.view(2, 1, 9, 5, -1).transpose(2, 3), *hidden.view(2, 1, 45, -1)
                            .detach()[..., :9, :])  # fmt: skip
        normed = ops.rms_norm(hidden, weight[0], 1e-6)
        loss = (
            loss + ops.gated(normed, hidden).float().mean() + sum(x.float().mean() for x in turned)
        )
        torch.autograd.grad(loss, [hidden, weight])
        apart = [
            np.r_[0, np.full(size // 3, i)] for i in range(1, 4 if DRY else 50)
        ]  # lists are cut
        for one, first in ((trie, 0), (trie, 5), (rmfast.pack(apart).to(DEV), 0)):
            q, k, v = heads_of(one, 16 if DRY else 64, (2, 1), dtype)
            rest = (one.subtree_end, one.position_ids, None, None, 0.1, 60, None)
            inputs = (q[:, :, first:], k, v, *rest)
            out, lse = kernels.trie_attention(*inputs, True)
            kernels.trie_attention_backward(out, *inputs, out, lse)
    yield "launched"


def sanitized(tool: str) -> Iterator[str]:
    """:func:`small` under NVIDIA's checker, each tensor an allocation of its own."""
    if DRY:
        yield from small()
        return
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    assert found, "no compute-sanitizer"
    done = subprocess.run(
        [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5",
         sys.executable, "-m", "rmfast.benchmarks.gpu_check", "--small"],
        capture_output=True, text=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    yield (done.stdout.strip().splitlines() or [""])[-1]


# --- models


def model(name: str, attention: str = "triton") -> Iterator[dict]:
    """fp32 is within 1e-4 of Hugging Face's. Of bf16, whole, in pieces and replayed, the distance
    from fp32 is at most 2 times Hugging Face's own for the scores, 1.25 times for the gradients."""
    batch, out = padded(rows_of("pairs")[:8]), {}

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        net.zero_grad()
        scores = net(**batch).logits[:, 0].float()
        F.logsigmoid(scores[0::2] - scores[1::2]).mean().backward()
        return scores.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}

    def apart(scores: Tensor) -> float:
        return float((scores - true[0]).square().mean().sqrt() / true[0].std())

    def gap(run: tuple) -> tuple[float, float]:  # of the scores, of all gradients
        far = size = 0.0
        for n, g in true[1].items():
            far += float((run[1][n].double() - g.double()).square().sum())
            size += float(g.double().square().sum())
        return apart(run[0]), (far / size) ** 0.5

    net = gpu_common.build(name, FP32)
    true = run()
    with rmfast.patched(net, attention=attention):
        out["fp32"] = fp32 = gap(run())
    net.to(BF16)
    out["bf16, Hugging Face"] = theirs = gap(run())
    rmfast.patch(net, attention=attention)
    out["bf16, rmfast"] = ours = gap(run())
    rmfast.patch(net, attention=attention, max_tokens=4 if DRY else 256)
    stream = contextlib.nullcontext()
    if not DRY:
        torch.cuda.synchronize()
        stream = torch.cuda.stream(torch.cuda.Stream())
    with torch.no_grad(), stream:
        out["bf16, in pieces"] = pieces = apart(net(**batch).logits[:, 0].float())
    replays = attention == "triton" and not DRY  # sdpa asks the device which tiles there are
    rmfast.patch(net, attention=attention, cuda_graphs=True)
    others = {**batch, "input_ids": batch["input_ids"] - batch["attention_mask"]}
    with torch.no_grad():
        for _ in range(3):
            net(**others)  # captured with other tokens
        out["bf16, replayed"] = again = apart(net(**batch).logits[:, 0].float())
    count = patching.attached(net).overrides[0].graphs.replayed
    assert count == 2 * replays, f"{count} passes replayed"
    report = rmfast.report(net)
    assert report.level == "trie" and not report.fallbacks, str(report)
    # each by itself: max() may pass over NaN. Of 8 scores and one batch's gradients: chance counts.
    # Dry, the layers' bf16 is cut off: twice as far
    most = [(x, 1e-4) for x in fp32] + [(x, 2 * theirs[0]) for x in (ours[0], pieces, again)]
    assert all(x <= bound for x, bound in (*most, (ours[1], (2.5 if DRY else 1.25) * theirs[1]))), (
        out
    )
    yield out


def roofs() -> Iterator[dict]:
    yield gpu_common.roof()


def _heads(m: int, h: int, b: int) -> tuple:
    return head, {"m": m, "h": h, "b": b}, 60


def _attends(**options: Any) -> tuple:
    return attention, options, 90


CHECKS: dict[str, tuple[Callable, dict, float]] = {  # the first one alone, then in this order
    "roof": (roofs, {}, 40), "qwen3-0.6b": (model, {"name": "0.6B"}, 120),
    "llama-1b": (model, {"name": "1B"}, 120),
    "qwen3-0.6b, sdpa": (model, {"name": "0.6B", "attention": "sdpa"}, 120),
    "memcheck": (sanitized, {"tool": "memcheck"}, 170),
    "racecheck": (sanitized, {"tool": "racecheck"}, 170),
    "head 4096": _heads(65536, 4096, 4096), "head 896": _heads(16384, 896, 154),
    "head 16384": _heads(4096, 16384, 512), "losses": (losses, {}, 60),
    "elementwise": (elementwise, {}, 60),
    "elementwise fp32": (elementwise, {"h": 2304, "d": 96, "dtype": FP32}, 60),
    "D 128": _attends(), "D 64": _attends(d=64, h=(14, 2)), "D 256": _attends(d=256, h=(8, 4)),
    "D 96": _attends(d=96, h=(32, 32)), "groups": _attends(kind="groups"),
    "long prompt": _attends(kind="long"), "pooled": _attends(pooled=True),
    "window": _attends(kind="long", window=1024), "fp16": _attends(dtype=FP16),
    "fp32": _attends(dtype=FP32, h=(8, 2), times=2), "65,536 nodes": _attends(kind="wide", times=3),
    "gemma2": _attends(kind="groups", d=256, h=(8, 4), softcap=50.0, window=1024),
    "gpt_oss": _attends(d=64, h=(64, 8), sinks=True, window=128),
    "past int32, head": _heads(540_000, 4096, 512), "past int32": _attends(kind="huge", times=1),
}  # fmt: skip


# --- tests

TESTS = {"tests": (["tests/gpu", "tests/kernels"], 7)}  # arguments of pytest, workers
if DRY:
    TESTS = {"tests": (["tests/kernels/test_trie_attention.py", "-k", "extreme_sinks"], 1)}


class Tests:
    """pytest in processes of its own, for so long; its output is in a file."""

    def __init__(self, log: Path, what: list[str], workers: int, seconds: float) -> None:
        options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--durations=12"]
        if importlib.util.find_spec("pytest_timeout"):
            options.append("--timeout=100")
        env = {"OMP_NUM_THREADS": "1" if DRY else "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = ["timeout", "-s", "INT", "-k", "6", str(int(seconds)), sys.executable, "-m"]
        command += ["pytest", "-n", str(workers), *options, *what]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | env, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.log, self.group = log, gpu_common.Group(self.process.pid)

    def result(self, seconds: float) -> dict[str, Any]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.group.end()
        code, text = self.process.wait(), self.log.read_text(errors="replace")
        lines = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) (.*?) *$", text, re.MULTILINE)
        words = ("PASSED", "SKIPPED", "FAILED", "ERROR")
        counts = {word: sum(w == word for w, _ in lines) for word in words}
        bad = [name for word, name in lines if word in words[2:]]
        ok = code == 0 and counts["PASSED"] > 0 and not bad
        error = None if ok else f"exit code {code}, {counts}: {'; '.join(bad) or text[-300:]}"
        return {"ok": ok, "rows": [counts], "error": error}


def main() -> None:
    parser = argparse.ArgumentParser("gpu_check", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=225, help="all in all; default: %(default)s")
    add("--jobs", type=int, default=6, help="checks beside each other; default: %(default)s")
    add("--only", default="", help="checks whose names match this, and no tests")
    add("--small", action="store_true", help="only the launches that a checker looks at")
    args = gpu_common.begin(parser)
    if args.small:
        print(*small())
        return
    todo = [name for name in CHECKS if re.search(args.only, name)]
    if not todo:
        parser.error(f"no check matches {args.only!r}: {', '.join(CHECKS)}")
    begun, about, asked = time.monotonic(), gpu_common.facts(), [*todo]
    asked += [] if args.only else TESTS
    found = {n: {"ok": False, "rows": [], "error": "not reached"} for n in (*CHECKS, *TESTS)}
    gpu_common.keep(args.out, "check", about, found)
    running: dict[str, gpu_common.Task] = {}
    testing: dict[str, Tests] = {}
    last = 2 if DRY else 11  # seconds that the end takes
    left = lambda: args.seconds - last - (time.monotonic() - begun)  # noqa: E731
    print(json.dumps(about, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        while todo or running:
            alone = "roof" in (*todo, *running)
            if not (alone or testing or args.only):
                for name, (what, workers) in TESTS.items():
                    log = args.out / f"{name.replace(' ', '-')}.log"
                    testing[name] = Tests(log, what, workers, max(1, left()))
            while todo and left() > 0 and len(running) < (1 if alone else args.jobs):
                name = todo.pop(0)
                work, options, seconds = CHECKS[name]
                work = functools.partial(work, **options)
                running[name] = gpu_common.Task(Path(folder, f"{len(todo)}.json"), seconds, work)
            for name in [name for name, task in running.items() if task.ended(now=left() <= 0)]:
                found[name] = running.pop(name).result()
                gpu_common.keep(args.out, "check", about, found)
            if left() <= 0:
                todo = []
            time.sleep(0.02)
    found |= {name: one.result(max(1, left() + last / 2)) for name, one in testing.items()}
    gpu_common.keep(args.out, "check", about, found)
    for name, one in [(name, found[name]) for name in asked]:
        text = json.dumps(one["rows"]) if one["ok"] else one["error"]
        verdict = "ok  " if one["ok"] else "FAIL"
        print(f"{verdict} {name:17} {one.get('seconds', ''):>5} {text[:280]}")
    well = sum(found[name]["ok"] for name in asked)
    print(f"{well} of {len(asked)} ok, {time.monotonic() - begun:.0f} s")
    raise SystemExit(well < len(asked))


if __name__ == "__main__":
    main()
