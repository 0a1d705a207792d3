"""Native sparse attention (NSA): a gated sum of attention to means of chunks, to chosen chunks, and to a window.

    h_c = mean_{j in c} k_j ;   u_c = mean_{j in c} v_j                            (of finished chunk c, C tokens)
    p_tc = softmax_c(q_t . h_c / sqrt(K))                                          (finished chunks up to t)
    o_t = g_t1 sum_c p_tc u_c + g_t2 a_t + g_t3 b_t                                (g_t = sigmoid(x_t W_g), per head)

a_t is softmax attention to the tokens up to t of `top_k` chunks: that of t, the one before, the first one, and those
with the greatest p_tc, summed over the heads that share keys. b_t is softmax attention to the last w tokens. q and k
are rotated by their positions. The choice has no gradient; p has one through the means. The fast form computes p and
its reads as matrices (T x N), a_t in tiles of queries that share a chunk (`chosen_attention`; on CUDA in low precision
by FlashAttention, `flash_chunks.py`), and b_t in blocks.

Source: Yuan et al. 2025, arXiv 2502.11089, eq. 5 (the gate) and section 3.3.
Differences: chunks are compressed by their mean, as in flash-linear-attention (published: a learned map of overlapping
chunks); the branches share keys and values (published: each has its own); the gate is one map (published: an MLP); the
scores of the choice are rounded to multiples of 1e-4, and of equal chunks the earlier is chosen; sizes (published:
top_k=16, window_size=512, 16 heads of queries share keys); an optional short convolution.
Cost: O(T (top_k C + w + T / C) D): the means are quadratic, with 2 / C times the constant of softmax
attention.
Decode state: keys and values of all tokens and means of finished chunks, 2 (T + T / C) G K numbers for G heads of keys,
and the last conv_size - 1 inputs of the convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Attention, num_weights
from .kernels import chosen_attention, exact_product, has_window
from .parts import (
    ConvInit,
    ShortConvolution,
    append,
    at_least_fp32,
    check_positive,
    chunk_means,
    merge_heads,
    rotary,
    split_heads,
    window_mask,
)
from .softmax import (
    EQUAL,
    causal_attention,
    causal_softmax,
    chosen_products,
    kv_heads,
    repeat_heads,
    tokens_seen,
    window_attention,
    window_products,
)


class Cache(NamedTuple):
    k: Tensor  # (B, G, T, K), rotated
    v: Tensor  # (B, G, T, V)
    h: Tensor  # (B, G, N, K), means of the keys of finished chunks
    u: Tensor  # (B, G, N, V), means of their values
    conv_state: Tensor  # (B, conv_size - 1, D + 2 G K), the last inputs of the convolution


class NSAAttention(Attention[Cache]):
    """Native sparse attention.

    Args:
        hidden_dim: width D.
        num_heads: heads H of the queries.
        chunk_size: tokens C in a chunk.
        top_k: chunks that a query attends to, its own, the one before and the first included, in this order.
        window_size: keys w in the window of a query, that of its own token included.
        rope: rotate queries and keys by their position.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        num_kv_heads: heads G of the keys and values, each shared by H / G heads; must divide H. None for H.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        top_k: int = 4,
        window_size: int = 128,
        rope: bool = True,
        conv_size: int = 1,
        conv_init: ConvInit = "identity",
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, top_k=top_k, window_size=window_size)
        self.chunk_size, self.top_k, self.window_size = chunk_size, top_k, window_size
        self.rope = rope
        self.num_kv_heads = kv_heads(num_heads, num_kv_heads)
        self.kv_dim = self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(hidden_dim, hidden_dim + 2 * self.kv_dim, bias=False)
        self.conv = ShortConvolution(self.qkv.out_features, conv_size, conv_init)
        self.gate = nn.Linear(hidden_dim, 3 * num_heads, bias=False)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    @property
    def reach(self) -> int:
        return max(self.window_size, min(self.top_k, 2) * self.chunk_size)

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_window(self.head_dim)

    def sees_exactly(self, num_tokens: int) -> Tensor:
        """The window, the own chunk, and the one before."""
        chunk = torch.arange(num_tokens, device=self._device) // self.chunk_size
        near = (chunk[:, None] - chunk < min(self.top_k, 2)).tril()
        return near | window_mask(num_tokens, self.window_size, self._device)

    def project(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, T, K), k, v (B, G, T, K), q and k rotated, and the state of the convolution."""
        start, conv_state = (0, None) if state is None else (state.k.shape[2], state.conv_state)
        qkv, conv_state = self.conv(self.qkv(x), conv_state)
        q, k, v = qkv.split([self.hidden_dim, self.kv_dim, self.kv_dim], -1)
        q, k, v = split_heads(q, self.num_heads), *(split_heads(part, self.num_kv_heads) for part in (k, v))
        return (rotary(q, start), rotary(k, start), v, conv_state) if self.rope else (q, k, v, conv_state)

    def gates(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> the weights of the means, the chosen chunks and the window (3, B, H, T, 1)."""
        gates = at_least_fp32(self.gate(x)).sigmoid().unflatten(2, (3, self.num_heads))
        return gates.permute(2, 0, 3, 1)[..., None]

    def scores(self, q: Tensor, h: Tensor, t: Tensor) -> Tensor:
        """Scores (B, H, T, N) of q (B, H, T, K) at the positions t (T,) with the means h (B, G, N, K); of chunks that
        are not finished yet very low, not -inf: the softmax of a row without any would be NaN."""
        scores = exact_product(q * self.head_dim**-0.5, repeat_heads(h, self.num_heads).mT)
        hidden = torch.arange(h.shape[2], device=q.device) >= ((t + 1) // self.chunk_size)[:, None]
        return scores.add_(scores.new_zeros(scores.shape[2:]).masked_fill(hidden, torch.finfo(scores.dtype).min / 2))

    def read_means(self, scores: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """What queries at the positions t (T,) read of the means u (B, G, N, V) by their scores (B, H, T, N): (B, H, T,
        V), 0 where no chunk is finished."""
        some = (t + 1 >= self.chunk_size)[:, None]
        return scores.softmax(3) @ at_least_fp32(repeat_heads(u, self.num_heads)) * some

    @torch.no_grad()
    def choose(self, scores: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chunks of queries at the positions t (T,), besides their own: scores (B, H, T, N) -> numbers of S =
        min(top_k - 1, N) chunks (B, G, T, S), the best first, and whether each exists, bool."""
        N, own = scores.shape[3], t[:, None] // self.chunk_size
        number = torch.arange(N, device=t.device)
        if self.num_kv_heads < self.num_heads:
            scores = scores.log_softmax(3).unflatten(1, (self.num_kv_heads, -1)).logsumexp(2)
        order = (-number.double()).expand(len(t), N)  # of equal chunks the earlier
        order = order.masked_fill(number == 0, 1e100).masked_fill(number == own - 1, 2e100)
        order = order.masked_fill(number >= own, -torch.inf)
        chosen = (scores / EQUAL).round().double().mul_(N).add_(order).topk(min(self.top_k - 1, N)).indices
        return chosen, chosen < own

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(repeat_heads(self.project(x)[2], self.num_heads))

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, _ = self.project(x)
        T, C = x.shape[1], min(self.chunk_size, x.shape[1])
        t = torch.arange(T, device=x.device)
        scores = self.scores(q, chunk_means(k, self.chunk_size), t)
        means = chunk_means(torch.eye(T, dtype=scores.dtype, device=x.device)[None, None], self.chunk_size)
        p = self.read_means(scores, means, t)  # means @ v are the means of v
        chosen, exists = self.choose(scores, t)
        seen = ((chosen[..., None] == t // C) & exists[..., None]).any(3) | (t[:, None] // C == t // C)
        scores = at_least_fp32(q) @ at_least_fp32(repeat_heads(k, self.num_heads)).mT / self.head_dim**0.5
        in_chunks = causal_softmax(scores.masked_fill(~repeat_heads(seen, self.num_heads), -torch.inf))
        in_window = causal_softmax(scores.masked_fill(~window_mask(T, self.window_size, x.device), -torch.inf))
        of_means, of_chunks, of_window = self.gates(x)
        return of_means * p + of_chunks * in_chunks + of_window * in_window

    def mix(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, u: Tensor, gates: Tensor) -> Tensor:
        """q (B, H, T, K), the last T tokens of k and v (B, G, ., K); means h, u (B, G, N, K); gates (3, B, H, T, 1) ->
        mixed values (B, H, T, V)."""
        t = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        scores = self.scores(q, h, t)
        chosen, exists = (repeat_heads(part, self.num_heads) for part in self.choose(scores, t))
        k, v = (repeat_heads(part, self.num_heads) for part in (k, v))
        C = min(self.chunk_size, k.shape[2])
        of_means, of_chunks, of_window = gates
        mixed = of_means * self.read_means(scores, u, t)
        mixed = mixed + of_chunks * chosen_attention(q, k, v, C, chosen, exists)
        return mixed + of_window * window_attention(q, k, v, self.window_size)

    def prefill(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        h, u = at_least_fp32(k[:, :, :0]), at_least_fp32(v[:, :, :0])
        if state is not None:
            k, v, h, u = append(state.k, k), append(state.v, v), state.h, state.u
        begun = h.shape[2] * self.chunk_size
        h, u = (
            torch.cat((past, chunk_means(part[:, :, begun:], self.chunk_size)), 2) for past, part in ((h, k), (u, v))
        )
        return self.emit(self.mix(q, k, v, h, u, self.gates(x)), x), Cache(k, v, h, u, conv_state)

    def init_state(self, batch_size: int) -> Cache:
        empty = self._zeros(batch_size, self.num_kv_heads, 0, self.head_dim)
        means = at_least_fp32(empty)
        return Cache(empty, empty, means, means, self.conv.init_state(batch_size))

    def step(self, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        x = x[:, None]
        q, k, v, conv_state = self.project(x, state)
        k, v = append(state.k, k), append(state.v, v)
        C, own = min(self.chunk_size, k.shape[2]), state.h.shape[2]  # all chunks before the own one are finished
        new = (chunk_means(part[:, :, own * C :], self.chunk_size) for part in (k, v))
        h, u = (append(past, means) for past, means in zip((state.h, state.u), new, strict=True))
        t = torch.full((1,), k.shape[2] - 1, device=x.device)
        scores = self.scores(q, h, t)
        chosen = self.choose(scores, t)[0][..., :own]  # (B, G, 1, S), those that exist
        in_chunks = (tokens_seen(part, self.chunk_size, chosen, own) for part in (k, v))
        in_window = (part[:, :, -self.window_size :] for part in (k, v))
        of_means, of_chunks, of_window = self.gates(x)
        mixed = of_means * self.read_means(scores, u, t)
        for gate, seen in ((of_chunks, in_chunks), (of_window, in_window)):
            k_seen, v_seen = (at_least_fp32(part) for part in seen)
            mixed = mixed + gate * causal_attention(at_least_fp32(q), k_seen, v_seen)
        return self.emit(mixed, x)[:, 0], Cache(k, v, h, u, conv_state)

    def state_size(self, num_tokens: int) -> int:
        return 2 * self.kv_dim * (num_tokens + num_tokens // self.chunk_size) + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        T, D = num_tokens, self.hidden_dim
        projections = T * num_weights(self.qkv, self.conv, self.gate, self.out)
        means = 2 * T * (T // self.chunk_size)
        chosen = chosen_products(T, self.chunk_size, self.top_k - 1)
        return 2 * (projections + (means + chosen + window_products(T, self.window_size)) * D)
