"""A GPU's kernels keep the law; where there is no GPU, stand-ins as their documentation has them keep its shapes."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_law import TOLERANCE, assert_close, definition, results
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES, Attention, kernels

KERNELS = {"linear": kernels.linear_kernel, "delta_net": kernels.delta_rule_kernel}


def build(name: str, dtype: torch.dtype, device: str = "cpu") -> Attention:
    torch.manual_seed(1)
    attention = ARCHITECTURES[name](128, 2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention.to(device, dtype)


def sequence(T: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(2, T, 128, generator=torch.Generator().manual_seed(T)).to(device, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not kernels.installed(), reason="needs flash-linear-attention: pip install -e '.[gpu]'")
@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_the_law_on_a_gpu(name, T, monkeypatch):
    attention, x = build(name, torch.bfloat16, "cuda"), sequence(T, torch.bfloat16, "cuda")
    monkeypatch.setattr(type(attention), "mix", None)  # what is compared is the kernel
    found, state = results(type(attention).forward, attention, x), attention.prefill(x)[1]
    monkeypatch.undo()
    assert_close(found, results(definition, attention, x), TOLERANCE[torch.bfloat16])
    kept, expected = (dict(enumerate(parts)) for parts in (state, mixed_state(attention, x)))
    assert_close(kept, expected, TOLERANCE[torch.bfloat16])


def mixed_state(attention: Attention, x: Tensor) -> list[Tensor]:
    *parts, before = attention.project(x)
    return [*attention.mix(*parts)[1:], before]


def chunk_linear_attn(q, k, v, scale, output_final_state, normalize):
    """q, k (B, T, H, K), v (B, T, H, V) -> (B, T, H, V) and the state (B, H, K, V)."""
    assert output_final_state
    assert not normalize
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * scale
    return torch.einsum("bhts,bshv->bthv", scores, v), torch.einsum("bthk,bthv->bhkv", k, v)


def chunk_delta_rule(q, k, v, beta, scale, output_final_state):
    """The same, and beta (B, T, H)."""
    assert output_final_state
    outputs = []
    S = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1])
    for t in range(q.shape[1]):
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, ..., None] * error[:, :, None]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, 1), S


@pytest.fixture
def stand_ins(monkeypatch):
    for module, function in (("linear_attn", chunk_linear_attn), ("delta_rule", chunk_delta_rule)):
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", SimpleNamespace(**{function.__name__: function}))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("T", [1, 7, 70])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_given_what_they_ask_for(name, T):
    """Documented shapes in, `mix`'s shapes out, nothing scaled twice: the stand-ins work in fp32."""
    attention, x = build(name, torch.float32), sequence(T, torch.float32)
    *parts, _ = attention.project(x)
    for found, own in zip(KERNELS[name](torch.float32, *parts), attention.mix(*parts), strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_kernels_are_chosen_on_cuda_in_low_precision_alone(monkeypatch):
    def chosen(is_cuda: bool, dtype: torch.dtype) -> str:
        return kernels.choose(SimpleNamespace(is_cuda=is_cuda, dtype=dtype), lambda low: f"kernel in {low}", mix)()

    def mix() -> str:
        return "mix"

    monkeypatch.setattr(kernels, "installed", lambda: True)
    assert chosen(True, torch.bfloat16) == "kernel in torch.bfloat16"
    assert chosen(True, torch.float32) == chosen(True, torch.float64) == chosen(False, torch.bfloat16) == "mix"
    with monkeypatch.context() as autocast:  # torch will not enter one without a GPU
        autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert chosen(True, torch.float32) == "kernel in torch.float16"  # what it is until it is set
    monkeypatch.setattr(kernels, "installed", lambda: False)
    assert chosen(True, torch.bfloat16) == "mix"
