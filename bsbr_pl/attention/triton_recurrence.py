"""What goes from chunk to chunk, in Triton, for CUDA: the recurrence of the delta rule, and `ops.sums_before`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LONG = 128  # from this many chunks on, the recurrence is computed in two levels


@triton.jit
def matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The offsets of the entries of a contiguous matrix."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _recurrence(
    decay,
    P,
    X,
    start,
    states,
    last,
    product,
    N,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    CHANNELS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """S <- S diag(decay_n) - S P_n + X_n, (V, K), through G of the N chunks of one sequence: BV rows of S in one
    program. A decay has CHANNELS numbers: K, or 1 for all channels.

    Without `X`, S starts as the identity; `last` is then the P of all G chunks together, and `product` their decay.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = row * tl.num_programs(1) + group
    lines = tl.program_id(2) * BV + tl.arange(0, BV)
    tile = lines[:, None] * K + tl.arange(0, K)[None, :]
    identity = tl.where(lines[:, None] == tl.arange(0, K)[None, :], 1.0, 0.0)
    channel = tl.where(CHANNELS > 1, tl.arange(0, K), 0)
    total = tl.full((K,), 1.0, tl.float32)
    if X is None:
        S = identity
    elif start is None:
        S = tl.zeros((BV, K), tl.float32)
    else:
        S = tl.load(start + own * V * K + tile).to(tl.float32)
    for i in range(group * G, tl.minimum(group * G + G, N)):
        n = row * N + i
        if BACKWARDS:
            n = row * N + N - 1 - i
        if states is not None:
            tl.store(states + n * V * K + tile, S.to(states.dtype.element_ty))
        p = tl.load(P + n * K * K + matrix(K, K))
        high = S.to(p.dtype)
        low = (S - high.to(tl.float32)).to(p.dtype)  # what rounding S to p's precision would lose
        change = tl.dot(low, p, tl.dot(high, p))
        if decay is not None:
            d = tl.load(decay + n * CHANNELS + channel)
            S = S * d[None, :]
            total = total * d
        S -= change
        if X is not None:
            S += tl.load(X + n * V * K + tile).to(tl.float32)
    if X is None:
        S = total[None, :] * identity - S
        tl.store(product + own * CHANNELS + channel, total)
    tl.store(last + own * V * K + tile, S.to(last.dtype.element_ty))


def recurrence(
    decay: Tensor | None, P: Tensor, X: Tensor, start: Tensor | None, backwards: bool
) -> tuple[Tensor, Tensor]:
    """S_{n+1} = S_n diag(decay_n) - S_n P_n + X_n.

    With many chunks it has two levels: the chunks of a group change S as one chunk would, so first every group is
    reduced to one chunk, then S goes from group to group, then through the chunks of all groups at once.

    Args:
        decay: (R, N, K), or (R, N) for all channels; None for 1.
        P: (R, N, K, K).
        X: (R, N, V, K).
        start: (R, V, K) or a view of it, the first S; None for zeros.
        backwards: go from the last chunk to the first.

    Returns:
        Every S_n (R, N, V, K) in the precision of X, and the last S (R, V, K) in fp32.
    """
    R, N, V, K = X.shape
    states, last = torch.empty_like(X), X.new_empty(R, V, K, dtype=torch.float32)
    if N < LONG:
        _launch(decay, P, X, start, states, last, None, 1, N, backwards)
        return states, last
    G = triton.next_power_of_2(int((N / 2) ** 0.5))
    M = triton.cdiv(N, G)
    P_of, product = P.new_empty(R, M, K, K), last.new_empty(R, M, *(() if decay is None else decay.shape[2:]))
    X_of, starts = last.new_empty(R, M, V, K), last.new_empty(R, M, V, K)
    _launch(decay, P, X, None, None, X_of, None, M, G, backwards)
    _launch(decay, P, None, None, None, P_of, product, M, G, backwards)
    _launch(product, P_of, X_of, start, starts, last, None, 1, M, False)
    _launch(decay, P, X, starts, states, torch.empty_like(starts), None, M, G, backwards)
    return states, last


def _launch(
    decay: Tensor | None,
    P: Tensor,
    X: Tensor | None,
    start: Tensor | None,
    states: Tensor | None,
    last: Tensor,
    product: Tensor | None,
    M: int,
    G: int,
    backwards: bool,
) -> None:
    """`_recurrence` in M groups of G chunks."""
    R, N, K, _ = P.shape
    V = last.shape[-2]
    height = 16 if R * M * V <= 132 * 64 else 32 if R * M * V <= 132 * 256 else 64  # few sequences: smaller programs
    grid = (R, M, V // min(V, height))
    channels = K if decay is not None and decay.dim() == 3 else 1
    sizes = {"K": K, "V": V, "BV": min(V, height), "CHANNELS": channels, "BACKWARDS": backwards}
    sizes |= {"num_warps": 4, "num_stages": 3}
    _recurrence[grid](decay, P, X, start, states, last, product, N, G, **sizes)


# Sums over chunks.


@triton.jit
def _sums_before(x, start, before, total, N, M, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr):
    """One program: COLUMNS columns of one (N, M) matrix, 32 rows at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total_before = tl.zeros((COLUMNS,), tl.float32)
    if start is not None:
        total_before = tl.load(start + row * M + columns, mask=columns < M, other=0.0)
    for i in range(0, N, 32):
        n = i + tl.arange(0, 32)
        mask = (n < N)[:, None] & (columns < M)[None, :]
        if BACKWARDS:
            n = N - 1 - n
        places = (row * N + n)[:, None] * M + columns[None, :]
        tile = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
        sums = total_before[None, :] + tl.cumsum(tile, 0)
        tl.store(before + places, (sums - tile).to(before.dtype.element_ty), mask=mask)
        total_before += tl.sum(tile, 0)
    tl.store(total + row * M + columns, total_before, mask=columns < M)


def sums_before(x: Tensor, start: Tensor | None, backwards: bool) -> tuple[Tensor, Tensor]:
    """`ops.sums_before` of contiguous inputs."""
    R, N, M = x.shape
    before, total = torch.empty_like(x), x.new_empty(R, M, dtype=torch.float32)
    _sums_before[(R, triton.cdiv(M, 128))](x, start, before, total, N, M, COLUMNS=128, BACKWARDS=backwards)
    return before, total
