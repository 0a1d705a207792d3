"""Certificates: every architecture earns one, and every kind of leak loses it."""

import copy

import pytest
import torch
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES, StandardAttention
from bsbr_pl.evals.certificate import Certificate, Check, certify
from bsbr_pl.model import LanguageModel


def disturb(model: LanguageModel) -> LanguageModel:
    """Weights without zeros, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def failing(certificate: Certificate) -> set[str]:
    return {check.name for check in certificate.checks if not check.passed}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_certified(name, make_module):
    model = disturb(make_module(name).model)
    before = copy.deepcopy(model.state_dict())
    certificate = certify(model)
    assert certificate.passed, certificate
    names = {check.name for check in certificate.checks}
    assert {"suffix_0", "suffix_1", "future_gradient", "random_tokens", "decode_step", "decode_prefill"} <= names
    if name not in ("standard", "hopfield"):
        assert {"suffix_7", "suffix_8", "suffix_9", "suffix_18"} <= names, "the edges of a chunk or window of 8"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


class UpperTriangle(StandardAttention):
    """Looks at the future instead of the past: an upper-triangular mask."""

    def prefill(self, x: Tensor):  # type: ignore[override]
        y, state = super().prefill(x.flip(1))
        return y.flip(1), state


class MeanOfAll(StandardAttention):
    """Adds a little of the whole sequence to each token."""

    def prefill(self, x: Tensor):  # type: ignore[override]
        y, state = super().prefill(x)
        return y + 1e-6 * x.mean(1, keepdim=True), state


class LooksOneAhead(StandardAttention):
    """Changes where the next token's largest feature is another: no gradient says so."""

    def prefill(self, x: Tensor):  # type: ignore[override]
        y, state = super().prefill(x)
        ahead = x.roll(-1, 1).argmax(-1, keepdim=True).to(y)
        ahead = 0.01 * torch.cat((ahead[:, :-1], ahead[:, -1:] * 0), 1)
        return torch.cat((y[..., :1] + ahead, y[..., 1:]), -1), state


class ForgetsInDecoding(StandardAttention):
    """Trains as softmax attention, decodes without its oldest token."""

    def step(self, x: Tensor, state):  # type: ignore[override]
        y, (k, v, before) = super().step(x, state)
        return y, type(state)(k[:, :, -20:], v[:, :, -20:], before)


@pytest.mark.parametrize(
    ("attention", "expected", "spared"),
    [
        (UpperTriangle, {"suffix_0", "suffix_64", "future_gradient"}, set()),
        (MeanOfAll, {"suffix_0", "suffix_130", "future_gradient"}, set()),
        (LooksOneAhead, {"suffix_0", "suffix_63"}, {"future_gradient"}),
        (ForgetsInDecoding, {"decode_step", "decode_prefill"}, {"suffix_0", "future_gradient"}),
    ],
)
def test_a_leak_is_found(attention, expected, spared):
    torch.manual_seed(0)
    certificate = certify(disturb(LanguageModel(attention, 50, 16, num_layers=2, num_heads=2)))
    assert not certificate.passed
    assert expected <= failing(certificate)
    assert not spared & failing(certificate)
    assert "random_tokens" not in failing(certificate), "it was not trained to use its leak"


def test_a_model_that_learnt_to_use_its_leak_beats_chance_on_random_tokens():
    torch.manual_seed(0)
    model = LanguageModel(UpperTriangle, 20, 32, num_layers=1, num_heads=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        ids = torch.randint(20, (4, 132))
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 2.5, "ln 20 is 3.0"
    assert "random_tokens" in failing(certify(model))


def test_weights_that_are_not_numbers_fail():
    model = LanguageModel(StandardAttention, 50, 16, num_layers=1, num_heads=2)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    certificate = certify(model)
    assert not certificate.passed
    assert {"suffix_0", "decode_step", "random_tokens"} <= failing(certificate)


def test_a_vocabulary_of_one_has_nothing_to_leak():
    assert certify(LanguageModel(StandardAttention, 1, 16, num_layers=1, num_heads=2)).passed


def test_as_dict_is_plain():
    certificate = Certificate(7, [Check("a", 0.5, 1.0), Check("b", float("nan"), 1.0)])
    assert not certificate.passed
    found = certificate.as_dict()
    assert found["length"] == 7
    assert not found["passed"]
    assert [check["passed"] for check in found["checks"]] == [True, False]
