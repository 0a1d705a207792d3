"""What an architecture computes in place of `mix` on CUDA in bf16 or fp16. What runs when is chosen here alone.

A kernel takes and gives what `mix` of its architecture does. Its products are of numbers rounded to the low precision,
with sums in fp32; what is summed over all chunks, denominators, decays and softmaxes are fp32. In fp32 and fp64, and on
a CPU, `mix` stays.

- windows: FlashAttention with a window, by `torch.nn.attention.varlen` (torch >= 2.11);
- Linear, GAU, BSBR's retrieval: batched products, chunk by chunk at once;
- DeltaNet, Gated DeltaNet: Triton kernels (`ops.py`, `triton_kernels.py`).
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import base, ops
from .base import at_least_fp32, lower_triangle, to_chunks

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:  # torch before 2.10
    HAS_WINDOW = False

HAS_TRITON = find_spec("triton") is not None
LOW = (torch.bfloat16, torch.float16)
CHUNK = 64  # tokens that the kernels take at once
WIDTHS = (16, 32, 64, 128)  # of keys and values that the Triton kernels have been made for


def low_precision(x: Tensor) -> torch.dtype | None:
    """In what precision products with x are to be, on CUDA under autocast or in a low precision; elsewhere None."""
    if not x.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype if dtype in LOW else None


def choose(x: Tensor, kernel: Callable[..., Any], mix: Callable[..., Any], fits: bool = True) -> Callable[..., Any]:
    """`kernel` where it `fits` and can work on what is projected from x, in x's precision; otherwise `mix`."""
    low = low_precision(x)
    if low is None or not fits:
        return mix
    return partial(kernel, low)


def has_width(width: int) -> bool:
    """Whether the Triton kernels take heads of this width."""
    return HAS_TRITON and width in WIDTHS


def for_products(x: Tensor) -> Tensor:
    """x as a matrix product takes it: in low precision where products are to be, otherwise in fp32 or more."""
    low = low_precision(x)
    return at_least_fp32(x) if low is None else x.to(low)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`base.window_attention`, by FlashAttention where it can."""
    B, _, T, K = q.shape
    if window >= T or not HAS_WINDOW or not q.is_cuda or q.dtype not in LOW or K % 8 or K > 256:
        return base.window_attention(q, k, v, window)
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B T, H, K)
    mixed: Any = varlen_attn(q, k, v, ends, ends, T, T, window_size=(window - 1, 0))
    return mixed.unflatten(0, (B, T)).transpose(1, 2)


def linear_kernel(low: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`LinearAttention.mix`."""
    from .linear import EPSILON

    T = q.shape[2]
    q, k, v = (to_chunks(part.to(low), CHUNK) for part in (q, k, v))  # (B, H, N, C, .)
    S_before, S = sums_before(k.mT @ v, dim=2)
    z_before, z = base.running_sum(k.sum(3, dtype=torch.float32), dim=2)
    scores = (q @ k.mT) * lower_triangle(CHUNK, like=q)
    total = scores.sum(-1, keepdim=True, dtype=torch.float32) + (q * z_before[..., None, :]).sum(-1, keepdim=True)
    mixed = plus_product(scores @ v, q, S_before) * (total + EPSILON).reciprocal()
    return mixed.to(low).flatten(2, 3)[:, :, :T], S, z


def gau_kernel(
    views: Callable[[Tensor], list[Tensor]], chunk: int, low: torch.dtype, z: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`GAUAttention.mix` with its `views` and chunk size."""
    T = z.shape[1]
    z, v = (to_chunks(part, min(chunk, T), dim=1) for part in (z, v.to(low)))  # (B, N, C, S), (B, N, C, E)
    q, k, q_lin, k_lin = views(z)
    scores = (q.to(low) @ k.to(low).mT / chunk).relu().square() * lower_triangle(q.shape[2], like=v)
    before, total = products_before(k_lin.to(low).mT @ v, dim=1)  # (B, N, S, E), (B, S, E)
    count = (torch.arange(v.shape[1], device=v.device) * chunk).clamp(min=1)[:, None, None]
    mixed = plus_product(scores @ v, (q_lin / count).to(low), before)
    return mixed.flatten(1, 2)[:, :T], before[:, -1].float() if T % chunk else total


def delta_rule_kernel(low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`DeltaNetAttention.mix`."""
    return gated_delta_rule_kernel(low, q, k, v, beta, None)


def gated_delta_rule_kernel(
    low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`GatedDeltaNetAttention.mix`; without `log_alpha` nothing is forgotten."""
    q, k, v = (part.to(low).transpose(1, 2).contiguous() for part in (q, k, v))  # (B, T, H, K)
    beta, *decays = (
        part.squeeze(3).float().mT.contiguous() for part in (beta, log_alpha) if part is not None
    )  # (B, T, H)
    mixed, S, *_ = ops.delta_rule(q, k, v, beta, decays[0] if decays else None)
    return mixed.transpose(1, 2), S.mT


def plus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b of batches of matrices, rounded once."""
    batches = (part.flatten(0, -3) for part in (x, a, b))
    return torch.baddbmm(*batches).reshape(x.shape)


def sums_before(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`base.running_sum` of x in low precision, added up in fp32 and rounded once; the sum of all in fp32."""
    shape = x.shape
    before, total = ops.sums_before(x.reshape(shape[:dim].numel(), shape[dim], -1).contiguous())
    return before.view(shape), total.view(shape[:dim] + shape[dim + 1 :])


def products_before(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`sums_before` by a product with a triangle of ones, which is faster for few chunks with large states.

    It reads x once, and its sums are fp32. More than 1024 chunks are summed by `cumsum`.
    """
    N, total = x.shape[dim], x.sum(dim, dtype=torch.float32)
    if N > 1024:
        return base.running_sum(x.float(), dim)[0].to(x.dtype), total
    earlier = torch.ones(N, N, dtype=x.dtype, device=x.device).tril(-1)
    return (earlier @ x.flatten(dim + 1)).reshape(x.shape), total
