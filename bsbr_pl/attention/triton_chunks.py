"""The operators of `chunk_ops` in Triton, for CUDA. A chunk has C = 64 tokens (4096 = C^2), in four blocks of 16.

`decayed_scores`: from a key in an earlier block to a query, the key decays up to the first token of the query's
block, and the query from there on; both exponents are at most 0, and A between blocks is a product of two matrices.
Within a block, A is computed key by key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_delta_rule import _triangle_inverse
from .triton_recurrence import matrix

COLUMNS = 128  # numbers of a state in one program of `_decayed_states`
# Warps of a program, for keys up to 64 wide.
SCORES = 1
SCORES_GRADIENT = 4

# States that decay.


@triton.jit
def _compose(decay_1, x_1, decay_2, x_2):
    """S -> decay S + x, first with index 1, then with index 2."""
    return decay_1 * decay_2, decay_2 * x_1 + x_2


@triton.jit
def _decayed_states(
    x, decay, start, before, last, N, M, V, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BACKWARDS: tl.constexpr
):
    """One program: WIDTH of the M numbers of the states of one row, 32 chunks at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < M
    channel = tl.where(CHANNELS > 1, columns // V, 0)
    S = tl.zeros((WIDTH,), tl.float32)
    if start is not None:
        S = tl.load(start + row * M + columns, mask=inside, other=0.0)
    line = tl.arange(0, 32)
    first = 0
    if BACKWARDS:
        first = N - 1
    tl.store(before + (row * N + first) * M + columns, S.to(before.dtype.element_ty), mask=inside)
    for i in range(0, N, 32):
        n = i + line
        following = n + 1
        mask = (n < N)[:, None] & inside[None, :]
        has_next = (following < N)[:, None] & inside[None, :]
        if BACKWARDS:
            n = N - 1 - n
            following = n - 1
        term = tl.load(x + (row * N + n)[:, None] * M + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(decay + (row * N + n)[:, None] * CHANNELS + channel[None, :], mask=mask, other=1.0)
        products, sums = tl.associative_scan((d, term), 0, _compose)
        after = products * S[None, :] + sums
        places = (row * N + following)[:, None] * M + columns[None, :]
        tl.store(before + places, after.to(before.dtype.element_ty), mask=has_next)
        S = tl.sum(tl.where((line == 31)[:, None], after, 0.0), 0)
    tl.store(last + row * M + columns, S, mask=inside)


def decayed_states(x: Tensor, decay: Tensor, start: Tensor | None, backwards: bool) -> tuple[Tensor, Tensor]:
    """`chunk_ops.decayed_states` of contiguous inputs."""
    R, N, K, V = x.shape
    before, last = torch.empty_like(x), x.new_empty(R, K, V, dtype=torch.float32)
    sizes = {"CHANNELS": decay.shape[2], "WIDTH": COLUMNS, "BACKWARDS": backwards}
    _decayed_states[(R, triton.cdiv(K * V, COLUMNS))](x, decay, start, before, last, N, K * V, V, **sizes)
    return before, last


# Scores within a chunk.


@triton.jit
def _decayed_scores(q, k, g, A, M, J: tl.constexpr, K: tl.constexpr):
    """One program: the queries of one block of one chunk."""
    chunk, first, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1) * 16, M.to(tl.int64)
    stride = chunks * 64 * K  # from query j of all tokens to query j + 1
    i, t, channels = tl.arange(0, 64), first + tl.arange(0, 16), tl.arange(0, K)
    past, outside = i < first, (i < first) | (i >= first + 16)
    keys_at = (chunk * 64 + i)[:, None] * K + channels[None, :]
    rows = (chunk * 64 + t)[:, None] * K + channels[None, :]
    border = tl.load(g + (chunk * 64 + first) * K + channels)
    g_t = tl.load(g + rows)
    from_border = tl.exp(tl.minimum(g_t - border[None, :], 0.0))
    g_past = tl.load(g + keys_at, mask=past[:, None], other=0.0)
    keys = tl.load(k + keys_at, mask=past[:, None], other=0.0)
    low = keys.dtype
    keys_T = tl.trans((keys * tl.exp(tl.minimum(border[None, :] - g_past, 0.0))).to(low))
    for j in tl.static_range(J):
        queries = tl.load(q + j * stride + rows)
        scores = tl.dot((queries * from_border).to(low), keys_T).to(low)
        places = (j * chunks + chunk) * 4096 + t[:, None] * 64
        tl.store(A + places + i[None, :], scores, mask=outside[None, :])
    for s in range(first, first + 16):
        key_at = (chunk * 64 + s) * K + channels
        key, g_s = tl.load(k + key_at).to(tl.float32), tl.load(g + key_at)
        decayed_key = key[None, :] * tl.exp(tl.minimum(g_t - g_s[None, :], 0.0))
        for j in tl.static_range(J):
            products = tl.load(q + j * stride + rows).to(tl.float32) * decayed_key
            score = tl.where(t >= s, tl.sum(products, 1), 0.0)
            tl.store(A + (j * chunks + chunk) * 4096 + t * 64 + s, score.to(A.dtype.element_ty))


@triton.jit
def _decayed_scores_gradient(q, k, g, DA, Dq, Dk, Dg, M, J: tl.constexpr, K: tl.constexpr):
    """One program: the gradients of the queries, keys and g of one block of one chunk. D: the gradient of the loss."""
    chunk, first, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1) * 16, M.to(tl.int64)
    stride = chunks * 64 * K  # from query j of all tokens to query j + 1
    last = first + 15
    i, t, channels = tl.arange(0, 64), first + tl.arange(0, 16), tl.arange(0, K)
    past, future = i < first, i > last
    all_at = (chunk * 64 + i)[:, None] * K + channels[None, :]
    rows = (chunk * 64 + t)[:, None] * K + channels[None, :]
    before_block = tl.load(g + (chunk * 64 + first) * K + channels)
    after_block = tl.load(g + (chunk * 64 + last) * K + channels)
    g_t, g_all = tl.load(g + rows), tl.load(g + all_at)
    own_keys = tl.load(k + rows).to(tl.float32)
    keys = tl.load(k + all_at, mask=past[:, None], other=0.0)
    low = keys.dtype
    keys = (keys * tl.exp(tl.minimum(before_block[None, :] - g_all, 0.0))).to(low)
    to_query = tl.exp(tl.minimum(g_t - before_block[None, :], 0.0))
    from_key = tl.exp(tl.minimum(after_block[None, :] - g_t, 0.0))
    to_queries = tl.exp(tl.minimum(g_all - after_block[None, :], 0.0))
    Dkeys = tl.zeros((16, K), tl.float32)
    Dsums = tl.zeros((16, K), tl.float32)
    for j in tl.static_range(J):
        own_queries = tl.load(q + j * stride + rows).to(tl.float32)
        queries = tl.load(q + j * stride + all_at, mask=future[:, None], other=0.0)
        queries = (queries * to_queries).to(low)
        tile = DA + (j * chunks + chunk) * 4096
        by_query = tl.load(tile + t[:, None] * 64 + i[None, :], mask=past[None, :], other=0.0)
        by_key = tl.load(tile + i[None, :] * 64 + t[:, None], mask=future[None, :], other=0.0)
        Dqueries = tl.dot(by_query.to(low), keys) * to_query
        Dkeys += tl.dot(by_key.to(low), queries) * from_key
        for u in range(first, first + 16):
            at = (chunk * 64 + u) * K + channels
            key, query = tl.load(k + at).to(tl.float32), tl.load(q + j * stride + at).to(tl.float32)
            of_key = tl.load(tile + t * 64 + u, mask=t >= u, other=0.0).to(tl.float32)
            of_query = tl.load(tile + u * 64 + t, mask=t <= u, other=0.0).to(tl.float32)
            decay = tl.exp(-tl.abs(g_t - tl.load(g + at)[None, :]))  # from the earlier of t and u to the later
            Dqueries += of_key[:, None] * key[None, :] * decay
            Dkeys += of_query[:, None] * query[None, :] * decay
        tl.store(Dq + j * stride + rows, Dqueries.to(Dq.dtype.element_ty))
        Dsums += own_queries * Dqueries
    tl.store(Dk + rows, Dkeys.to(Dk.dtype.element_ty))
    tl.store(Dg + rows, Dsums - own_keys * Dkeys)


