"""`softmax.chosen_attention` by FlashAttention, as an operator that torch.compile does not trace into.

A query attends to its own chunk and to S chosen chunks. Each of these S + 1 parts i is softmax attention for itself,
with output o_i and log-sum-exp l_i of its scores. Together they are the softmax over the tokens of all parts:

    l = log sum_i exp(l_i) ;   o = sum_i exp(l_i - l) o_i

The gradient of a part is FlashAttention's, given o and l instead of o_i and l_i: it computes the weights exp(score - l)
again, which are now those of the whole softmax, and subtracts do . o of the whole output.

FlashAttention takes packed sequences, here of one head: rows (rows, 1, K), and the borders between sequences. A chunk
of a batch entry and head is a sequence of keys. Its queries are those of the same chunk, or the pairs (query, chosen
chunk) that chose it, which are sorted by chunk for this. Pairs that do not exist come last and belong to no sequence.
FlashAttention does not write their rows, so these hold anything, and are replaced before use.

Source: Lu et al. 2025, arXiv 2502.13189, algorithm 1.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

SEQUENCES = 65_535  # in one call, which CUDA allows at most

# FlashAttention.


class Packed(NamedTuple):
    """Packed sequences: number i has the rows borders[i] ... borders[i + 1] - 1."""

    borders_q: Tensor  # int32 (sequences + 1,)
    borders_k: Tensor  # int32 (sequences + 1,)
    max_q: int  # no sequence has more queries
    max_k: int  # no sequence has more keys
    causal: bool


def _forward(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences: q, k, v (rows, 1, K) -> output like q, and log-sum-exp (1, rows) in fp32."""
    return aten._flash_attention_forward(q, k, v, *packed[:4], 0.0, packed.causal, False)[:2]


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of `_forward`, given that of the output, the output and the log-sum-exp."""
    random = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # there is no dropout
    return aten._flash_attention_backward(grad, q, k, v, out, lse, *packed[:4], 0.0, packed.causal, *random)


# Rows, pairs and sequences.


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, K) -> (B H T, 1, K), contiguous."""
    return x.contiguous().view(-1, 1, x.shape[3])


