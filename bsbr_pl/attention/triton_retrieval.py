"""BSBR's chunk states and what is read from them, in Triton, for CUDA: `ops.chunk_states`, `ops.retrieve`.

One program is one chunk of one head. q, k and v are read where the convolution left them, (B, T, H, K) with any strides
but 1 for K; all else is contiguous. Products are of low precision with sums in fp32, all between them is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import _load, _matrix, _store


@triton.jit
def _strided(x, row, n, T, H, of_sequence, of_token, of_head, C: tl.constexpr, WIDTH: tl.constexpr):
    """The tokens of chunk n of one head of x (C, WIDTH), zeros where there are none."""
    t = n * C + tl.arange(0, C)
    start = (row // H) * of_sequence + (row % H) * of_head
    places = start + t[:, None].to(tl.int64) * of_token + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + places, mask=(t < T)[:, None], other=0.0)


@triton.jit
def _tokens(row, n, T, H, C: tl.constexpr):
    """Where they lie in a contiguous (B, T, H), and which of them there are."""
    t = n * C + tl.arange(0, C)
    return ((row // H) * T + t) * H + row % H, t < T


@triton.jit
def _unit(keys, K: tl.constexpr):
    """k^ = k centred and scaled to unit length, in fp32, and 1 / its deviation (C)."""
    keys = keys.to(tl.float32)
    keys -= (tl.sum(keys, 1) / K)[:, None]
    scale = tl.rsqrt(tl.sum(keys * keys, 1) / K + 1e-5)
    return keys * scale[:, None] * (K**-0.5), scale


@triton.jit
def _chunk_states(
    k, v, states, T, H, of_sequence, of_token, of_head, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr
):
    """k^^T v (K, V)."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys = _strided(k, row, n, T, H, of_sequence, of_token, of_head, C, K)
    values = _strided(v, row, n, T, H, of_sequence, of_token, of_head, C, V)
    unit, _ = _unit(keys, K)
    state = tl.dot(tl.trans(unit.to(keys.dtype)), values)
    tl.store(states + (row * tl.num_programs(1) + n) * K * V + _matrix(K, V), state.to(keys.dtype))


@triton.jit
def _chunk_states_gradient(
    k, v, Dstates, Dk, Dv, T, H, of_sequence, of_token, of_head, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr
):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys = _strided(k, row, n, T, H, of_sequence, of_token, of_head, C, K)
    values = _strided(v, row, n, T, H, of_sequence, of_token, of_head, C, V)
    place, there = _tokens(row, n, T, H, C)
    unit, scale = _unit(keys, K)
    worth = tl.load(Dstates + (row * tl.num_programs(1) + n) * K * V + _matrix(K, V))
    _store(Dv, tl.dot(unit.to(keys.dtype), worth), place, there, V)
    Dunit = tl.dot(values, tl.trans(worth)) * (K**-0.5)
    along = tl.sum(Dunit * unit, 1) * (K**-0.5)  # the mean of what is worth along k^, whose squares' sum is 1
    Dkeys = Dunit - (tl.sum(Dunit, 1) / K)[:, None] - unit * (along * K**0.5)[:, None]
    _store(Dk, Dkeys * scale[:, None], place, there, K)


@triton.jit
def _retrieve(
    q, S, local, gain, out, T, H, of_sequence, of_token, of_head, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr
):
    """local + gain m / sqrt(1 + mean(m^2)), m = q S."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    queries = _strided(q, row, n, T, H, of_sequence, of_token, of_head, C, K)
    place, there = _tokens(row, n, T, H, C)
    m = tl.dot(queries, tl.load(S + (row * tl.num_programs(1) + n) * K * V + _matrix(K, V)))
    bound = tl.load(gain + row % H) * tl.rsqrt(1 + tl.sum(m * m, 1) / V)
    _store(out, _load(local, place, there, V) + m * bound[:, None], place, there, V)


@triton.jit
def _retrieve_gradient(
    q,
    S,
    gain,
    Dout,
    Dq,
    DS,
    Dgain,
    T,
    H,
    of_sequence,
    of_token,
    of_head,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Dgain (R, N): a chunk's own."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk = row * tl.num_programs(1) + n
    queries = _strided(q, row, n, T, H, of_sequence, of_token, of_head, C, K)
    place, there = _tokens(row, n, T, H, C)
    state = tl.load(S + chunk * K * V + _matrix(K, V))
    worth = _load(Dout, place, there, V).to(tl.float32)
    m = tl.dot(queries, state)
    root = tl.rsqrt(1 + tl.sum(m * m, 1) / V)
    along = tl.sum(worth * m, 1)
    tl.store(Dgain + chunk, tl.sum(along * root, 0))
    factor = tl.load(gain + row % H)
    Dm = (factor * root)[:, None] * (worth - m * (root * root * along / V)[:, None])
    Dm = Dm.to(queries.dtype)
    _store(Dq, tl.dot(Dm, tl.trans(state)), place, there, K)
    tl.store(DS + chunk * K * V + _matrix(K, V), tl.dot(tl.trans(queries), Dm).to(queries.dtype))


# The launches.


def _options(x: Tensor, C: int, V: int) -> dict[str, int]:
    K = x.shape[-1]
    return {"C": C, "K": K, "V": V, "num_warps": 4 if C * max(K, V) < 128 * 64 else 8}


def _alike(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Those as they are where they have equal strides and the last is 1, otherwise contiguous."""
    if x.stride(-1) == 1 and all(x.stride() == other.stride() for other in others):
        return [x, *others]
    return [part.contiguous() for part in (x, *others)]


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def chunk_states(k: Tensor, v: Tensor, C: int) -> Tensor:
    """`ops.chunk_states`."""
    k, v = _alike(k, v)
    B, T, H, K = k.shape
    N, V = triton.cdiv(T, C), v.shape[-1]
    states = k.new_empty(B, H, N, K, V)
    _chunk_states[(B * H, N)](k, v, states, T, H, *_strides(k), **_options(k, C, V))
    return states


def chunk_states_gradient(k: Tensor, v: Tensor, grad: Tensor, C: int) -> list[Tensor]:
    k, v = _alike(k, v)
    B, T, H, _ = k.shape
    Dk, Dv = (x.new_empty(x.shape) for x in (k, v))
    grid = (B * H, grad.shape[2])
    _chunk_states_gradient[grid](k, v, grad, Dk, Dv, T, H, *_strides(k), **_options(k, C, v.shape[-1]))
    return [Dk, Dv]


def retrieve(q: Tensor, S: Tensor, local: Tensor, gain: Tensor, C: int) -> Tensor:
    """`ops.retrieve`."""
    (q,) = _alike(q)
    B, T, H, _ = q.shape
    out = torch.empty_like(local)
    _retrieve[(B * H, S.shape[2])](q, S, local, gain, out, T, H, *_strides(q), **_options(q, C, S.shape[-1]))
    return out


def retrieve_gradient(q: Tensor, S: Tensor, gain: Tensor, grad: Tensor, C: int) -> list[Tensor]:
    (q,) = _alike(q)
    B, T, H, _ = q.shape
    Dq, DS, Dgain = q.new_empty(q.shape), S.new_empty(S.shape), gain.new_empty(B, H, S.shape[2])
    grid = (B * H, S.shape[2])
    _retrieve_gradient[grid](q, S, gain, grad, Dq, DS, Dgain, T, H, *_strides(q), **_options(q, C, S.shape[-1]))
    return [Dq, DS, Dgain.sum((0, 2))]
