"""Mixture of block attention (MoBA): each query attends to its own chunk and to the few earlier chunks it chooses.

    h_c = mean_{j in c} k_j                                                        (key of chunk c, C tokens)
    chosen_t = the chunk of t, and the top_k - 1 finished chunks c with the greatest q_t . h_c
    o_t = sum_{j <= t, chunk of j in chosen_t} softmax_j(q_t . k_j / sqrt(K)) v_j

q and k are rotated by their positions. The choice has no parameters and no gradient. The fast form sorts the pairs
(query, chosen chunk) by chunk, in tiles of C queries that share a chunk. One product per tile gives its scores, one
softmax runs over the scores of the own chunk and of the chosen chunks, one product per tile reads the values. On
CUDA in low precision, FlashAttention reads each chunk, and its outputs are added (`flash_chunks.py`).

Source: Lu et al. 2025, arXiv 2502.13189, section 2.2.
Differences: the scores of the choice are rounded to multiples of 1e-4, and of equal chunks the earlier is chosen, so
rounding errors do not choose among repetitions. Options as in `standard`: a short convolution, RMSNorm of q and k, an
output gate.
Cost: O(T (top_k C + T / C) D): the choice is quadratic, with 1 / C times the constant of softmax attention.
Decode state: the keys and values of all tokens and the keys of the finished chunks (2 T D + (T / C) D numbers), and the
last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, num_weights
from .kernels import chosen_attention, exact_product, has_window
from .parts import (
    ConvInit,
    ShortConvolution,
    append,
    at_least_fp32,
    check_positive,
    chunk_mask,
    chunk_means,
    gated,
    merge_heads,
    rotary,
    split_heads,
)
from .softmax import EQUAL, causal_softmax, chosen_products, head_norm, tokens_seen


class BlockCache(NamedTuple):
    k: Tensor  # (B, H, T, K), rotated
    v: Tensor  # (B, H, T, V)
    h: Tensor  # (B, H, N, K), keys of the finished chunks
    conv_state: Tensor  # (B, conv_size - 1, 3D), the last inputs of the convolution


class MoBAAttention(Attention[BlockCache]):
    """Mixture of block attention.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C in a chunk.
        top_k: chunks that a query attends to, its own included.
        rope: rotate queries and keys by their position.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        qk_norm: RMSNorm of queries and keys.
        output_gate: multiply the output by sigmoid(x_t W_g).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        top_k: int = 3,
        rope: bool = True,
        conv_size: int = 1,
        conv_init: ConvInit = "identity",
        qk_norm: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, top_k=top_k)
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.rope = rope
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size, conv_init)
        self.q_norm, self.k_norm = head_norm(self.head_dim, qk_norm), head_norm(self.head_dim, qk_norm)
        self.output_gate = nn.Linear(hidden_dim, hidden_dim, bias=False) if output_gate else None
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    @property
    def reach(self) -> int:
        return self.chunk_size

    period = reach

    @property
    def has_kernel(self) -> bool:
        return has_window(self.head_dim)

    def sees_exactly(self, num_tokens: int) -> Tensor:
        return chunk_mask(num_tokens, self.chunk_size, self._device)

    def project(self, x: Tensor, state: BlockCache | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K), q and k normed and rotated, and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.k.shape[2], state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        return (rotary(q, start), rotary(k, start), v, conv_state) if self.rope else (q, k, v, conv_state)

    @torch.no_grad()
    def choose(self, q: Tensor, h: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """The best earlier chunks of queries q (B, H, T, K) in chunks `chunk` (T,), by their keys h (B, H, N, K).

        Returns min(top_k - 1, N) numbers of chunks for each query, (B, H, T, .), and whether each of them exists, bool.
        """
        N = h.shape[2]
        number = torch.arange(N, device=q.device)
        scores = (exact_product(q, h.mT) / EQUAL).round().double() * N - number  # no two are equal
        scores = scores.masked_fill(number >= chunk[:, None], -torch.inf)
        chosen = scores.topk(min(self.top_k - 1, N)).indices
        return chosen, chosen < chunk[:, None]

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(merge_heads(mixed).to(x.dtype), x, self.output_gate))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        chunk = torch.arange(x.shape[1], device=x.device) // self.chunk_size
        chosen, exists = self.choose(q, chunk_means(k, self.chunk_size), chunk)
        seen = ((chosen[..., None] == chunk) & exists[..., None]).any(3) | (chunk[:, None] == chunk)
        scores = at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5
        return causal_softmax(scores.masked_fill(~seen, -torch.inf))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:
        """q (B, H, T, K), the last T tokens of k and v; h (B, H, N, K) of the finished chunks -> mixed values."""
        past, C = k.shape[2] - q.shape[2], min(self.chunk_size, k.shape[2])
        chunk = torch.arange(past, k.shape[2], device=q.device) // C
        return chosen_attention(q, k, v, C, *self.choose(q, h, chunk))

    def prefill(self, x: Tensor, state: BlockCache | None = None) -> tuple[Tensor, BlockCache]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        h = at_least_fp32(k[:, :, :0])
        if state is not None:
            k, v, h = append(state.k, k), append(state.v, v), state.h
        h = torch.cat((h, chunk_means(k[:, :, h.shape[2] * self.chunk_size :], self.chunk_size)), 2)
        return self.emit(self.mix(q, k, v, h), x), BlockCache(k, v, h, conv_state)

    def init_state(self, batch_size: int) -> BlockCache:
        empty = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        return BlockCache(empty, empty, at_least_fp32(empty), self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: BlockCache) -> tuple[Tensor, BlockCache]:
        q, k, v, conv_state = self.project(x[:, None], state)
        k, v = append(state.k, k), append(state.v, v)
        C = min(self.chunk_size, k.shape[2])
        own = state.h.shape[2]  # all chunks before the own one are finished
        chosen, _ = self.choose(q, state.h, torch.full((1,), own, device=x.device))  # (B, H, 1, .)
        k_seen, v_seen = (tokens_seen(part, self.chunk_size, chosen, own) for part in (k, v))
        q, k_seen, v_seen = (at_least_fp32(part) for part in (q, k_seen, v_seen))
        mixed = F.scaled_dot_product_attention(q, k_seen, v_seen)
        h = append(state.h, chunk_means(k[:, :, own * C :], self.chunk_size))
        return self.emit(mixed, x[:, None])[:, 0], BlockCache(k, v, h, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim * (2 * num_tokens + num_tokens // self.chunk_size) + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        T, D = num_tokens, self.hidden_dim
        projections = T * num_weights(self.qkv, self.conv, self.output_gate, self.out)
        choice = T * (T // self.chunk_size) * D
        return 2 * (projections + chosen_products(T, self.chunk_size, self.top_k - 1) * D + choice)
