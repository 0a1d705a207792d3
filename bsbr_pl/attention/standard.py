"""Standard causal softmax attention: every token attends to itself and to all earlier tokens.

    o_t = sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j

The fast form is `scaled_dot_product_attention`. Options of later models:

- rope_fraction: only a share of the channels is rotated (GPT-NeoX, arXiv 2204.06745);
- qk_norm: RMSNorm of q and k over each head, before the rotation (as in OLMo 2, arXiv 2501.00656, there
  over all heads at once);
- num_kv_heads: G heads of keys and values for H heads of queries (grouped queries, arXiv 2305.13245, section 2.2);
- sink: a learned score s per head joins the softmax and reads nothing (gpt-oss, arXiv 2508.10925):
  the weights are exp(q_t . k_j / sqrt(K)) / (exp(s) + the sum of these), so a head may attend to nothing;
- output_gate: o_t * sigmoid(x_t W_g) (arXiv 2505.06708, the gate after the attention);
- conv_size: a short causal convolution on q, k and v (So et al. 2021, arXiv 2109.08668, section 4).

Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1.
Differences: positions are rotary (arXiv 2104.09864, eq. 34).
Cost: O(T^2 D).
Decode state: the KV cache (2 T G K numbers) and the last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Attention, num_weights
from .parts import (
    ConvInit,
    ShortConvolution,
    append,
    at_least_fp32,
    check_rotary,
    gated,
    merge_heads,
    rotary,
    split_heads,
)
from .softmax import causal_attention, causal_softmax, head_norm, kv_heads, repeat_heads, sink_attention


class KeyValueCache(NamedTuple):
    k: Tensor  # (B, G, T, K), rotated
    v: Tensor  # (B, G, T, V)
    conv_state: Tensor  # (B, conv_size - 1, D + 2 G K), the last inputs of the convolution


class StandardAttention(Attention[KeyValueCache]):
    """Causal softmax attention.

    Args:
        hidden_dim: width D.
        num_heads: heads H of the queries.
        rope: rotate queries and keys by their position. Without it, the order of past tokens is invisible.
        bias: give the linear maps a bias.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        rope_base: base of the rotary angles; see `rotary`.
        rope_fraction: share of the channels of each head that is rotated.
        qk_norm: RMSNorm of queries and keys.
        num_kv_heads: heads G of the keys and values, each shared by H / G heads; must divide H. None for H.
        sink: a learned score per head, initially 0, that joins the softmax and reads nothing.
        output_gate: multiply the output by sigmoid(x_t W_g).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        rope: bool = True,
        bias: bool = False,
        conv_size: int = 1,
        conv_init: ConvInit = "identity",
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
        qk_norm: bool = False,
        num_kv_heads: int | None = None,
        sink: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_rotary(rope_base, rope_fraction)
        self.rope, self.rope_base, self.rope_fraction = rope, rope_base, rope_fraction
        self.num_kv_heads = kv_heads(num_heads, num_kv_heads)
        self.kv_dim = self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(hidden_dim, hidden_dim + 2 * self.kv_dim, bias=bias)
        self.conv = ShortConvolution(self.qkv.out_features, conv_size, conv_init)
        self.q_norm, self.k_norm = head_norm(self.head_dim, qk_norm), head_norm(self.head_dim, qk_norm)
        self.sink = nn.Parameter(torch.zeros(num_heads)) if sink else None
        self.output_gate = nn.Linear(hidden_dim, hidden_dim, bias=False) if output_gate else None
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        return rotary(x, start, self.rope_base, self.rope_fraction) if self.rope else x

    def project(self, x: Tensor, state: KeyValueCache | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, T, K), k, v (B, G, T, K), q and k normed and rotated, and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.k.shape[2], state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        q, k, v = qkv.split([self.hidden_dim, self.kv_dim, self.kv_dim], -1)
        q = self.q_norm(split_heads(q, self.num_heads))
        k, v = self.k_norm(split_heads(k, self.num_kv_heads)), split_heads(v, self.num_kv_heads)
        return self.rotate(q, start), self.rotate(k, start), v, conv_state

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(repeat_heads(self.project(x)[2], self.num_heads))

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(merge_heads(mixed).to(x.dtype), x, self.output_gate))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        q, k = at_least_fp32(q), at_least_fp32(repeat_heads(k, self.num_heads))
        return causal_softmax(q @ k.mT / self.head_dim**0.5, self.sink)

    def prefill(self, x: Tensor, state: KeyValueCache | None = None) -> tuple[Tensor, KeyValueCache]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        if state is not None:
            k, v = append(state.k, k), append(state.v, v)
        mixed = causal_attention(q, k, v) if self.sink is None else sink_attention(q, k, v, self.sink)
        return self.emit(mixed, x), KeyValueCache(k, v, conv_state)

    def init_state(self, batch_size: int) -> KeyValueCache:
        empty = self._zeros(batch_size, self.num_kv_heads, 0, self.head_dim)
        return KeyValueCache(empty, empty, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

    def state_size(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.kv_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        T, D = num_tokens, self.hidden_dim
        projections = T * num_weights(self.qkv, self.conv, self.output_gate, self.out)
        attention = T * (T + 1) * D if self.sink is None else (T + 1) * (T + 2) * (D + self.num_heads)
        return 2 * (projections + attention)