def _sort_pairs(chosen: Tensor, exists: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Numbers of chunks (B, H, T, S), and whether they exist -> the order of the pairs by their chunk, those that do
    not exist last (B H T S,), and the borders between the N chunks of all heads, int32 (B H N + 1,).

    Pair number p is one of query p // S.
    """
    heads, total = chosen.shape[:2], chosen.shape[:2].numel() * num_chunks
    first = torch.arange(0, total, num_chunks, device=chosen.device).view(*heads, 1, 1)
    block, order = (chosen + first).masked_fill(~exists, total).int().flatten().sort(stable=True)
    numbers = torch.arange(total + 1, dtype=torch.int32, device=chosen.device)
    return order, torch.searchsorted(block, numbers, out_int32=True)


def _sequences(q: Tensor, borders: Tensor, C: int) -> tuple[Packed, Packed]:
    """The sequences of the own chunks of q (B, H, T, K), and those of the pairs with these `borders`.

    The last chunk of a head may be unfinished. No pair chooses it.
    """
    heads, T = q.shape[:2].numel(), q.shape[2]
    starts = torch.arange(heads, device=q.device)[:, None] * T + torch.arange(0, T, C, device=q.device)
    own = F.pad(starts.flatten(), (0, 1), value=heads * T).int()
    return Packed(own, own, C, C, True), Packed(borders, own, T, C, False)


def _by_query(x: Tensor, order: Tensor, exists: Tensor, other: float) -> Tensor:
    """x (B H T S, K) of the sorted pairs -> (B H T, S, K), with `other` for pairs that do not exist."""
    x = torch.empty_like(x).index_copy_(0, order, x)
    return x.masked_fill_(~exists.reshape(-1, 1), other).unflatten(0, (-1, exists.shape[3]))


# The operator.


@torch.library.custom_op("bsbr_pl::chosen_chunks", mutates_args=())
def chosen_chunks(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, exists: Tensor, C: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention to the tokens up to the query of its own chunk of C tokens, and to S chosen earlier chunks.

    Args:
        q, k, v: (B, H, T, K) from the first token on, on CUDA in fp16 or bf16, of at most `SEQUENCES` chunks B H N.
        chosen: numbers of chunks (B, H, T, S), all different where they exist, and before that of the query.
        exists: bool (B, H, T, S).
        C: tokens in a chunk, at most T.

    Returns:
        Mixed values (B, H, T, K) in the precision of q; and for the gradient, the log-sum-exp of all scores of a query
        (1, B H T) in fp32, and the order and the borders of the pairs, as of `_sort_pairs`.
    """
    (T, K), S = q.shape[2:], chosen.shape[3]
    order, borders = _sort_pairs(chosen, exists, -(-T // C))
    own_chunks, pairs = _sequences(q, borders, C)
    rows_q, rows_k, rows_v = _rows(q), _rows(k), _rows(v)
    own, own_lse = _forward(rows_q, rows_k, rows_v, own_chunks)
    if not S:
        return own.view(q.shape), own_lse, order, borders

    read, read_lse = _forward(rows_q.index_select(0, order // S), rows_k, rows_v, pairs)
    reads = _by_query(read.view(-1, K), order, exists, 0.0)
    lses = torch.cat((own_lse.view(-1, 1, 1), _by_query(read_lse.view(-1, 1), order, exists, -torch.inf)), 1)
    lse = lses.logsumexp(1, keepdim=True)
    weights = (lses - lse).exp()  # (B H T, 1 + S, 1)
    mixed = weights[:, 0] * own.view(-1, K)
    for s in range(S):  # the sum over S in one step would need S tensors in fp32
        mixed += weights[:, 1 + s] * reads[:, s]
    return mixed.to(q.dtype).view(q.shape), lse.view(1, -1), order, borders


@chosen_chunks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, exists: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, T = q.shape[0] * q.shape[1], q.shape[2]
    lse = q.new_empty(1, heads * T, dtype=torch.float32)
    order = chosen.new_empty(chosen.numel(), dtype=torch.long)
    borders = chosen.new_empty(heads * -(-T // C) + 1, dtype=torch.int32)
    return q.new_empty(q.shape), lse, order, borders


@torch.library.custom_op("bsbr_pl::chosen_chunks_backward", mutates_args=())
def chosen_chunks_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exists: Tensor,
    mixed: Tensor,
    lse: Tensor,
    order: Tensor,
    borders: Tensor,
    C: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the mixed values, given what `chosen_chunks` returned."""
    K, S = q.shape[3], exists.shape[3]
    own_chunks, pairs = _sequences(q, borders, C)
    rows_g, rows_q, rows_k, rows_v, rows_o = (_rows(part) for part in (grad, q, k, v, mixed))
    dq, dk, dv = _backward(rows_g, rows_q, rows_k, rows_v, rows_o, lse, own_chunks)
    if S:
        query = order // S
        pair_g, pair_q, pair_o = (part.index_select(0, query) for part in (rows_g, rows_q, rows_o))
        pair_lse = lse.index_select(1, query)
        read_dq, read_dk, read_dv = _backward(pair_g, pair_q, rows_k, rows_v, pair_o, pair_lse, pairs)
        over_pairs = _by_query(read_dq.view(-1, K), order, exists, 0.0).sum(1, dtype=torch.float32)
        dq, dk, dv = (dq.view(-1, K) + over_pairs).to(q.dtype), dk + read_dk, dv + read_dv
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@chosen_chunks_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, exists, ctx.C = inputs
    ctx.save_for_backward(q, k, v, exists, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *chosen_chunks_backward(grad, *ctx.saved_tensors, ctx.C), None, None, None


chosen_chunks.register_autograd(_gradient, setup_context=_setup)
