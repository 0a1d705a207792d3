"""Kimi Delta Attention (KDA): the delta rule in a memory in which every channel of the keys decays at its own rate.

    S_t = (I - beta_t k_t^T k_t) diag(alpha_t) S_{t-1} + beta_t k_t^T v_t    beta_t = sigmoid(x_t w_b)
    o_t = q_t S_t                                                            alpha_t = exp(-A softplus(x_t W_1 W_2 + b))

q, k, v are the SiLU of a short causal convolution of the projections; q and k have unit length; A is learned per head,
b per channel; the output is RMSNorm(o_t) * sigmoid(x_t W_3 W_4 + c). The fast form, per chunk of C tokens, with S at
the start of the chunk, g_t the sum of log alpha from the start to t (K numbers), and the products
<q, k>_ts = sum_i q_ti k_si exp(g_ti - g_si) for s <= t, else 0 (`decayed_products`):

    U = (I + tril(diag(beta) <k, k>, -1))^-1 diag(beta) (V - (exp(g) K) S)          (the updates, C x V)
    O = (exp(g) Q) S + <q, k> U ;   S <- diag(exp(g_C)) S + (exp(g_C - g) K)^T U

The inverses and O are computed for all chunks at once; only U and S go from chunk to chunk. One chunk of T tokens, with
S = 0, gives the map. With `allow_neg_eigval`, beta_t = 2 sigmoid(x_t w_b) (Grazzi et al. 2024, arXiv 2411.12537).

Source: Kimi Team 2025, arXiv 2510.26692, eq. 1, section 3.1 (the fast form), section 4 (the layer, eq. 10); W_1 W_2 and
W_3 W_4 have rank V, the width of a head.
Differences: q is not divided by sqrt(K) (published code: it is), which RMSNorm cancels unless o_t is small: its eps is
1e-5; the width of a head is D / H (published: 128).
Cost: O(T (C + K + C^2 / K) D).
Decode state: S (K D numbers) and the last conv_size - 1 inputs of the convolution.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .chunk_kernels import kda_kernel
from .decays import decay_map, decayed_products, power_of_two
from .kernels import BF16, choose, has_triton
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_positive,
    merge_heads,
    split_heads,
    to_chunks,
    unit_triangle_inverse,
)


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    conv_state: Tensor  # (B, conv_size - 1, 3D), the last inputs of the convolution


class KDAAttention(Attention[Memory]):
    """Causal linear attention with the delta rule and a learned decay of every key channel.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once, rounded up to a power of two; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        allow_neg_eigval: beta is in (0, 2) instead of (0, 1), so that a write can flip the sign of a stored value.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 4,
        conv_init: ConvInit = "uniform",
        allow_neg_eigval: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size)
        self.chunk_size = chunk_size
        self.allow_neg_eigval = allow_neg_eigval
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size, conv_init)
        self.beta = nn.Linear(hidden_dim, num_heads, bias=False)
        self.decay = self.low_rank()
        self.log_rate = nn.Parameter(torch.empty(num_heads, 1).uniform_(1, 16).log())  # log A
        self.gate = self.low_rank()
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)
        softplus_b = torch.empty(hidden_dim).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.decay[1].bias = nn.Parameter(softplus_b.expm1().log())

    def low_rank(self) -> nn.Sequential:
        """A map D -> V -> D."""
        return nn.Sequential(
            nn.Linear(self.hidden_dim, self.head_dim, bias=False), nn.Linear(self.head_dim, self.hidden_dim)
        )

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton(self.head_dim)

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, ...]:
        """q, k, v (B, H, T, K), beta (B, H, T, 1), log alpha (B, H, T, K) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in F.silu(at_least_fp32(qkv)).chunk(3, -1))
        beta = at_least_fp32(self.beta(x)).sigmoid().mT[..., None] * (2 if self.allow_neg_eigval else 1)
        rate = at_least_fp32(self.log_rate).exp()[..., None]  # (H, 1, 1)
        log_alpha = -rate * F.softplus(split_heads(at_least_fp32(self.decay(x)), self.num_heads))
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, log_alpha, conv_state

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(self.norm(mixed.to(x.dtype))) * self.gate(x).sigmoid())

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, beta, log_alpha, _ = self.project(x)
        qk, kk = (torch.einsum("bhtk,bhsk,bhtsk->bhts", part, k, decay_map(log_alpha)) for part in (q, k))
        identity = torch.eye(x.shape[1], dtype=q.dtype, device=x.device)
        updates = torch.linalg.inv(identity + (beta * kk).tril(-1)) * beta.mT  # U = updates @ V
        return qk @ updates.tril()

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q, k, v, log alpha (B, H, T, K), beta (B, H, T, 1); S before them, zeros if None -> mixed values
        (B, H, T, V); S after."""
        T = q.shape[2]
        C = power_of_two(min(self.chunk_size, T))
        q, k, v, beta, log_alpha = (to_chunks(part, C) for part in (q, k, v, beta, log_alpha))  # (B, H, N, C, .)
        k_beta, v_beta = beta * k, beta * v
        (qk, kk), from_start, to_end = decayed_products(torch.stack((q, k_beta), -2), k, log_alpha)
        inverses = unit_triangle_inverse(kk)
        S = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if S is None else S
        steps = (k * to_end, k_beta * from_start, v_beta, inverses, from_start[..., -1, :, None])
        S_before, U = [], []
        for k_n, k_beta_n, v_beta_n, inverse_n, decay_n in zip(*(part.unbind(2) for part in steps), strict=True):
            S_before.append(S)
            U.append(inverse_n @ (v_beta_n - k_beta_n @ S))
            S = decay_n * S + k_n.mT @ U[-1]
        mixed = (q * from_start) @ torch.stack(S_before, 2) + qk @ torch.stack(U, 2)
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, beta, log_alpha, conv_state = self.project(x, state)
        S = None if state is None else state.S
        mixed, S = choose(x, kda_kernel, self.mix, self.has_kernel, BF16)(q, k, v, beta, log_alpha, S)
        return self.emit(mixed, x), Memory(S, conv_state)

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.head_dim, self.head_dim))
        return Memory(S, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, v, beta, log_alpha, conv_state = self.project(x, state)
        S = log_alpha.mT.exp() * state.S
        S = S + beta * k.mT @ (v - k @ S)
        return self.emit(q @ S, x)[:, 0], Memory(S, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim * self.head_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, C = self.hidden_dim, self.head_dim, power_of_two(min(self.chunk_size, num_tokens))
        padded = -(-num_tokens // C) * C
        projections = num_tokens * (4 * D * D + 4 * K * D + D * self.num_heads + self.conv.weight.numel())
        products = (C - 1) * D  # <q, k> and <k, k> below their diagonals
        inverse = padded // C * self.num_heads * C**3 // 2  # half of C^2 for each of C columns
        loop = C * D + 2 * K * D  # (...)^-1 (...) ; K S, K^T U
        outputs = K * D + C * D  # Q S, <q, k> U
        return 2 * (projections + inverse + padded * (products + loop + outputs))
