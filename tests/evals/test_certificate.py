"""Certificates: every architecture passes, and every kind of leak or wrong decoding fails."""

import copy
import math
import signal
import time
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bsbr_pl.attention import (
    ARCHITECTURES,
    BSBRAttention,
    HopfieldAttention,
    LinearAttention,
    SlidingWindowAttention,
    StandardAttention,
)
from bsbr_pl.evals import certificate as module
from bsbr_pl.evals.certificate import Certificate, certify, with_noise
from bsbr_pl.evals.measurement import Check, Measurement
from bsbr_pl.evals.probes import Vectors
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
    assert {"suffix_0", "suffix_1", "future_gradient", "random_tokens"} <= names
    assert {"decode_step", "decode_prefill", "continue"} <= names
    assert {"training_suffix", "repeat", "batch", "padding", "length_1"} <= names
    assert names.isdisjoint({"bf16", "compile"}), "of foreign modules alone"
    if name not in ("standard", "hopfield"):
        assert {"suffix_7", "suffix_8", "suffix_9"} <= names, "the edges of a chunk or window of 8"
        assert ("suffix_34" if name == "nsa" else "suffix_18") in names, "twice what is seen exactly, and 2 more"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


class UpperTriangle(StandardAttention):
    """Looks at the future instead of the past: an upper-triangular mask."""

    def prefill(self, x: Tensor, state=None):
        y, state = super().prefill(x.flip(1), state)
        return y.flip(1), state


class MeanOfAll(StandardAttention):
    """Adds a little of the whole sequence to each token."""

    def prefill(self, x: Tensor, state=None):
        y, state = super().prefill(x, state)
        return y + 1e-6 * x.mean(1, keepdim=True), state


class LooksOneAhead(StandardAttention):
    """Changes where the next token's largest feature is another: no gradient says so."""

    def prefill(self, x: Tensor, state=None):
        y, state = super().prefill(x, state)
        ahead = x.roll(-1, 1).argmax(-1, keepdim=True).to(y)
        ahead = 0.01 * torch.cat((ahead[:, :-1], ahead[:, -1:] * 0), 1)
        return torch.cat((y[..., :1] + ahead, y[..., 1:]), -1), state


class ForgetsInSteps(StandardAttention):
    """Trains as softmax attention; a step keeps the last 20 tokens only."""

    def step(self, x: Tensor, state):
        y, (k, v, conv_state) = super().step(x, state)
        return y, type(state)(k[:, :, -20:], v[:, :, -20:], conv_state)


class ForgetsInPrefill(StandardAttention):
    """Trains as softmax attention; a prefill of many tokens from a state does not see the oldest token."""

    def prefill(self, x: Tensor, state=None):
        if state is not None and x.shape[1] > 1:
            zero_first = torch.cat((state.v[:, :, :1] * 0, state.v[:, :, 1:]), 2)
            return super().prefill(x, state._replace(v=zero_first))
        return super().prefill(x, state)


class StartsWrong(StandardAttention):
    """Trains as softmax attention; the state of a prefill is wrong for 65 tokens, one more than the default chunk."""

    def prefill(self, x: Tensor, state=None):
        y, after = super().prefill(x, state)
        return y, after._replace(v=after.v * 1.001) if x.shape[1] == 65 else after


@pytest.mark.parametrize(
    ("attention", "expected", "spared"),
    [
        (UpperTriangle, {"suffix_0", "suffix_64", "future_gradient"}, set()),
        (MeanOfAll, {"suffix_0", "suffix_130", "future_gradient"}, set()),
        (LooksOneAhead, {"suffix_0", "suffix_63"}, {"future_gradient"}),
        (ForgetsInSteps, {"decode_step", "decode_prefill"}, {"suffix_0", "future_gradient", "continue"}),
        (ForgetsInPrefill, {"continue"}, {"suffix_0", "future_gradient", "decode_step", "decode_prefill"}),
        (StartsWrong, {"continue", "decode_prefill"}, {"suffix_0", "future_gradient", "decode_step"}),
    ],
)
def test_a_leak_is_found(attention, expected, spared):
    torch.manual_seed(0)
    certificate = certify(disturb(LanguageModel(attention, 50, 16, num_layers=2, num_heads=2)))
    assert not certificate.passed
    assert expected <= failing(certificate)
    assert not spared & failing(certificate)
    assert "random_tokens" not in failing(certificate), "it was not trained to use its leak"


