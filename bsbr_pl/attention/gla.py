"""Gated linear attention (GLA): linear attention in which every channel of the keys decays at its own rate.

    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t                    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16)
    o_t = q_t S_t

q, k, v are a short causal convolution of the projections, q divided by sqrt(K); the output is RMSNorm(o_t) *
SiLU(x_t W_g). The fast form, per chunk of C tokens, with S at the start of the chunk and g_t the sum of log alpha from
the start to t, K numbers:

    A_ts = sum_i q_ti k_si exp(g_ti - g_si)   for s <= t, else 0                    (`decayed_products`)
    O = (exp(g) Q) S + A V ;   S <- diag(exp(g_C)) S + (exp(g_C - g) K)^T V

With `tied_keys` it is HGRN2: alpha_t = sigmoid(x_t W_a + b), k_t = 1 - alpha_t, and q is a SiLU.

Source: Yang et al. 2023, arXiv 2312.06635, eq. 3; the fast form section 4, the layer section 4.4. HGRN2: Qin et al.
2024, arXiv 2404.07904.
Differences: the convolution (published: none, conv_size=1) and the width of the keys (published: expand_k=0.5); of
HGRN2, the output gate and the RMSNorm per head of GLA, and no lower bound on alpha.
Cost: O(T (C + K) D), with K = expand_k D / H.
Decode state: S (K D numbers) and the last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .chunk_kernels import gla_kernel
from .decays import decay_map, decayed_products, decayed_sum, power_of_two
from .kernels import BF16, choose, has_triton
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_number,
    check_positive,
    merge_heads,
    split_heads,
    to_chunks,
)

TEMPERATURE = 16  # alpha is the 16th root of a sigmoid


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    conv_state: Tensor  # (B, conv_size - 1, width of q, k, v), the last inputs of the convolution


class GLAAttention(Attention[Memory]):
    """Causal linear attention with a learned decay of every key channel.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once, rounded up to a power of two; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        expand_k: width of the keys of all heads, over D.
        gate_rank: width between the two maps that give the decay.
        tied_keys: the keys are 1 - alpha (HGRN2), and the decay is one map of full rank.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 4,
        conv_init: ConvInit = "uniform",
        expand_k: float = 1.0,
        gate_rank: int = 16,
        tied_keys: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size, gate_rank=gate_rank)
        whole = f"above 0, with expand_k * {self.head_dim} (the head width) a whole number"
        check_number(whole, lambda factor: factor > 0 and factor * self.head_dim % 1 == 0, expand_k=expand_k)
        self.chunk_size = chunk_size
        self.tied_keys = tied_keys
        self.key_dim = int(expand_k * self.head_dim)
        keys = num_heads * self.key_dim
        self.widths = [keys, hidden_dim] if tied_keys else [keys, keys, hidden_dim]
        self.qkv = nn.Linear(hidden_dim, sum(self.widths), bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv_size, conv_init)
        low_rank = nn.Sequential(nn.Linear(hidden_dim, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.decay = nn.Linear(hidden_dim, keys) if tied_keys else low_rank
        self.gate = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton(self.key_dim)

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, ...]:
        """q, k, log alpha (B, H, T, K), v (B, H, T, V) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        parts = [split_heads(part, self.num_heads) for part in at_least_fp32(qkv).split(self.widths, -1)]
        gate = split_heads(at_least_fp32(self.decay(x)), self.num_heads)
        log_alpha = -F.softplus(-gate)  # log sigmoid(gate)
        if self.tied_keys:
            q, v = parts
            q, k = F.silu(q), (-gate).sigmoid()  # 1 - alpha
        else:
            q, k, v = parts
            log_alpha = log_alpha / TEMPERATURE
        return q * self.key_dim**-0.5, k, log_alpha, v, conv_state

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[3]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(self.norm(mixed.to(x.dtype))) * F.silu(self.gate(x)))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, log_alpha, *_ = self.project(x)
        return torch.einsum("bhtk,bhsk,bhtsk->bhts", q, k, decay_map(log_alpha))

    def mix(self, q: Tensor, k: Tensor, log_alpha: Tensor, v: Tensor, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q, k, log alpha (B, H, T, K), v (B, H, T, V); S before them, zeros if None -> mixed values (B, H, T, V); S
        after."""
        T = q.shape[2]
        C = power_of_two(min(self.chunk_size, T))
        q, k, log_alpha, v = (to_chunks(part, C) for part in (q, k, log_alpha, v))  # (B, H, N, C, .)
        (A,), from_start, to_end = decayed_products(q[..., None, :], k, log_alpha)
        S_before, S = decayed_sum((k * to_end).mT @ v, from_start[..., -1, :, None], S)
        mixed = (q * from_start) @ S_before + A @ v
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, log_alpha, v, conv_state = self.project(x, state)
        S = None if state is None else state.S
        mixed, S = choose(x, gla_kernel, self.mix, self.has_kernel, BF16)(q, k, log_alpha, v, S)
        return self.emit(mixed, x), Memory(S, conv_state)

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.key_dim, self.head_dim))
        return Memory(S, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, log_alpha, v, conv_state = self.project(x, state)
        S = log_alpha.mT.exp() * state.S + k.mT @ v
        return self.emit(q @ S, x)[:, 0], Memory(S, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim * self.key_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, C = self.hidden_dim, self.key_dim, power_of_two(min(self.chunk_size, num_tokens))
        padded = -(-num_tokens // C) * C
        decay = sum(weight.numel() for weight in self.decay.parameters() if weight.dim() == 2)
        projections = num_tokens * (self.qkv.weight.numel() + decay + 2 * D * D + self.conv.weight.numel())
        products = padded * (C - 1) * K * self.num_heads // 2  # A below its diagonal
        return 2 * (projections + products + padded * D * (2 * K + C))  # K^T V and Q S, A V
