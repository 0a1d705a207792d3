"""Modern Hopfield attention: updates move the query towards keys that are similar to it; then it reads the values.

    xi^0 = q_t ;   xi^{i+1} = sum_{j <= t} softmax_j(beta xi^i . k_j) k_j   for i < n = num_updates
    o_t  = sum_{j <= t} softmax_j(beta xi^n . k_j) v_j

Every update of query t depends only on keys up to t. With n = 0 this is standard attention. beta is learned per head
and starts at 1 / sqrt(K). The fast form is n + 1 times `scaled_dot_product_attention`.

Source: Ramsauer et al. 2020, arXiv 2008.02217, eq. 3 (the update) and eq. 10 (the layer).
Differences: a causal mask; rotary positions of q and k (arXiv 2104.09864, eq. 34); beta is learned (published: fixed);
v_j is a map of x_j (eq. 10: of k_j); no LayerNorm of the inputs and no early stop of the updates (public code: both).
Cost: O((n + 1) T^2 D).
Decode state: the keys and values of all tokens (2 T D numbers).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Attention
from .parts import append, at_least_fp32, check_number, check_rotary, merge_heads, rotary, split_heads
from .softmax import causal_attention, causal_softmax


class StoredPatterns(NamedTuple):
    k: Tensor  # (B, H, T, K), rotated
    v: Tensor  # (B, H, T, V)


class HopfieldAttention(Attention[StoredPatterns]):
    """Causal modern Hopfield network over the keys of the sequence.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        num_updates: updates n of the query before it reads the values; 0 is standard attention.
        beta: initial inverse temperature, 1 / sqrt(K) if None; learned per head.
        rope: rotate queries and keys by their position.
        rope_base: base of the rotary angles; see `rotary`.
        rope_fraction: share of the channels of each head that is rotated.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        num_updates: int = 1,
        beta: float | None = None,
        rope: bool = True,
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_rotary(rope_base, rope_fraction)
        check_number("0 or more", lambda n: n >= 0, whole=True, num_updates=num_updates)
        beta = self.head_dim**-0.5 if beta is None else beta
        check_number("positive", lambda inverse_temperature: inverse_temperature > 0, beta=beta)
        self.num_updates = num_updates
        self.rope, self.rope_base, self.rope_fraction = rope, rope_base, rope_fraction
        self.beta = nn.Parameter(torch.full((num_heads, 1, 1), float(beta)))
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K) at positions start, start + 1, ..., rotated."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        if self.rope:
            q, k = (rotary(part, start, self.rope_base, self.rope_fraction) for part in (q, k))
        return q, k, v

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def attention_map(self, x: Tensor) -> Tensor:
        xi, k, _ = (at_least_fp32(part) for part in self.project(x))
        for _ in range(self.num_updates):
            xi = causal_softmax(self.beta * xi @ k.mT) @ k
        return causal_softmax(self.beta * xi @ k.mT)

    def prefill(self, x: Tensor, state: StoredPatterns | None = None) -> tuple[Tensor, StoredPatterns]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        xi, k, v = self.project(x, start=0 if state is None else state.k.shape[2])
        if state is not None:
            k, v = append(state.k, k), append(state.v, v)
        for stored in (k,) * self.num_updates + (v,):  # the updates read keys, then the query reads values
            xi = causal_attention(self.beta * xi, k, stored, scale=1.0)
        return self.emit(xi, x), StoredPatterns(k, v)

    def init_state(self, batch_size: int) -> StoredPatterns:
        empty = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return StoredPatterns(empty, empty)

    def step(self, x: Tensor, state: StoredPatterns) -> tuple[Tensor, StoredPatterns]:
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

    def state_size(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.hidden_dim

    def flops(self, num_tokens: int) -> int:
        T, D = num_tokens, self.hidden_dim
        return 2 * (4 * T * D * D + (self.num_updates + 1) * T * (T + 1) * D)
