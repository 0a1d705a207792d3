"""Operators of chunks of 64 tokens for architectures whose state decays, with their gradients: Triton on CUDA.

On a CPU they are plain PyTorch, so that a test can hold the kernels that use them to `mix`. R is the number of heads of
all sequences, N of chunks of a head, M of chunks of all heads, C of tokens in a chunk. Decays are (..., K), or (..., 1)
if all channels share one.
"""

from typing import Any

import torch
from torch import Tensor

from .parts import unit_triangle_inverse


def in_triton(x: Tensor) -> bool:
    """Whether an operator runs in Triton."""
    return x.is_cuda


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# States that decay.


@torch.library.custom_op("bsbr_pl::decayed_states", mutates_args=())
def decayed_states(
    x: Tensor, decay: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n S_n + x_n, in fp32.

    With dS_n the gradient of S_n and y_n that of result n, dS_n = decay_n dS_{n+1} + y_n: the same recurrence in the
    other direction. The gradient of x_n is dS_{n+1}, that of decay_n is S_n * dS_{n+1}, summed over V.

    Args:
        x: (R, N, K, V).
        decay: (R, N, K or 1) in fp32.
        start: the first S (R, K, V) in fp32; None for zeros.
        backwards: go from the last chunk to the first.

    Returns:
        S before each chunk (R, N, K, V) in the precision of x, and the last S (R, K, V) in fp32.
    """
    if in_triton(x):
        from . import triton_chunks

        return triton_chunks.decayed_states(x.contiguous(), decay.contiguous(), _contiguous(start), backwards)
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
    ctx.has_start, ctx.backwards = inputs[2] is not None, inputs[3]


def _decayed_states_gradient(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    decay, before = ctx.saved_tensors
    after, grad_start = decayed_states(grad, decay, grad_last.float(), not ctx.backwards)
    grad_decay = None
    if ctx.needs_input_grad[1]:
        grad_decay = (before.float() * after).sum(3).sum_to_size(*decay.shape)
    return after, grad_decay, grad_start if ctx.has_start else None, None


decayed_states.register_autograd(_decayed_states_gradient, setup_context=_decayed_states_setup)


# States that decay and are partly replaced.


@torch.library.custom_op("bsbr_pl::replaced_states", mutates_args=())
def replaced_states(
    P: Tensor, X: Tensor, decay: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """S_{n+1} = S_n diag(decay_n) - S_n P_n + X_n, of transposed states, in fp32.

    The gradients are as those of `decayed_states`: dS_n = dS_{n+1} diag(decay_n) - dS_{n+1} P_n^T + y_n; that of X_n is
    dS_{n+1}, that of P_n is -S_n^T dS_{n+1}, that of decay_n is S_n * dS_{n+1}, summed over V.

    Args:
        P: (R, N, K, K).
        X: (R, N, V, K).
        decay: (R, N, K) in fp32.
        start: the first S (R, V, K) in fp32; None for zeros.
        backwards: go from the last chunk to the first.

    Returns:
        S before each chunk (R, N, V, K) in the precision of X, and the last S (R, V, K) in fp32.
    """
    if in_triton(X):
        from . import triton_recurrence

        decay, P, X = (part.contiguous() for part in (decay, P, X))
        return triton_recurrence.recurrence(decay, P, X, _contiguous(start), backwards)
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
    ctx.has_start, ctx.backwards = inputs[3] is not None, inputs[4]


def _replaced_states_gradient(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    P, decay, before = ctx.saved_tensors
    after, grad_start = replaced_states(P.mT, grad, decay, grad_last.float(), not ctx.backwards)
    grad_decay = (before.float() * after).sum(2)
    return -(before.mT @ after), after, grad_decay, grad_start if ctx.has_start else None, None


replaced_states.register_autograd(_replaced_states_gradient, setup_context=_replaced_states_setup)


# Within a chunk.


@torch.library.custom_op("bsbr_pl::decayed_scores", mutates_args=())
def decayed_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """A_ts = sum_i q_ti k_si exp(g_ti - g_si) for s <= t, else 0, within chunks.

    Args:
        q: (J, M, C, K), J queries of each token.
        k: (M, C, K).
        g: sums of log decays from the start of the chunk, this token included, (M, C, K) in fp32: never increasing.

    Returns:
        A (J, M, C, C) in the precision of q.
    """
    if in_triton(q):
        from . import triton_chunks

        return triton_chunks.decayed_scores(q.contiguous(), k.contiguous(), g.contiguous())
    return torch.einsum("jmtk,msk,mtsk->jmts", q.float(), k.float(), _decays(g)).to(q.dtype).contiguous()


def _decays(g: Tensor) -> Tensor:
    """(M, C, K) -> exp(g_t - g_s) (M, C, C, K), 0 if s > t."""
    past = torch.ones(g.shape[1], g.shape[1], dtype=g.dtype, device=g.device).tril()
    return (g[:, :, None] - g[:, None]).clamp(max=0).exp() * past[..., None]


@decayed_scores.register_fake
def _(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], q.shape[2])


@torch.library.custom_op("bsbr_pl::decayed_scores_backward", mutates_args=())
def decayed_scores_backward(grad: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and g. As A_ts depends on g_t - g_s alone, dg_t = q_t * dq_t - k_t * dk_t."""
    if in_triton(q):
        from . import triton_chunks

        return triton_chunks.decayed_scores_backward(*(part.contiguous() for part in (grad, q, k, g)))
    dq = torch.einsum("jmts,msk,mtsk->jmtk", grad.float(), k.float(), _decays(g))
    dk = torch.einsum("jmts,jmtk,mtsk->msk", grad.float(), q.float(), _decays(g))
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), ((q * dq).sum(0) - k * dk).contiguous()


@decayed_scores_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)


def _decayed_scores_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decayed_scores_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return decayed_scores_backward(grad, *ctx.saved_tensors)


decayed_scores.register_autograd(_decayed_scores_gradient, setup_context=_decayed_scores_setup)


@torch.library.custom_op("bsbr_pl::triangle_inverse", mutates_args=())
def triangle_inverse(lower: Tensor) -> Tensor:
    """(I + tril(L, -1))^-1 of L (M, C, C), computed in fp32; in the precision of L."""
    if in_triton(lower):
        from . import triton_chunks

        return triton_chunks.triangle_inverse(lower.contiguous())
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
