"""The forms for CUDA in bf16 or fp16, which replace `mix` of an architecture. Only this file decides which form runs.

A kernel has the arguments and results of the `mix` that it replaces, initial states included. Matrix products are in
low precision with fp32 sums. Sums over all chunks, denominators, decays and softmaxes are fp32. `mix` itself runs in
fp32 and fp64, and on a CPU.

- windows: FlashAttention with a window, `torch.nn.attention.varlen` (torch >= 2.11); from a state, the plain form;
- chosen chunks (MoBA, NSA): FlashAttention of each chunk (`flash_chunks.py`); from a state, the plain form;
- FoX's queries after earlier keys: FlashAttention without a mask;
- Linear, GAU, BSBR's retrieval: batched products, all chunks at once;
- DeltaNet, Gated DeltaNet: Triton kernels (`ops.py`, `triton_delta_rule.py`);
- the other states that decay: `chunk_kernels.py`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import flash_chunks, ops, parts, softmax
from .parts import at_least_fp32, lower_triangle, to_chunks

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:  # torch before 2.10
    HAS_WINDOW = False

HAS_TRITON = find_spec("triton") is not None
BF16 = (torch.bfloat16,)  # of kernels whose states or factors may be above the range of fp16
LOW = (*BF16, torch.float16)
CHUNK = 64  # tokens in a chunk of the kernels
WIDTHS = (16, 32, 64, 128)  # head widths that the Triton kernels support
LEAST = -30.0  # log decay of a token: exp(-30) is nothing in low precision; larger sums would cost fp32 its digits


# Which form runs.


def low_precision(x: Tensor) -> torch.dtype | None:
    """The low precision of products with x, on CUDA under autocast or in that precision; None elsewhere."""
    if not x.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype if dtype in LOW else None


def choose(
    x: Tensor,
    kernel: Callable[..., Any],
    mix: Callable[..., Any],
    fits: bool = True,
    precisions: tuple[torch.dtype, ...] = LOW,
) -> Callable[..., Any]:
    """`kernel` if it `fits` and products with x are in one of the low `precisions`; otherwise `mix`."""
    low = low_precision(x)
    if low not in precisions or not fits:
        return mix
    return partial(kernel, low)


def has_triton(*widths: int) -> bool:
    """Whether Triton's kernels support heads of these widths."""
    return HAS_TRITON and all(width in WIDTHS for width in widths)


def has_window(width: int) -> bool:
    """Whether there is a FlashAttention of packed sequences, with a window, for heads of this width."""
    return HAS_WINDOW and width % 8 == 0 and width <= 256


def for_products(x: Tensor) -> Tensor:
    """x in the precision of its matrix products: low precision where `low_precision` says so, else at least fp32."""
    low = low_precision(x)
    return at_least_fp32(x) if low is None else x.to(low)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least fp32, under autocast too: for choices, and for factors that low precision does not hold."""
    a, b = at_least_fp32(a), at_least_fp32(b)
    if a.is_cuda:
        return ops.exact_product(a, b)
    if not torch.amp.is_autocast_available(a.device.type):  # meta
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def unit_vectors(x: Tensor) -> Tensor:
    """x / |x| over the last axis. In low precision on CUDA, its gradient keeps the result in that precision, not x."""
    low = low_precision(x)
    if low is None:
        return F.normalize(x, dim=-1)
    unit: Tensor = ops.UnitVectors.apply(x, low)
    return unit


# The kernels.


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: softmax.Sinks | None = None) -> Tensor:
    """`softmax.window_attention`, by FlashAttention where possible."""
    T, K = q.shape[2:]
    fits = window < T and k.shape[2] == T and has_window(K) and sinks is None
    low = low_precision(q)  # with QK-norm, autocast on CUDA gives q and k in fp32
    if low is None or not fits:
        return softmax.window_attention(q, k, v, window, sinks)
    return packed_attention(q.to(low), k.to(low), v.to(low), window - 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`softmax.causal_attention`. After earlier keys, FlashAttention aligned to the last key replaces its mask."""
    T, K = q.shape[2:]
    past, low = k.shape[2] - T, low_precision(q)
    if low is None or not past or T == 1 or not has_window(K) or k.shape[1] != q.shape[1]:
        return softmax.causal_attention(q, k, v, scale=scale)
    return packed_attention(q.to(low), k.to(low), v.to(low), -1, scale)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, back: int, scale: float | None = None) -> Tensor:
    """FlashAttention of queries (B, H, T, K) that are the last of the keys, to their own token and as many as `back`
    before it, all if -1: (B, H, T, K). A scale of None is 1 / sqrt(K)."""
    B, _, T, _ = q.shape
    S = k.shape[2]
    ends_q, ends_k = (torch.arange(B + 1, dtype=torch.int32, device=q.device) * tokens for tokens in (T, S))
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B T, H, K)
    mixed: Any = varlen_attn(q, k, v, ends_q, ends_k, T, S, scale=scale, window_size=(back, 0))
    return mixed.unflatten(0, (B, T)).transpose(1, 2)


