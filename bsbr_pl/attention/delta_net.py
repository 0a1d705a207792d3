"""DeltaNet: a linear memory that corrects the value stored under a key instead of adding to it.

    S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t          beta_t = sigmoid(x_t w_b + c)
    o_t = q_t S_t

q, k, v are the SiLU of a short causal convolution of the projections; q and k have unit length; the output is
RMSNorm(o_t), with `output_gate` RMSNorm(o_t) * SiLU(x_t W_g). The fast form, per chunk of C tokens, with S at the start
of the chunk:

    U = (I + tril(diag(beta) K K^T, -1))^-1 diag(beta) (V - K S)          (the updates, C x V)
    O = Q S + tril(Q K^T) U ;   S <- S + K^T U

The inverses and O are computed for all chunks at once; only U and S go from chunk to chunk. One chunk of T tokens, with
S = 0, gives the map. With `allow_neg_eigval`, beta_t = 2 sigmoid(x_t w_b + c) (Grazzi et al. 2024, arXiv 2411.12537).

Source: Schlag et al. 2021, arXiv 2102.11174, eq. 24; the fast form (section 3.2) and the layer (3.3) are Yang et al.
2024, arXiv 2406.06484.
Differences: beta has a bias c (published: none); q is not divided by sqrt(K) (published code: it is; see `kda`).
Cost: O(T H (C (K + V) + K V + C^2)).
Decode state: S (H K V numbers) and the last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .kernels import choose, delta_rule_kernel, has_triton, unit_vectors
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_number,
    check_positive,
    lower_triangle,
    merge_heads,
    split_heads,
    to_chunks,
    unit_triangle_inverse,
)


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    conv_state: Tensor  # (B, conv_size - 1, H (2K + V)), the last inputs of the convolution


class DeltaNetAttention(Attention[Memory]):
    """Causal linear attention with the delta rule.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        allow_neg_eigval: beta is in (0, 2) instead of (0, 1), so that a write can flip the sign of a stored value.
        head_dim: width K of the queries and keys of a head; D / H if None. The state has H K V numbers.
        expand_v: V / K; expand_v * K must be whole.
        output_gate: multiply the output by SiLU(x_t W_g), as Gated DeltaNet does.
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
        output_gate: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads, head_dim)
        check_positive(chunk_size=chunk_size, conv_size=conv_size)
        whole = f"above 0, with expand_v * {self.head_dim} (the head width) a whole number"
        check_number(whole, lambda factor: factor > 0 and factor * self.head_dim % 1 == 0, expand_v=expand_v)
        self.chunk_size = chunk_size
        self.allow_neg_eigval = allow_neg_eigval
        keys, self.value_dim = num_heads * self.head_dim, num_heads * int(expand_v * self.head_dim)
        self.widths = [keys, keys, self.value_dim]
        self.qkv = nn.Linear(hidden_dim, sum(self.widths), bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv_size, conv_init)
        self.beta = nn.Linear(hidden_dim, num_heads)
        self.gate = nn.Linear(hidden_dim, self.value_dim, bias=False) if output_gate else None
        self.norm = nn.RMSNorm(self.value_dim // num_heads, eps=1e-5)
        self.out = nn.Linear(self.value_dim, hidden_dim, bias=False)

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton(self.head_dim, self.value_dim // self.num_heads)

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, H, T, K), v (B, H, T, V), beta (B, H, T, 1) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in F.silu(at_least_fp32(qkv)).split(self.widths, -1))
        beta = at_least_fp32(self.beta(x)).sigmoid().mT[..., None] * (2 if self.allow_neg_eigval else 1)
        return unit_vectors(q), unit_vectors(k), v, beta, conv_state

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        y = merge_heads(self.norm(mixed.to(x.dtype)))
        return self.out(y if self.gate is None else y * F.silu(self.gate(x)))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, beta, _ = self.project(x)
        identity = torch.eye(x.shape[1], dtype=q.dtype, device=x.device)
        updates = torch.linalg.inv(identity + (beta * k @ k.mT).tril(-1)) * beta.mT  # U = updates @ V
        return (q @ k.mT).tril() @ updates.tril()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q, k (B, H, T, K), v (B, H, T, V), beta (B, H, T, 1); S before them, zeros if None -> mixed values
        (B, H, T, V); S after."""
        T = q.shape[2]
        q, k, v, beta = (to_chunks(part, min(self.chunk_size, T)) for part in (q, k, v, beta))  # (B, H, N, C, .)
        k_beta, v_beta = beta * k, beta * v
        inverses = unit_triangle_inverse(at_least_fp32(k_beta @ k.mT))  # the solver has no bf16
        S = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if S is None else S
        steps = (k, k_beta, v_beta, inverses)
        S_before, U = [], []
        for k_n, k_beta_n, v_beta_n, inverse_n in zip(*(part.unbind(2) for part in steps), strict=True):
            S_before.append(S)
            U.append(inverse_n @ (v_beta_n - k_beta_n @ S))
            S = S + k_n.mT @ U[-1]
        scores = (q @ k.mT) * lower_triangle(q.shape[3], like=q)
        mixed = q @ torch.stack(S_before, 2) + scores @ torch.stack(U, 2)
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, beta, conv_state = self.project(x, state)
        S = None if state is None else state.S
        mixed, S = choose(x, delta_rule_kernel, self.mix, self.has_kernel)(q, k, v, beta, S)
        return self.emit(mixed, x), Memory(S, conv_state)

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.head_dim, self.value_dim // self.num_heads))
        return Memory(S, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, v, beta, conv_state = self.project(x, state)
        S = state.S + beta * k.mT @ (v - k @ state.S)
        return self.emit(q @ S, x)[:, 0], Memory(S, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.head_dim * self.value_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        H, K, E, C = self.num_heads, self.head_dim, self.value_dim, min(self.chunk_size, num_tokens)
        padded = -(-num_tokens // C) * C
        maps = sum(weight.numel() for weight in self.parameters() if weight.dim() > 1)  # the taps included
        products = 2 * C * H * K  # K K^T and Q K^T
        inverse = padded // C * H * C**3 // 2  # half of C^2 for each of C columns
        loop = C * E + 2 * K * E  # (...)^-1 (...) ; K S, K^T U
        outputs = K * E + C * E  # Q S, scores U
        return 2 * (num_tokens * maps + inverse + padded * (products + loop + outputs))