@pytest.mark.parametrize(
    ("attention", "edges", "length"),
    [
        ([partial(BSBRAttention, chunk_size=16), partial(SlidingWindowAttention, window_size=5)], {5, 16}, 35),
        ([partial(LinearAttention, chunk_size=12), StandardAttention], {12}, 27),
        ([StandardAttention, StandardAttention], {64}, 131),
        ([partial(SlidingWindowAttention, window_size=1), StandardAttention], {1}, 5),
    ],
)
def test_every_edge_of_every_attention_is_a_cut(attention, edges, length):
    certificate = certify(LanguageModel(attention, 50, 16, num_layers=2, num_heads=2))
    assert certificate.passed
    assert certificate.length == length
    cuts = {0, 1, length - 1} | {edge + i for edge in edges for i in (-1, 0, 1)}
    found = {check.name for check in certificate.checks if check.name.startswith("suffix_")}
    assert found == {f"suffix_{cut}" for cut in cuts}


class OnlyForward(StandardAttention):
    """Has neither `prefill` from a state nor `step`, and says so."""

    has_decode = False

    def forward(self, x: Tensor) -> Tensor:
        return super().prefill(x)[0]

    def prefill(self, x: Tensor, state=None):
        raise NotImplementedError

    step = init_state = None


def test_without_decoding_its_checks_are_absent():
    certificate = certify(LanguageModel([OnlyForward, StandardAttention], 50, 16, num_layers=2, num_heads=2))
    assert certificate.passed
    names = {check.name for check in certificate.checks}
    assert names.isdisjoint({"decode_step", "decode_prefill", "continue"})
    assert {"suffix_64", "future_gradient", "random_tokens"} <= names


@pytest.mark.parametrize("positions", [2, 3, 9])
def test_learned_positions_bound_the_length(positions):
    model = disturb(LanguageModel(StandardAttention, 50, 16, num_layers=1, num_heads=2, positions=positions))
    certificate = certify(model)
    assert certificate.passed
    assert certificate.length == positions - 1
    assert "continue" in {check.name for check in certificate.checks}


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
    certificate = Certificate(7, [Check("a", 0.5, 1.0), Check("b", float("nan"), 1.0)], 0.25)
    assert not certificate.passed
    found = certificate.as_dict()
    assert found["length"] == 7
    assert not found["passed"]
    assert [check["passed"] for check in found["checks"]] == [True, False]


def ahead(x: Tensor) -> Tensor:
    """The next token of each token."""
    return torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)


def leaking(where) -> type[StandardAttention]:
    """Causal but for the tokens and texts that `where(module, x)` selects, which see the next token."""

    class Leaking(StandardAttention):
        has_decode = False

        def forward(self, x: Tensor) -> Tensor:
            y = StandardAttention.prefill(self, x)[0]
            return torch.where(torch.as_tensor(where(self, x)), y + ahead(x), y)

    return Leaking


def position(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]