def chosen_attention(q: Tensor, k: Tensor, v: Tensor, C: int, chosen: Tensor, exists: Tensor) -> Tensor:
    """`softmax.chosen_attention`, by FlashAttention where possible; then the mixed values are in low precision."""
    B, H, T, K = q.shape
    low = low_precision(q)
    fits = k.shape[2] == T and v.shape[3] == K and has_window(K) and B * H * -(-T // C) <= flash_chunks.SEQUENCES
    if low is None or not fits:
        return softmax.chosen_attention(q, k, v, C, chosen, exists)
    q, k, v = (part.to(low) for part in (q, k, v))
    return flash_chunks.chosen_chunks(q, k, v, chosen, exists, C)[0]


def linear_kernel(
    low: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None = None,
    z: Tensor | None = None,
    divide: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`LinearAttention.mix`; `divide` by the denominator."""
    from .linear import EPSILON

    T = q.shape[2]
    q, k, v = (to_chunks(part.to(low), CHUNK) for part in (q, k, v))  # (B, H, N, C, .)
    S_before, S = sums_before(k.mT @ v, dim=2, start=S)
    scores = (q @ k.mT) * lower_triangle(CHUNK, like=q)
    mixed = plus_product(scores @ v, q, S_before)
    if divide:
        z_before, z = parts.running_sum(k.sum(3, dtype=torch.float32), dim=2, start=z)
        total = scores.sum(-1, keepdim=True, dtype=torch.float32) + (q * z_before[..., None, :]).sum(-1, keepdim=True)
        mixed = mixed * (total + EPSILON).reciprocal()
    return mixed.to(low).flatten(2, 3)[:, :, :T], S, z


def gau_kernel(
    views: Callable[[Tensor, int], list[Tensor]],
    inside: Callable[[Tensor, Tensor], Tensor],
    chunk: int,
    low: torch.dtype,
    z: Tensor,
    v: Tensor,
    kv: Tensor | None = None,
    finished: int = 0,
) -> tuple[Tensor, Tensor]:
    """`GAUAttention.mix`, given its `views`, the weights `inside` a chunk and the chunk size."""
    T = z.shape[1]
    z, v = (to_chunks(part, min(chunk, T), dim=1) for part in (z, v.to(low)))  # (B, N, C, K), (B, N, C, E)
    q, k, q_lin, k_lin = views(z, finished)
    scores = inside(q.to(low), k.to(low)) * lower_triangle(q.shape[2], like=v)
    before, total = products_before(k_lin.to(low).mT @ v, dim=1)  # (B, N, K, E), (B, K, E)
    if kv is not None:
        before, total = before + kv.to(low)[:, None], total + kv
    count = ((finished + torch.arange(v.shape[1], device=v.device)) * chunk).clamp(min=1)[:, None, None]
    mixed = plus_product(scores @ v, (q_lin / count).to(low), before)
    return mixed.flatten(1, 2)[:, :T], before[:, -1].float() if T % chunk else total


def delta_rule_kernel(
    low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`DeltaNetAttention.mix`."""
    return gated_delta_rule_kernel(low, q, k, v, beta, None, S)


def gated_delta_rule_kernel(
    low: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor | None,
    S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`GatedDeltaNetAttention.mix`; without `log_alpha` there is no decay."""
    q, k, v = (part.to(low).transpose(1, 2).contiguous() for part in (q, k, v))  # (B, T, H, K)
    log_alpha = None if log_alpha is None else log_alpha.clamp(min=LEAST)
    beta, *decays = (
        part.squeeze(3).float().mT.contiguous() for part in (beta, log_alpha) if part is not None
    )  # (B, T, H)
    start = None if S is None else S.float().mT.contiguous()
    mixed, last, *_ = ops.delta_rule(q, k, v, beta, decays[0] if decays else None, start)
    return mixed.transpose(1, 2), last.mT


# Sums and products.


def weighted_states(weights: Tensor, states: Tensor, top_k: int | None) -> Tensor:
    """sum_n P_mn F_n: weights P (B, H, M, N), of which at most `top_k` per row are not 0, and states F (B, H, N, K, V)
    -> (B, H, M, K, V)."""
    weights = weights.to(states.dtype)
    if top_k is None or top_k >= states.shape[2] or states.is_cuda:  # on CUDA, zeros are faster than a gather
        return (weights @ states.flatten(3)).unflatten(3, states.shape[3:])
    best, index = weights.topk(top_k)  # (B, H, M, top_k)
    B, H, N = states.shape[:3]
    rows = torch.arange(B * H, device=index.device).view(B, H, 1, 1) * N + index
    bags = F.embedding_bag(
        rows.flatten(0, 2), states.flatten(3).flatten(0, 2), mode="sum", per_sample_weights=best.flatten(0, 2)
    )
    return bags.view(B, H, -1, *states.shape[3:])


def plus_product(x: Tensor, a: Tensor, b: Tensor, factor: int = 1) -> Tensor:
    """x + factor a @ b of batches of matrices, rounded once."""
    batches = (part.flatten(0, -3) for part in (x, a, b))
    return torch.baddbmm(*batches, alpha=factor).reshape(x.shape)


def sums_before(x: Tensor, dim: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`parts.running_sum` of x in low precision, summed in fp32 and rounded once; the sum of all in fp32."""
    shape = x.shape
    rows = x.reshape(shape[:dim].numel(), shape[dim], -1).contiguous()
    before, total = ops.sums_before(rows, None if start is None else start.float().reshape(len(rows), -1))
    return before.view(shape), total.view(shape[:dim] + shape[dim + 1 :])


def products_before(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`sums_before` by a product with a triangle of ones, which is faster for few chunks with large states.

    It reads x once, and its sums are fp32. More than 1024 chunks are summed by `cumsum`.
    """
    N, total = x.shape[dim], x.sum(dim, dtype=torch.float32)
    if N > 1024:
        return parts.running_sum(x.float(), dim)[0].to(x.dtype), total
    earlier = torch.ones(N, N, dtype=x.dtype, device=x.device).tril(-1)
    return (earlier @ x.flatten(dim + 1)).reshape(x.shape), total
