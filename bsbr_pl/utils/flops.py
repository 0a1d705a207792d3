"""Floating-point work of a model: two independent counters, made to count the same thing, and what a device can do.

Counted as products are the multiply-adds of matrix products, convolutions, attention and triangular solves: what
`LanguageModel.flops` gives in closed form. `count_macs` (fvcore) takes a multiply-add for 1, `count_flops` (torch)
for 2.

No parameter, gradient, mode or random state is touched. fvcore traces one real forward pass of a copy that shares the
parameters; torch counts on the meta device, where nothing is computed. Both tools need the formulas below:

- attention: on a CPU both count `scaled_dot_product_attention` as 0, elsewhere torch counts the full square. Here a
  causal one counts its lower triangle, one under a mask the full square that its kernel computes.
- fvcore takes a broadcast (4, 4) @ (8, 4, 4) for 64 multiply-adds instead of 512, fails on a matrix times a vector,
  rounds einsum to four digits, and leaves out triangular solves, weighted embedding bags, norms, softmax and cumsum.
  What stays: it does not see what is computed and then not used (the memory after DeltaNet's last chunk).
- torch leaves out triangular solves and embedding bags, and counts the weight gradient of a depthwise convolution as
  if it were dense.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
    """A copy in evaluation mode that shares the parameters and buffers, or holds empty ones on `device` ("meta")."""
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


# -- fvcore ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Macs:
    """What fvcore found in one forward pass.

    products: multiply-adds by operator. elementwise: plain operations (an addition, a product, an exponential: 1 each)
    by operator. uncounted: operators that neither is known for, and how often they were called.
    """

    products: dict[str, int]
    elementwise: dict[str, int]
    uncounted: dict[str, int]

    @property
    def total(self) -> int:
        """Multiply-adds of all products."""
        return sum(self.products.values())


def count_macs(model: nn.Module, inputs: Tensor) -> Macs:
    """Count the forward pass of `model(inputs)` with fvcore; it is carried out, once, without gradients.

    Args:
        model: any module of one tensor; code that depends on the data cannot be counted.
        inputs: on the model's device.
    """
    import warnings

    with warnings.catch_warnings():  # fvcore uses torch.jit, which says at import that it is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        with torch.no_grad():
            analysis = FlopCountAnalysis(evaluation_copy(model), inputs)
            handles: dict[str, Any] = {
                **_PRODUCTS,
                **{name: _elementwise(*rule) for name, rule in _ELEMENTWISE.items()},
            }
            analysis.clear_op_handles().set_op_handle(**handles, **dict.fromkeys(_MOVES))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            counted, uncounted = analysis.by_operator(), analysis.unsupported_ops()
    products, elementwise = Counter[str](), Counter[str]()
    for name, count in counted.items():
        kind, operator = name.split(":")
        (products if kind == "product" else elementwise)[operator] += int(count)
    return Macs(dict(products), dict(elementwise), dict(uncounted))


def _shape(value: Any) -> Shape:
    """Shape of a value in a traced graph; None where it is no tensor."""
    return value.type().sizes() if value.isCompleteTensor() else None


def _product(name: str, macs: Callable[[list[Any], Shape], float]) -> Any:
    """An fvcore handle from a formula of the inputs and the output's shape."""
    return lambda inputs, outputs: Counter({f"product:{name}": macs(inputs, _shape(outputs[0]))})


def _contracted(inputs: list[Any], out: Shape) -> int:
    """A product of matrices or vectors, broadcast or not: each number of the output sums over the last axis of a."""
    return prod(out) * _shape(inputs[0])[-1]


def _einsum(inputs: list[Any], out: Shape) -> int:
    """An einsum of two operands: every combination of the letters is one multiply-add."""
    equation = inputs[0].toIValue().replace(" ", "")
    sizes: dict[str, int] = {}
    for letters, value in zip(equation.split("->")[0].split(","), inputs[1].node().inputs(), strict=True):
        if "." in letters:
            raise NotImplementedError(f"einsum {equation!r} cannot be counted: write its letters out")
        sizes |= dict(zip(letters, _shape(value), strict=True))
    return prod(sizes.values())


def _attention(inputs: list[Any], out: Shape) -> int:
    q, k, v = (_shape(value) for value in inputs[:3])
    return attention_macs(q, k, v, is_causal=bool(inputs[5].toIValue()))


def _embedding_bag(inputs: list[Any], out: Shape) -> int:
    weighted = _shape(inputs[6]) is not None
    return prod(_shape(inputs[1])) * _shape(inputs[0])[1] if weighted else 0


