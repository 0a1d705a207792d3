"""The short convolution against its definition, a sum over taps, and against torch's own."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.attention.parts import DepthwiseConvolution, ShortConvolution


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_the_sum_over_its_taps(size, T, dtype, tolerance):
    """Also in fp32, which has another implementation."""
    torch.manual_seed(0)
    convolution = ShortConvolution(6, size).to(dtype)
    x, before = torch.randn(2, T, 6, dtype=dtype), torch.randn(2, size - 1, 6, dtype=dtype)
    for parameter in convolution.parameters():
        parameter.data.normal_()
    y, after = convolution(x, before)
    past = torch.cat((before, x), 1)
    taps = convolution.weight[:, 0].mT if size > 1 else torch.ones(1, 6)
    expected = sum(taps[i] * past[:, i : i + T] for i in range(size))
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(after, past[:, T:])
    assert convolution.init_state(3).shape == (3, size - 1, 6)


def test_one_tap_learns_nothing_and_more_start_as_the_identity():
    x = torch.randn(2, 5, 6)
    assert list(ShortConvolution(6, 1).parameters()) == []
    assert ShortConvolution(6, 1).state_dict() == {}
    started = ShortConvolution(6, 4)
    assert torch.equal(started(x, started.init_state(2))[0], x)


@pytest.mark.parametrize("size", [2, 4])
def test_uniform_taps_have_the_variance_of_their_formula(size):
    torch.manual_seed(0)
    taps = ShortConvolution(40_000, size, "uniform").weight
    assert size**-0.5 * 0.999 < taps.abs().max() <= size**-0.5
    for tap in taps[:, 0].unbind(1):  # U(-a, a) has variance a^2 / 3 and mean 0
        assert tap.var().item() == pytest.approx(1 / (3 * size), rel=0.02)
        assert abs(tap.mean().item()) < 4 * (3 * size * 40_000) ** -0.5
    assert list(ShortConvolution(6, 1, "uniform").parameters()) == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_starts_its_taps_as_it_is_told(name):
    if "conv_init" not in inspect.signature(ARCHITECTURES[name]).parameters:
        assert not any(isinstance(part, ShortConvolution) for part in ARCHITECTURES[name](16, 2).modules())
        return
    identity = torch.tensor([0.0, 0.0, 1.0])
    for init in ("identity", "uniform"):
        taps = ARCHITECTURES[name](16, 2, conv_size=3, conv_init=init).conv.weight[:, 0]
        assert bool((taps == identity).all()) == (init == "identity")
        assert taps.std(0).min() > 0.2 or init == "identity"
    with pytest.raises(ValueError, match="conv_init must be one of identity, uniform, got 'zeros'"):
        ARCHITECTURES[name](16, 2, conv_init="zeros")


def test_its_gradients_are_those_of_torch():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 12, 6).double().requires_grad_(), torch.randn(6, 1, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(DepthwiseConvolution.apply, (x, weight))
    assert torch.autograd.gradgradcheck(DepthwiseConvolution.apply, (x, weight))
    x, weight = (tensor.detach().float().requires_grad_() for tensor in (x, weight))
    ours, theirs = DepthwiseConvolution.apply(x, weight), F.conv1d(x.mT, weight, groups=6).mT
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for own, other in zip(
        torch.autograd.grad(ours, (x, weight), cotangent),
        torch.autograd.grad(theirs, (x, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_on_the_meta_device_it_is_laid_out_as_elsewhere():
    convolution = ShortConvolution(6, 4).to("meta")
    y, _ = convolution(torch.empty(2, 5, 6, device="meta"), convolution.init_state(2))
    assert y.is_contiguous()
