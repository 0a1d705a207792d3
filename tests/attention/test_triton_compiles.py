"""Triton's kernels compile for a GPU, without one: the interpreter, which runs them on a CPU, has looser types."""

import os

import pytest

from bsbr_pl.attention.kernels import HAS_TRITON

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, not interpreted"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
LOW, FP32, INTEGER = "*bf16", "*fp32", "i32"

KERNELS = {
    "triton_chunks._decayed_states": {"x": LOW, "before": LOW},
    "triton_chunks._decayed_scores": {"q": LOW, "k": LOW, "A": LOW},
    "triton_chunks._decayed_scores_gradient": {"q": LOW, "k": LOW, "DA": LOW, "Dq": LOW, "Dk": LOW},
    "triton_chunks._inverses": {"lower": LOW, "inverses": LOW},
    "triton_recurrence._recurrence": {"P": LOW, "X": LOW, "states": LOW},
    "triton_recurrence._sums_before": {"x": LOW, "before": LOW},
    **{
        f"triton_delta_rule.{name}": dict.fromkeys(
            ("q", "k", "v", "inverses", "P", "X", "G", "states", "out", "Dout", "DS", "Dq", "Dk", "Dv"), LOW
        )
        for name in ("_prepare", "_output", "_prepare_gradient", "_gradient")
    },
}
SIZES = {"N": INTEGER, "M": INTEGER, "V": INTEGER, "R": INTEGER, "T": INTEGER, "H": INTEGER, "G": INTEGER}
CONSTANTS = {"K": 64, "V": 64, "J": 2, "BV": 16, "CHANNELS": 64, "WIDTH": 128, "COLUMNS": 128, "BACKWARDS": True}


@pytest.mark.parametrize("optional", [True, False], ids=["", "without what is optional"])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_a_gpu(name, optional):
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = name.partition(".")
    kernel = getattr(import_module(f"bsbr_pl.attention.{module}"), function)
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    values = {key: CONSTANTS[key] for key in constant}
    if not optional:
        values |= {key: None for key in ("start", "log_alpha", "Dlog_alpha", "product") if key in kernel.arg_names}
    types = SIZES | KERNELS[name]
    signature = {key: "constexpr" if key in values else types.get(key, FP32) for key in kernel.arg_names}
    places = {(kernel.arg_names.index(key),): value for key, value in values.items()}
    compiled = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
