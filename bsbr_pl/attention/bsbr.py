"""BSBR, block sparse attention with block retrieval: softmax over the last C tokens and over the states of chunks.

The sequence is cut in chunks of C tokens. Per head, with k^ the keys centred and scaled to unit length:

    near by            local_t = sum_{t - C < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j          (q, k rotated)
    a chunk's state    F_c = sum_{j in c} k^_j^T v_j                                              (K x V)
    a chunk's key      h_c = mean_{j in c} x_j W_h                        (R numbers: K, or router_dim)
    a chunk's query    r_c = x_{first of c} W_r
    between chunks     P_cj = softmax_{j < c}(r_c . h_j / sqrt(R)), and a null slot of score 0 retrieves nothing
    what is retrieved  m_t = q_t sum_{j < c} P_cj F_j
    o_t = local_t + gain * m_t / sqrt(1 + mean(m_t^2))

A chunk's query is known when the chunk starts, and only finished chunks are retrieved: nothing of the future leaks.
The gain is learned per head and starts at 0: training switches retrieval on (a recall task learns sooner from 0.5). The
root bounds what is large and leaves small what is small. q, k and v pass a short causal convolution first, so that a
key can know what stands before it.

The plain form is overlap = False (a token sees its own chunk only, which is cheaper), conv_size = 1 and normalize =
False: k as it is, o_t = local_t + m_t, no null slot.

Cost per token, multiply-adds beside projections and convolution: at least D (2C + 2K + (T / C^2)(K + 1)). In all that
is quadratic in T, as softmax attention is, with about (K + 1) / C^2 of its coefficient (1 / 500 at C = 128, K = 32), or
1 / C^2, the routing's scores, where retrieval_top_k bounds the chunks that are mixed.
Decode state: (T / C) D (K + 1) + 2 C D numbers; unless C > K / 2 that is more than the 2 T D of a key-value cache.
Source: the idea is that of the PyPI package bsbr (0.1.1), whose masks let the future through; these equations are ours.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    Attention,
    ShortConvolution,
    at_least_fp32,
    causal_softmax,
    check_number,
    check_positive,
    merge_heads,
    rotary,
    split_heads,
    to_chunks,
    window_pairs,
)
from .kernels import for_products, window_attention

EQUAL = 1e-4  # scores this close count as equal and the earlier chunk wins: rounding must not choose among repetitions


class Chunks(NamedTuple):
    F: Tensor  # (B, H, N, K, V / compression), states of the finished chunks
    h: Tensor  # (B, H, N, R), their keys
    S: Tensor  # (B, H, K, V / compression), what the chunk under way retrieved
    k: Tensor  # (B, H, min(T, C), K), not rotated; without overlap those of the chunk under way alone
    v: Tensor  # (B, H, min(T, C), V)
    x_sum: Tensor  # (B, D), the inputs of the chunk under way, summed
    before: Tensor  # (B, conv_size - 1, 3D), the convolution's last inputs
    position: int  # tokens seen


class BSBRAttention(Attention[Chunks]):
    """Block sparse attention with block retrieval.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C in a chunk, and how many a token sees exactly.
        retrieval_top_k: mix only this many best earlier chunks; None for all of them.
        compression_factor: store chunk states of K x V / compression_factor numbers, through a learned map of the
            values down and back; must divide the head width.
        router_dim: width R of a head's chunk queries and keys; None for that of the head.
        normalize: unit-length keys, a null slot and a bounded, gained read in the retrieval; False is the plain form.
        initial_gain: where the gain starts; without `normalize` there is none.
        rope: rotate q and k of the local attention; without it only the convolution knows any order.
        overlap: see the last C tokens; False for those of the own chunk.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        bias: give `qkv` and `out` a bias; the chunks' queries and keys have none.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 128,
        retrieval_top_k: int | None = None,
        compression_factor: int = 1,
        router_dim: int | None = None,
        normalize: bool = True,
        initial_gain: float = 0.0,
        rope: bool = True,
        overlap: bool = True,
        conv_size: int = 4,
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, compression_factor=compression_factor, conv_size=conv_size)
        check_number("from -1 to 1", lambda gain: -1 <= gain <= 1, initial_gain=initial_gain)
        if retrieval_top_k is not None:
            check_positive(retrieval_top_k=retrieval_top_k)
        if self.head_dim % compression_factor:
            raise ValueError(f"compression_factor must divide the head width {self.head_dim}, got {compression_factor}")
        self.chunk_size = chunk_size
        self.retrieval_top_k = retrieval_top_k
        self.state_dim = self.head_dim // compression_factor
        self.router_dim = self.head_dim if router_dim is None else router_dim
        check_positive(router_dim=self.router_dim)
        self.normalize = normalize
        self.rope = rope
        self.overlap = overlap
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=bias)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size)
        self.chunk_query = nn.Linear(hidden_dim, num_heads * self.router_dim, bias=False)
        self.chunk_key = nn.Linear(hidden_dim, num_heads * self.router_dim, bias=False)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)
        if normalize:
            self.gain = nn.Parameter(torch.full((num_heads, 1, 1), float(initial_gain)))
        if compression_factor > 1:
            self.down = nn.Parameter(torch.randn(num_heads, self.head_dim, self.state_dim) * self.head_dim**-0.5)
            self.up = nn.Parameter(torch.randn(num_heads, self.state_dim, self.head_dim) * self.state_dim**-0.5)

    def project(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K) and the convolution's last inputs."""
        qkv, before = self.conv(self.qkv(x), before)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))
        return q, k, v, before

    def rotate(self, q: Tensor, start: int = 0) -> Tensor:
        return rotary(q, start) if self.rope else q

    def address(self, k: Tensor) -> Tensor:
        """k^, the keys (..., K) as retrieval uses them."""
        k = at_least_fp32(k)
        if not self.normalize:
            return k
        return F.layer_norm(k, k.shape[-1:], weight=k.new_full(k.shape[-1:], self.head_dim**-0.5))

    def bound(self, retrieved: Tensor, v: Tensor) -> Tensor:
        """`retrieved` (B, H, N, C, .) with rows scaled so that `v`, what they retrieve, is below the gain in size."""
        if not self.normalize:
            return retrieved
        return retrieved * (self.gain[..., None] * (1 + v.square().mean(-1, keepdim=True)).rsqrt())

    def chunk_weights(self, r: Tensor, h: Tensor, first: int = 0) -> Tensor:
        """P: queries r (B, H, M, R) of chunks first, first + 1, ... over keys h (B, H, N, R) -> (B, H, M, N)."""
        r, h = at_least_fp32(r), at_least_fp32(h)
        chunks = torch.arange(first, first + r.shape[2], device=r.device)[:, None]
        past = torch.arange(h.shape[2], device=r.device) < chunks
        scores = (r @ h.mT / self.router_dim**0.5).masked_fill(~past, -torch.inf)
        if self.retrieval_top_k is not None and self.retrieval_top_k < h.shape[2]:
            order = (scores / EQUAL).round().argsort(dim=-1, descending=True, stable=True)
            scores = scores.scatter(-1, order[..., self.retrieval_top_k :], -torch.inf)
        null = torch.zeros_like(scores[..., :1])
        if not self.normalize:
            null = null.masked_fill(chunks > 0, -torch.inf)  # the first chunk has nothing else
        return torch.cat((null, scores), -1).softmax(-1)[..., 1:]

    def chunk_map(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> P (B, H, N, N): how much chunk c retrieves of chunk j, strictly lower triangular."""
        return self.chunk_weights(*self.route(x))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> the chunks' queries r and keys h, both (B, H, N, R)."""
        x = to_chunks(x, min(self.chunk_size, x.shape[1]), dim=1)
        r = split_heads(self.chunk_query(x[:, :, 0]), self.num_heads)
        return r, split_heads(self.chunk_key(x.mean(2)), self.num_heads)

    def attention_map(self, x: Tensor) -> Tensor:
        if self.state_dim != self.head_dim:
            raise ValueError("compression_factor > 1 alters the values retrieved: there is no T x T attention map")
        q, k, v, _ = (at_least_fp32(part) for part in self.project(x))
        place = torch.arange(x.shape[1], device=x.device)
        chunk = place // self.chunk_size
        far = place[:, None] - place >= self.chunk_size if self.overlap else chunk[:, None] != chunk
        scores = self.rotate(q) @ self.rotate(k).mT / self.head_dim**0.5
        local = causal_softmax(scores.masked_fill(far, -torch.inf))
        retrieved = self.chunk_map(x)[:, :, chunk][..., chunk] * (q @ self.address(k).mT)
        return local + self.bound(retrieved[:, :, None], (retrieved @ v)[:, :, None])[:, :, 0]

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def read(self, q: Tensor, S: Tensor) -> Tensor:
        """q (B, H, N, C, K) and what the chunks retrieved, S (B, H, N, K, V / compression) -> (B, H, N, C, V)."""
        q = for_products(q)
        retrieved = q @ S.to(q.dtype)
        if self.state_dim != self.head_dim:
            retrieved = retrieved @ self.up[:, None].to(q.dtype)
        retrieved = at_least_fp32(retrieved)
        return self.bound(retrieved, retrieved)

    def write(self, k: Tensor, v: Tensor) -> Tensor:
        """k, v (B, H, N, C, K) -> the chunks' states F (B, H, N, K, V / compression)."""
        v = for_products(v)
        if self.state_dim != self.head_dim:
            v = v @ self.down[:, None].to(v.dtype)
        return self.address(k).to(v.dtype).mT @ v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K), r, h (B, H, N, R) -> mixed values (B, H, T, V); chunk states F and what each
        chunk retrieved, S, both (B, H, N, K, V / compression)."""
        if not q.is_cuda:  # once, for what is cut in chunks here and in `local`
            q, k, v = (part.contiguous() for part in (q, k, v))
        local = self.local(self.rotate(q), self.rotate(k), v)
        T = q.shape[2]
        q, k, v = (to_chunks(part, min(self.chunk_size, T)) for part in (q, k, v))  # (B, H, N, C, K)
        states = self.write(k, v)
        S = self.combine(self.chunk_weights(r, h), states)
        return local + self.read(q, S).flatten(2, 3)[:, :, :T], states, S

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention near by, of rotated q and k: (B, H, T, K) -> (B, H, T, V)."""
        if self.overlap:
            return window_attention(q, k, v, self.chunk_size)
        T = q.shape[2]
        q, k, v = (to_chunks(part, min(self.chunk_size, T)).flatten(0, 1) for part in (q, k, v))  # (B H, N, C, K)
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .flatten(1, 2)[:, :T]
            .unflatten(0, (-1, self.num_heads))
        )

    def prefill(self, x: Tensor) -> tuple[Tensor, Chunks]:
        q, k, v, before = self.project(x)
        r, h = self.route(x)
        mixed, states, S = self.mix(q, k, v, r, h)
        T, C = x.shape[1], self.chunk_size
        done = T // C
        near = max(0, T - C) if self.overlap else done * C
        under_way = (k[:, :, near:], v[:, :, near:], x[:, done * C :].sum(1), before, T)
        return self.emit(mixed, x), Chunks(states[:, :, :done], h[:, :, :done], S[:, :, -1], *under_way)

    def combine(self, weights: Tensor, states: Tensor) -> Tensor:
        """S: weights P (B, H, M, N) and chunk states F (B, H, N, K, V) -> (B, H, M, K, V)."""
        weights = weights.to(states.dtype)
        top_k = self.retrieval_top_k
        if top_k is None or top_k >= states.shape[2] or states.is_cuda:  # there zeros are quicker than a gather
            return (weights @ states.flatten(3)).unflatten(3, states.shape[3:])
        best, index = weights.topk(top_k)  # (B, H, M, top_k)
        B, H, N = states.shape[:3]
        rows = torch.arange(B * H, device=index.device).view(B, H, 1, 1) * N + index
        bags = F.embedding_bag(
            rows.flatten(0, 2), states.flatten(3).flatten(0, 2), mode="sum", per_sample_weights=best.flatten(0, 2)
        )
        return bags.view(B, H, -1, *states.shape[3:])

    def init_state(self, batch_size: int) -> Chunks:
        B, H, K, V = batch_size, self.num_heads, self.head_dim, self.state_dim
        nothing, no_key = self._zeros(B, H, 0, K), self._zeros(B, H, 0, self.router_dim)
        S = at_least_fp32(self._zeros(B, H, K, V))
        under_way = (nothing, nothing, self._zeros(B, H * K), self.conv.nothing_before(B), 0)
        return Chunks(S.new_zeros(B, H, 0, K, V), no_key, S, *under_way)

    def step(self, x: Tensor, state: Chunks) -> tuple[Tensor, Chunks]:
        states, h, S, k, v, x_sum, before, position = state
        C = self.chunk_size
        if position % C == 0 and position > 0:  # a chunk starts: it retrieves
            r = split_heads(self.chunk_query(x)[:, None], self.num_heads)
            S = self.combine(self.chunk_weights(r, h, first=h.shape[2]), states)[:, :, 0]
        x = x[:, None]
        q, k_t, v_t, before = self.project(x, before)
        k, v, x_sum = torch.cat((k, k_t), 2)[:, :, -C:], torch.cat((v, v_t), 2)[:, :, -C:], x_sum + x[:, 0]
        local = F.scaled_dot_product_attention(self.rotate(q, start=k.shape[2] - 1), self.rotate(k), v)
        retrieved = self.read(q[:, :, None], S[:, :, None])[:, :, 0]
        output = self.emit(local + retrieved, x)[:, 0]
        if (position + 1) % C == 0:  # a chunk ends: it becomes a state and a key
            states = torch.cat((states, self.write(k[:, :, None], v[:, :, None])), 2)
            h_c = split_heads(self.chunk_key(x_sum / C)[:, None], self.num_heads)
            h, x_sum = torch.cat((h, h_c), 2), torch.zeros_like(x_sum)
            if not self.overlap:
                k, v = k[:, :, :0], v[:, :, :0]
        return output, Chunks(states, h, S, k, v, x_sum, before, position + 1)

    def state_size(self, num_tokens: int) -> int:
        D, HR = self.hidden_dim, self.num_heads * self.router_dim
        finished, under_way = divmod(num_tokens, self.chunk_size)
        matrix = self.head_dim * self.state_dim * self.num_heads
        near = min(num_tokens, self.chunk_size) if self.overlap else under_way
        return finished * (matrix + HR) + matrix + 2 * near * D + D + self.conv.nothing_before(1).numel()

    def flops(self, num_tokens: int) -> int:
        D, V, C = self.hidden_dim, self.state_dim, min(self.chunk_size, num_tokens)
        HR = self.num_heads * self.router_dim
        N = -(-num_tokens // C)
        mixed = N if self.retrieval_top_k is None else min(N, self.retrieval_top_k)
        projections = 4 * num_tokens * D * D + 2 * N * D * HR
        convolution = num_tokens * self.conv.weight.numel()
        compression = 2 * N * C * D * V if self.head_dim != V else 0
        local = 2 * D * (window_pairs(num_tokens, C) if self.overlap else N * C * (C + 1) // 2)
        retrieval = 2 * N * C * D * V + N * N * HR + N * mixed * D * V
        return 2 * (projections + convolution + compression + local + retrieval)
