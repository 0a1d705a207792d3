"""The two Triton kernels of the delta rule, for CUDA: what goes from chunk to chunk, and the inverse of a triangle.

Everything else that the architectures compute on a GPU is a batched matrix product or elementwise work, which cuBLAS
and torch.compile do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _recurrence(
    decay,
    P,
    X,
    start,
    states,
    last,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BACKWARDS: tl.constexpr,
    FROM_START: tl.constexpr,
):
    """One program: BV columns of one sequence's S, through its N chunks."""
    row = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, K), tl.program_id(1) * BV + tl.arange(0, BV)
    tile = rows[:, None] * V + columns[None, :]
    square = rows[:, None] * K + rows[None, :]
    if BACKWARDS:
        square = rows[None, :] * K + rows[:, None]  # P transposed
    S = tl.zeros((K, BV), tl.float32)
    if FROM_START:
        S = tl.load(start + row * K * V + tile)
    for i in range(N):
        n = row * N + i
        if BACKWARDS:
            n = row * N + N - 1 - i
        tl.store(states + n * K * V + tile, S.to(states.dtype.element_ty))
        p = tl.load(P + n * K * K + square)
        x = tl.load(X + n * K * V + tile).to(tl.float32)
        high = S.to(p.dtype)
        low = (S - high.to(tl.float32)).to(p.dtype)  # what rounding S to p's precision would lose
        S = tl.load(decay + n) * S + x - tl.dot(p, high) - tl.dot(p, low)
    tl.store(last + row * K * V + tile, S)


def recurrence(decay: Tensor, P: Tensor, X: Tensor, start: Tensor | None, backwards: bool) -> tuple[Tensor, Tensor]:
    """`ops.chunk_recurrence` of contiguous inputs, or its adjoint, which goes back from `start` (R, K, V) by P^T."""
    R, N, K, V = X.shape
    states, last = torch.empty_like(X), X.new_empty(R, K, V, dtype=torch.float32)
    columns = 16 if R * V <= 132 * 64 else 32  # few sequences: more, narrower programs
    grid = (R, V // min(V, columns))
    _recurrence[grid](
        *(decay, P, X, X if start is None else start, states, last, N),
        K=K,
        V=V,
        BV=min(V, columns),
        BACKWARDS=backwards,
        FROM_START=start is not None,
        num_warps=4,
        num_stages=3,
    )
    return states, last


@triton.jit
def _unit_triangle_inverse(L, out, C: tl.constexpr):
    """One program, one matrix: row after row by forward substitution, in fp32."""
    base = tl.program_id(0).to(tl.int64) * C * C
    rows = tl.arange(0, C)
    places = base + rows[:, None] * C + rows[None, :]
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for i in range(1, C):
        weights = tl.load(L + base + i * C + rows, mask=rows < i, other=0.0).to(tl.float32)
        row = tl.sum(weights[:, None] * inverse, 0)
        inverse = tl.where(rows[:, None] == i, inverse - row[None, :], inverse)
    tl.store(out + places, inverse.to(out.dtype.element_ty))


def unit_triangle_inverse(lower: Tensor) -> Tensor:
    """`base.unit_triangle_inverse` of contiguous matrices (..., C, C), C a power of 2."""
    out = torch.empty_like(lower)
    C = lower.shape[-1]
    _unit_triangle_inverse[(lower.numel() // C**2,)](lower, out, C=C, num_warps=1)
    return out
