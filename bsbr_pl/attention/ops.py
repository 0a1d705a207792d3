"""Operations that torch.compile does not look into: what Triton kernels do on CUDA, with its gradient, and a table of
sines, which a compiled kernel would otherwise compute anew for every head."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # tokens that `delta_rule` takes at once


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


@torch.library.custom_op("bsbr_pl::sums_before", mutates_args=())
def sums_before(x: Tensor, start: Tensor | None = None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """x (R, N, M) -> at n the sum of x over all before n (R, N, M), in fp32, rounded once, and of all (R, M) in fp32;
    from `start` (R, M) or 0. `backwards` sums over all after n."""
    if x.is_cuda:
        from . import triton_kernels

        return triton_kernels.sums_before(x.contiguous(), None if start is None else start.contiguous(), backwards)
    parts = x.float().flip(1) if backwards else x.float()
    sums = parts.cumsum(1) if start is None else parts.cumsum(1) + start[:, None]
    before = sums - parts
    return (before.flip(1) if backwards else before).to(x.dtype, copy=True), sums[:, -1].clone()


@sums_before.register_fake
def _(x: Tensor, start: Tensor | None = None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


def _sums_gradient(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, None, None]:
    return sums_before(grad.contiguous(), grad_total, True)[0], None, None


sums_before.register_autograd(_sums_gradient)


@torch.library.custom_op("bsbr_pl::delta_rule", mutates_args=())
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, T, H, K), beta, log_alpha (B, T, H) in fp32 -> mixed values (B, T, H, V), S^T after the last token
    (B, H, V, K) in fp32; and what the gradient needs, per chunk of 64 its inverse and S^T before it.

    On CUDA, or where TRITON_INTERPRET is 1. All is contiguous; without `log_alpha` nothing is forgotten.
    """
    from . import triton_kernels

    return triton_kernels.forward(q, k, v, beta, log_alpha)


@delta_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, K = q.shape
    V, R, N = v.shape[-1], B * H, (T + CHUNK - 1) // CHUNK
    last = v.new_empty(B, H, V, K, dtype=torch.float32)
    return torch.empty_like(v), last, q.new_empty(R, N, CHUNK, CHUNK), q.new_empty(R, N, V, K)


@torch.library.custom_op("bsbr_pl::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor | None,
    inverses: Tensor,
    states: Tensor,
) -> list[Tensor]:
    """The gradients of q, k, v, beta and, where it is given, log_alpha."""
    from . import triton_kernels

    last = None if grad_last is None else grad_last.contiguous()
    return triton_kernels.backward(grad.contiguous(), last, q, k, v, beta, log_alpha, inverses, states)


@delta_rule_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor | None,
    inverses: Tensor,
    states: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, beta, log_alpha) if x is not None]


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)


def _delta_rule_gradient(
    ctx: Any, grad: Tensor | None, grad_last: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    grads = delta_rule_backward(torch.zeros_like(v) if grad is None else grad, grad_last, q, k, v, *rest)
    return (*grads, None)[:5]


delta_rule.register_autograd(_delta_rule_gradient, setup_context=_keep)
