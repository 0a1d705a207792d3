"""Multiply-adds and elementwise operations of a model by fvcore, which traces one real forward pass of a copy.

fvcore counts a broadcast (4, 4) @ (8, 4, 4) as 64 multiply-adds instead of 512, fails on a matrix times a vector,
rounds einsum to four digits, and omits attention, triangular solves, weighted embedding bags, norms, softmax and
cumsum. The handles below correct this. One limit remains: results that are never used (the memory after DeltaNet's last
chunk) are not counted.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .flops import Shape, attention_macs, evaluation_copy, solve_macs


@dataclass(frozen=True)
class Macs:
    """What fvcore found in one forward pass.

    products: multiply-adds by operator. elementwise: plain operations by operator (an addition, a product, an
    exponential count 1 each). uncounted: calls of operators without a formula.
    """

    products: dict[str, int]
    elementwise: dict[str, int]
    uncounted: dict[str, int]

    @property
    def total(self) -> int:
        """Multiply-adds of all products."""
        return sum(self.products.values())


def count_macs(model: nn.Module, inputs: Tensor) -> Macs:
    """Count the forward pass of `model(inputs)` with fvcore, which runs it once, without gradients.

    Args:
        model: any module of one tensor; control flow that depends on the data cannot be counted.
        inputs: on the model's device.
    """
    with warnings.catch_warnings():  # fvcore uses torch.jit, which says at import that it is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        with torch.no_grad():
            analysis = FlopCountAnalysis(evaluation_copy(model), inputs)
            ignored = dict.fromkeys(f"aten::{name}" for name in _MOVES.split())
            analysis.clear_op_handles().set_op_handle(**_PRODUCTS, **_ELEMENTWISE, **ignored)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            counted, uncounted = analysis.by_operator(), analysis.unsupported_ops()
    products, elementwise = Counter[str](), Counter[str]()
    for name, count in counted.items():
        kind, operator = name.split(":")
        counts = products if kind == "product" else elementwise
        counts[operator] += int(count)
    return Macs(dict(products), dict(elementwise), dict(uncounted))


def _shape(value: Any) -> Shape:
    """Shape of a value in a traced graph; None if it is no tensor."""
    return value.type().sizes() if value.isCompleteTensor() else None


def _product(name: str, macs: Callable[[list[Any], Shape], float]) -> Any:
    """An fvcore handle, from a formula of the inputs and the output's shape."""
    return lambda inputs, outputs: Counter({f"product:{name}": macs(inputs, _shape(outputs[0]))})


def _contracted(inputs: list[Any], out: Shape) -> int:
    """A product of matrices or vectors, broadcast or not: each output sums over the last axis of the first input."""
    return prod(out) * _shape(inputs[0])[-1]


def _einsum(inputs: list[Any], out: Shape) -> int:
    """An einsum of two operands: every combination of the letters is one multiply-add."""
    equation = inputs[0].toIValue().replace(" ", "")
    sizes: dict[str, int] = {}
    for letters, value in zip(equation.split("->")[0].split(","), inputs[1].node().inputs(), strict=True):
        if "." in letters:
            raise NotImplementedError(f"einsum {equation!r} cannot be counted: write it without an ellipsis")
        sizes |= dict(zip(letters, _shape(value), strict=True))
    return prod(sizes.values())


def _attention(inputs: list[Any], out: Shape) -> int:
    q, k, v = (_shape(value) for value in inputs[:3])
    return attention_macs(q, k, v, is_causal=bool(inputs[5].toIValue()))


def _decayed_products(inputs: list[Any], out: Shape) -> int:
    """The pairs of query and key below the diagonal, for q (..., C, R, K)."""
    q = _shape(inputs[0])
    return prod(q) * (q[-3] - 1) // 2


def _embedding_bag(inputs: list[Any], out: Shape) -> int:
    weighted = _shape(inputs[6]) is not None
    return prod(_shape(inputs[1])) * _shape(inputs[0])[1] if weighted else 0


_PRODUCTS = {
    **{f"aten::{name}": _product(name, _contracted) for name in ("matmul", "mm", "bmm", "mv", "dot", "linear")},
    "aten::addmm": _product("addmm", lambda inputs, out: prod(out) * _shape(inputs[1])[-1]),
    "aten::einsum": _product("einsum", _einsum),
    **{
        name: _product("conv", lambda inputs, out: prod(out) * prod(_shape(inputs[1])[1:]))
        for name in ("aten::_convolution", "prim::PythonOp.DepthwiseConvolution")
    },
    "prim::PythonOp.DecayedProducts": _product("decayed_products", _decayed_products),
    "aten::scaled_dot_product_attention": _product("attention", _attention),
    "aten::linalg_solve_triangular": _product("solve", lambda inputs, out: int(solve_macs(_shape(inputs[0]), out))),
    "aten::embedding_bag": _product("embedding_bag", _embedding_bag),
}


def _elementwise(operations: int, of_input: bool) -> Any:
    """An fvcore handle: `operations` per number of the output, or of the first input for reductions."""

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        shape = _shape((inputs if of_input else outputs)[0])
        name = (outputs[0].node().kind()).removeprefix("aten::").rstrip("_")
        kind = outputs[0].type().dtype() if shape is not None else None
        complex_product = 6 if name == "mul" and kind is not None and kind.is_complex else 1  # 4 products, 2 sums
        return Counter({f"elementwise:{name}": operations * complex_product * prod(shape or ())})

    return handle


def _handles(operators: dict[int, str], of_input: bool = False) -> dict[str, Any]:
    """Handles by operator, from the names of the operators by their operations per number."""
    found: dict[str, Any] = {}
    for operations, names in operators.items():
        found |= {f"aten::{name}": _elementwise(operations, of_input) for name in names.split()}
    return found


_ELEMENTWISE = _handles(
    {
        1: "add add_ index_add_ sub sub_ mul mul_ div div_ pow pow_ rsub neg square exp log sqrt rsqrt reciprocal sin"
        " cos relu abs round clamp clamp_min cumsum maximum minimum",
        2: "polar",  # sine and cosine
        3: "softplus elu lerp",  # exponential, add, logarithm; subtract, multiply, add
        4: "sigmoid rms_norm",  # negate, exponential, add, divide; square, sum, times the root, times the weight
        5: "silu tanh gelu layer_norm softmax log_softmax",  # of softmax: maximum, subtract, exponential, sum, divide
    }
) | _handles({1: "sum mean amax max topk argmax argsort", 2: "linalg_vector_norm norm", 4: "logsumexp"}, of_input=True)

#: Operators without arithmetic on activations that fvcore does not ignore by itself.
_MOVES = (
    "__xor__ clone embedding empty_like expand_as eye index_copy index_select le lt mT ne numel ones_like pad repeat "
    "repeat_interleave scatter scatter_ scatter_add_ searchsorted tril triu unflatten "
    "view_as_complex view_as_real where"
)
