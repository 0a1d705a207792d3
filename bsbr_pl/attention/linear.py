"""Linear attention: a positive feature map replaces the softmax, so the past fits in one matrix.

    phi(x) = elu(x) + 1
    S_t = S_{t-1} + phi(k_t)^T v_t        (an outer product, K x V)
    z_t = z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) . z_t + 1e-6)

With output_norm="rms" there is no denominator: o_t = RMSNorm(phi(q_t) S_t). The fast form computes chunks of C tokens
at once: tril(phi(Q) phi(K)^T) V for the tokens of the chunk, plus phi(Q) S for the tokens before it, with S at the
start of the chunk. The denominator is computed in the same way.

Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7 (phi), 9-12 and 16-20; without denominator Qin et al. 2022,
arXiv 2210.10340, there with phi = elu or this phi.
Differences: the past is a sum without order, so q, k and v pass a short causal convolution first (So et al. 2021, arXiv
2109.08668); conv_size=1 is the published form.
Cost: O(T (C + K) D).
Decode state: S and z (D (K + 1) numbers, without denominator D K) and the last conv_size - 1 inputs of the convolution.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .kernels import choose, linear_kernel
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_choice,
    check_positive,
    lower_triangle,
    merge_heads,
    running_sum,
    split_heads,
    to_chunks,
)

EPSILON = 1e-6
OutputNorm = Literal["denominator", "rms"]


class Sums(NamedTuple):
    S: Tensor  # (B, H, K, V)
    z: Tensor | None  # (B, H, K); None without denominator
    conv_state: Tensor  # (B, conv_size - 1, 3D), the last inputs of the convolution


class LinearAttention(Attention[Sums]):
    """Causal linear attention.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        output_norm: what keeps the output bounded, `denominator` or `rms`.
    """

    has_kernel = True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 4,
        conv_init: ConvInit = "uniform",
        output_norm: OutputNorm = "denominator",
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size)
        check_choice(get_args(OutputNorm), output_norm=output_norm)
        self.chunk_size = chunk_size
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size, conv_init)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5) if output_norm == "rms" else None
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    @property
    def period(self) -> int:
        return self.chunk_size

    def project(self, x: Tensor, state: Sums | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """phi(q), phi(k), v (B, H, T, K) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in at_least_fp32(qkv).chunk(3, -1))
        return F.elu(q) + 1, F.elu(k) + 1, v, conv_state

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        mixed = mixed.to(x.dtype)
        return self.out(merge_heads(mixed if self.norm is None else self.norm(mixed)))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, *_ = self.project(x)
        scores = (q @ k.mT).tril()
        return scores / (scores.sum(-1, keepdim=True) + EPSILON) if self.norm is None else scores

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """phi(q), phi(k), v (B, H, T, K); S and z before them, zeros if None -> mixed values (B, H, T, V); S and z
        after."""
        T = q.shape[2]
        q, k, v = (to_chunks(part, min(self.chunk_size, T)) for part in (q, k, v))  # (B, H, N, C, K)
        S_before, S = running_sum(k.mT @ v, dim=2, start=S)  # (B, H, N, K, V), (B, H, K, V)
        scores = (q @ k.mT) * lower_triangle(q.shape[3], like=q)
        mixed = scores @ v + q @ S_before
        if self.norm is None:
            z_before, z = running_sum(k.sum(3), dim=2, start=z)  # (B, H, N, K), (B, H, K)
            total = scores.sum(-1, keepdim=True) + (q * z_before[..., None, :]).sum(-1, keepdim=True)
            mixed = mixed * (total + EPSILON).reciprocal()
        return mixed.flatten(2, 3)[:, :, :T], S, z

    def prefill(self, x: Tensor, state: Sums | None = None) -> tuple[Tensor, Sums]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        S, z = (None, None) if state is None else (state.S, state.z)
        kernel = partial(linear_kernel, divide=self.norm is None)
        mixed, S, z = choose(x, kernel, self.mix)(q, k, v, S, z)
        return self.emit(mixed, x), Sums(S, z, conv_state)

    def init_state(self, batch_size: int) -> Sums:
        H, K = self.num_heads, self.head_dim
        S, z = (at_least_fp32(self._zeros(batch_size, H, *shape)) for shape in ((K, K), (K,)))
        return Sums(S, z if self.norm is None else None, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Sums) -> tuple[Tensor, Sums]:
        x = x[:, None]
        q, k, v, conv_state = self.project(x, state)
        S = state.S + k.mT @ v
        mixed, z = q @ S, state.z
        if z is not None:
            z = z + k[:, :, 0]
            mixed = mixed / (q @ z[..., None] + EPSILON)
        return self.emit(mixed, x)[:, 0], Sums(S, z, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim * (self.head_dim + (self.norm is None)) + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, C = self.hidden_dim, self.head_dim, min(self.chunk_size, num_tokens)
        padded = -(-num_tokens // C) * C
        projections = num_tokens * (4 * D * D + self.conv.weight.numel())
        products = 2 * C + 2 * K + (self.norm is None)  # phi(Q) phi(K)^T and its V, K^T V and Q S, q . z
        return 2 * (projections + padded * D * products)