def decayed_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """`chunk_ops.decayed_scores` of contiguous inputs."""
    J, M, C, K = q.shape
    A = q.new_empty(J, M, C, C)
    _decayed_scores[(M, C // 16)](q, k, g, A, M, J=J, K=K, num_warps=_warps(SCORES, K))
    return A


def decayed_scores_backward(grad: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_ops.decayed_scores_backward` of contiguous inputs."""
    J, M, C, K = q.shape
    Dq, Dk, Dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)
    warps = _warps(SCORES_GRADIENT, K)
    _decayed_scores_gradient[(M, C // 16)](q, k, g, grad, Dq, Dk, Dg, M, J=J, K=K, num_warps=warps)
    return Dq, Dk, Dg


def _warps(warps: int, K: int) -> int:
    """Wider keys need more registers."""
    return warps * max(1, K // 64)


# Inverses.


@triton.jit
def _inverses(lower, inverses):
    """One program: one matrix."""
    tile = tl.program_id(0).to(tl.int64) * 4096 + matrix(64, 64)
    i = tl.arange(0, 64)
    L = tl.where(i[:, None] > i[None, :], tl.load(lower + tile).to(tl.float32), 0.0)
    tl.store(inverses + tile, _triangle_inverse(L).to(inverses.dtype.element_ty))


def triangle_inverse(lower: Tensor) -> Tensor:
    """`chunk_ops.triangle_inverse` of contiguous inputs."""
    inverses = torch.empty_like(lower)
    _inverses[(len(lower),)](lower, inverses)
    return inverses
