"""Retention (RetNet): linear attention in a memory in which each head decays at a fixed rate.

    S_t = gamma S_{t-1} + k_t^T v_t          gamma of head h = 1 - 2^(-5 - 4 h / (H - 1))
    o_t = q_t S_t                            (q, k rotated, q divided by sqrt(K))

v has E = expand_v D numbers; the output is RMSNorm(o_t) * SiLU(x_t W_g). The fast form, per chunk of C tokens, with S
at the start of the chunk, t from 1 to C, and the decay G_ts = gamma^(t - s) from s to t for s <= t, else 0:

    O = gamma^t Q S + (Q K^T * G) V ;   S <- gamma^C S + (gamma^(C - t) K)^T V

Source: Sun et al. 2023, arXiv 2307.08621, eq. 5 to 8; the rates are those of section 3.1, from 1 - 1/32 to 1 - 1/512.
Differences: eq. 8 and the public code have rates 1 - 2^(-5 - h); the code rotates pair i by t 10000^(-2i / (K - 2)),
divides by sums of decays and of weights, and its norm has no learned scale; an optional short convolution.
Cost: O(T (C + K) E).
Decode state: S (K E numbers) and the last conv_size - 1 inputs of the convolution.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .chunk_kernels import retnet_kernel
from .decays import decayed_sum
from .kernels import BF16, choose, has_triton
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_number,
    check_positive,
    merge_heads,
    rotary,
    split_heads,
    to_chunks,
)


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    conv_state: Tensor  # (B, conv_size - 1, 2D + E), the last inputs of the convolution
    position: int  # tokens read


class RetNetAttention(Attention[Memory]):
    """Causal linear attention with one fixed decay per head.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C computed at once; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        expand_v: E / D; expand_v * D / H must be whole.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 1,
        conv_init: ConvInit = "identity",
        expand_v: float = 2.0,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size)
        whole = f"above 0, with expand_v * {self.head_dim} (the head width) a whole number"
        check_number(whole, lambda factor: factor > 0 and factor * self.head_dim % 1 == 0, expand_v=expand_v)
        self.chunk_size = chunk_size
        self.value_dim = int(expand_v * hidden_dim)
        self.qkv = nn.Linear(hidden_dim, 2 * hidden_dim + self.value_dim, bias=False)
        self.conv = ShortConvolution(2 * hidden_dim + self.value_dim, conv_size, conv_init)
        self.gate = nn.Linear(hidden_dim, self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim // num_heads, eps=1e-5)
        self.out = nn.Linear(self.value_dim, hidden_dim, bias=False)

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton()

    def project(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, H, T, K), rotated, v (B, H, T, V) and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.position, state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        widths = [self.hidden_dim, self.hidden_dim, self.value_dim]
        q, k, v = (split_heads(part, self.num_heads) for part in at_least_fp32(qkv).split(widths, -1))
        return rotary(q, start) * self.head_dim**-0.5, rotary(k, start), v, conv_state

    def decay(self, steps: Tensor, like: Tensor) -> Tensor:
        """gamma^steps of each head: steps (M, N) -> (H, M, N), in the precision of `like`."""
        return (self.log_gamma(steps.device)[:, None, None] * steps).exp().to(like.dtype)

    def log_gamma(self, device: torch.device) -> Tensor:
        """Of each head, (H,), in fp64."""
        h = torch.arange(self.num_heads, dtype=torch.float64, device=device)
        return (1 - 2 ** (-5 - 4 * h / max(1, self.num_heads - 1))).log()

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(self.norm(mixed.to(x.dtype))) * F.silu(self.gate(x)))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        t = torch.arange(x.shape[1], device=x.device)
        return (q @ k.mT * self.decay((t[:, None] - t).clamp(min=0), like=q)).tril()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q, k (B, H, T, K), v (B, H, T, V); S before them, zeros if None -> mixed values (B, H, T, V); S after."""
        T = q.shape[2]
        C = min(self.chunk_size, T)
        q, k, v = (to_chunks(part, C) for part in (q, k, v))  # (B, H, N, C, .)
        t = torch.arange(1, C + 1, device=q.device)
        tokens = (T - C * torch.arange(k.shape[2], device=q.device)).clamp(max=C)[:, None]  # in each chunk, no padding
        G = self.decay((t[:, None] - t).clamp(min=0), like=q).tril()[:, None]  # (H, 1, C, C)
        from_start = self.decay(t[:, None], like=q)[:, None]  # (H, 1, C, 1)
        to_end = self.decay((tokens - t).clamp(min=0), like=q)[..., None]  # (H, N, C, 1)
        S_before, S = decayed_sum((k * to_end).mT @ v, self.decay(tokens, like=q)[None, ..., None], S)
        mixed = (q * from_start) @ S_before + (q @ k.mT * G) @ v
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        kernel = partial(retnet_kernel, self.log_gamma(x.device))
        S = None if state is None else state.S
        mixed, S = choose(x, kernel, self.mix, self.has_kernel, BF16)(q, k, v, S)
        return self.emit(mixed, x), Memory(S, conv_state, (state.position if state else 0) + x.shape[1])

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.head_dim, self.value_dim // self.num_heads))
        return Memory(S, self.conv.init_state(batch_size), 0)

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        q, k, v, conv_state = self.project(x, state)
        S = self.decay(torch.ones(1, 1, device=x.device), like=state.S) * state.S + k.mT @ v
        return self.emit(q @ S, x)[:, 0], Memory(S, conv_state, state.position + 1)

    def state_size(self, num_tokens: int) -> int:
        return self.head_dim * self.value_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, E, C = self.hidden_dim, self.head_dim, self.value_dim, min(self.chunk_size, num_tokens)
        padded = -(-num_tokens // C) * C
        projections = num_tokens * (2 * D * D + 3 * D * E + self.conv.weight.numel())
        return 2 * (projections + padded * (C * D + C * E + 2 * K * E))  # Q K^T, scores V; K^T V, Q S
