"""Sliding-window attention: every token attends to itself and to the w - 1 tokens before it.

    o_t = sum_{t - w < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j          (w = window_size, the token itself included)

The fast form processes blocks of C <= w queries. A block attends to its own keys and to those of the earlier blocks
that overlap its windows, so no T x T matrix is formed.

Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1. Differences: the window is one-sided, positions are rotary
(arXiv 2104.09864, eq. 34), and there is an optional short causal convolution on q, k and v.
Cost: O(T w D).
Decode state: the keys and values of a window (2 w D numbers) and the last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Attention
from .kernels import has_window, window_attention
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_positive,
    merge_heads,
    rotary,
    split_heads,
)
from .softmax import window_pairs


class Window(NamedTuple):
    k: Tensor  # (B, H, min(T, w), K), rotated
    v: Tensor  # (B, H, min(T, w), V)
    conv_state: Tensor  # (B, conv_size - 1, 3D), the last inputs of the convolution
    position: int  # tokens seen


class SlidingWindowAttention(Attention[Window]):
    """Causal softmax attention within a window.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        window_size: keys that a query sees, that of its own token included.
        rope: rotate queries and keys by their position. Without it, the order within the window is invisible.
        bias: give the linear maps a bias.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        window_size: int = 128,
        rope: bool = True,
        bias: bool = False,
        conv_size: int = 1,
        conv_init: ConvInit = "identity",
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(window_size=window_size)
        self.window_size = window_size
        self.rope = rope
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=bias)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size, conv_init)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    @property
    def reach(self) -> int:
        return self.window_size

    @property
    def has_kernel(self) -> bool:
        return has_window(self.head_dim)

    def project(self, x: Tensor, state: Window | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K), rotated, and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.position, state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))
        return (rotary(q, start), rotary(k, start), v, conv_state) if self.rope else (q, k, v, conv_state)

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        scores = at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5
        return scores.masked_fill(~self.sees_exactly(x.shape[1]), -torch.inf).softmax(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, K), which are the last tokens of k and v -> mixed values (B, H, T, V)."""
        return window_attention(q, k, v, self.window_size)

    def prefill(self, x: Tensor, state: Window | None = None) -> tuple[Tensor, Window]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        position, w = x.shape[1], self.window_size
        if state is not None:
            position += state.position
            needed = x.shape[1] + w - 1  # the first query sees w - 1 keys before its own
            k, v = (torch.cat(parts, 2)[:, :, -needed:] for parts in ((state.k, k), (state.v, v)))
        return self.emit(self.mix(q, k, v), x), Window(k[:, :, -w:], v[:, :, -w:], conv_state, position)

    def init_state(self, batch_size: int) -> Window:
        empty = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return Window(empty, empty, self.conv.init_state(batch_size), 0)

    def step(self, x: Tensor, state: Window) -> tuple[Tensor, Window]:
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

    def state_size(self, num_tokens: int) -> int:
        return 2 * min(num_tokens, self.window_size) * self.hidden_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D = self.hidden_dim
        projections = num_tokens * (4 * D * D + self.conv.weight.numel())
        return 2 * (projections + 2 * window_pairs(num_tokens, self.window_size) * D)
