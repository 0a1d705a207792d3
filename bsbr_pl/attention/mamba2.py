"""Mamba-2: a state-space model in which the state of each head decays at one learned rate per token.

    S_t = alpha_t S_{t-1} + dt_t k_t^T v_t          dt_t = softplus(x_t w_dt + b),  alpha_t = exp(-A dt_t)
    o_t = q_t S_t + d v_t

q, k, v are the SiLU of a short causal convolution of the projections; in the letters of the paper they are C, B and X.
All heads share q and k, K numbers each; v has E = expansion_factor D numbers. A, b and d are learned per head; the
output is RMSNorm(o_t * SiLU(x_t W_z)), with RMSNorm over all heads together. The fast form, per chunk of C tokens, with
S at the start of the chunk, g_t the sum of log alpha from the start to t, and the decay G_ts = exp(g_t - g_s) from s to
t for s <= t, else 0 (`decays`):

    O = exp(g) Q S + (Q K^T * G) dt V + d V ;   S <- exp(g_C) S + (exp(g_C - g) K)^T dt V

Source: Dao and Gu 2024, arXiv 2405.21060, eq. 6 and 16 (the map), section 6 (the fast form), section 7.1 (the layer).
Differences: the convolution starts as the identity (published: conv_init="uniform") with a bias of 0, and the state is
smaller (published: key_dim=128, heads of width 64).
Cost: O(T (C + K) E).
Decode state: S (K E numbers) and the last conv_size - 1 inputs of the convolution.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .chunk_kernels import mamba2_kernel
from .decays import decay_map, decayed_sum, decays, power_of_two
from .kernels import BF16, choose, has_triton
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_positive,
    merge_heads,
    split_heads,
    to_chunks,
)


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    conv_state: Tensor  # (B, conv_size - 1, 2K + E), the last inputs of the convolution


class Mamba2Attention(Attention[Memory]):
    """The layer of Mamba-2, a linear attention with one decay per head and one query and key for all heads.

    Args:
        hidden_dim: width D.
        num_heads: heads H; the published width of a head, E / H, is 64.
        chunk_size: tokens C computed at once, rounded up to a power of two; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        expansion_factor: E / D.
        key_dim: width K of a query and a key, the state size N of the paper.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 4,
        conv_init: ConvInit = "identity",
        expansion_factor: int = 2,
        key_dim: int = 64,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size, expansion_factor=expansion_factor, key_dim=key_dim)
        self.chunk_size = chunk_size
        self.key_dim = key_dim
        self.value_dim = expansion_factor * hidden_dim
        channels = 2 * key_dim + self.value_dim
        self.qkv = nn.Linear(hidden_dim, channels, bias=False)
        self.conv = ShortConvolution(channels, conv_size, conv_init)
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.dt = nn.Linear(hidden_dim, num_heads)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())  # log A
        self.skip = nn.Parameter(torch.ones(num_heads))  # d
        self.gate = nn.Linear(hidden_dim, self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.out = nn.Linear(self.value_dim, hidden_dim, bias=False)
        with torch.no_grad():  # dt starts between 0.001 and 0.1
            self.dt.bias.uniform_(math.log(0.001), math.log(0.1)).exp_().expm1_().log_()

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton()

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, ...]:
        """q, k (B, 1, T, K), v (B, H, T, V), dt, log alpha (B, H, T, 1) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        qkv = F.silu(at_least_fp32(qkv) + self.conv_bias)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], -1)
        dt = F.softplus(at_least_fp32(self.dt(x)))  # (B, T, H)
        log_alpha = -at_least_fp32(self.log_rate).exp() * dt
        return (
            q[:, None],
            k[:, None],
            split_heads(v, self.num_heads),
            dt.mT[..., None],
            log_alpha.mT[..., None],
            conv_state,
        )

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(merge_heads(mixed).to(x.dtype) * F.silu(self.gate(x))))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, dt, log_alpha, _ = self.project(x)
        G = decay_map(log_alpha)[..., 0]
        return q @ k.mT * G * dt.mT + self.skip[:, None, None] * torch.eye(x.shape[1], device=x.device)

    def mix(
        self, q: Tensor, k: Tensor, dt_v: Tensor, log_alpha: Tensor, S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q, k (B, 1, T, K), dt v (B, H, T, V), log alpha (B, H, T, 1); S before them, zeros if None -> mixed values
        (B, H, T, V), without d v; S after."""
        T, parts = dt_v.shape[2], (q, k, dt_v, log_alpha)
        C = power_of_two(min(self.chunk_size, T))
        q, k, dt_v, log_alpha = (to_chunks(part, C) for part in parts)  # (B, 1 or H, N, C, .)
        G, from_start, to_end = decays(log_alpha)
        S_before, S = decayed_sum(k.mT @ (to_end * dt_v), from_start[..., -1:, :], S)
        mixed = from_start * (q @ S_before) + (q @ k.mT * G) @ dt_v
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, dt, log_alpha, conv_state = self.project(x, state)
        S = None if state is None else state.S
        mixed, S = choose(x, mamba2_kernel, self.mix, self.has_kernel, BF16)(q, k, dt * v, log_alpha, S)
        return self.emit(mixed + self.skip[:, None, None] * v, x), Memory(S, conv_state)

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.key_dim, self.value_dim // self.num_heads))
        return Memory(S, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, v, dt, log_alpha, conv_state = self.project(x, state)
        S = log_alpha.exp() * state.S + k.mT @ (dt * v)
        return self.emit(q @ S + self.skip[:, None, None] * v, x)[:, 0], Memory(S, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.key_dim * self.value_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, E, C = self.hidden_dim, self.key_dim, self.value_dim, power_of_two(min(self.chunk_size, num_tokens))
        padded = -(-num_tokens // C) * C
        projections = num_tokens * (D * (2 * K + 3 * E + self.num_heads) + self.conv.weight.numel())
        G = padded * (C - 1) * self.num_heads // 2
        return 2 * (projections + G + padded * (C * K + 2 * K * E + C * E))  # Q K^T; K^T V and Q S; (Q K^T * G) V
