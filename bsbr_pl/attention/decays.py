"""Decays over several tokens, for the architectures whose state decays.

A decay over several tokens is the product of their decays alpha, each at most 1. No decay is divided by another one, so
nothing overflows, and a factor that underflows is too small to matter. No sum of logs is subtracted from another one
either: in fp32, one fast decay would then cost the precision of all slow decays after it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def decay_map(log_alpha: Tensor) -> Tensor:
    """The definition: log alpha (..., T, K) -> alpha_{s+1} ... alpha_t (..., T, T, K), from s to t, 0 if s > t."""
    T = log_alpha.shape[-2]
    causal = torch.ones(T, T, dtype=log_alpha.dtype, device=log_alpha.device).tril()
    sums = (log_alpha[..., None, :] * causal.tril(-1)[..., None]).cumsum(-3)  # [t, s]: over s + 1, ..., t
    return sums.exp() * causal[..., None]


def decayed_sum(x: Tensor, decay: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_n = decay_n S_{n-1} + x_n over the chunks: S before each chunk (B, H, N, K, V), and the last S (B, H, K, V).

    Args:
        x: (B, H, N, K, V).
        decay: of each chunk, (B, H, N, K or 1, 1).
        start: S before the first chunk (B, H, K, V); zeros if None.
    """
    S_before, S = [], torch.zeros_like(x[:, :, 0]) if start is None else start
    for x_n, decay_n in zip(x.unbind(2), decay.unbind(2), strict=True):
        S_before.append(S)
        S = decay_n * S + x_n
    return torch.stack(S_before, 2), S


def decays(log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decays within a chunk, of log alpha (..., C, 1), C a power of two.

    Returns:
        From s to t (..., C, C), 0 if s > t; from the start of the chunk to t, t included, and from t, not included, to
        the end of the chunk, (..., C, 1) each.
    """
    ones = torch.ones_like(log_alpha)
    (G,), from_start, to_end = decayed_products(ones[..., None], ones, log_alpha)  # q = k = 1: A is the decay
    return G, from_start, to_end


def decayed_products(q: Tensor, k: Tensor, log_alpha: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Products of queries and keys within a chunk, each channel decaying at its own rate from key to query.

        A_ts = sum_i q_ti k_si alpha_{s+1,i} ... alpha_{t,i}   for s <= t, else 0

    Blocks of 2, 4, ..., C tokens are halved in turn. From a key in the first half to a query in the second half, the
    key decays up to the border between the halves, and the query from there on; so A between the halves is a product of
    two matrices. Every pair s < t is in different halves of exactly one block.

    Args:
        q: R queries of each token, (..., C, R, K), C a power of two.
        k: (..., C, K).
        log_alpha: (..., C, K), not positive.

    Returns:
        A of each of the R queries, (..., C, C); the decays from the start of the chunk to t, t included, and from t,
        not included, to the end of the chunk, (..., C, K) each.
    """
    A, from_start, to_end = DecayedProducts.apply(q, k.unsqueeze(-2), log_alpha.unsqueeze(-2))
    return A.unbind(-2), from_start.squeeze(-2), to_end.squeeze(-2)


class DecayedProducts(torch.autograd.Function):
    """`decayed_products`: q (..., C, R, K), k and log alpha (..., C, 1, K) -> A (..., C, R, C), decays (..., C, 1, K).

    The gradients are those of autograd, without its copies. With g_t the sum of log alpha from the start to t, A_ts
    depends on g_t - g_s alone, so that dg_t = q_t * dq_t - k_t * dk_t.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, log_alpha)
        from_start, to_end = log_alpha.exp(), torch.ones_like(log_alpha)
        A = q.new_zeros(*q.shape[:-1], q.shape[-3])
        _diagonal(A).copy_((q * k).sum(-1))
        for h, to_query, from_key in _halvings(from_start, to_end):
            q_h, k_h = _halves(q, h)[1] * to_query, _halves(k, h)[0] * from_key
            _between_halves(A, h).copy_((_rows(q_h) @ _rows(k_h).mT).reshape(*q_h.shape[:-1], h))
        return A, from_start, to_end

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dA: Tensor, d_from_start: Tensor, d_to_end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, log_alpha = ctx.saved_tensors
        from_start, to_end = log_alpha.exp(), torch.ones_like(log_alpha)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for h, to_query, from_key in _halvings(from_start, to_end):
            q_h, k_h = _halves(q, h)[1] * to_query, _halves(k, h)[0] * from_key
            dA_h = _rows(_between_halves(dA, h))
            _halves(dq, h)[1].addcmul_((dA_h @ _rows(k_h)).reshape(q_h.shape), to_query)
            _halves(dk, h)[0].addcmul_((dA_h.mT @ _rows(q_h)).reshape(k_h.shape), from_key)
        after = to_end * d_to_end  # to_end_t depends on g_C - g_t
        dg = (q * dq).sum(-2, keepdim=True) - k * dk + from_start * d_from_start - after
        dg[..., -1, :, :] += after.sum(-3)
        d_log_alpha = dg.flip(-3).cumsum(-3).flip(-3)
        own = _diagonal(dA)[..., None]
        return dq + own * k, dk + (own * q).sum(-2, keepdim=True), d_log_alpha


def _halvings(from_start: Tensor, to_end: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For blocks of 2, 4, ..., C tokens: their half h, the decays from the border to each token of the second half, and
    from each token of the first half to the border, (..., C / 2h, h, 1, K).

    `from_start` and `to_end` are those of blocks of one token; in the end they are those of the chunk.
    """
    h = 1
    while h < from_start.shape[-3]:
        (from_start_1, from_start_2), (to_end_1, _) = _halves(from_start, h), _halves(to_end, h)
        yield h, from_start_2, to_end_1
        to_end_1 *= from_start_2[..., -1:, :, :]
        from_start_2 *= from_start_1[..., -1:, :, :]
        h *= 2


def _halves(x: Tensor, h: int) -> tuple[Tensor, ...]:
    """The two halves of every block of 2h tokens: (..., C, R, K) -> (..., C / 2h, h, R, K) each, views of x."""
    return x.unflatten(-3, (-1, 2, h)).unbind(-4)


def _between_halves(A: Tensor, h: int) -> Tensor:
    """Queries in the second half by keys in the first half of every block of 2h: (..., C / 2h, h, R, h), a view."""
    queries = A.unflatten(-3, (-1, 2, h)).select(-4, 1)  # (..., C / 2h, h, R, C)
    return queries.unflatten(-1, (-1, 2, h)).select(-2, 0).diagonal(0, -5, -2).movedim(-1, -4)


def _diagonal(A: Tensor) -> Tensor:
    """Queries by the key of their own token: (..., C, R), a view of A (..., C, R, C)."""
    return A.diagonal(0, -3, -1).mT


def _rows(x: Tensor) -> Tensor:
    """(..., h, R, K) -> (..., h R, K)."""
    return x.flatten(-3, -2)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (int(number) - 1).bit_length()  # int: a tracer makes tensors of sizes
