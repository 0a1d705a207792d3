"""Multiply-adds and elementwise operations of a model by fvcore, which traces one real forward pass of a copy.

fvcore takes a broadcast (4, 4) @ (8, 4, 4) for 64 multiply-adds instead of 512, fails on a matrix times a vector,
rounds einsum to four digits, and leaves out attention, triangular solves, weighted embedding bags, norms, softmax and
cumsum: hence the handles below. What stays: it does not see what is computed and then not used (the memory after
DeltaNet's last chunk).
"""

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
    **{
        f"aten::{name}": (1, False)
        for name in ("relu", "abs", "round", "clamp", "clamp_min", "cumsum", "maximum", "minimum")
    },
    **{f"aten::{name}": (1, True) for name in ("sum", "mean", "amax", "max", "topk", "argmax", "argsort")},
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