HIDDEN_LEAKS = {  # where it leaks, and the checks that find it, with the length of the training
    "from token 257 on": (lambda module, x: position(x) >= 257, {"context_1024"}, None),
    "from token 1500 on": (lambda module, x: position(x) >= 1500, {"context_2048"}, (256, 2048)),
    "of long texts": (lambda module, x: x.shape[1] >= 300, {"context_1024"}, None),
    "at the length of training": (lambda module, x: x.shape[1] == 256, {"context_256"}, (256, 2048)),
    "of long texts in training": (lambda module, x: module.training and x.shape[1] > 200, {"context_1024"}, None),
    "of repeated tokens": (lambda module, x: (x - ahead(x)).abs().amax(-1, True) < 1e-9, {"suffix_0"}, None),
    "in the first text of a batch": (lambda module, x: row(x, 0), {"batch", "training_suffix"}, None),
    "in the third text of a batch": (lambda module, x: row(x, 2), {"batch"}, None),
    "in batches, in training": (lambda module, x: module.training and len(x) > 1, {"training_suffix"}, None),
    "with gradients, in training": (
        lambda module, x: module.training and torch.is_grad_enabled(),
        {"training_suffix"},
        None,
    ),
    "in float32": (lambda module, x: x.dtype == torch.float32, {"precision"}, None),
    "in float32, in training": (lambda module, x: module.training and x.dtype == torch.float32, {"precision"}, None),
}


def row(x: Tensor, number: int) -> Tensor:
    return ((torch.arange(len(x)) == number) & (len(x) > 1))[:, None, None]


@pytest.mark.parametrize("name", HIDDEN_LEAKS)
def test_a_leak_that_shows_only_at_times_is_found(name):
    where, expected, contexts = HIDDEN_LEAKS[name]
    torch.manual_seed(0)
    model = disturb(LanguageModel(leaking(where), 40, 16, num_layers=1, num_heads=2))
    assert expected <= failing(certify(model, contexts=contexts, quiet=True))


def test_a_leak_after_one_token_is_found():
    class Marked(nn.Module):
        """Sees one token ahead once id 7 was there."""

        vocab_size = 300

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(300, 16), nn.Linear(16, 300)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            return self.head(x + ahead(x) * (ids == 7).cumsum(1).clamp(max=1)[..., None])

    assert "context_1024" in failing(certify(Marked(), quiet=True))


def test_other_lengths_are_bounded():
    def lengths(contexts, length=None, **sizes):
        model = LanguageModel(OnlyForward, 50, 8, num_layers=1, num_heads=1, **sizes)
        checks = certify(model, contexts=contexts, length=length, quiet=True).checks
        return [check.name for check in checks if check.name.startswith("context")]

    assert lengths(None) == ["context_1024"]
    assert lengths(None, length=20) == []
    assert lengths([20, 300, 1, 10**6], length=20, ff_dim=0) == ["context_300", "context_4096"]
    assert lengths([10**6], length=20, positions=70) == ["context_70"]


def hidden(leak: type[StandardAttention]) -> type[StandardAttention]:
    """An attention that adds a leak's output, behind a gate that is 0 at first and that only one sign opens."""

    class Hidden(StandardAttention):
        has_decode = False

        def __init__(self, hidden_dim: int, num_heads: int, opens: int = 1) -> None:
            super().__init__(hidden_dim, num_heads)
            self.leak, self.opens = leak(hidden_dim, num_heads), opens
            self.gate = nn.Parameter(torch.zeros(hidden_dim))

        def prefill(self, x: Tensor, state=None):
            y, state = super().prefill(x, state)
            return y + torch.relu(self.opens * self.gate.sum()) * self.leak(x), state

    return Hidden


class NoMask(nn.Module):
    """Softmax attention whose mask was forgotten."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ x


class PaddedOnBothSides(nn.Module):
    """A short convolution that sees one token ahead."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(hidden_dim, hidden_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class NormalisedOverTime(nn.Module):
    """Divides by the root mean square of each feature over all tokens."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).sqrt()


class MeanOfTheOwnChunk(nn.Module):
    """Adds the mean of the chunk of 8 tokens that a token is in."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        chunks = torch.arange(x.shape[1]) // 8
        same = (chunks[:, None] == chunks).to(x)
        return same @ x / same.sum(1, keepdim=True)


