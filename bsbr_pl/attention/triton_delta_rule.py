"""The (gated) delta rule in Triton, for CUDA: `ops.delta_rule` and its gradient.

The formulas are those of `gated_delta_net`, whose G is `decay` here. A chunk has C = 64 tokens. g_t is the sum of log
alpha from its start to t; decay_ts = exp(g_t - g_s) for s <= t, else 0; B = diag(beta exp(g)) K (not the batch);
K_end = exp(g_C - g) K; S is the state before the chunk:

    U = (I + tril(diag(beta) K K^T * decay, -1))^-1 (diag(beta) V - B S)         I + ...: the triangle
    O = exp(g) Q S + (Q K^T * decay) U ;   S <- exp(g_C) S + K_end^T U

So a chunk changes the state by S <- exp(g_C) S - P S + X, with P = Z^T B, X = Z^T diag(beta) V and
Z = triangle^-T K_end, which do not depend on S. Forward: one program per chunk computes the inverse of the triangle,
P and X (`_prepare`); `recurrence` goes through the chunks; one program per chunk computes U and O (`_output`).
Backward: the gradient of S obeys the same recurrence in reverse (`_prepare_gradient`, `recurrence`), and one program
per chunk computes the other gradients (`_gradient`). Only the inverse and S before each chunk are saved.

q, k are (B, T, H, K), v and O (B, T, H, V), in low precision; beta and log_alpha are (B, T, H) in fp32; states are
transposed, (V, K). Products are in low precision with fp32 sums; S is fp32 inside the recurrence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import CHUNK
from .triton_recurrence import matrix, recurrence

# Warps of a program: heads up to 64 wide without and with decay, wider heads without and with decay.
PREPARE = (4, 4, 4, 4)
OUTPUT = (4, 4, 4, 4)
PREPARE_GRADIENT = (4, 4, 4, 4)
GRADIENT = (4, 4, 8, 8)


# Loads.


@triton.jit
def _load(x, offsets, mask, WIDTH: tl.constexpr):
    """The chunk's tokens (C, WIDTH) of x (B, T, H, WIDTH), zeros where masked."""
    return tl.load(x + offsets[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def _store(x, value, offsets, mask, WIDTH: tl.constexpr):
    places = offsets[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(x + places, value.to(x.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _decays(log_alpha, offsets, mask):
    """Of a chunk: decay (C, C), exp(g) (C), exp(g_C - g) (C), exp(g_C)."""
    i = tl.arange(0, 64)
    past = i[:, None] >= i[None, :]
    if log_alpha is None:
        ones = tl.full((64,), 1.0, tl.float32)
        decay = tl.where(past, 1.0, 0.0)
        from_start = ones
        to_end = ones
        whole = 1.0
    else:
        steps = tl.load(log_alpha + offsets, mask=mask, other=0.0)
        g = tl.sum(tl.where(past, steps[None, :], 0.0), 1)
        decay = tl.where(past, tl.exp(tl.minimum(g[:, None] - g[None, :], 0.0)), 0.0)
        from_start = tl.exp(g)
        g_end = tl.sum(steps, 0)
        to_end = tl.exp(tl.minimum(g_end - g, 0.0))
        whole = tl.exp(g_end)
    return decay, from_start, to_end, whole


@triton.jit
def _chunk(k, beta, log_alpha, T, H, K: tl.constexpr):
    """The chunk of this program: its number; the offsets of its tokens in (B, T, H) and a mask of those before T; its
    keys (C, K), beta (C) and decays."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = n * 64 + tl.arange(0, 64)
    offsets, mask = ((row // H) * T + t) * H + row % H, t < T
    keys = _load(k, offsets, mask, K)
    b = tl.load(beta + offsets, mask=mask, other=0.0)
    decay, from_start, to_end, whole = _decays(log_alpha, offsets, mask)
    return row * tl.num_programs(1) + n, offsets, mask, keys, b, decay, from_start, to_end, whole


@triton.jit
def _triangle_inverse(L):
    """(I + L)^-1 of a strictly lower L (64, 64) in fp32.

    Its four diagonal blocks of 16 by forward substitution, D; with Y = D times the rest of L, which vanishes to the
    fourth power, it is (I - Y + Y^2 - Y^3) D.
    """
    i = tl.arange(0, 64)
    same = (i[:, None] // 16) == (i[None, :] // 16)
    blocks = tl.sum(tl.reshape(tl.where(same, L, 0.0), (4, 16, 4, 16)), 2)  # (4, 16, 16)
    line = tl.arange(0, 16)[None, :, None]
    inverses = tl.where(line == tl.arange(0, 16)[None, None, :], 1.0, 0.0) + tl.zeros((4, 16, 16), tl.float32)
    for n in range(1, 16):
        weights = tl.sum(tl.where(line == n, blocks, 0.0), 1)  # (4, 16): row n of each
        change = tl.sum(weights[:, :, None] * inverses, 1)
        inverses -= tl.where(line == n, change[:, None, :], 0.0)
    spread = tl.reshape(inverses, (4, 16, 1, 16)) + tl.zeros((4, 16, 4, 16), tl.float32)
    D = tl.where(same, tl.reshape(spread, (64, 64)), 0.0)
    Y = tl.dot(D, tl.where(same, 0.0, L), input_precision="tf32")
    series = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - Y
    series += tl.dot(series, tl.dot(Y, Y, input_precision="tf32"), input_precision="tf32")
    return tl.dot(series, D, input_precision="tf32")


# Forward.


@triton.jit
def _prepare(k, v, beta, log_alpha, inverses, P, X, totals, T, H, K: tl.constexpr, V: tl.constexpr):
    """One program, one chunk: its inverse (C, C), P^T (K, K), X^T (V, K) and exp(g_C)."""
    chunk, offsets, mask, keys, b, decay, from_start, to_end, whole = _chunk(k, beta, log_alpha, T, H, K)
    values = _load(v, offsets, mask, V)
    low = keys.dtype
    i = tl.arange(0, 64)
    L = tl.where(i[:, None] > i[None, :], b[:, None] * decay * tl.dot(keys, tl.trans(keys)), 0.0)
    inverse = _triangle_inverse(L).to(low)
    tl.store(inverses + chunk * 4096 + matrix(64, 64), inverse)
    Z = tl.dot(tl.trans(inverse), (keys * to_end[:, None]).to(low)).to(low)
    B = (keys * (b * from_start)[:, None]).to(low)
    tl.store(P + chunk * K * K + matrix(K, K), tl.dot(tl.trans(B), Z).to(low))
    written = (values * b[:, None]).to(low)
    tl.store(X + chunk * V * K + matrix(V, K), tl.dot(tl.trans(written), Z).to(low))
    if log_alpha is not None:
        tl.store(totals + chunk, whole)


@triton.jit
def _output(q, k, v, beta, log_alpha, inverses, states, out, T, H, K: tl.constexpr, V: tl.constexpr):
    """One program, one chunk: O (C, V)."""
    chunk, offsets, mask, keys, b, decay, from_start, _, _ = _chunk(k, beta, log_alpha, T, H, K)
    values = _load(v, offsets, mask, V)
    low = keys.dtype
    S = tl.trans(tl.load(states + chunk * V * K + matrix(V, K)))
    inverse = tl.load(inverses + chunk * 4096 + matrix(64, 64))
    written = b[:, None] * (values - from_start[:, None] * tl.dot(keys, S))
    U = tl.dot(inverse, written.to(low)).to(low)
    queries = _load(q, offsets, mask, K)
    mixed = from_start[:, None] * tl.dot(queries, S)
    scores = (decay * tl.dot(queries, tl.trans(keys))).to(low)
    _store(out, tl.dot(scores, U, mixed), offsets, mask, V)


# Backward. D before a name: the gradient of the loss by it.


@triton.jit
def _prepare_gradient(q, k, beta, log_alpha, inverses, Dout, P, G, totals, T, H, K: tl.constexpr, V: tl.constexpr):
    """One program, one chunk: P (K, K), G^T (V, K), the gradient of S through the chunk's own outputs, and exp(g_C)."""
    chunk, offsets, mask, keys, b, decay, from_start, to_end, whole = _chunk(k, beta, log_alpha, T, H, K)
    queries, Dmixed = _load(q, offsets, mask, K), _load(Dout, offsets, mask, V)
    low = keys.dtype
    inverse_T = tl.trans(tl.load(inverses + chunk * 4096 + matrix(64, 64)))
    B = (keys * (b * from_start)[:, None]).to(low)
    Z = tl.dot(inverse_T, (keys * to_end[:, None]).to(low)).to(low)
    tl.store(P + chunk * K * K + matrix(K, K), tl.dot(tl.trans(Z), B).to(low))
    scores = (decay * tl.dot(queries, tl.trans(keys))).to(low)
    Dwritten = tl.dot(inverse_T, tl.dot(tl.trans(scores), Dmixed).to(low)).to(low)
    own = tl.dot(tl.trans(Dmixed), (queries * from_start[:, None]).to(low)) - tl.dot(tl.trans(Dwritten), B)
    tl.store(G + chunk * V * K + matrix(V, K), own.to(low))
    if log_alpha is not None:
        tl.store(totals + chunk, whole)


@triton.jit
def _rows_less_columns(M):
    """The gradient of g from M (C, C), decay times the gradient of decay: decay_ts = exp(g_t - g_s).

    From a single M in fp32: M_ts cancels in sums over tokens, but two rounded copies of M would not.
    """
    return tl.sum(M, 1) - tl.sum(M, 0)


@triton.jit
def _gradient(
    q,
    k,
    v,
    beta,
    log_alpha,
    inverses,
    states,
    Dout,
    DS,
    Dq,
    Dk,
    Dv,
    Dbeta,
    Dlog_alpha,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """One program, one chunk: the gradients of all inputs, from those of O and of the state after the chunk."""
    chunk, offsets, mask, keys, b, decay, from_start, to_end, whole = _chunk(k, beta, log_alpha, T, H, K)
    low = keys.dtype
    i = tl.arange(0, 64)
    S = tl.load(states + chunk * V * K + matrix(V, K))  # transposed, as is DS
    after = tl.load(DS + chunk * V * K + matrix(V, K))
    inverse = tl.load(inverses + chunk * 4096 + matrix(64, 64))

    # O = exp(g) Q S + scores U ; S <- exp(g_C) S + K_end^T U
    values = _load(v, offsets, mask, V)
    new = values - from_start[:, None] * tl.dot(keys, tl.trans(S))
    U = tl.dot(inverse, (b[:, None] * new).to(low)).to(low)
    queries, Dmixed = _load(q, offsets, mask, K), _load(Dout, offsets, mask, V)
    products = tl.dot(queries, tl.trans(keys))
    Dproducts = decay * tl.dot(Dmixed, tl.trans(U))
    Dqueries = from_start[:, None] * tl.dot(Dmixed, S)
    Dcolumns = to_end[:, None] * tl.dot(U, after)  # of the keys in K_end and in the columns of Q K^T and K K^T
    if log_alpha is not None:
        Dto_end = tl.sum(Dcolumns * keys, 1)
        Dend = tl.sum(Dto_end, 0) + whole * tl.sum(tl.sum(S.to(tl.float32) * after.to(tl.float32), 1), 0)
        Dg = tl.sum(Dqueries * queries, 1) - Dto_end + _rows_less_columns(Dproducts * products)
    low_products = Dproducts.to(low)
    _store(Dq, tl.dot(low_products, keys, Dqueries), offsets, mask, K)
    Dcolumns = tl.dot(tl.trans(low_products), queries, Dcolumns)
    DU = tl.dot(tl.trans((decay * products).to(low)), Dmixed, to_end[:, None] * tl.dot(keys, tl.trans(after)))

    # U = inverse diag(beta) new ; new = V - exp(g) K S ; inverse = (I + L)^-1 ; L = tril(diag(beta) K K^T * decay, -1)
    Dwritten = tl.dot(tl.trans(inverse), DU.to(low))
    Dnew = b[:, None] * Dwritten
    _store(Dv, Dnew, offsets, mask, V)
    products = tl.dot(keys, tl.trans(keys))
    DL = tl.where(i[:, None] > i[None, :], -decay * tl.dot(Dwritten.to(low), tl.trans(U)), 0.0)  # divided by beta
    tl.store(Dbeta + offsets, tl.sum(Dwritten * new, 1) + tl.sum(DL * products, 1), mask=mask)
    DL = b[:, None] * DL
    if log_alpha is not None:
        Dg += _rows_less_columns(DL * products) - tl.sum(Dnew * (values - new), 1)
        Dsteps = Dend + tl.sum(tl.where(i[:, None] >= i[None, :], Dg[:, None], 0.0), 0)
        tl.store(Dlog_alpha + offsets, Dsteps, mask=mask)
    low_DL = DL.to(low)
    Drows = tl.dot(low_DL, keys) - from_start[:, None] * tl.dot(Dnew.to(low), S)
    _store(Dk, Drows + tl.dot(tl.trans(low_DL), keys, Dcolumns), offsets, mask, K)


# The launches.


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.delta_rule` of contiguous inputs."""
    B, T, H, K = q.shape
    V, R, N = v.shape[-1], B * H, triton.cdiv(T, CHUNK)
    inverses, P, X = q.new_empty(R, N, CHUNK, CHUNK), q.new_empty(R, N, K, K), q.new_empty(R, N, V, K)
    totals = None if log_alpha is None else beta.new_empty(R, N)
    _prepare[(R, N)](k, v, beta, log_alpha, inverses, P, X, totals, T, H, **_sizes(PREPARE, K, V, log_alpha))
    states, last = recurrence(totals, P, X, start, False)
    out = torch.empty_like(v)
    _output[(R, N)](q, k, v, beta, log_alpha, inverses, states, out, T, H, **_sizes(OUTPUT, K, V, log_alpha))
    return out, last.view(B, H, V, K), inverses, states


def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    inverses: Tensor,
    states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor | None,
) -> list[Tensor]:
    """`ops.delta_rule_backward` of contiguous inputs."""
    B, T, H, K = q.shape
    R, N, V, _ = states.shape
    P, G = q.new_empty(R, N, K, K), torch.empty_like(states)
    totals = None if log_alpha is None else beta.new_empty(R, N)
    _prepare_gradient[(R, N)](
        q, k, beta, log_alpha, inverses, grad, P, G, totals, T, H, **_sizes(PREPARE_GRADIENT, K, V, log_alpha)
    )
    after, Dstart = recurrence(totals, P, G, grad_last, True)
    inputs = [q, k, v, beta, log_alpha]
    gradients = [None if x is None else torch.empty_like(x) for x in inputs]
    _gradient[(R, N)](*inputs, inverses, states, grad, after, *gradients, T, H, **_sizes(GRADIENT, K, V, log_alpha))
    return [Dstart.view(B, H, V, K), *(x for x in gradients if x is not None)]


def _sizes(warps: tuple[int, ...], K: int, V: int, log_alpha: Tensor | None) -> dict[str, int]:
    return {"K": K, "V": V, "num_warps": warps[2 * (max(K, V) > 64) + (log_alpha is not None)]}
