"""Sliding-window attention: every token looks at itself and the w - 1 tokens before it.

    o_t = sum_{t - w < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j          (w = window_size keys, self included)

The sequence is cut in blocks of C <= w queries; a block meets its own keys and those of the blocks before it that reach
into its window, so that no T x T matrix is ever formed.

Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1, one-sided; rotary positions (arXiv 2104.09864), and
where asked for a short causal convolution on q, k and v.
Cost: O(T w D). Decode state: a window of keys and values, 2 w D numbers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    Attention,
    ShortConvolution,
    at_least_fp32,
    check_positive,
    merge_heads,
    rotary,
    split_heads,
    window_pairs,
)
from .kernels import window_attention


class Window(NamedTuple):
    k: Tensor  # (B, H, min(T, w), K), rotated
    v: Tensor  # (B, H, min(T, w), V)
    before: Tensor  # (B, conv_size - 1, 3D), the convolution's last inputs
    position: int  # tokens seen


class SlidingWindowAttention(Attention[Window]):
    """Causal softmax attention within a window.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        window_size: keys a query sees, itself among them.
        rope: rotate queries and keys by their position; without it the order within the window is invisible.
        bias: give the linear maps a bias.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        window_size: int = 128,
        rope: bool = True,
        bias: bool = False,
        conv_size: int = 1,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(window_size=window_size)
        self.window_size = window_size
        self.rope = rope
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=bias)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def project(self, x: Tensor, before: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K) and the convolution's last inputs."""
        qkv, before = self.conv(self.qkv(x), before)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))
        return (rotary(q, start), rotary(k, start), v, before) if self.rope else (q, k, v, before)

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        age = torch.arange(x.shape[1], device=x.device)[:, None] - torch.arange(x.shape[1], device=x.device)
        outside = (age < 0) | (age >= self.window_size)
        scores = at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5
        return scores.masked_fill(outside, -torch.inf).softmax(-1)

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, T, K) -> mixed values (B, H, T, V)."""
        return window_attention(q, k, v, self.window_size)

    def prefill(self, x: Tensor) -> tuple[Tensor, Window]:
        q, k, v, before = self.project(x)
        state = Window(k[:, :, -self.window_size :], v[:, :, -self.window_size :], before, x.shape[1])
        return self.emit(self.mix(q, k, v), x), state

    def init_state(self, batch_size: int) -> Window:
        nothing = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return Window(nothing, nothing, self.conv.nothing_before(batch_size), 0)

    def step(self, x: Tensor, state: Window) -> tuple[Tensor, Window]:
        x = x[:, None]
        q, k, v, before = self.project(x, state.before, start=state.position)
        k = torch.cat((state.k, k), 2)[:, :, -self.window_size :]
        v = torch.cat((state.v, v), 2)[:, :, -self.window_size :]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.emit(mixed, x)[:, 0], Window(k, v, before, state.position + 1)

    def state_size(self, num_tokens: int) -> int:
        return 2 * min(num_tokens, self.window_size) * self.hidden_dim + self.conv.nothing_before(1).numel()

    def flops(self, num_tokens: int) -> int:
        D = self.hidden_dim
        projections = num_tokens * (4 * D * D + self.conv.weight.numel())
        return 2 * (projections + 2 * window_pairs(num_tokens, self.window_size) * D)
