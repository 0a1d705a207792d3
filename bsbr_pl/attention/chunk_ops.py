"""Operators of chunks of 64 tokens for architectures whose state decays, with their gradients: Triton on CUDA.

On a CPU they are plain PyTorch, so that a test can hold the kernels that use them to `mix`. R counts the heads of all
sequences, N their chunks, C the tokens of a chunk. The last axis of a decay has one number for each key channel, or one
for all.
"""

from typing import Any

import torch
from torch import Tensor

from .parts import unit_triangle_inverse


def in_triton(x: Tensor) -> bool:
    """Whether an operator runs in Triton."""
    return x.is_cuda


# States that decay.


@torch.library.custom_op("bsbr_pl::decayed_states", mutates_args=())
def decayed_states(
    x: Tensor, decay: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n S_n + x_n, in fp32.

    Args:
        x: (R, N, K, V), contiguous as all inputs.
        decay: (R, N, K or 1) in fp32.
        start: the first S (R, K, V) in fp32; None for zeros.
        backwards: go from the last chunk to the first.

    Returns:
        S before each chunk (R, N, K, V) in the precision of x, and the last S (R, K, V) in fp32.
    """
    if in_triton(x):
        from . import triton_chunks

        start = None if start is None else start.contiguous()
        return triton_chunks.decayed_states(x.contiguous(), decay.contiguous(), start, backwards)
    before = torch.empty_like(x)
    S = torch.zeros_like(x[:, 0], dtype=torch.float32) if start is None else start
    for n in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        before[:, n] = S
        S = decay[:, n, :, None] * S + x[:, n]
    return before, S.clone()


@decayed_states.register_fake
def _(x: Tensor, decay: Tensor, start: Tensor | None = None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], *x.shape[2:], dtype=torch.float32)


def _decayed_states_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], output[0])
    ctx.has_start = inputs[2] is not None


def _decayed_states_gradient(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    decay, before = ctx.saved_tensors
    after, grad_start = decayed_states(grad.contiguous(), decay, grad_last.float().contiguous(), True)
    return after, _of_decay(after * before.float(), decay), grad_start if ctx.has_start else None, None


def _of_decay(products: Tensor, decay: Tensor) -> Tensor:
    """The gradient of the decay, from products of states and their gradients (R, N, K, V)."""
    by_channel = products.sum(3)
    return by_channel if decay.shape[2] > 1 else by_channel.sum(2, keepdim=True)


decayed_states.register_autograd(_decayed_states_gradient, setup_context=_decayed_states_setup)


# States that decay and are partly replaced.


@torch.library.custom_op("bsbr_pl::replaced_states", mutates_args=())
def replaced_states(
    P: Tensor, X: Tensor, decay: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """S_{n+1} = S_n diag(decay_n) - S_n P_n + X_n, of transposed states, in fp32.

    Args:
        P: (R, N, K, K), contiguous as all inputs.
        X: (R, N, V, K).
        decay: (R, N, K) in fp32.
        start: the first S (R, V, K) in fp32; None for zeros.
        backwards: go from the last chunk to the first.

    Returns:
        S before each chunk (R, N, V, K) in the precision of X, and the last S (R, V, K) in fp32.
    """
    if in_triton(X):
        from . import triton_recurrence

        return triton_recurrence.recurrence(decay.contiguous(), P.contiguous(), X.contiguous(), start, backwards)
    before = torch.empty_like(X)
    S = torch.zeros_like(X[:, 0], dtype=torch.float32) if start is None else start
    for n in reversed(range(X.shape[1])) if backwards else range(X.shape[1]):
        before[:, n] = S
        S = S * decay[:, n, None] - S @ P[:, n].float() + X[:, n]
    return before, S.clone()


@replaced_states.register_fake
def _(
    P: Tensor, X: Tensor, decay: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(X), X.new_empty(X.shape[0], *X.shape[2:], dtype=torch.float32)


def _replaced_states_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], output[0])
    ctx.has_start = inputs[3] is not None


def _replaced_states_gradient(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    P, decay, before = ctx.saved_tensors
    last = grad_last.float().contiguous()
    after, grad_start = replaced_states(P.mT.contiguous(), grad.contiguous(), decay, last, True)
    of_decay = (before.float() * after).sum(2)
    return -(before.mT @ after), after, of_decay, grad_start if ctx.has_start else None, None


replaced_states.register_autograd(_replaced_states_gradient, setup_context=_replaced_states_setup)


# Within a chunk.


@torch.library.custom_op("bsbr_pl::decayed_products", mutates_args=())
def decayed_products(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """A_ts = sum_i q_ti k_si exp(g_ti - g_si) for s <= t, else 0, within chunks.

    Args:
        q: (J, R, C, K), J queries of each token, contiguous as all inputs.
        k: (R, C, K), R chunks.
        g: sums of log decays from the start of the chunk, this token included, (R, C, K) in fp32: never increasing.

    Returns:
        A (J, R, C, C) in the precision of q.
    """
    if in_triton(q):
        from . import triton_chunks

        return triton_chunks.decayed_products(q, k, g)
    return torch.einsum("jrtk,rsk,rtsk->jrts", q.float(), k.float(), _decays(g)).to(q.dtype).contiguous()


def _decays(g: Tensor) -> Tensor:
    """(R, C, K) -> exp(g_t - g_s) (R, C, C, K), 0 if s > t."""
    past = torch.ones(g.shape[1], g.shape[1], dtype=g.dtype, device=g.device).tril()
    return (g[:, :, None] - g[:, None]).clamp(max=0).exp() * past[..., None]


@decayed_products.register_fake
def _(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], q.shape[2])


@torch.library.custom_op("bsbr_pl::decayed_products_backward", mutates_args=())
def decayed_products_backward(grad: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and g. As A_ts depends on g_t - g_s alone, dg_t = q_t * dq_t - k_t * dk_t."""
    if in_triton(q):
        from . import triton_chunks

        return triton_chunks.decayed_products_backward(grad, q, k, g)
    dq = torch.einsum("jrts,rsk,rtsk->jrtk", grad.float(), k.float(), _decays(g))
    dk = torch.einsum("jrts,jrtk,rtsk->rsk", grad.float(), q.float(), _decays(g))
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), ((q * dq).sum(0) - k * dk).contiguous()


@decayed_products_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)


def _decayed_products_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decayed_products_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return decayed_products_backward(grad.contiguous(), *ctx.saved_tensors)


decayed_products.register_autograd(_decayed_products_gradient, setup_context=_decayed_products_setup)


@torch.library.custom_op("bsbr_pl::triangle_inverse", mutates_args=())
def triangle_inverse(lower: Tensor) -> Tensor:
    """(I + tril(L, -1))^-1 of L (R, C, C), contiguous, computed in fp32; in the precision of L."""
    if in_triton(lower):
        from . import triton_chunks

        return triton_chunks.triangle_inverse(lower)
    return unit_triangle_inverse(lower.float()).to(lower.dtype).contiguous()


@triangle_inverse.register_fake
def _(lower: Tensor) -> Tensor:
    return torch.empty_like(lower)


def _triangle_inverse_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _triangle_inverse_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    return -(inverse.mT @ grad @ inverse.mT).tril(-1)


triangle_inverse.register_autograd(_triangle_inverse_gradient, setup_context=_triangle_inverse_setup)
