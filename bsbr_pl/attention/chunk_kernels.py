"""The forms for CUDA in bf16 of architectures whose state decays: batched products, and the operators of `chunk_ops`.

A kernel takes `low`, the precision of its products, and then the arguments of the `mix` that it replaces; it returns
what `mix` does. The formulas are those of the architecture's file, with chunks of C = 64 tokens. g is the sum of log
decays from the start of the chunk, this token included. All sums and decays are fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunk_ops
from .kernels import CHUNK, LEAST, gated_delta_rule_kernel, plus_product
from .parts import lower_triangle, to_chunks


def log_decays(log_alpha: Tensor) -> Tensor:
    """g of log alpha (B, H, T, K or 1): (B, H, N, C, K or 1)."""
    return to_chunks(log_alpha.float().clamp(min=LEAST), CHUNK).cumsum(3)


# A sum that decays.


def mamba2_kernel(
    low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`Mamba2Attention.mix`, with dt v as v."""
    T = v.shape[2]
    q, k, v = (to_chunks(part.to(low), CHUNK) for part in (q, k, v))  # (B, H or 1, N, C, .)
    g = log_decays(log_alpha)  # (B, H, N, C, 1)
    G = (g - g.mT).clamp(max=0).exp() * lower_triangle(CHUNK, like=g)
    mixed, S = through_chunks(((q @ k.mT) * G).to(low), q, k, v, g, S)
    return mixed[:, :, :T], S


