"""Operators that torch.compile does not trace into: the Triton kernels with their gradients, and the rotary table,
which a compiled kernel would otherwise recompute for every head. And `UnitVectors`, whose gradient keeps less."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # tokens in a chunk of `delta_rule`


@torch.library.custom_op("bsbr_pl::rotary_table", mutates_args=())
def rotary_table(position: Tensor, width: int, base: float) -> Tensor:
    """Cosines and sines of rotary positions: `position` (T,), head width K -> (2, T, K); sines at even places are
    negated."""
    angle = position[:, None] * base ** (
        -torch.arange(0, width, 2, device=position.device, dtype=position.dtype) / width
    )
    sine = angle.sin()
    return torch.stack((angle.cos().repeat_interleave(2, 1), torch.stack((-sine, sine), 2).flatten(1)))


@rotary_table.register_fake
def _(position: Tensor, width: int, base: float) -> Tensor:
    return position.new_empty(2, position.shape[0], width)


@torch.library.custom_op("bsbr_pl::exact_product", mutates_args=())
def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices, in their precision under autocast too, and compiled in one graph."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


@exact_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty(*batch, a.shape[-2], b.shape[-1])


def _exact_product_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _exact_product_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return exact_product(grad, b.mT).sum_to_size(a.shape), exact_product(a.mT, grad).sum_to_size(b.shape)


exact_product.register_autograd(_exact_product_gradient, setup_context=_exact_product_setup)


class UnitVectors(torch.autograd.Function):
    """u = x / max(|x|, 1e-12) over the last axis: `F.normalize`, which would keep x and its norms for the gradient.

    With g the gradient of u, that of x is (g - u (u . g)) / |x|. So u is enough, and it is kept in the precision of the
    products that read it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: torch.dtype) -> Tensor:
        inverse = x.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()
        u = x * inverse
        ctx.save_for_backward(u.to(kept), inverse)
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        u, inverse = ctx.saved_tensors
        u = u.to(grad.dtype)
        return (grad - u * (u * grad).sum(-1, keepdim=True)) * inverse, None


# Sums over chunks.


@torch.library.custom_op("bsbr_pl::sums_before", mutates_args=())
def sums_before(x: Tensor, start: Tensor | None = None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Exclusive cumulative sums in fp32: x (R, N, M) -> at n the sum of all x before n (R, N, M), rounded to the
    precision of x, and the sum of all (R, M) in fp32.

    Both include `start` (R, M), in fp32. `backwards` sums all x after n.
    """
    if x.is_cuda:
        from . import triton_recurrence

        return triton_recurrence.sums_before(x.contiguous(), None if start is None else start.contiguous(), backwards)
    terms = x.float().flip(1) if backwards else x.float()
    sums = terms.cumsum(1) if start is None else terms.cumsum(1) + start[:, None]
    before = sums - terms
    return (before.flip(1) if backwards else before).to(x.dtype, copy=True), sums[:, -1].clone()


@sums_before.register_fake
def _(x: Tensor, start: Tensor | None = None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


def _sums_before_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.has_start, ctx.backwards = inputs[1] is not None, inputs[2]


def _sums_before_gradient(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor | None, None]:
    grad_x, grad_start = sums_before(grad.contiguous(), grad_total, not ctx.backwards)
    return grad_x, grad_start if ctx.has_start else None, None


sums_before.register_autograd(_sums_before_gradient, setup_context=_sums_before_setup)


# The delta rule.


@torch.library.custom_op("bsbr_pl::delta_rule", mutates_args=())
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The (gated) delta rule on CUDA, or with TRITON_INTERPRET=1.

    Args:
        q, k: (B, T, H, K), contiguous as all inputs.
        v: (B, T, H, V).
        beta: (B, T, H) in fp32.
        log_alpha: (B, T, H) in fp32; None for no decay.
        start: S^T before the first token (B, H, V, K) in fp32; None for zeros.

    Returns:
        Mixed values (B, T, H, V); S^T after the last token (B, H, V, K) in fp32; and for the gradient, per chunk of 64
        tokens, its inverse and S^T before it.
    """
    from . import triton_delta_rule

    return triton_delta_rule.forward(q, k, v, beta, log_alpha, start)


@delta_rule.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, K = q.shape
    V, R, N = v.shape[-1], B * H, (T + CHUNK - 1) // CHUNK
    last = v.new_empty(B, H, V, K, dtype=torch.float32)
    return torch.empty_like(v), last, q.new_empty(R, N, CHUNK, CHUNK), q.new_empty(R, N, V, K)


@torch.library.custom_op(
    "bsbr_pl::delta_rule_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_last, Tensor inverses, Tensor states, "
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_alpha) -> Tensor[]",
)
def delta_rule_backward(grad: Tensor, grad_last: Tensor | None, *saved: Any) -> list[Tensor]:
    """The gradients of start, q, k, v, beta and, if given, log_alpha, from those of the first two results."""
    from . import triton_delta_rule

    return triton_delta_rule.backward(grad.contiguous(), None if grad_last is None else grad_last.contiguous(), *saved)


@delta_rule_backward.register_fake
def _(grad: Tensor, grad_last: Tensor | None, inverses: Tensor, states: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    B, _, H, V = grad.shape
    start = grad.new_empty(B, H, V, states.shape[-1], dtype=torch.float32)
    return [start, *(torch.empty_like(x) for x in inputs if x is not None)]


def _delta_rule_setup(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:], *inputs[:5])
    ctx.has_decay, ctx.has_start = (x is not None for x in inputs[4:])
    ctx.set_materialize_grads(False)


def _delta_rule_gradient(
    ctx: Any, grad: Tensor | None, grad_last: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        grad = torch.zeros_like(ctx.saved_tensors[4])
    start, *inputs = delta_rule_backward(grad, grad_last, *ctx.saved_tensors)
    log_alpha = () if ctx.has_decay else (None,)
    return *inputs, *log_alpha, start if ctx.has_start else None


delta_rule.register_autograd(_delta_rule_gradient, setup_context=_delta_rule_setup)
