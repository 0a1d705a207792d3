"""Gated DeltaNet: the delta rule in a memory that decays.

    S_t = alpha_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t          beta_t = sigmoid(x_t w_b + c)
    o_t = q_t S_t                                                            alpha_t = exp(-A softplus(x_t w_a + b))

q, k, v are the SiLU of a short causal convolution of the projections; q and k have unit length; A, b and c are learned
per head; the output is RMSNorm(o_t) * SiLU(x_t W_g). The fast form, per chunk of C tokens, with S at the start of the
chunk, g_t the sum of log alpha from the start to t, and the decay G_ts = exp(g_t - g_s) from s to t for s <= t,
else 0:

    U = (I + tril(diag(beta) K K^T * G, -1))^-1 diag(beta) (V - exp(g) K S)          (the updates, C x V)
    O = exp(g) Q S + (Q K^T * G) U ;   S <- exp(g_C) S + (exp(g_C - g) K)^T U

The inverses and O are computed for all chunks at once; only U and S go from chunk to chunk. One chunk of T tokens, with
S = 0, gives the map. All exponents are at most 0, so nothing overflows. With `allow_neg_eigval`,
beta_t = 2 sigmoid(x_t w_b + c) (Grazzi et al. 2024, arXiv 2411.12537).

Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, eq. 10, section 3.3 (the fast form) and 3.4 (the layer); A
and b as in Dao and Gu 2024, arXiv 2405.21060.
Differences: the widths of keys and values (published: head_dim = 3 D / (4 H), expand_v=2), the start of the decays
(published: decay_init="random"), the bias c (published: none), and q is not divided by sqrt(K) (see `kda`).
Cost: O(T H (C (K + V) + K V + C^2)).
Decode state: S (H K V numbers) and the last conv_size - 1 inputs of the convolution.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .decays import decay_map, decays, power_of_two
from .kernels import choose, gated_delta_rule_kernel, has_triton, unit_vectors
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_choice,
    check_number,
    check_positive,
    merge_heads,
    split_heads,
    to_chunks,
    unit_triangle_inverse,
)

DecayInit = Literal["spaced", "random"]


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    conv_state: Tensor  # (B, conv_size - 1, H (2K + V)), the last inputs of the convolution


class GatedDeltaNetAttention(Attention[Memory]):
    """Causal linear attention with the delta rule and a learned decay.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once, rounded up to a power of two; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        allow_neg_eigval: beta is in (0, 2) instead of (0, 1), so that a write can flip the sign of a stored value.
        head_dim: width K of the queries and keys of a head; D / H if None. The state has H K V numbers.
        expand_v: V / K; expand_v * K must be whole.
        decay_init: initial decays: `spaced` (A = 1, and the heads remember 10 to 1000 tokens) or `random`, as published
            (A from U(0, 16), and softplus(b) from 0.001 to 0.1, uniform in its logarithm).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 4,
        conv_init: ConvInit = "uniform",
        allow_neg_eigval: bool = False,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        decay_init: DecayInit = "spaced",
    ) -> None:
        super().__init__(hidden_dim, num_heads, head_dim)
        check_positive(chunk_size=chunk_size, conv_size=conv_size)
        check_choice(get_args(DecayInit), decay_init=decay_init)
        whole = f"above 0, with expand_v * {self.head_dim} (the head width) a whole number"
        check_number(whole, lambda factor: factor > 0 and factor * self.head_dim % 1 == 0, expand_v=expand_v)
        self.chunk_size = chunk_size
        self.allow_neg_eigval = allow_neg_eigval
        keys, self.value_dim = num_heads * self.head_dim, num_heads * int(expand_v * self.head_dim)
        self.widths = [keys, keys, self.value_dim]
        self.qkv = nn.Linear(hidden_dim, sum(self.widths), bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv_size, conv_init)
        self.beta = nn.Linear(hidden_dim, num_heads)
        self.decay = nn.Linear(hidden_dim, num_heads)
        rate = 16 * (1 - torch.rand(num_heads)) if decay_init == "random" else torch.ones(num_heads)
        self.log_rate = nn.Parameter(rate.log())  # log A
        self.gate = nn.Linear(hidden_dim, self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim // num_heads, eps=1e-5)
        self.out = nn.Linear(self.value_dim, hidden_dim, bias=False)
        softplus_b = torch.logspace(-1, -3, num_heads)
        if decay_init == "random":
            softplus_b.uniform_(math.log(0.001), math.log(0.1)).exp_()
        with torch.no_grad():
            self.decay.bias.copy_(softplus_b.expm1().log())

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton(self.head_dim, self.value_dim // self.num_heads)

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, ...]:
        """q, k (B, H, T, K), v (B, H, T, V), beta, log alpha (B, H, T, 1) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in F.silu(at_least_fp32(qkv)).split(self.widths, -1))
        beta = at_least_fp32(self.beta(x)).sigmoid().mT[..., None] * (2 if self.allow_neg_eigval else 1)
        log_alpha = -(at_least_fp32(self.log_rate).exp() * F.softplus(at_least_fp32(self.decay(x)))).mT[..., None]
        return unit_vectors(q), unit_vectors(k), v, beta, log_alpha, conv_state

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(self.norm(mixed.to(x.dtype))) * F.silu(self.gate(x)))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, beta, log_alpha, _ = self.project(x)
        G = decay_map(log_alpha)[..., 0]
        identity = torch.eye(x.shape[1], dtype=q.dtype, device=x.device)
        updates = torch.linalg.inv(identity + (beta * k @ k.mT * G).tril(-1)) * beta.mT  # U = updates @ V
        return q @ k.mT * G @ updates.tril()

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q, k (B, H, T, K), v (B, H, T, V), beta, log alpha (B, H, T, 1); S before them, zeros if None -> mixed values
        (B, H, T, V); S after."""
        T = q.shape[2]
        C = power_of_two(min(self.chunk_size, T))
        q, k, v, beta, log_alpha = (to_chunks(part, C) for part in (q, k, v, beta, log_alpha))  # (B, H, N, C, .)
        G, from_start, to_end = decays(log_alpha)
        k_beta, v_beta = beta * k, beta * v
        inverses = unit_triangle_inverse(at_least_fp32(k_beta @ k.mT * G))  # the solver has no bf16
        S = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if S is None else S
        steps = (k * to_end, k_beta * from_start, v_beta, inverses, from_start[..., -1:, :])
        S_before, U = [], []
        for k_n, k_beta_n, v_beta_n, inverse_n, decay_n in zip(*(part.unbind(2) for part in steps), strict=True):
            S_before.append(S)
            U.append(inverse_n @ (v_beta_n - k_beta_n @ S))
            S = decay_n * S + k_n.mT @ U[-1]
        mixed = (q * from_start) @ torch.stack(S_before, 2) + (q @ k.mT * G) @ torch.stack(U, 2)
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, beta, log_alpha, conv_state = self.project(x, state)
        S = None if state is None else state.S
        mixed, S = choose(x, gated_delta_rule_kernel, self.mix, self.has_kernel)(q, k, v, beta, log_alpha, S)
        return self.emit(mixed, x), Memory(S, conv_state)

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.head_dim, self.value_dim // self.num_heads))
        return Memory(S, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, v, beta, log_alpha, conv_state = self.project(x, state)
        S = log_alpha.exp() * state.S
        S = S + beta * k.mT @ (v - k @ S)
        return self.emit(q @ S, x)[:, 0], Memory(S, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.head_dim * self.value_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        H, K, E, C = self.num_heads, self.head_dim, self.value_dim, power_of_two(min(self.chunk_size, num_tokens))
        padded = -(-num_tokens // C) * C
        maps = sum(weight.numel() for weight in self.parameters() if weight.dim() > 1)  # the taps included
        products = 2 * C * H * K  # K K^T and Q K^T
        inverse = padded // C * H * C**3 // 2  # half of C^2 for each of C columns
        loop = C * E + 2 * K * E  # (...)^-1 (...) ; K S, K^T U
        outputs = K * E + C * E  # Q S, scores U
        G = padded * (C - 1) * H // 2
        return 2 * (num_tokens * maps + G + inverse + padded * (products + loop + outputs))
