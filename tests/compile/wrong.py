"""Kernels with the faults the checks look for: what they say of these shows that they see."""

import triton
import triton.language as tl


@triton.jit
def spill(x, y, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """A [ROWS, SIZE] block that every step needs whole: more than one warp's registers hold."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    block = tl.load(x + row * SIZE + col)
    for _ in range(8):
        block = block * tl.sum(block, axis=0)[None, :] + 1.0
    tl.store(y + row * SIZE + col, block)


@triton.jit
def copy(x, y, stride, SIZE: tl.constexpr):
    """16-byte loads only where ``stride`` is 1."""
    col = tl.arange(0, SIZE)
    tl.store(y + col, tl.load(x + col * stride))


@triton.jit
def matmul(a, b, c, scale, SIZE: tl.constexpr, DOT: tl.constexpr):
    row, col = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + row * SIZE + col), tl.load(b + row * SIZE + col)
    out = tl.dot(x, y) if DOT else x.to(tl.float32) + y.to(tl.float32)
    tl.store(c + row * SIZE + col, out * scale)
