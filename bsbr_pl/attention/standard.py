"""Standard causal softmax attention: every token attends to itself and to all earlier tokens.

    o_t = sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j

Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1. Differences: positions are rotary (arXiv 2104.09864, eq. 34), and
an optional short causal convolution on q, k and v, as in So et al. 2021, arXiv 2109.08668, section 4.
Cost: O(T^2 D).
Decode state: the KV cache (2 T D numbers) and the last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

from torch import Tensor, nn

from .base import Attention
from .parts import (
    ConvInit,
    ShortConvolution,
    append,
    at_least_fp32,
    causal_attention,
    causal_softmax,
    merge_heads,
    rotary,
    split_heads,
)


class KeyValueCache(NamedTuple):
    k: Tensor  # (B, H, T, K), rotated
    v: Tensor  # (B, H, T, V)
    conv_state: Tensor  # (B, conv_size - 1, 3D), the last inputs of the convolution


class StandardAttention(Attention[KeyValueCache]):
    """Causal softmax attention.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        rope: rotate queries and keys by their position. Without it, the order of past tokens is invisible.
        bias: give the linear maps a bias.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        rope: bool = True,
        bias: bool = False,
        conv_size: int = 1,
        conv_init: ConvInit = "identity",
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        self.rope = rope
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=bias)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size, conv_init)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def project(self, x: Tensor, state: KeyValueCache | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K), rotated, and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.k.shape[2], state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))
        return (rotary(q, start), rotary(k, start), v, conv_state) if self.rope else (q, k, v, conv_state)

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        return causal_softmax(at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5)

    def prefill(self, x: Tensor, state: KeyValueCache | None = None) -> tuple[Tensor, KeyValueCache]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        if state is not None:
            k, v = append(state.k, k), append(state.v, v)
        return self.emit(causal_attention(q, k, v), x), KeyValueCache(k, v, conv_state)

    def init_state(self, batch_size: int) -> KeyValueCache:
        empty = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return KeyValueCache(empty, empty, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

    def state_size(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.hidden_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        T, D = num_tokens, self.hidden_dim
        return 2 * (4 * T * D * D + T * self.conv.weight.numel() + T * (T + 1) * D)
