"""FLOPs of a model by torch's counter; formulas that this counter and fvcore's (`macs`) lack; a device's peak.

Products are matrix products, convolutions, attention and triangular solves: what `LanguageModel.flops` gives in closed
form. A multiply-add counts as 2 in `count_flops`, as 1 in `macs.count_macs`. Counting changes no parameter, gradient,
mode or random state.

On a CPU both counters count `scaled_dot_product_attention` as 0; on other devices torch counts the full square. Here
causal attention counts its lower triangle, and attention with a mask the full square that its kernel computes. torch
also omits triangular solves and embedding bags, and counts the weight gradient of a depthwise convolution as dense.
"""

import copy
import time
from contextlib import suppress
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .timing import synchronize

Shape = Any  # of a tensor: a sequence of int
aten = torch.ops.aten


def evaluation_copy(model: nn.Module, device: str | None = None) -> nn.Module:
    """A copy in evaluation mode. It shares parameters and buffers, or has them on `device` ("meta": empty ones)."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor if device is None else tensor.detach().to(device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if device and is_parameter else moved
    return copy.deepcopy(model, memo).eval()


def attended_pairs(queries: int, keys: int, is_causal: bool) -> int:
    """Pairs (query, key) that attention multiplies: all, or for causal attention those with key <= query."""
    if not is_causal:
        return queries * keys
    full = min(queries, keys)
    return full * (full + 1) // 2 + (queries - full) * keys


def attention_macs(q: Shape, k: Shape, v: Shape, is_causal: bool) -> int:
    """Multiply-adds of softmax(q k^T) v: q (..., L, K), k (..., S, K), v (..., S, V)."""
    return prod(q[:-2]) * attended_pairs(q[-2], k[-2], is_causal) * (q[-1] + v[-1])


def solve_macs(a: Shape, out: Shape) -> float:
    """Multiply-adds of a triangular solve: half of n^2 for each right-hand side; a (..., n, n)."""
    return prod(out) * a[-1] / 2


def count_flops(model: nn.Module, inputs: Tensor, backward: bool = False) -> int:
    """Floating-point operations of the products in `model(inputs)`, 2 per multiply-add, by torch's counter, on meta.

    The backward pass of attention counts as twice its forward pass. Recomputing the scores in the backward pass is not
    counted.

    Args:
        model: any module of one tensor; control flow that depends on the data cannot be counted.
        inputs: only shape and dtype matter.
        backward: also count the gradients of all parameters (and of floating-point inputs).
    """
    copied = evaluation_copy(model, "meta")
    x = inputs.detach().to("meta").requires_grad_(backward and inputs.is_floating_point())
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    usual = torch.autograd.set_detect_anomaly(False)  # it would look for NaN, of which meta tensors have none
    with usual, torch.device("meta"), torch.set_grad_enabled(backward), _FusedAttention(), counter:
        y = copied(x)
        if backward:
            y.sum().backward()
    return int(counter.get_total_flops())


def forward_flops(model: Any, num_tokens: int) -> int | None:
    """FLOPs of a `LanguageModel`'s forward pass over one sequence: its closed form, or counted if it has none.

    None if torch's counter cannot run the model: its control flow depends on data, or it has kernels of its own.
    """
    try:
        return model.flops(num_tokens)
    except NotImplementedError:
        with suppress(Exception):  # whatever a foreign module does with tensors that hold no numbers
            return count_flops(model, torch.zeros(1, num_tokens, dtype=torch.long))
    return None


class _FusedAttention(TorchFunctionMode):
    """Keeps `scaled_dot_product_attention` one operator on meta, where it would be decomposed into full products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]


def _attention_flops(q: Shape, k: Shape, v: Shape, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return 2 * attention_macs(q, k, v, is_causal)


def _attention_backward_flops(
    grad: Shape, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, dropout: float, is_causal: bool, **_: Any
) -> int:
    return 4 * attention_macs(q, k, v, is_causal)


def _solve_flops(a: Shape, b: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return int(2 * solve_macs(a, out_shape))


def _bag_flops(weight: Shape, indices: Shape, *rest: Any, **__: Any) -> int:
    return 2 * prod(indices) * weight[1] if len(rest) > 4 and rest[4] is not None else 0


def _bag_backward_flops(grad: Shape, *rest: Shape, **_: Any) -> int:
    indices = next(shape for shape in rest if len(shape) == 1)  # the weight (2 axes) may come before it
    return 2 * prod(indices) * grad[1]


def _convolution_backward_flops(grad: Shape, x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    output_mask = rest[-1]
    return 2 * prod(grad) * prod(weight[1:]) * sum(output_mask[:2])


_FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.linalg_solve_triangular: _solve_flops,
    aten._embedding_bag: _bag_flops,
    aten._embedding_bag_forward_only: _bag_flops,
    aten._embedding_bag_backward: _bag_backward_flops,
    aten._embedding_bag_per_sample_weights_backward: _bag_backward_flops,
    aten.convolution_backward: _convolution_backward_flops,
}


def matmul_peak(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None, tries: int = 8
) -> float:
    """Floating-point operations per second of the fastest square matrix product on `device`: an achievable peak.

    Args:
        device: where to multiply.
        dtype: of the matrices.
        size: rows and columns; by default 1024 on a CPU and 8192 elsewhere.
        tries: products to time; the fastest counts.
    """
    size = size or (1024 if torch.device(device).type == "cpu" else 8192)
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)  # no random state is used
    out = a @ a
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
