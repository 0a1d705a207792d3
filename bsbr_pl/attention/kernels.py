"""flash-linear-attention's kernels in place of `mix`, on CUDA in bf16 or fp16: `pip install -e '.[gpu]'`.

A kernel takes and gives what `mix` of its architecture does. Its products are of numbers rounded to x's precision, so
in fp32 and fp64 `mix` stays. Decode state and denominators are fp32 here too.

Source: https://github.com/fla-org/flash-linear-attention (Yang and Zhang 2024).
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def installed() -> bool:
    return all(map(find_spec, ("fla", "triton")))


def choose(x: Tensor, kernel: Callable[..., Any], mix: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` where it can work on what is projected from x, in its precision; otherwise `mix`."""
    if not x.is_cuda or not installed():
        return mix
    low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if low not in (torch.bfloat16, torch.float16):
        return mix
    return lambda *parts: kernel(low, *parts)


def delta_rule_kernel(low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`DeltaNetAttention.mix`."""
    from fla.ops.delta_rule import chunk_delta_rule

    q, k, v, beta = (_tokens_first(part, low) for part in (q, k, v, beta))
    mixed, S = chunk_delta_rule(q, k, v, beta[..., 0], scale=1.0, output_final_state=True)
    return mixed.transpose(1, 2).float(), S


def linear_kernel(low: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`LinearAttention.mix`."""
    from fla.ops.linear_attn import chunk_linear_attn

    from .linear import EPSILON

    parts = (_tokens_first(part, low) for part in (q, k, v))
    mixed, S = chunk_linear_attn(*parts, scale=1.0, output_final_state=True, normalize=False)
    z = k.cumsum(2)
    total = (q * z).sum(-1, keepdim=True) + EPSILON
    return mixed.transpose(1, 2).float() / total, S, z[:, :, -1]


def _tokens_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, K) -> (B, T, H, K), contiguous."""
    return x.transpose(1, 2).to(dtype).contiguous()
