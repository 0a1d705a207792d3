"""Gated attention unit in its mixed-chunk form (FLASH): one head, one shared projection, no feed-forward network.

    u, v = SiLU(x W_u), SiLU(x W_v)        (E = expansion_factor D wide)        z = SiLU(x W_z)        (K wide)
    q, k, q', k' = scale_i * z + offset_i                                       (i = 1 to 4)
    inside a chunk of C:  A_tj = relu(q_t . k_j / C)^2                          (j <= t; q, k rotated)
    earlier chunks:       A_tj = q'_t . k'_j / (number of tokens in them)
    o_t = (u_t * sum_j A_tj v_j) W_o

Two such layers replace one attention and one feed-forward layer. The fast form reads the earlier chunks through one
K x E matrix, the sum of k'_j^T v_j over their tokens. With `published`, three more things are as in the paper's code: a
learned bias of the distance inside the chunk, relu(q_t . k_j / C + b_{t-j})^2; q' and k' are rotated too; the scales
start at N(0, 0.02^2), here at 1 for q and k and at 1 / sqrt(K) for q' and k'.

Source: Hua et al. 2022, arXiv 2202.10447, section 3.1 (the unit) and 3.2 (mixed chunks). The linear part is an average,
as in the code of its appendix; the text has a sum.
Differences: the maps have no bias, and chunks are shorter (published: chunk_size=256).
Cost: O(T (C + K) E).
Decode state: the sum of k'^T v over the finished chunks (K E numbers), and z and v of the current chunk
((T mod C) (K + E) numbers).
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .kernels import choose, gau_kernel
from .parts import at_least_fp32, check_positive, chunk_mask, lower_triangle, rotary, running_sum, to_chunks

LONGEST = 512  # the longest chunk for which the published code has a bias of each distance


class Chunk(NamedTuple):
    kv: Tensor  # (B, K, E), k'^T v summed over the finished chunks
    z: Tensor  # (B, T mod C, K), of the current chunk
    v: Tensor  # (B, T mod C, E), of the current chunk
    finished: int  # number of finished chunks


class GAUAttention(Attention[Chunk]):
    """Gated attention unit.

    Args:
        hidden_dim: width D.
        num_heads: not used, because the unit has one head; every architecture takes it.
        chunk_size: tokens C in a chunk.
        expansion_factor: E / D.
        key_dim: width K of the shared representation z.
        rope: rotate q and k inside the chunk. Without it, only `published` shows the order within the chunk.
        published: the positions and the start of the paper's code.
    """

    replaces_feed_forward, has_kernel = True, True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int = 1,
        chunk_size: int = 128,
        expansion_factor: int = 2,
        key_dim: int = 128,
        rope: bool = True,
        published: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, expansion_factor=expansion_factor, key_dim=key_dim)
        if rope and key_dim % 2:
            raise ValueError(f"key_dim must be even for rotary positions, got {key_dim}")
        if published and chunk_size > LONGEST:
            raise ValueError(
                f"chunk_size must be at most {LONGEST} if published, with a bias for every distance, got {chunk_size}"
            )
        self.num_heads = 1
        self.chunk_size = chunk_size
        self.rope = rope
        self.published = published
        self.value_dim = expansion_factor * hidden_dim
        self.key_dim = key_dim
        self.u = nn.Linear(hidden_dim, self.value_dim, bias=False)
        self.v = nn.Linear(hidden_dim, self.value_dim, bias=False)
        self.z = nn.Linear(hidden_dim, key_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor([1.0, 1.0, key_dim**-0.5, key_dim**-0.5])[:, None].repeat(1, key_dim))
        self.offset = nn.Parameter(torch.zeros(4, key_dim))
        if published:
            nn.init.normal_(self.scale, std=0.02)
        self.bias = nn.Parameter(0.02 * torch.randn(chunk_size)) if published else None
        self.out = nn.Linear(self.value_dim, hidden_dim, bias=False)

    @property
    def reach(self) -> int:
        return self.chunk_size

    period = reach

    def sees_exactly(self, num_tokens: int) -> Tensor:
        return chunk_mask(num_tokens, self.chunk_size, self._device)

    def shared(self, x: Tensor) -> Tensor:
        """z (B, T, K)."""
        return F.silu(at_least_fp32(self.z(x)))

    def views(self, z: Tensor, finished: int = 0) -> list[Tensor]:
        """z (B, C, K) of a chunk or (B, N, C, K) of chunks, after `finished` others -> q, k, q', k', each like z."""
        q, k, q_lin, k_lin = (scale * z + offset for scale, offset in zip(self.scale, self.offset, strict=True))
        if self.rope:
            q, k = rotary(q), rotary(k)
        if self.rope and self.published:  # the distances between chunks count
            start = finished * self.chunk_size
            q_lin, k_lin = (rotary(part.flatten(1, -2), start).view_as(part) for part in (q_lin, k_lin))
        return [q, k, q_lin, k_lin]

    def inside(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights inside a chunk, not masked: its last queries (..., n, K), its keys (..., C, K) -> (..., n, C)."""
        scores = q @ k.mT / self.chunk_size
        if self.bias is not None:
            j = torch.arange(k.shape[-2], device=k.device)
            scores = scores + self.bias[(j[-q.shape[-2] :, None] - j).clamp(0, self.chunk_size - 1)].to(scores.dtype)
        return scores.relu().square()

    def values(self, x: Tensor) -> Tensor:
        return F.silu(at_least_fp32(self.v(x)))[:, None]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(F.silu(self.u(x)) * mixed[:, 0].to(x.dtype))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, q_lin, k_lin = self.views(self.shared(x))
        chunk = torch.arange(x.shape[1], device=x.device) // self.chunk_size
        earlier = q_lin @ k_lin.mT / (chunk * self.chunk_size).clamp(min=1)[:, None]
        return (self.inside(q, k) * self.sees_exactly(x.shape[1]) + earlier * (chunk[:, None] > chunk))[:, None]

    def mix(self, z: Tensor, v: Tensor, kv: Tensor | None = None, finished: int = 0) -> tuple[Tensor, Tensor]:
        """z (B, T, K), v (B, T, E) from the start of a chunk on; k'^T v (B, K, E) of the finished chunks before it ->
        mixed values (B, T, E); k'^T v of all finished chunks (B, K, E)."""
        T, C = z.shape[1], self.chunk_size
        z, v = (to_chunks(part, min(C, T), dim=1) for part in (z, v))  # (B, N, C, K), (B, N, C, E)
        q, k, q_lin, k_lin = self.views(z, finished)
        inside = self.inside(q, k) * lower_triangle(q.shape[2], like=q) @ v
        before, total = running_sum(k_lin.mT @ v, dim=1, start=kv)  # (B, N, K, E), (B, K, E)
        count = ((finished + torch.arange(v.shape[1], device=v.device)) * C).clamp(min=1)[:, None, None]
        mixed = inside + (q_lin / count) @ before
        return mixed.flatten(1, 2)[:, :T], before[:, -1] if T % C else total

    def prefill(self, x: Tensor, state: Chunk | None = None) -> tuple[Tensor, Chunk]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        z, v = self.shared(x), self.values(x)[:, 0]
        kv, finished = None, 0
        if state is not None:  # compute the current chunk again, from its first token on
            kv, finished = state.kv, state.finished
            z, v = torch.cat((state.z, z), 1), torch.cat((state.v, v), 1)
        kernel = partial(gau_kernel, self.views, self.inside, self.chunk_size)
        mixed, kv = choose(x, kernel, self.mix)(z, v, kv, finished)
        rest = z.shape[1] // self.chunk_size * self.chunk_size
        state = Chunk(kv, z[:, rest:], v[:, rest:], finished + rest // self.chunk_size)
        return self.emit(mixed[:, None, -x.shape[1] :], x), state

    def init_state(self, batch_size: int) -> Chunk:
        B, K, E = batch_size, self.key_dim, self.value_dim
        zeros = at_least_fp32(self._zeros(B, K, E))
        return Chunk(zeros, zeros.new_zeros(B, 0, K), zeros.new_zeros(B, 0, E), 0)

    def step(self, x: Tensor, state: Chunk) -> tuple[Tensor, Chunk]:
        x = x[:, None]
        kv, finished = state.kv, state.finished
        z = torch.cat((state.z, self.shared(x)), 1)
        v = torch.cat((state.v, self.values(x)[:, 0]), 1)
        q, k, q_lin, k_lin = self.views(z, finished)
        mixed = self.inside(q[:, -1:], k) @ v
        mixed = mixed + q_lin[:, -1:] @ kv / max(1, finished * self.chunk_size)
        if z.shape[1] == self.chunk_size:
            kv, finished = kv + k_lin.mT @ v, finished + 1
            z, v = z[:, :0], v[:, :0]
        return self.emit(mixed[:, None], x)[:, 0], Chunk(kv, z, v, finished)

    def state_size(self, num_tokens: int) -> int:
        K, E = self.key_dim, self.value_dim
        return K * E + num_tokens % self.chunk_size * (K + E)

    def flops(self, num_tokens: int) -> int:
        D, K, E, C = self.hidden_dim, self.key_dim, self.value_dim, min(self.chunk_size, num_tokens)
        padded = -(-num_tokens // C) * C
        return 2 * (num_tokens * D * (3 * E + K) + padded * (C * (K + E) + 2 * K * E))
