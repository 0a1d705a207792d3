"""Gated DeltaProduct: several steps of the delta rule per token, in a memory that decays.

    S_t,0 = alpha_t S_{t-1}
    S_t,i = (I - beta_t,i k_t,i^T k_t,i) S_t,i-1 + beta_t,i k_t,i^T v_t,i        i = 1, ..., n
    S_t = S_t,n
    o_t = q_t S_t

beta_t,i = 2 sigmoid(x_t w_i + c_i), so a step may flip the sign of what it finds. A product of n such steps can rotate,
which one step cannot. alpha_t = exp(-A softplus(x_t w_a + b)). q, the n keys and the n values are the SiLU of a short
causal convolution of the projections; q and k have unit length; the output is RMSNorm(o_t) * SiLU(x_t W_g).

The fast form is that of Gated DeltaNet with n rows per token: in a chunk of C tokens, K, V and beta have n C rows. S is
the state at the start of the chunk, g_t the sum of log alpha from there to t, and the decay from s to t is
G_ts = exp(g_t - g_s) for s <= t, else 0:

    U = (I + tril(diag(beta) K K^T * G, -1))^-1 diag(beta) (V - exp(g) K S)        (the updates, n C x V)
    O = exp(g) Q S + (Q K^T * G) U ;   S <- exp(g_C) S + (exp(g_C - g) K)^T U

One chunk of T tokens, with S = 0, gives the map: one T x T matrix per head and step, which mixes the values of that
step. With forget_gate=False, alpha_t = 1.

Source: Siems et al. 2025, arXiv 2502.10297, section 3. Published: two to four steps, at the same number of parameters.
Differences: keys and values of a head are D / H wide (published: 3 D / (4 H), and twice that); A starts at 1 and the
heads with memories of 10 to 1000 tokens (published: A from U(0, 16), and softplus(b) from 0.001 to 0.1); beta has the
biases c_i (published: none); q is not divided by sqrt(K) (see `kda`).
Cost: O(T (n C + K + n^2 C^2 / K) n D).
Decode state: S (K D numbers) and the last conv_size - 1 inputs of the convolution, (2n + 1) D numbers each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, num_weights
from .chunk_kernels import gated_delta_product_kernel
from .decays import decay_map, decays, power_of_two
from .kernels import choose, has_triton, unit_vectors
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
    conv_state: Tensor  # (B, conv_size - 1, (2n + 1) D), the last inputs of the convolution


class GatedDeltaProductAttention(Attention[Memory]):
    """Causal linear attention with several steps of the delta rule per token and a learned decay.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once, rounded up to a power of two; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        num_steps: steps n per token, each with a key and a value of its own.
        forget_gate: decay the memory; without it, this is DeltaProduct.
        allow_neg_eigval: beta is in (0, 2); False for (0, 1).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 32,
        conv_size: int = 4,
        conv_init: ConvInit = "uniform",
        num_steps: int = 2,
        forget_gate: bool = True,
        allow_neg_eigval: bool = True,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size, num_steps=num_steps)
        self.chunk_size = chunk_size
        self.num_steps = num_steps
        self.beta_scale = 2 if allow_neg_eigval else 1
        width = (2 * num_steps + 1) * hidden_dim
        self.qkv = nn.Linear(hidden_dim, width, bias=False)  # q, the keys of all steps, the values of all steps
        self.conv = ShortConvolution(width, conv_size, conv_init)
        self.beta = nn.Linear(hidden_dim, num_steps * num_heads)
        self.decay = nn.Linear(hidden_dim, num_heads) if forget_gate else None
        self.log_rate = nn.Parameter(torch.zeros(num_heads)) if forget_gate else None  # log A
        self.gate = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)
        if self.decay is not None:
            with torch.no_grad():  # the heads start with memories of 10 to 1000 tokens
                self.decay.bias.copy_(torch.logspace(-1, -3, num_heads).expm1().log())

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton(self.head_dim)

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, ...]:
        """q (B, H, T, K); k, v (B, H, T, n, K) and beta (B, H, T, n, 1) of each step; log alpha (B, H, T, 1); the state
        of the convolution."""
        D, n = self.hidden_dim, self.num_steps
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        q, k, v = F.silu(at_least_fp32(qkv)).split([D, n * D, n * D], -1)
        q = split_heads(q, self.num_heads)
        k, v, beta = (
            split_heads(part, n * self.num_heads).unflatten(1, (-1, n)).transpose(2, 3)
            for part in (k, v, self.beta_scale * at_least_fp32(self.beta(x)).sigmoid())
        )
        log_alpha = q.new_zeros(*q.shape[:3], 1)
        if self.decay is not None and self.log_rate is not None:
            rate = at_least_fp32(self.log_rate).exp()
            log_alpha = -(rate * F.softplus(at_least_fp32(self.decay(x)))).mT[..., None]
        return unit_vectors(q), unit_vectors(k), v, beta, log_alpha, conv_state

    def values(self, x: Tensor) -> Tensor:
        """(B, n H, T, V): of each head, the values of its n steps."""
        return self.project(x)[2].transpose(2, 3).flatten(1, 2)

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        mixed = mixed.unflatten(1, (self.num_heads, -1)).sum(2)  # what the steps add up to
        return self.out(merge_heads(self.norm(mixed.to(x.dtype))) * F.silu(self.gate(x)))

    def attention_map(self, x: Tensor) -> Tensor:
        """(B, n H, T, T)."""
        q, k, _, beta, log_alpha, _ = self.project(x)
        n, T = self.num_steps, x.shape[1]
        k, beta = k.flatten(2, 3), beta.flatten(2, 3)  # (B, H, T n, .)
        G = decay_map(log_alpha)[..., 0].repeat_interleave(n, 3)  # from the rows of a token to each token
        identity = torch.eye(T * n, dtype=q.dtype, device=x.device)
        lower = (beta * k @ k.mT * G.repeat_interleave(n, 2)).tril(-1)
        scores = q @ k.mT * G
        steps = (scores @ (torch.linalg.inv(identity + lower).tril() * beta.mT)).unflatten(3, (T, n))
        return steps.movedim(4, 2).flatten(1, 2)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q (B, H, T, K), k, v (B, H, T, n, K), beta (B, H, T, n, 1), log alpha (B, H, T, 1); S before them, zeros if
        None -> mixed values (B, H, T, V); S after."""
        T, n = q.shape[2], k.shape[3]
        C = power_of_two(min(self.chunk_size, T))
        q, log_alpha = to_chunks(q, C), to_chunks(log_alpha, C)  # (B, H, N, C, .)
        k, v, beta = (to_chunks(part.flatten(2, 3), n * C) for part in (k, v, beta))  # (B, H, N, n C, .)
        G, from_start, to_end = decays(log_alpha)
        G = G.repeat_interleave(n, 4)  # from the rows of a token to each token
        k_beta, v_beta = beta * k, beta * v
        inverses = unit_triangle_inverse(at_least_fp32(k_beta @ k.mT * G.repeat_interleave(n, 3)))
        rows_from_start, rows_to_end = from_start.repeat_interleave(n, 3), to_end.repeat_interleave(n, 3)
        S = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if S is None else S
        steps = (k * rows_to_end, k_beta * rows_from_start, v_beta, inverses, from_start[..., -1:, :])
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
        kernel = choose(x, gated_delta_product_kernel, self.mix, self.has_kernel)
        mixed, S = kernel(q, k, v, beta, log_alpha, S)
        return self.emit(mixed, x), Memory(S, conv_state)

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.head_dim, self.head_dim))
        return Memory(S, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, v, beta, log_alpha, conv_state = self.project(x, state)
        S = log_alpha.exp() * state.S
        for k_i, v_i, beta_i in zip(*(part.unbind(3) for part in (k, v, beta)), strict=True):  # (B, H, 1, .)
            S = S + beta_i * k_i.mT @ (v_i - k_i @ S)
        return self.emit(q @ S, x)[:, 0], Memory(S, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim * self.head_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, n, C = self.hidden_dim, self.head_dim, self.num_steps, power_of_two(min(self.chunk_size, num_tokens))
        padded = -(-num_tokens // C) * C
        projections = num_tokens * num_weights(self.qkv, self.conv, self.beta, self.decay, self.gate, self.out)
        products = (n + 1) * n * C * D  # K K^T and Q K^T
        inverse = padded // C * self.num_heads * (n * C) ** 3 // 2  # half of (n C)^2 for each of n C columns
        loop = n * n * C * D + 2 * n * K * D  # (...)^-1 (...) ; K S, K^T U
        outputs = K * D + n * C * D  # Q S, scores U
        G = padded * (C - 1) * self.num_heads // 2
        return 2 * (projections + G + inverse + padded * (products + loop + outputs))
