"""Standard causal softmax attention: every token looks at every earlier one.

    o_t = sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j

Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1, with rotary positions (arXiv 2104.09864) and, where asked for, a
short causal convolution on q, k and v (as in So et al. 2021, arXiv 2109.08668, section 4).
Cost: O(T^2 D). Decode state: the keys and values of all tokens, 2 T D numbers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, ShortConvolution, at_least_fp32, causal_softmax, merge_heads, rotary, split_heads


class KeyValueCache(NamedTuple):
    k: Tensor  # (B, H, T, K), rotated
    v: Tensor  # (B, H, T, V)
    before: Tensor  # (B, conv_size - 1, 3D), the convolution's last inputs


class StandardAttention(Attention[KeyValueCache]):
    """Causal softmax attention.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        rope: rotate queries and keys by their position; without it the order of the past is invisible.
        bias: give the linear maps a bias.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, rope: bool = True, bias: bool = False, conv_size: int = 1
    ) -> None:
        super().__init__(hidden_dim, num_heads)
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
        return causal_softmax(at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5)

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def prefill(self, x: Tensor) -> tuple[Tensor, KeyValueCache]:
        q, k, v, before = self.project(x)
        return self.emit(F.scaled_dot_product_attention(q, k, v, is_causal=True), x), KeyValueCache(k, v, before)

    def init_state(self, batch_size: int) -> KeyValueCache:
        nothing = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return KeyValueCache(nothing, nothing, self.conv.nothing_before(batch_size))

    def step(self, x: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        x = x[:, None]
        q, k, v, before = self.project(x, state.before, start=state.k.shape[2])
        k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        return self.emit(F.scaled_dot_product_attention(q, k, v), x)[:, 0], KeyValueCache(k, v, before)

    def state_size(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.hidden_dim + self.conv.nothing_before(1).numel()

    def flops(self, num_tokens: int) -> int:
        T, D = num_tokens, self.hidden_dim
        return 2 * (4 * T * D * D + T * self.conv.weight.numel() + T * (T + 1) * D)
