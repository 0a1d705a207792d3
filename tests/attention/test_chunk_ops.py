"""The operators of chunks: their gradients against autograd, and Triton's kernels in its interpreter against them."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bsbr_pl.attention import chunk_ops, kernels

INTERPRETED = kernels.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # Triton's interpreter


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5


CHUNK_OPERATORS = {
    "decayed_states": (chunk_ops.decayed_states, [numbers(2, 70, 8, 20), numbers(2, 70, 8, seed=1) + 0.5]),
    "decayed_states, one decay": (chunk_ops.decayed_states, [numbers(2, 40, 8, 20), numbers(2, 40, 1, seed=1) + 0.5]),
    "decayed_states, from a state": (
        chunk_ops.decayed_states,
        [numbers(1, 5, 4, 8), numbers(1, 5, 4, seed=1) + 0.5, numbers(1, 4, 8, seed=2)],
    ),
    "replaced_states": (
        chunk_ops.replaced_states,
        [numbers(2, 9, 16, 16), numbers(2, 9, 32, 16, seed=1), numbers(2, 9, 16, seed=2) + 0.5],
    ),
    "replaced_states, from a state": (
        chunk_ops.replaced_states,
        [*(numbers(1, 9, 16, 16, seed=i) for i in (0, 1)), numbers(1, 9, 16, seed=2) + 0.5, numbers(1, 16, 16, seed=3)],
    ),
    "decayed_scores": (
        chunk_ops.decayed_scores,
        [numbers(1, 2, 64, 16), numbers(2, 64, 16, seed=1), (numbers(2, 64, 16, seed=2) - 0.5).cumsum(1)],
    ),
    "decayed_scores, two queries": (
        chunk_ops.decayed_scores,
        [numbers(2, 3, 64, 32), numbers(3, 64, 32, seed=1), (0.1 * numbers(3, 64, 32, seed=2) - 0.05).cumsum(1)],
    ),
    "triangle_inverse": (chunk_ops.triangle_inverse, [numbers(2, 64, 64)]),
}


def outputs_and_gradients(operator: Callable, given: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in given]
    found = operator(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    loss = sum((output * numbers(*output.shape, seed=9)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("name", CHUNK_OPERATORS)
def test_gradients_of_chunk_operators_are_those_of_autograd(name):
    """The registered formulas against autograd through the same operator written without them."""
    operator, given = CHUNK_OPERATORS[name]
    torch.library.opcheck(operator, tuple(x.detach().requires_grad_() for x in given))
    found = outputs_and_gradients(operator, given)
    for own, expected in zip(found, outputs_and_gradients(PLAIN[operator], given), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.detach().abs().max())))


def plain_states(x: Tensor, decay: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    S = torch.zeros_like(x[:, 0]) if start is None else start
    before = []
    for x_n, decay_n in zip(x.unbind(1), decay.unbind(1), strict=True):
        before.append(S)
        S = decay_n[..., None] * S + x_n
    return torch.stack(before, 1), S


def plain_replaced_states(P: Tensor, X: Tensor, decay: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    S = torch.zeros_like(X[:, 0]) if start is None else start
    before = []
    for P_n, X_n, decay_n in zip(P.unbind(1), X.unbind(1), decay.unbind(1), strict=True):
        before.append(S)
        S = S * decay_n[:, None] - S @ P_n + X_n
    return torch.stack(before, 1), S


def plain_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    decays = (g[:, :, None] - g[:, None]).clamp(max=0).exp()
    return torch.einsum("jrtk,rsk,rtsk->jrts", q, k, decays).tril()


PLAIN = {
    chunk_ops.decayed_states: plain_states,
    chunk_ops.replaced_states: plain_replaced_states,
    chunk_ops.decayed_scores: plain_scores,
    chunk_ops.triangle_inverse: lambda L: torch.linalg.inv(torch.eye(64) + L.tril(-1)),
}


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", CHUNK_OPERATORS)
def test_chunk_operators_in_triton(monkeypatch, name):
    """Outputs and gradients, of recurrences also in two levels."""
    from bsbr_pl.attention import triton_recurrence

    operator, given = CHUNK_OPERATORS[name]
    expected = outputs_and_gradients(operator, given)
    monkeypatch.setattr(chunk_ops, "in_triton", lambda x: True)
    for least in (1000, 1):
        monkeypatch.setattr(triton_recurrence, "LONG", least)
        for own, plain in zip(outputs_and_gradients(operator, given), expected, strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5 * max(1.0, float(plain.detach().abs().max())))


@pytest.mark.parametrize("started", [True, False])
def test_recurrences_go_backwards(started):
    """Outputs and gradients are those of the reversed chunks."""
    x, decay = numbers(2, 5, 3, 4), numbers(2, 5, 3, seed=1) + 0.5
    P, X, start = numbers(2, 5, 3, 3, seed=2), numbers(2, 5, 4, 3, seed=3), numbers(2, 3, 4, seed=4)
    for operator, given, first in (
        (chunk_ops.decayed_states, [x, decay], start),
        (chunk_ops.replaced_states, [P, X, decay], start.mT),
    ):

        def reversed_chunks(*inputs, plain=PLAIN[operator]):
            chunks, rest = inputs[: len(given)], inputs[len(given) :]  # noqa: B023
            before, last = plain(*(part.flip(1) for part in chunks), *rest)
            return before.flip(1), last

        inputs = [*given, first] if started else given
        count = len(given)
        found = outputs_and_gradients(lambda *x: operator(*x[:count], *(x[count:] or (None,)), True), inputs)  # noqa: B023
        for own, expected in zip(found, outputs_and_gradients(reversed_chunks, inputs), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_states_are_summed_in_fp32():
    ones = torch.ones(1, 600, 1, 1, dtype=torch.bfloat16)
    before, last = chunk_ops.decayed_states(ones, torch.ones(1, 600, 1))
    assert before.dtype == torch.bfloat16
    assert last.item() == 600  # in bf16, 256 + 1 is 256
