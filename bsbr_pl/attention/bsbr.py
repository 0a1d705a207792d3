"""BSBR, block sparse attention with block retrieval: softmax over the last C tokens, and retrieval from earlier chunks.

The sequence is cut into chunks of C tokens. Per head:

    local attention    local_t = sum_{t - C < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j          (q, k rotated)
    unit keys          k^_j = (k_j - mean(k_j)) / sqrt(K (var(k_j) + 1e-5))
    state of a chunk   F_c = sum_{j in c} k^_j^T v_j                                              (K x V)
    its key            h_c = mean_{j in c} x_j W_h                                (R numbers: K, or router_dim)
    query of a block   r_b = x_{first of b} W_r                                   (A tokens: C, or route_every)
    routing            P_bj = softmax_{j < chunk of b}(r_b . h_j / sqrt(R))  with a null slot of score 0
    retrieval          S_b = sum_j P_bj F_j ;  m_t = q_t S_b                      (b the block of t; q not rotated)
    output             o_t = local_t + gain m_t / sqrt(1 + mean(m_t^2))           (mean over the V channels)

The null slot retrieves nothing. The query of a block depends only on its first token, and only finished chunks are
retrieved, so the layer is causal. The gain is learned per head, from 0: retrieval is off at first. The root limits
large reads. A short causal convolution on q, k and v lets a key depend on the tokens just before it.

With retrieval_top_k, the softmax has the null slot and only that many chunks j, those with the greatest scores, rounded
to multiples of 1e-4; of equal chunks the earlier are kept, so rounding errors do not choose among repetitions. With
compression_factor, F_c = sum_{j in c} k^_j^T v_j W_down and m_t = q_t S_b W_up, where F_c and S_b have
V' = V / compression_factor columns. The plain form is overlap=False, conv_size=1 and normalize=False.

Source: the idea is from the PyPI package bsbr (0.1.1).
Differences: the masks of that package are not causal; these equations are new.
Cost: per token at least D (2C + 2K + (K + 1) T / AC) multiply-adds without projections and convolution: O(T^2), with
(K + 1) / AC times the constant of softmax attention (1 / 500 at A = C = 128, K = 32), or 1 / AC with retrieval_top_k.
Decode state: D ((T / C + 1) (K + 1) + 2 C + 3 (conv_size - 1)) numbers; if C <= K / 2, more than a KV cache (2 T D).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, num_weights
from .kernels import exact_product, for_products, weighted_states, window_attention
from .parts import (
    ConvInit,
    ShortConvolution,
    at_least_fp32,
    check_number,
    check_positive,
    chunk_mask,
    gated,
    merge_heads,
    rotary,
    split_heads,
    to_chunks,
)
from .softmax import chunk_attention, head_norm, keep_best, window_products


class Chunks(NamedTuple):
    states: Tensor  # F of the finished chunks (B, H, N, K, V')
    h: Tensor  # (B, H, N, R), keys of the finished chunks
    S: Tensor  # (B, H, K, V'), what the current block retrieved
    k: Tensor  # (B, H, min(T, C), K), not rotated; without overlap, of the current chunk only: (B, H, T mod C, K)
    v: Tensor  # (B, H, min(T, C), V), likewise
    x_sum: Tensor  # (B, D), sum of the inputs of the current chunk
    conv_state: Tensor  # (B, conv_size - 1, 3D), the last inputs of the convolution
    position: int  # tokens seen


class BSBRAttention(Attention[Chunks]):
    """Block sparse attention with block retrieval.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: tokens C in a chunk, and how many tokens a query sees exactly.
        retrieval_top_k: retrieve only from this many best earlier chunks; None for all of them.
        compression_factor: V / V', a divisor of the head width; above 1, learned maps take the values down and up.
        router_dim: width R of the queries of blocks and the keys of chunks; the head width if None.
        route_every: tokens A that share one routing query, a divisor of chunk_size; chunk_size if None.
        normalize: unit keys, a null slot and a bounded read; False: k^ = k, no null slot, and o_t = local_t + m_t.
        initial_gain: initial value of the gain, unused without `normalize`; recall tasks train faster with 0.5.
        rope: rotate q and k of the local attention. Without it, only the convolution depends on order.
        overlap: see the last C tokens exactly; False for those of the own chunk, which is cheaper.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        bias: give `qkv` and `out` a bias; `chunk_query` and `chunk_key` have none.
        qk_norm: RMSNorm of q and k, before all that reads them.
        output_gate: multiply the output by sigmoid(x_t W_g).
    """

    routes_chunks, has_kernel = True, True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 128,
        retrieval_top_k: int | None = None,
        compression_factor: int = 1,
        router_dim: int | None = None,
        route_every: int | None = None,
        normalize: bool = True,
        initial_gain: float = 0.0,
        rope: bool = True,
        overlap: bool = True,
        conv_size: int = 4,
        conv_init: ConvInit = "identity",
        bias: bool = False,
        qk_norm: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        router_dim = self.head_dim if router_dim is None else router_dim
        route_every = chunk_size if route_every is None else route_every
        check_positive(chunk_size=chunk_size, compression_factor=compression_factor, router_dim=router_dim)
        check_number("a divisor of chunk_size", lambda a: a > 0 and chunk_size % a == 0, True, route_every=route_every)
        check_number("from -1 to 1", lambda gain: -1 <= gain <= 1, initial_gain=initial_gain)
        check_positive(retrieval_top_k=1 if retrieval_top_k is None else retrieval_top_k)
        if self.head_dim % compression_factor:
            raise ValueError(f"compression_factor must divide the head width {self.head_dim}, got {compression_factor}")
        self.chunk_size, self.retrieval_top_k, self.router_dim = chunk_size, retrieval_top_k, router_dim
        self.route_every, self.state_dim = route_every, self.head_dim // compression_factor
        self.normalize, self.rope, self.overlap = normalize, rope, overlap
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=bias)
        self.conv = ShortConvolution(3 * hidden_dim, conv_size, conv_init)
        self.chunk_query = nn.Linear(hidden_dim, num_heads * router_dim, bias=False)
        self.chunk_key = nn.Linear(hidden_dim, num_heads * router_dim, bias=False)
        self.q_norm, self.k_norm = head_norm(self.head_dim, qk_norm), head_norm(self.head_dim, qk_norm)
        self.output_gate = nn.Linear(hidden_dim, hidden_dim, bias=False) if output_gate else None
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=bias)
        self.gain = nn.Parameter(torch.full((num_heads, 1, 1), float(initial_gain))) if normalize else None
        if compression_factor > 1:
            self.down = nn.Parameter(torch.randn(num_heads, self.head_dim, self.state_dim) * self.head_dim**-0.5)
            self.up = nn.Parameter(torch.randn(num_heads, self.state_dim, self.head_dim) * self.state_dim**-0.5)

    @property
    def reach(self) -> int:
        return self.chunk_size

    period = reach

    @property
    def has_map(self) -> bool:
        return self.state_dim == self.head_dim

    def sees_exactly(self, num_tokens: int) -> Tensor:
        window = super().sees_exactly(num_tokens)
        return window if self.overlap else chunk_mask(num_tokens, self.chunk_size, self._device)

    def project(self, x: Tensor, state: Chunks | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K) and the state of the convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))
        return self.q_norm(q), self.k_norm(k), v, conv_state

    def rotate(self, q: Tensor, start: int = 0) -> Tensor:
        return rotary(q, start) if self.rope else q

    def unit_keys(self, k: Tensor) -> Tensor:
        """k^ (..., K)."""
        k = at_least_fp32(k)
        if not self.normalize:
            return k
        return F.layer_norm(k, k.shape[-1:], weight=k.new_full(k.shape[-1:], self.head_dim**-0.5), eps=1e-5)

    def routing_vectors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) from the start of a chunk -> queries r (B, H, M, R) of blocks, keys h (B, H, N, R) of chunks."""
        r = split_heads(self.chunk_query(x[:, :: min(self.route_every, x.shape[1])]), self.num_heads)
        means = to_chunks(x, min(self.chunk_size, x.shape[1]), dim=1).mean(2)
        return r, split_heads(self.chunk_key(means), self.num_heads)

    def chunk_weights(self, r: Tensor, h: Tensor, first: int = 0) -> Tensor:
        """P (B, H, M, N): queries r (B, H, M, R) of blocks first, first + 1, ... over keys h (B, H, N, R)."""
        blocks = torch.arange(first, first + r.shape[2], device=r.device)[:, None]
        chunks = blocks * self.route_every // self.chunk_size
        past = torch.arange(h.shape[2], device=r.device) < chunks
        scores = (exact_product(r, h.mT) / self.router_dim**0.5).masked_fill(~past, -torch.inf)
        scores = keep_best(scores, self.retrieval_top_k)
        null = torch.zeros_like(scores[..., :1])
        if not self.normalize:
            null = null.masked_fill(chunks > 0, -torch.inf)  # the first chunk has nothing else
        return torch.cat((null, scores), -1).softmax(-1)[..., 1:]

    def bound(self, rows: Tensor, m: Tensor) -> Tensor:
        """rows * gain / sqrt(1 + mean(m^2)): reads, or rows of a map (B, H, T, .), that retrieve m (B, H, T, V)."""
        return rows if self.gain is None else rows * (self.gain * (1 + m.square().mean(-1, keepdim=True)).rsqrt())

    def chunk_map(self, x: Tensor) -> Tensor:
        block = torch.arange(x.shape[1], device=x.device) // self.route_every
        return self.chunk_weights(*self.routing_vectors(x))[:, :, block]

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(merge_heads(mixed).to(x.dtype), x, self.output_gate))

    def attention_map(self, x: Tensor) -> Tensor:
        if not self.has_map:
            raise ValueError("compression_factor > 1 alters the values retrieved: there is no T x T attention map")
        q, k, v, _ = (at_least_fp32(part) for part in self.project(x))
        scores = self.rotate(q) @ self.rotate(k).mT / self.head_dim**0.5
        local = scores.masked_fill(~self.sees_exactly(x.shape[1]), -torch.inf).softmax(-1)
        chunk = torch.arange(x.shape[1], device=x.device) // self.chunk_size
        retrieved = self.chunk_map(x)[..., chunk] * (q @ self.unit_keys(k).mT)
        return local + self.bound(retrieved, retrieved @ v)

    def chunk_states(self, k: Tensor, v: Tensor) -> Tensor:
        """F (B, H, N, K, V') of chunks k, v (B, H, N, C, K)."""
        v = for_products(v)
        if self.state_dim != self.head_dim:
            v = v @ self.down[:, None].to(v.dtype)
        return self.unit_keys(k).to(v.dtype).mT @ v

    def retrieve(self, q: Tensor, S: Tensor) -> Tensor:
        """Bounded m (B, H, M A, V) of blocks q (B, H, M, A, K) that retrieved S (B, H, M, K, V')."""
        q = for_products(q)
        m = q @ S.to(q.dtype)
        if self.state_dim != self.head_dim:
            m = m @ self.up[:, None].to(q.dtype)
        m = at_least_fp32(m).flatten(2, 3)
        return self.bound(m, m)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, h: Tensor, state: Chunks | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, T, K) of new tokens; k, v (B, H, ., K) of the state and of these tokens; r (B, H, M, R) of blocks
        that start in them, h (B, H, N, R) of chunks that overlap them -> mixed values (B, H, T, V); F and h of all
        chunks so far; S (B, H, ., K, V') of the blocks that overlap them."""
        if not q.is_cuda:  # copied once, for the local attention and for the chunks below
            q, k, v = (part.contiguous() for part in (q, k, v))
        T, C, position = q.shape[2], self.chunk_size, 0 if state is None else state.position
        attention = window_attention if self.overlap else chunk_attention
        local = attention(self.rotate(q, start=k.shape[2] - T), self.rotate(k), v, C)
        begun, asked = position % C, position % self.route_every  # tokens of the current chunk, block in the state
        k, v = (to_chunks(part[:, :, part.shape[2] - T - begun :], min(C, begun + T)) for part in (k, v))
        q = to_chunks(F.pad(q, (0, 0, asked, 0)) if asked else q, min(self.route_every, asked + T))
        states = self.chunk_states(k, v)
        if state is not None:
            states, h = torch.cat((state.states.to(states.dtype), states), 2), torch.cat((state.h, h), 2)
        first = -(-position // self.route_every)
        S = weighted_states(self.chunk_weights(r, h, first), states, self.retrieval_top_k)
        if state is not None and asked:
            S = torch.cat((state.S[:, :, None].to(S.dtype), S), 2)
        return local + self.retrieve(q, S)[:, :, asked : asked + T], states, h, S

    def prefill(self, x: Tensor, state: Chunks | None = None) -> tuple[Tensor, Chunks]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, conv_state = self.project(x, state)
        position, begun, inputs = 0, 0, x  # begun: tokens of the current chunk that the state has read
        if state is not None:
            position, begun = state.position, state.position % self.chunk_size
            k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
            if begun:  # their sum replaces the earlier inputs of the current chunk
                inputs = torch.cat((F.pad(state.x_sum[:, None], (0, 0, 0, begun - 1)), x), 1)
        r, h = self.routing_vectors(inputs)
        r = r[:, :, -(-begun // self.route_every) :]  # earlier blocks of the current chunk have retrieved already
        mixed, states, h, S = self.mix(q, k, v, r, h, state)
        position += x.shape[1]
        finished, rest = position // self.chunk_size, position % self.chunk_size
        far = max(0, k.shape[2] - (self.chunk_size if self.overlap else rest))  # tokens that no later one sees exactly
        current = (S[:, :, -1], k[:, :, far:], v[:, :, far:], inputs[:, inputs.shape[1] - rest :].sum(1))
        return self.emit(mixed, x), Chunks(states[:, :, :finished], h[:, :, :finished], *current, conv_state, position)

    def init_state(self, batch_size: int) -> Chunks:
        B, H, K, V = batch_size, self.num_heads, self.head_dim, self.state_dim
        S, no_token = at_least_fp32(self._zeros(B, H, K, V)), self._zeros(B, H, 0, K)
        current = (S, no_token, no_token, self._zeros(B, H * K), self.conv.init_state(B), 0)
        return Chunks(S.new_zeros(B, H, 0, K, V), self._zeros(B, H, 0, self.router_dim), *current)

    def step(self, x: Tensor, state: Chunks) -> tuple[Tensor, Chunks]:
        states, h, S, k, v, x_sum, _, position = state
        C, A = self.chunk_size, self.route_every
        if position % A == 0 and position >= C:  # a block starts: it retrieves
            r = split_heads(self.chunk_query(x)[:, None], self.num_heads)
            S = weighted_states(self.chunk_weights(r, h, position // A), states, self.retrieval_top_k)[:, :, 0]
        q, k_t, v_t, conv_state = self.project(x[:, None], state)
        k, v, x_sum = torch.cat((k, k_t), 2)[:, :, -C:], torch.cat((v, v_t), 2)[:, :, -C:], x_sum + x
        local = F.scaled_dot_product_attention(self.rotate(q, start=k.shape[2] - 1), self.rotate(k), v)
        output = self.emit(local + self.retrieve(q[:, :, None], S[:, :, None]), x[:, None])[:, 0]
        if (position + 1) % C == 0:  # a chunk ends: it becomes a state and a key
            states = torch.cat((states, self.chunk_states(k[:, :, None], v[:, :, None])), 2)
            h_c = split_heads(self.chunk_key(x_sum / C)[:, None], self.num_heads)
            h, x_sum = torch.cat((h, h_c), 2), torch.zeros_like(x_sum)
            if not self.overlap:
                k, v = k[:, :, :0], v[:, :, :0]
        return output, Chunks(states, h, S, k, v, x_sum, conv_state, position + 1)

    def state_size(self, num_tokens: int) -> int:
        D, HR = self.hidden_dim, self.num_heads * self.router_dim
        finished, rest = divmod(num_tokens, self.chunk_size)
        matrix = self.head_dim * self.state_dim * self.num_heads
        near = min(num_tokens, self.chunk_size) if self.overlap else rest
        return finished * (matrix + HR) + matrix + 2 * near * D + D + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, V, HR = self.hidden_dim, self.state_dim, self.num_heads * self.router_dim
        C, A = min(self.chunk_size, num_tokens), min(self.route_every, num_tokens)
        N, M = -(-num_tokens // C), -(-num_tokens // A)
        projections = num_tokens * num_weights(self.qkv, self.conv, self.output_gate, self.out) + (N + M) * D * HR
        local = D * (window_products(num_tokens, C) if self.overlap else N * C * (C + 1))
        states = (N * C + M * A) * D * V * (1 if self.head_dim == V else 2)  # made and read; with `down` and `up`
        return 2 * (projections + local + states + M * N * HR + M * min(N, self.retrieval_top_k or N) * D * V)
