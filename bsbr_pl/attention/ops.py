"""Operations that torch.compile must not look into: a Triton kernel on CUDA, plain torch elsewhere, and a gradient.

Beside them a table of sines, which a compiled kernel would otherwise compute anew for every head.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("bsbr_pl::turns", mutates_args=())
def turns(position: Tensor, width: int) -> Tensor:
    """For rotary positions of `width` K at (T,): (2, T, K), cosines, and sines whose even ones are negative."""
    angle = position[:, None] * 10_000 ** (
        -torch.arange(0, width, 2, device=position.device, dtype=position.dtype) / width
    )
    sine = angle.sin()
    return torch.stack((angle.cos().repeat_interleave(2, 1), torch.stack((-sine, sine), 2).flatten(1)))


@turns.register_fake
def _(position: Tensor, width: int) -> Tensor:
    return position.new_empty(2, position.shape[0], width)


@torch.library.custom_op("bsbr_pl::unit_triangle_inverse", mutates_args=())
def unit_triangle_inverse(lower: Tensor) -> Tensor:
    """`base.unit_triangle_inverse` in the precision of `lower`, computed in fp32."""
    if lower.is_cuda:
        from . import triton_kernels

        return triton_kernels.unit_triangle_inverse(lower.contiguous())
    identity = torch.eye(lower.shape[-1], device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower.float(), identity, upper=False, unitriangular=True)
    return inverse.to(lower.dtype).contiguous()


@unit_triangle_inverse.register_fake
def _(lower: Tensor) -> Tensor:
    return lower.new_empty(lower.shape)


def _keep_inverse(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _inverse_backward(ctx: Any, grad: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    return -(inverse.mT @ grad @ inverse.mT).tril(-1)


unit_triangle_inverse.register_autograd(_inverse_backward, setup_context=_keep_inverse)


@torch.library.custom_op("bsbr_pl::chunk_recurrence", mutates_args=())
def chunk_recurrence(
    decay: Tensor, P: Tensor, X: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n S_n - P_n S_n + X_n: decay (R, N), P (R, N, K, K), X (R, N, K, V) -> every S_n before its
    chunk (R, N, K, V), and the last (R, K, V) in fp32. S is fp32, and starts at 0 where there is no `start`.

    `backwards` goes from the last chunk to the first by P^T.
    """
    if X.is_cuda:
        from . import triton_kernels

        parts = (part.contiguous() for part in (decay, P, X))
        return triton_kernels.recurrence(*parts, None if start is None else start.contiguous(), backwards)
    P = P.mT if backwards else P
    S = X.new_zeros(X.shape[0], *X.shape[2:], dtype=torch.float32) if start is None else start.clone()
    states: list[Any] = [None] * X.shape[1]
    for n in reversed(range(X.shape[1])) if backwards else range(X.shape[1]):
        states[n] = S.to(X.dtype)
        S = decay[:, n, None, None] * S - P[:, n].float() @ S + X[:, n]
    return torch.stack(states, 1), S


@chunk_recurrence.register_fake
def _(
    decay: Tensor, P: Tensor, X: Tensor, start: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    R, N, K, V = X.shape
    return X.new_empty(R, N, K, V), X.new_empty(R, K, V, dtype=torch.float32)


def _keep_states(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    decay, P, *_ = inputs
    ctx.save_for_backward(decay, P, output[0])


def _recurrence_backward(ctx: Any, grad_states: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    """What a change of S_{n+1} is worth, which is X_n's gradient, goes the same road back."""
    decay, P, states = ctx.saved_tensors
    worth, _ = chunk_recurrence(decay, P, grad_states.to(P.dtype), grad_last, True)
    grad_decay = (worth.float() * states.float()).sum((2, 3))
    return grad_decay, -(worth @ states.mT), worth, None, None


chunk_recurrence.register_autograd(_recurrence_backward, setup_context=_keep_states)