_PRODUCTS = {
    **{f"aten::{name}": _product(name, _contracted) for name in ("matmul", "mm", "bmm", "mv", "dot", "linear")},
    "aten::addmm": _product("addmm", lambda inputs, out: prod(out) * _shape(inputs[1])[-1]),
    "aten::einsum": _product("einsum", _einsum),
    "aten::_convolution": _product("conv", lambda inputs, out: prod(out) * prod(_shape(inputs[1])[1:])),
    "aten::scaled_dot_product_attention": _product("attention", _attention),
    "aten::linalg_solve_triangular": _product("solve", lambda inputs, out: int(solve_macs(_shape(inputs[0]), out))),
    "aten::embedding_bag": _product("embedding_bag", _embedding_bag),
}


def _elementwise(operations: int, of_input: bool = False) -> Any:
    """So many operations for each number of the output, or of the first input where that is what is reduced."""

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        shape = _shape((inputs if of_input else outputs)[0])
        name = (outputs[0].node().kind()).removeprefix("aten::").rstrip("_")
        kind = outputs[0].type().dtype() if shape is not None else None
        complex_product = 6 if name == "mul" and kind is not None and kind.is_complex else 1  # 4 products, 2 sums
        return Counter({f"elementwise:{name}": operations * complex_product * prod(shape or ())})

    return handle


#: (operations a number, of the input instead of the output)
_ELEMENTWISE: dict[str, tuple[int, bool]] = {
    **{f"aten::{name}{end}": (1, False) for name in ("add", "sub", "mul", "div", "pow") for end in ("", "_")},
    **{f"aten::{name}": (1, False) for name in ("rsub", "neg", "square", "exp", "log", "sqrt", "rsqrt", "sin", "cos")},
    "aten::reciprocal": (1, False),
    "aten::polar": (2, False),  # sine and cosine
    **{f"aten::{name}": (1, False) for name in ("relu", "abs", "clamp", "clamp_min", "cumsum", "maximum", "minimum")},
    **{f"aten::{name}": (1, True) for name in ("sum", "mean", "amax", "max", "topk", "argmax")},
    "aten::sigmoid": (4, False),  # negate, exponential, add, divide
    "aten::silu": (5, False),
    "aten::softplus": (3, False),  # exponential, add, logarithm
    "aten::tanh": (5, False),
    "aten::elu": (3, False),
    "aten::gelu": (5, False),
    "aten::softmax": (5, False),  # maximum, subtract, exponential, sum, divide
    "aten::rms_norm": (4, False),  # square, sum, times the root, times the weight
    "aten::layer_norm": (5, False),
    "aten::linalg_vector_norm": (2, True),
    "aten::norm": (2, True),
}

#: Operators without arithmetic on activations, besides those that fvcore ignores by itself.
_MOVES = [
    *("aten::clone", "aten::embedding", "aten::expand_as", "aten::eye", "aten::index_select", "aten::le", "aten::lt"),
    *("aten::mT", "aten::ne", "aten::numel", "aten::ones_like", "aten::pad", "aten::repeat", "aten::scatter"),
    *("aten::tril", "aten::triu", "aten::unflatten", "aten::view_as_complex", "aten::view_as_real", "aten::where"),
]


# -- torch -------------------------------------------------------------------------------------------------------------


def count_flops(model: nn.Module, inputs: Tensor, backward: bool = False) -> int:
    """Floating-point operations of the products in `model(inputs)`, 2 a multiply-add, by torch's counter, on meta.

    The backward pass of attention is counted as twice its forward: that its scores are computed anew is a choice of
    the kernel, not work of the model.

    Args:
        model: any module of one tensor; code that depends on the data cannot be counted.
        inputs: only shape and dtype matter.
        backward: count the gradients of all parameters (and of floating-point inputs) besides.
    """
    copied = evaluation_copy(model, "meta")
    x = inputs.detach().to("meta").requires_grad_(backward and inputs.is_floating_point())
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.device("meta"), torch.set_grad_enabled(backward), _FusedAttention(), counter:
        y = copied(x)
        if backward:
            y.sum().backward()
    return int(counter.get_total_flops())


class _FusedAttention(TorchFunctionMode):
    """Keeps `scaled_dot_product_attention` in one piece on meta, where it would fall apart into full products."""

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


# -- the device --------------------------------------------------------------------------------------------------------


def matmul_peak(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None, tries: int = 8
) -> float:
    """Floating-point operations a second of the best square matrix product on `device`: a peak that can be reached.

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
