"""The law on a CUDA device, at the sizes of test_law.py and at those that GPUs are made for."""

import copy

import pytest
import torch
from test_law import (
    LENGTHS,
    TOLERANCE,
    C,
    assert_close,
    assert_near_truth,
    build,
    decode,
    definition,
    each_variant,
    prefill_in_parts,
    relative_error,
    results,
    sequence,
)

from bsbr_pl.attention import ARCHITECTURES, Attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@each_variant
def test_fast_form_equals_definition_on_a_gpu(name, options, dtype):
    attention = build(name, options, dtype).cuda()
    for T in LENGTHS:
        x = sequence(T, dtype).cuda()
        if dtype == torch.bfloat16:
            assert_near_truth(attention, x)
        else:
            found, expected = results(type(attention).forward, attention, x), results(definition, attention, x)
            assert_close(found, expected, TOLERANCE[dtype])


@each_variant
def test_a_gpu_and_a_processor_agree(name, options):
    attention = build(name, options)
    x = sequence(4 * C + 1)
    expected = results(type(attention).forward, attention, x)
    found = results(type(attention).forward, copy.deepcopy(attention).cuda(), x.cuda())
    assert_close({key: value.cpu() for key, value in found.items()}, expected, 1e-10)


@each_variant
def test_decode_equals_definition_on_a_gpu(name, options):
    attention, x = build(name, options).cuda(), sequence(3 * C + 2).cuda()
    for prefilled in (0, C - 1, 2 * C):
        torch.testing.assert_close(decode(attention, x, prefilled), attention(x), rtol=1e-10, atol=1e-10)


@each_variant
def test_prefill_continues_on_a_gpu(name, options):
    attention, x = build(name, options).cuda(), sequence(3 * C + 2).cuda()
    for cuts in ((1,), (C - 1,), (C, 2 * C), (3, C + 3, 2 * C + 3)):
        torch.testing.assert_close(prefill_in_parts(attention, x, *cuts), attention(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefill_continues_in_bf16_on_a_gpu(name):
    """From states that fused kernels made, against the definition in fp64 with the same numbers."""
    attention = wide(name, torch.bfloat16)
    x = torch.randn(2, 1000, 256, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    truth = definition(copy.deepcopy(attention).double(), x.double())
    for cuts in ((1,), (128, 256), (333, 700), (999,)):
        error = relative_error(prefill_in_parts(attention, x, *cuts), truth)
        assert error <= 2e-2, f"cuts {cuts}: relative error {error:.2e}"


@each_variant
def test_no_output_moves_when_a_later_token_changes_on_a_gpu(name, options):
    attention = build(name, options, torch.float32).cuda()
    T = 4 * C + 3
    x = sequence(T, torch.float32).cuda()
    before = attention(x)
    for t in (1, C - 1, C, C + 1, T - 1):
        changed = x.clone()
        changed[:, t:] += 10
        assert torch.equal(attention(changed)[:, :t], before[:, :t]), f"outputs before {t} moved"


def wide(name: str, dtype: torch.dtype) -> Attention:
    """Hidden 256, four heads, the architecture's own chunks."""
    torch.manual_seed(1)
    return ARCHITECTURES[name](256, 4).to("cuda", dtype)


@pytest.mark.parametrize("T", [1000, 1024])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wide_and_long_is_near_the_truth(name, T):
    """Against the definition in fp64 with the same numbers, where fused kernels are at work."""
    x = torch.randn(2, T, 256, generator=torch.Generator().manual_seed(T)).cuda()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        attention = wide(name, dtype)
        truth = definition(copy.deepcopy(attention).double(), x.to(dtype).double())
        error = relative_error(attention(x.to(dtype)), truth)
        assert error <= tolerance, f"{dtype}: relative error {error:.2e}"
