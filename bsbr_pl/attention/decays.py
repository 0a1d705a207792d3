"""Sums and products of what decays on the way, for the architectures whose memory forgets.

Decays are multiplied by adding their logs, and no difference of such sums is taken: every exponent is a sum of log
decays, none positive. So nothing overflows, and a product that underflows is 0 to the precision of its neighbours.
"""

import torch
from torch import Tensor


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


def decayed_products(q: Tensor, k: Tensor, log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of queries and keys in which every channel decays by itself on the way from key to query.

        A_ts = sum_k q_tk k_sk alpha_{s+1,k} ... alpha_{t,k}   for s <= t, else 0

    A is computed by halves. From a key of the first half to a query of the second half, the key decays up to the border
    between them and the query from there on, so this quarter of A is one product of matrices. The quarters on the
    diagonal are the same problem at half the size.

    Args:
        q: (..., C, K), C a power of two.
        k: (..., C, K).
        log_alpha: (..., C, K), not positive.

    Returns:
        A (..., C, C); the sums of log alpha up to token t, and after token t, (..., C, K) each.
    """
    if q.shape[-2] == 1:
        return (q * k).sum(-1, keepdim=True), log_alpha, torch.zeros_like(log_alpha)
    q, k, log_alpha = (part.unflatten(-2, (2, -1)) for part in (q, k, log_alpha))
    quarters, up_to, after = (part.unbind(-3) for part in decayed_products(q, k, log_alpha))
    lower = (q.select(-3, 1) * up_to[1].exp()) @ (k.select(-3, 0) * after[0].exp()).mT
    upper_rows = torch.cat((quarters[0], torch.zeros_like(lower)), -1)
    A = torch.cat((upper_rows, torch.cat((lower, quarters[1]), -1)), -2)
    up_to_t = torch.cat((up_to[0], up_to[0][..., -1:, :] + up_to[1]), -2)
    after_t = torch.cat((after[0] + up_to[1][..., -1:, :], after[1]), -2)
    return A, up_to_t, after_t


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