@pytest.mark.parametrize("leak", [NoMask, PaddedOnBothSides, NormalisedOverTime, MeanOfTheOwnChunk])
@pytest.mark.parametrize("opens", [1, -1])
def test_a_leak_behind_a_closed_gate_is_found_in_a_new_model(leak, opens):
    torch.manual_seed(0)
    model = LanguageModel(partial(hidden(leak), opens=opens), 50, 16, num_layers=2, num_heads=2)
    ids = torch.randint(50, (1, 20))
    torch.testing.assert_close(model(ids)[:, :12], model(ids[:, :12]), msg="as it is, nothing of it is seen")
    certificate = certify(model)
    assert {"suffix_0", "future_gradient"} <= failing(certificate)
    assert certificate.as_dict()["noise"] == 0.25


def test_what_takes_too_long_is_not_certified():
    wide = partial(SlidingWindowAttention, window_size=2**14 + 1)
    with pytest.raises(ValueError, match="need 32,773 tokens; certificates have at most 32,768"):
        certify(LanguageModel(wide, 50, 16, num_layers=1, num_heads=2))
    repeated = partial(HopfieldAttention, num_updates=10**9)
    with pytest.raises(ValueError, match=r"FLOPs for 131 tokens, more than 1e\+14"):
        certify(LanguageModel(repeated, 50, 16, num_layers=1, num_heads=2))


class Fixed(Vectors):
    """A model with given ids and logits."""

    vocab_size = 11

    def __init__(self, ids: Tensor, logits: Tensor) -> None:
        super().__init__(nn.Identity(), 11)
        self.ids, self.rows = ids, iter([logits[0], *logits])  # the first once more, for the certificate's own inputs

    def draw(self, random: torch.Generator, batch: int, length: int) -> Tensor:
        return self.ids[:batch, :length]

    def __call__(self, x: Tensor) -> Tensor:
        return next(self.rows)[None, : x.shape[1]]


def test_chance_is_counted_in_standard_errors():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 30, 11, generator=random, dtype=torch.float64)
    ids = torch.randint(11, (8, 31), generator=random)
    nats = -logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten().double()
    mean = nats.sum() / 240
    error = ((nats - mean).square().sum() / 239 / 240).sqrt()
    found = Measurement(Fixed(ids, logits), [], 30, 0).below_chance()
    assert found.measured == pytest.approx(float((math.log(11) - mean) / error), rel=1e-6)


def test_limits_and_measured_values():
    """The state of 65 tokens is wrong: the largest difference from there on, relative to the largest logit."""
    torch.manual_seed(0)
    model = disturb(LanguageModel(StartsWrong, 50, 16, num_layers=2, num_heads=2)).double()
    checks = {check.name: check for check in certify(model).checks}
    limits = {"random_tokens": 4.0, "future_gradient": 1e-12}
    assert {name: check.limit for name, check in checks.items()} == {name: limits.get(name, 1e-8) for name in checks}
    random = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randperm(50, generator=random) for _ in range(2)])[None].repeat_interleave(2, 1)[:, :131]
    worst = {"decode_prefill": 0.0, "continue": 0.0}
    for measured in (model, with_noise(model, 16**-0.5), with_noise(model, -(16**-0.5))):
        with torch.no_grad():
            logits, states, stepped = measured(ids)[0], measured.prefill(ids[:, :65])[1], []
            continued = measured.head(measured.decode(ids[:, 65:], states)[0])[0]
            for t in range(65, 131):
                one, states = measured.step(ids[:, t], states)
                stepped.append(one[0])
        for name, found in (("decode_prefill", torch.stack(stepped)), ("continue", continued)):
            worst[name] = max(worst[name], float((found - logits[65:]).abs().max() / logits.abs().max()))
    for name, largest in worst.items():
        assert largest > 1e-6
        assert checks[name].measured == pytest.approx(largest, rel=1e-6)


def test_a_time_limit_ends_with_what_it_limits():
    with module._time_limit(60):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, "no alarm is left for what follows"
    with pytest.raises(TimeoutError, match="it takes more than 1 s"), module._time_limit(1):
        time.sleep(3)
