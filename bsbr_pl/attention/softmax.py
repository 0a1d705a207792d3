"""Softmax attention that the architectures share: causal, in a chunk or window, to chosen chunks, with sinks.

The letters are those of `base.py`, and

    G  heads of keys and values (`num_kv_heads`); H / G heads of queries share each of them
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import at_least_fp32, check_positive, to_chunks

EQUAL = 1e-4  # scores of chunks are compared after rounding to multiples of this

# Options.


def kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """The number of key-value heads G; H if None. Raises a ValueError if it does not divide H."""
    if num_kv_heads is None:
        return num_heads
    check_positive(num_kv_heads=num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
    return num_kv_heads


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values (B, G, T, K) -> (B, H, T, K): heads 0 ... H/G - 1 have the first of them, and so on."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def head_norm(head_dim: int, normed: bool) -> nn.Module:
    """RMSNorm over the channels of each head, with weights that all heads share; the identity unless `normed`."""
    return nn.RMSNorm(head_dim, eps=1e-5) if normed else nn.Identity()


# All tokens.


def causal_softmax(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the last axis of (B, H, T, T), restricted to j <= t; entries after t are exactly 0.

    A `sink` (H,) is one more score of every query, whose weight is left out of the result.
    """
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    if sink is None:
        return scores.softmax(-1)
    sinks = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks.to(scores.dtype)), -1).softmax(-1)[..., :-1]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax attention in which the queries q (B, H, T, K) are the last T tokens of k and v: (B, H, T, V).

    k and v may have G heads. A scale of None is 1 / sqrt(K).
    """
    T, past = q.shape[2], k.shape[2] - q.shape[2]
    if T == 1:  # no copy of the cache
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1]))
    k, v = (repeat_heads(part, q.shape[1]) for part in (k, v))
    if not past:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    visible = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """`causal_attention` with a `sink` (H,), one more score of every query that reads nothing.

    Scores are counted from that of the sink, which is then a key of zeros before the others: one more channel of the
    queries holds minus its score, and is 1 in the keys.
    """
    T, K, V = q.shape[2], q.shape[3], v.shape[3]
    q, k, v = (at_least_fp32(part) for part in (q, k, v))
    q = torch.cat((q * K**-0.5, -sink.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)), 3)
    k = F.pad(F.pad(k, (0, 1), value=1.0), (0, 0, 1, 0))
    v = F.pad(v, (0, 1, 1, 0))  # the kernels want equal widths
    if k.shape[2] == T + 1:  # a query of the sink, so that the kernel is causal
        q = F.pad(q, (0, 0, 1, 0))
    return causal_attention(q, k, v, scale=1.0)[:, :, -T:, :V]


# Chunks.


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """`causal_attention` in which a query sees its own chunk only. k and v start with the first token of a chunk."""
    T, past = q.shape[2], k.shape[2] - q.shape[2]
    padded = F.pad(q, (0, 0, past, 0)) if past else q
    q_n, k_n, v_n = (to_chunks(part, min(chunk, past + T)).flatten(0, 1) for part in (padded, k, v))  # (B H, N, C, .)
    mixed = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True)
    return mixed.flatten(1, 2)[:, past : past + T].unflatten(0, q.shape[:2])


def keep_best(scores: Tensor, count: int | None) -> Tensor:
    """Scores (..., N) of chunks, with -inf for all but the `count` greatest of each row; None keeps all.

    Scores are compared after rounding to multiples of 1e-4, and of equal chunks the earlier are kept, so rounding
    errors do not choose among repetitions.
    """
    if count is None or count >= scores.shape[-1]:
        return scores
    order = (scores / EQUAL).round().argsort(dim=-1, descending=True, stable=True)
    return scores.scatter(-1, order[..., count:], -torch.inf)


# A window.


class Sinks(NamedTuple):
    """The first s tokens of a text, which every later query sees beside its window."""

    q: Tensor  # (B, H, T, K), the queries as they meet these keys
    k: Tensor  # (B, H, s, K)
    v: Tensor  # (B, H, s, V)
    start: int  # position of the first query in the text


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: Sinks | None = None) -> Tensor:
    """`causal_attention` in which a query sees its last `window` tokens only, itself included, and the `sinks`.

    Queries are processed in blocks of C <= window. A block sees its own keys and those of the r blocks before it that
    its window touches, so no T x T matrix is formed.
    """
    T, past = q.shape[2], k.shape[2] - q.shape[2]
    if sinks is not None and sinks.start + T <= window:
        sinks = None  # they are in every window
    if window >= past + T and sinks is None:
        return causal_attention(q, k, v)
    C, r = _blocks(window)
    q, k, v = (at_least_fp32(part) for part in (q, k, v))
    far = q[..., :0] if sinks is None else _sink_scores(sinks, window)
    far_v = v[:, :, :0] if sinks is None else at_least_fp32(sinks.v)
    if past and r * C >= T:
        return _banded(q, k, v, past, window, far, far_v)
    past_k, past_v = k[:, :, :past], v[:, :, :past]
    q, k, v, far = (to_chunks(part[:, :, -T:], C) for part in (q, k, v, far))  # (B, H, N, C, .)
    first_q, first_k, first_v, first_far = (part[:, :, :r].flatten(2, 3) for part in (q, k, v, far))
    if past:
        first_k, first_v = torch.cat((past_k, first_k), 2), torch.cat((past_v, first_v), 2)
    first = _banded(first_q, first_k, first_v, past, window, first_far, far_v)
    rest = q.shape[2] - r
    near_k, near_v = (torch.cat([part[:, :, i : i + rest] for i in range(r + 1)], 3) for part in (k, v))
    others = _banded(q[:, :, r:], near_k, near_v, r * C, window, far[:, :, r:], far_v[:, :, None])
    return torch.cat((first, others.flatten(2, 3)), 2)[:, :, :T]


def window_products(num_tokens: int, window: int, num_sinks: int = 0) -> int:
    """How many products of vectors `window_attention` computes: two for a pair of query and key, a score and a read.

    Masked pairs of its blocks are included, and the reads of padding.
    """
    C, r = _blocks(window)
    if window >= num_tokens:
        return num_tokens * (num_tokens + 1)
    rows = -(-num_tokens // C) * C
    return 2 * (r * C) ** 2 + 2 * (rows - r * C) * (r + 1) * C + (num_tokens + rows) * num_sinks


def _blocks(window: int) -> tuple[int, int]:
    """The block size C, and how many blocks before its own a block sees."""
    C = min(64, window)
    return C, -(-(window - 1) // C)


def _sink_scores(sinks: Sinks, window: int) -> Tensor:
    """Scores of the sinks for each query (B, H, T, s), -inf where they are in the window or after the query."""
    q, k = at_least_fp32(sinks.q), at_least_fp32(sinks.k)
    t = torch.arange(sinks.start, sinks.start + q.shape[2], device=q.device)[:, None]
    near = t - torch.arange(k.shape[2], device=q.device) < window
    return (q * q.shape[-1] ** -0.5 @ k.mT).masked_fill(near, -torch.inf)


def _banded(q: Tensor, k: Tensor, v: Tensor, past: int, window: int, far: Tensor, far_v: Tensor) -> Tensor:
    """Window attention of q (..., C, K), whose first query is at the position of key `past`: (..., C, V).

    far (..., C, s) are scores of further tokens, and far_v (..., s, V) the values of these; s may be 0.
    """
    shape, s = (q.shape[-2], k.shape[-2]), far.shape[-1]
    visible = torch.ones(shape, dtype=torch.bool, device=q.device).tril(past).triu(past - window + 1)
    bias = torch.full(shape, -torch.inf, dtype=q.dtype, device=q.device).masked_fill(visible, 0)
    scores = (q * q.shape[-1] ** -0.5 @ k.mT).add_(bias)
    if not s:
        return scores.softmax(-1) @ v
    weights = torch.cat((far, scores), -1).softmax(-1)
    return weights[..., :s] @ far_v + weights[..., s:] @ v


# Chosen chunks.


def chosen_attention(q: Tensor, k: Tensor, v: Tensor, C: int, chosen: Tensor, exists: Tensor) -> Tensor:
    """Attention to the tokens up to the query of its own chunk of C tokens, and to S chosen earlier chunks.

    Args:
        q: (B, H, T, K), the last T tokens of k and v.
        k, v: (B, H, ., K or V).
        C: tokens in a chunk, no more than there are keys.
        chosen: numbers of chunks (B, H, T, S), all different where they exist, and before that of the query.
        exists: bool (B, H, T, S).

    Returns:
        Mixed values (B, H, T, V).
    """
    T, S, past = q.shape[2], chosen.shape[3], k.shape[2] - q.shape[2]
    begun = past % C  # tokens before the queries in the chunk of the first query
    q, k, v = (at_least_fp32(part) for part in (q, k, v))
    scaled = q * q.shape[3] ** -0.5
    own_q = to_chunks(F.pad(scaled, (0, 0, begun, 0)), C)  # (B, H, n, C, K)
    finished, n = k.shape[2] // C, own_q.shape[2]
    k, v = to_chunks(k, C), to_chunks(v, C)  # (B, H, N, C, K)
    future = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    own = (own_q @ k[:, :, -n:].mT).masked_fill(future, -torch.inf).flatten(2, 3)[:, :, begun : begun + T]
    if not S:
        return _read_own(own.softmax(-1), v, n, begun)

    tiles = Tiles(chosen.flatten(2), exists.flatten(2), finished, size=C)
    blocks_k, blocks_v = (part[:, :, :finished].flatten(0, 2) for part in (k, v))  # (B H N, C, K)
    queries = scaled.repeat_interleave(S, 2).flatten(0, 2)  # one of each pair
    scores = tiles.gather(tiles.scatter(queries) @ blocks_k[tiles.block].mT)
    scores = scores.view(*chosen.shape, C).masked_fill(~exists[..., None], -torch.inf)
    weights = torch.cat((own, scores.flatten(3)), 3).softmax(-1)
    reads = tiles.gather(tiles.scatter(weights[..., C:].reshape(-1, C)) @ blocks_v[tiles.block])
    return _read_own(weights[..., :C], v, n, begun) + reads.view(*chosen.shape, -1).sum(3)


def _read_own(weights: Tensor, v: Tensor, n: int, begun: int) -> Tensor:
    """weights (B, H, T, C) in the own chunk; v (B, H, N, C, V), of which the last n overlap the queries."""
    T, C = weights.shape[2:]
    weights = F.pad(weights, (0, 0, begun, n * C - begun - T)).unflatten(2, (n, C))
    return (weights @ v[:, :, -n:]).flatten(2, 3)[:, :, begun : begun + T]


def tokens_seen(x: Tensor, chunk: int, chosen: Tensor, own: int) -> Tensor:
    """Keys or values x (B, H, T, K) that the last token sees: of S chosen chunks (B, H, 1, S), then of its own chunk,
    the one with the number `own` -> (B, H, ., K)."""
    C = min(chunk, x.shape[2])
    tokens = (chosen.mT * C + torch.arange(C, device=x.device)).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return torch.cat((x.gather(2, tokens), x[:, :, own * C :]), 2)


def chosen_products(num_tokens: int, chunk: int, num_chosen: int) -> int:
    """How many products of vectors `chosen_attention` computes of a text whose queries choose S chunks, two for a pair
    of query and key, masked pairs and padding included."""
    C, finished = min(chunk, num_tokens), num_tokens // chunk
    own = -(-num_tokens // C) * C * C
    S = min(num_chosen, finished)
    return 2 * own + 2 * (Tiles.rows(num_tokens * S, finished, C) * C if S else 0)


class Tiles:
    """Pairs of a query and a block, sorted by block into tiles of `size` queries that share a block.

    There is room for every way to choose, so that shapes do not depend on the choice; what is left over is zeros.

    Args:
        block: of each pair, (B, H, P), below N.
        exists: bool (B, H, P); other pairs go to tiles of no block.
        num_blocks: N.
        size: M.
    """

    block: Tensor  # of each tile, counted over all heads, (B H tiles,)

    def __init__(self, block: Tensor, exists: Tensor, num_blocks: int, size: int) -> None:
        heads = block.shape[:2].numel()
        block = block.masked_fill(~exists, num_blocks).flatten(0, 1)  # (B H, P)
        order = block.argsort(dim=-1, stable=True)
        count = torch.zeros(heads, num_blocks + 1, dtype=torch.long, device=block.device)
        count.scatter_add_(1, block, torch.ones_like(block))
        rows = -(-count // size) * size  # of each block
        pairs_before, rows_after = count.cumsum(1) - count, rows.cumsum(1)
        sorted_block = block.gather(1, order)
        rank = torch.arange(block.shape[1], device=block.device) - pairs_before.gather(1, sorted_block)
        self.size, self.total = size, self.rows(block.shape[1], num_blocks, size)
        row = torch.empty_like(block).scatter_(1, order, (rows_after - rows).gather(1, sorted_block) + rank)
        offset = torch.arange(heads, device=block.device)[:, None]
        self.row = (row + offset * self.total).flatten()  # of each pair
        starts = torch.arange(0, self.total, size, device=block.device).expand(heads, -1).contiguous()
        own = torch.searchsorted(rows_after, starts, right=True).clamp(max=num_blocks - 1)
        self.block = (own + offset * num_blocks).flatten()

    @staticmethod
    def rows(pairs: int, num_blocks: int, size: int) -> int:
        """Rows of the tiles of one head: the pairs, and less than one tile more for each block and for no block."""
        return (-(-pairs // size) + num_blocks + 1) * size

    def scatter(self, x: Tensor) -> Tensor:
        """x of each pair (B H P, K) -> (B H tiles, M, K)."""
        rows = x.new_zeros(len(self.block) * self.size, x.shape[1]).index_copy(0, self.row, x)
        return rows.unflatten(0, (-1, self.size))

    def gather(self, x: Tensor) -> Tensor:
        """x (B H tiles, M, K) -> of each pair (B H P, K)."""
        return x.flatten(0, 1).index_select(0, self.row)
