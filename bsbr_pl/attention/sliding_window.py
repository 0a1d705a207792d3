"""Sliding-window attention: every token looks at itself and the w - 1 tokens before it.

    o_t = sum_{t - w < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j          (w = window_size keys, self included)

The sequence is cut in blocks of C <= w queries; a block attends to itself and to the w keys before it, so that no
T x T matrix is ever formed.

Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1, one-sided; rotary positions (arXiv 2104.09864).
Cost: O(T w D). Decode state: a window of keys and values, 2 w D numbers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, at_least_fp32, check_positive, merge_heads, rotary, split_heads, to_chunks


class Window(NamedTuple):
    k: Tensor  # (B, H, min(T, w), K), rotated
    v: Tensor  # (B, H, min(T, w), V)
    position: int  # tokens seen


class SlidingWindowAttention(Attention[Window]):
    """Causal softmax attention within a window.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        window_size: keys a query sees, itself among them.
        rope: rotate queries and keys by their position; without it the order within the window is invisible.
    """

    def __init__(self, hidden_dim: int, num_heads: int, window_size: int = 128, rope: bool = True) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(window_size=window_size)
        self.window_size = window_size
        self.rope = rope
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        return (rotary(q, start), rotary(k, start), v) if self.rope else (q, k, v)

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _ = self.project(x)
        age = torch.arange(x.shape[1], device=x.device)[:, None] - torch.arange(x.shape[1], device=x.device)
        outside = (age < 0) | (age >= self.window_size)
        scores = at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5
        return scores.masked_fill(outside, -torch.inf).softmax(-1)

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def prefill(self, x: Tensor) -> tuple[Tensor, Window]:
        T, w = x.shape[1], self.window_size
        q, k, v = self.project(x)
        state = Window(k[:, :, -w:], v[:, :, -w:], T)
        if w >= T:
            return self.emit(F.scaled_dot_product_attention(q, k, v, is_causal=True), x), state
        q, k, v = (to_chunks(part, w).transpose(1, 2) for part in (q, k, v))  # (B, N, H, C, K), C = w
        first = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], is_causal=True)[:, None]
        pairs_k = torch.cat((k[:, :-1], k[:, 1:]), 3).flatten(0, 1)  # (B (N - 1), H, 2C, K)
        pairs_v = torch.cat((v[:, :-1], v[:, 1:]), 3).flatten(0, 1)
        band = torch.ones(w, 2 * w, dtype=torch.bool, device=x.device).triu(1).tril(w)  # i < j <= i + w
        rest = F.scaled_dot_product_attention(q[:, 1:].flatten(0, 1), pairs_k, pairs_v, attn_mask=band)
        mixed = torch.cat((first, rest.unflatten(0, (x.shape[0], -1))), 1)  # (B, N, H, C, V)
        return self.emit(mixed.transpose(1, 2).flatten(2, 3)[:, :, :T], x), state

    def init_state(self, batch_size: int) -> Window:
        nothing = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return Window(nothing, nothing, 0)

    def step(self, x: Tensor, state: Window) -> tuple[Tensor, Window]:
        x = x[:, None]
        q, k, v = self.project(x, start=state.position)
        k = torch.cat((state.k, k), 2)[:, :, -self.window_size :]
        v = torch.cat((state.v, v), 2)[:, :, -self.window_size :]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.emit(mixed, x)[:, 0], Window(k, v, state.position + 1)

    def state_size(self, num_tokens: int) -> int:
        return 2 * min(num_tokens, self.window_size) * self.hidden_dim

    def flops(self, num_tokens: int) -> int:
        D, w = self.hidden_dim, min(num_tokens, self.window_size)
        blocks = -(-num_tokens // w)
        pairs = w * (w + 1) // 2 + (blocks - 1) * w * 2 * w
        return 2 * (4 * num_tokens * D * D + 2 * pairs * D)