def retnet_kernel(
    log_gamma: Tensor, low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`RetNetAttention.mix`, given log gamma (H,): Mamba-2's with a fixed decay."""
    log_alpha = log_gamma.float()[None, :, None, None].expand(1, -1, q.shape[2], 1)
    return mamba2_kernel(low, q, k, v, log_alpha, S)


def gla_kernel(
    low: torch.dtype, q: Tensor, k: Tensor, log_alpha: Tensor, v: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`GLAAttention.mix`."""
    T = v.shape[2]
    q, k, v = (to_chunks(part.to(low), CHUNK) for part in (q, k, v))  # (B, H, N, C, .)
    g = log_decays(log_alpha)  # (B, H, N, C, K)
    mixed, S = through_chunks(decayed_scores(q[None], k, g)[0], q, k, v, g, S)
    return mixed[:, :, :T], S


def through_chunks(
    scores: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """O = scores V + (exp(g) Q) S ; S <- diag(exp(g_C)) S + (exp(g_C - g) K)^T V, for all chunks.

    Args:
        scores: (B, H, N, C, C).
        q, k, v: (B, H or 1, N, C, .).
        g: (B, H, N, C, K or 1); B may be 1.
        S: before the first chunk (B, H, K, V); zeros if None.

    Returns:
        O (B, H, N C, V); S after the last chunk.
    """
    end = g[..., -1:, :]
    added = (k * (end - g).exp()).to(v.dtype).mT @ v  # (B, H, N, K, V)
    B, H, N, K, V = added.shape
    decay = end.exp().expand(B, -1, -1, -1, -1).reshape(B * H, N, -1)
    start = None if S is None else S.float().reshape(B * H, K, V)
    before, last = chunk_ops.decayed_states(added.flatten(0, 1), decay, start)
    mixed = plus_product(scores @ v, (q * g.exp()).to(v.dtype), before.unflatten(0, (B, H)))
    return mixed.flatten(2, 3), last.unflatten(0, (B, H))


def decayed_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """`chunk_ops.decayed_scores` of q (J, B, H, N, C, K), k and g (B, H, N, C, K): (J, B, H, N, C, C)."""
    return chunk_ops.decayed_scores(q.flatten(1, 3), k.flatten(0, 2), g.flatten(0, 2)).unflatten(1, k.shape[:3])


# Delta rules.


def kda_kernel(
    low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`KDAAttention.mix`.

    With K_end = exp(g_C - g) K, U = written - erased S, so that S <- diag(exp(g_C)) S - P S + X with P = K_end^T erased
    and X = K_end^T written.
    """
    T = v.shape[2]
    k_beta, v_beta = beta * k, beta * v
    q, k, k_beta, v_beta = (to_chunks(part.to(low), CHUNK) for part in (q, k, k_beta, v_beta))  # (B, H, N, C, .)
    g = log_decays(log_alpha)
    qk, kk = decayed_scores(torch.stack((q, k_beta)), k, g)
    inverses = inverse_of(kk)
    erased, written = inverses @ (k_beta * g.exp()).to(low), inverses @ v_beta
    k_end = (k * (g[..., -1:, :] - g).exp()).to(low)
    before, S = replaced_states(erased.mT @ k_end, written.mT @ k_end, g, S)
    U = plus_product(written, erased, before, -1)
    mixed = plus_product(qk @ U, (q * g.exp()).to(low), before)
    return mixed.flatten(2, 3)[:, :, :T], S


def rwkv7_kernel(
    low: torch.dtype,
    r: Tensor,
    log_w: Tensor,
    kappa: Tensor,
    removed: Tensor,
    p: Tensor,
    v: Tensor,
    S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`RWKV7Attention.mix`. No exp(-g) is above exp(0.61 C) = e^39, which bf16 holds and fp16 does not.

    U = found + reading S, so that S <- diag(exp(g_C)) S - P S + X with P = removed_end^T reading and
    X = p_end^T V - removed_end^T found.
    """
    T = v.shape[2]
    log_w = to_chunks(log_w.float(), CHUNK)  # (B, H, N, C, K)
    g = log_w.cumsum(3)
    r, kappa, removed, p, v = (to_chunks(part.to(low), CHUNK) for part in (r, kappa, removed, p, v))
    r_start, kappa_start = (r * g.exp()).to(low), (kappa * (g - log_w).exp()).to(low)
    growth, end = (-g).exp(), g[..., -1:, :]
    keys = torch.cat((p * growth, removed * growth), 3).to(low)
    products = torch.cat((r_start, kappa_start), 3) @ keys.mT  # (B, H, N, 2C, 2C)
    (r_p, r_a), (kappa_p, kappa_a) = (part.chunk(2, -1) for part in products.chunk(2, -2))
    triangle = lower_triangle(CHUNK, like=v)
    inverses = inverse_of(kappa_a)
    found = inverses @ ((kappa_p * triangle.tril(-1)) @ v)
    reading = inverses @ kappa_start
    to_end = (end - g).exp()
    p_end, removed_end = (p * to_end).to(low), (removed * to_end).to(low)
    X = plus_product(v.mT @ p_end, found.mT, removed_end, -1)
    before, S = replaced_states(reading.mT @ removed_end, X, g, S)
    U = plus_product(found, reading, before)
    mixed = plus_product((r_p * triangle) @ v, r_start, before)
    mixed = plus_product(mixed, r_a * triangle, U, -1)
    return mixed.flatten(2, 3)[:, :, :T], S


def replaced_states(P: Tensor, X: Tensor, g: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
    """S before each chunk (B, H, N, K, V) and after the last (B, H, K, V), by `chunk_ops.replaced_states`.

    Args:
        P: (B, H, N, K, K).
        X: (B, H, N, V, K).
        g: (B, H, N, C, K).
        S: before the first chunk (B, H, K, V); zeros if None.
    """
    heads = P.shape[:2]
    start = None if S is None else S.float().mT.flatten(0, 1)
    decay = g[..., -1, :].exp().flatten(0, 1)
    before, last = chunk_ops.replaced_states(P.flatten(0, 1), X.flatten(0, 1), decay, start)
    return before.mT.unflatten(0, heads), last.mT.unflatten(0, heads)


def inverse_of(lower: Tensor) -> Tensor:
    """`chunk_ops.triangle_inverse` of (B, H, N, C, C)."""
    return chunk_ops.triangle_inverse(lower.flatten(0, 2)).unflatten(0, lower.shape[:3])


def gated_delta_product_kernel(
    low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`GatedDeltaProductAttention.mix`, as the gated delta rule over n rows a token: the state decays before the first
    row, and is read after the last."""
    n = k.shape[3]
    q = F.pad(q[:, :, :, None], (0, 0, n - 1, 0)).flatten(2, 3)  # (B, H, T n, K)
    log_alpha = F.pad(log_alpha, (0, n - 1)).flatten(2)[..., None]  # (B, H, T n, 1)
    k, v, beta = (part.flatten(2, 3) for part in (k, v, beta))
    mixed, S = gated_delta_rule_kernel(low, q, k, v, beta, log_alpha, S)
    return mixed[:, :, n - 1 :: n], S
