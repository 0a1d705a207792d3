"""Sliding-window attention: every token attends to itself and to the w - 1 tokens before it.

    o_t = sum_{t - w < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j          (w = window_size, the token itself included)

The fast form processes blocks of C <= w queries. A block attends to its own keys and to those of the earlier blocks
that overlap its windows, so no T x T matrix is formed.

With num_sinks = s > 0, every query also sees the first s tokens (attention sinks, Xiao et al. 2023, arXiv 2309.17453,
section 3.2). As published, positions are then those in the cache of s + w tokens: the key of sink j is rotated by j,
and the query meets it rotated by min(t, s + w - 1), as if the window followed the sinks. So a sink stays nearer than
s + w tokens, whatever T is.

Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
Differences: the window is one-sided, and positions are rotary (arXiv 2104.09864, eq. 34). Options as in `standard`,
without its learned score `sink`: partial rotation, RMSNorm of q and k, shared key-value heads, an output gate, and a
short causal convolution on q, k and v.
Cost: O(T (w + s) D).
Decode state: the keys and values of a window and of the sinks (2 (w + s) G K numbers, G = num_kv_heads) and the last
conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Attention, num_weights
from .kernels import has_window, window_attention
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_number,
    check_positive,
    check_rotary,
    gated,
    merge_heads,
    rotary,
    split_heads,
    window_mask,
)
from .softmax import Sinks, head_norm, kv_heads, repeat_heads, window_products


class Window(NamedTuple):
    k: Tensor  # (B, G, min(T, w), K), rotated
    v: Tensor  # (B, G, min(T, w), V)
    sink_k: Tensor  # (B, G, min(T, s), K), rotated
    sink_v: Tensor  # (B, G, min(T, s), V)
    conv_state: Tensor  # (B, conv_size - 1, D + 2 G K), the last inputs of the convolution
    position: int  # tokens seen


class SlidingWindowAttention(Attention[Window]):
    """Causal softmax attention within a window.

    Args:
        hidden_dim: width D.
        num_heads: heads H of the queries.
        window_size: keys w that a query sees, that of its own token included.
        rope: rotate queries and keys by their position. Without it, the order within the window is invisible.
        bias: give the linear maps a bias.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        num_sinks: first tokens s of the text that every query sees, besides its window.
        rope_base: base of the rotary angles; see `rotary`.
        rope_fraction: share of the channels of each head that is rotated.
        qk_norm: RMSNorm of queries and keys.
        num_kv_heads: heads G of the keys and values, each shared by H / G heads; must divide H. None for H.
        output_gate: multiply the output by sigmoid(x_t W_g).
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
        num_sinks: int = 0,
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
        qk_norm: bool = False,
        num_kv_heads: int | None = None,
        output_gate: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(window_size=window_size)
        check_number("0 (none) or more", lambda n: n >= 0, whole=True, num_sinks=num_sinks)
        check_rotary(rope_base, rope_fraction)
        self.window_size, self.num_sinks = window_size, num_sinks
        self.rope, self.rope_base, self.rope_fraction = rope, rope_base, rope_fraction
        self.num_kv_heads = kv_heads(num_heads, num_kv_heads)
        self.kv_dim = self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(hidden_dim, hidden_dim + 2 * self.kv_dim, bias=bias)
        self.conv = ShortConvolution(self.qkv.out_features, conv_size, conv_init)
        self.q_norm, self.k_norm = head_norm(self.head_dim, qk_norm), head_norm(self.head_dim, qk_norm)
        self.output_gate = nn.Linear(hidden_dim, hidden_dim, bias=False) if output_gate else None
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    @property
    def reach(self) -> int:
        return self.window_size

    @property
    def has_kernel(self) -> bool:
        return has_window(self.head_dim) and not self.num_sinks

    def sees_exactly(self, num_tokens: int) -> Tensor:
        seen = super().sees_exactly(num_tokens)
        seen[:, : self.num_sinks] = True
        return seen.tril()

    def rotate(self, x: Tensor, start: int = 0, last: int | None = None) -> Tensor:
        return rotary(x, start, self.rope_base, self.rope_fraction, last) if self.rope else x

    def rotate_for_sinks(self, q: Tensor, start: int = 0) -> Tensor:
        """q as the keys of the sinks meet them: positions end with the cache."""
        return self.rotate(q, start, last=self.num_sinks + self.window_size - 1)

    def project(self, x: Tensor, state: Window | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, T, K), not rotated; k, v (B, G, T, K), k rotated; and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.position, state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        q, k, v = qkv.split([self.hidden_dim, self.kv_dim, self.kv_dim], -1)
        q = self.q_norm(split_heads(q, self.num_heads))
        k, v = self.k_norm(split_heads(k, self.num_kv_heads)), split_heads(v, self.num_kv_heads)
        return q, self.rotate(k, start), v, conv_state

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(repeat_heads(self.project(x)[2], self.num_heads))

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(merge_heads(mixed).to(x.dtype), x, self.output_gate))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        k = at_least_fp32(repeat_heads(k, self.num_heads)) / self.head_dim**0.5
        near, far = (at_least_fp32(rotated) @ k.mT for rotated in (self.rotate(q), self.rotate_for_sinks(q)))
        in_window = window_mask(x.shape[1], self.window_size, x.device)
        scores = torch.where(in_window, near, far)
        return scores.masked_fill(~self.sees_exactly(x.shape[1]), -torch.inf).softmax(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None = None) -> Tensor:
        """q (B, H, T, K), which are the last tokens of k and v (B, G, ., K) -> mixed values (B, H, T, V)."""
        k, v = (repeat_heads(part, self.num_heads) for part in (k, v))
        return window_attention(q, k, v, self.window_size, sinks)

    def prefill(self, x: Tensor, state: Window | None = None) -> tuple[Tensor, Window]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        w, s = self.window_size, self.num_sinks
        start, sink_k, sink_v = 0, k[:, :, :s], v[:, :, :s]
        if state is not None:
            start = state.position
            missing, needed = max(0, s - start), x.shape[1] + w - 1  # the first query sees w - 1 keys before its own
            sink_k = torch.cat((state.sink_k, k[:, :, :missing]), 2)
            sink_v = torch.cat((state.sink_v, v[:, :, :missing]), 2)
            k, v = (torch.cat(parts, 2)[:, :, -needed:] for parts in ((state.k, k), (state.v, v)))
        sinks = None
        if s:
            all_k, all_v = (repeat_heads(part, self.num_heads) for part in (sink_k, sink_v))
            sinks = Sinks(self.rotate_for_sinks(q, start), all_k, all_v, start)
        mixed = self.mix(self.rotate(q, start), k, v, sinks)
        after = Window(k[:, :, -w:], v[:, :, -w:], sink_k, sink_v, conv_state, start + x.shape[1])
        return self.emit(mixed, x), after

    def init_state(self, batch_size: int) -> Window:
        empty = self._zeros(batch_size, self.num_kv_heads, 0, self.head_dim)
        return Window(empty, empty, empty, empty, self.conv.init_state(batch_size), 0)

    def step(self, x: Tensor, state: Window) -> tuple[Tensor, Window]:
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

    def state_size(self, num_tokens: int) -> int:
        seen = min(num_tokens, self.window_size) + min(num_tokens, self.num_sinks)
        return 2 * seen * self.kv_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        projections = num_tokens * num_weights(self.qkv, self.conv, self.output_gate, self.out)
        products = window_products(num_tokens, self.window_size, self.num_sinks)
        return 2 * (projections + products * self.hidden_dim)
