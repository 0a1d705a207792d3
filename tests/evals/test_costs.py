"""Costs: what is measured, and what exponents and crossovers make of it."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.evals.costs import call, measure_costs
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.memory import LiveTensors
from bsbr_pl.values import crossover, exponent

LENGTHS = [256, 512, 1024, 2048, 4096]


def quadratic(length: int) -> list[float]:
    return [1e-6 * length**2 * (1 + 0.01 * i) for i in range(-2, 3)]


def linear(length: int) -> list[float]:
    return [1e-3 * length * (1 + 0.01 * i) for i in range(-2, 3)]


def test_exponents_are_those_of_the_curve():
    found = exponent({length: quadratic(length) for length in LENGTHS})
    assert found is not None
    assert found["exponent"] == pytest.approx(2)
    assert found["interval"][0] < 2 < found["interval"][1]
    assert found["interval"][1] - found["interval"][0] < 0.1
    assert found["lengths"] == [256, 4096]
    mixed = {length: [max(1e6, float(length) ** 2)] for length in LENGTHS}
    late = exponent(mixed, shortest=1024)
    assert late is not None
    assert late["exponent"] == pytest.approx(2)
    assert late["interval"] == pytest.approx([2, 2]), "one value a length has no spread"
    assert exponent({256: [1.0]}) is None
    assert exponent({256: [0.0], 512: [0.0]}) is None, "nothing has no exponent"


def test_a_crossover_is_where_the_curves_meet():
    found = crossover({n: linear(n) for n in LENGTHS}, {n: quadratic(n) for n in LENGTHS})
    assert found["length"] == pytest.approx(1000, abs=1)
    low, high = found["interval"]
    assert 950 < low <= found["length"] <= high < 1050
    assert found["longest"] == 4096


def test_a_crossover_that_is_not_reached_or_was_there_all_along():
    fast, slow = {n: [0.1 * n] for n in LENGTHS}, {n: [0.2 * n] for n in LENGTHS}
    assert crossover(slow, fast) == {"length": None, "interval": [None, None], "longest": 4096}
    assert crossover(fast, slow) == {"length": 256, "interval": [256, 256], "longest": 4096}
    assert crossover({256: [1.0]}, {512: [1.0]})["length"] is None, "no length in common"
    back = crossover(dict(zip(LENGTHS, [[1.0], [3.0], [1.0], [3.0], [1.0]], strict=True)), {n: [2.0] for n in LENGTHS})
    assert 2048 < back["length"] < 4096, "it passed before, and fell behind again"


def test_a_length_without_cost_is_left_out():
    free = {256: [0.1], 512: [0.0], 1024: [0.0]}
    assert crossover(free, {n: [1.0] for n in free}) == {"length": 256, "interval": [256, 256], "longest": 256}
    assert crossover({256: [0.0]}, {256: [1.0]}) == {"length": None, "interval": None, "longest": None}


@pytest.mark.parametrize("samples", [{256: [1.0, math.nan], 512: [1.0]}, {256: [math.inf], 512: [1.0]}, {0: [1.0]}])
def test_what_is_no_measurement_is_refused(samples):
    for ask in (exponent, partial(crossover, {256: [1.0]})):
        with pytest.raises(
            ValueError, match=r"samples must map lengths of at least 1 to finite numbers, got (256|0): "
        ):
            ask(samples)


def test_an_uncertain_crossover_says_so():
    noisy = {n: [0.2 * n, 0.09 * n, 0.09 * n] for n in LENGTHS}
    found = crossover(noisy, {n: [0.1 * n] for n in LENGTHS})
    assert found["length"] == 256
    assert found["interval"][0] == 256
    assert found["interval"][1] is None, "some resamples never pass"


def bytes_of(state) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(bytes_of, state)) if isinstance(state, list | tuple) else 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_costs_are_those_of_the_body(name, make_module):
    model = make_module(name).model
    (found,) = measure_costs({"m": model}, 20, rounds=3).values()
    for one in ("forward", "training", "decode"):
        low, high = found[one]["interval"]
        assert 0 < low <= found[one]["seconds"] <= high
        assert len(found[one]["samples"]) == 3
    assert found["forward_flops"] == model.flops(20) - 2 * 20 * 16 * 257
    assert found["state_bytes"] == 4 * model.state_size(20) == bytes_of(model.prefill(torch.zeros(1, 20).long())[1])
    low = copy.deepcopy(model).bfloat16()
    (found_low,) = measure_costs({"m": low}, 20, rounds=1, passes=(), memory=False).values()
    assert found_low["state_bytes"] == bytes_of(low.prefill(torch.zeros(1, 20).long())[1])
    assert (2 * found_low["state_bytes"] == found["state_bytes"]) == (
        name in ("standard", "sliding_window", "hopfield")
    )
    ids = torch.zeros(1, 20, dtype=torch.long)
    with LiveTensors(model, ids) as live, torch.no_grad():
        live.reset()
        before = live.current
        model.hidden(ids)
    assert found["forward_bytes"] == pytest.approx(live.peak - before, rel=0.05)
    assert found["training_bytes"] > found["forward_bytes"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_decoding_one_token_repeats_the_same_token(make_module):
    """A timed call must not grow the state it starts from."""
    for name in ARCHITECTURES:
        model = make_module(name).model.eval()
        decode = call(model, torch.randint(257, (1, 21), generator=torch.Generator().manual_seed(0)), "decode")
        first, second = decode(), decode()
        assert torch.equal(first[0], second[0]), name


@pytest.mark.parametrize(("positions", "lengths"), [(0, [33, 34, 33, 34]), (33, [33, 33, 33, 33])])
def test_decoding_continues_for_a_sixteenth_of_the_text_and_starts_again(positions, lengths):
    model = LanguageModel(ARCHITECTURES["standard"], 9, 16, positions=positions)
    decode = call(model.eval(), torch.zeros(1, 33, dtype=torch.long), "decode")
    assert [decode()[1][0].tokens for _ in range(4)] == lengths


def test_an_unknown_pass_is_named(make_module):
    with pytest.raises(ValueError, match="forward, training, decode, got 'backward'"):
        measure_costs({"m": make_module("linear").model}, 8, passes=["backward"])


@pytest.fixture(scope="module")
def rounds():
    """Twenty-five noisy rounds of a quadratic and of a linear cost, which meet at 1,000 tokens."""
    random = np.random.default_rng(1)
    noise = {n: random.lognormal(0, 0.2, (2, 25)) for n in LENGTHS}
    return {n: 1e-6 * n**2 * noise[n][0] for n in LENGTHS}, {n: 1e-3 * n * noise[n][1] for n in LENGTHS}


def bootstrapped(samples, count=4000):
    """(count, lengths) logarithms of medians of rounds that were drawn anew."""
    random = np.random.default_rng(2)
    return np.log([np.median(samples[n][random.integers(25, size=(count, 25))], 1) for n in LENGTHS]).T


def test_intervals_leave_out_two_and_a_half_percent_at_each_end(rounds):
    quadratic, linear = rounds
    x, drawn = np.log(LENGTHS), bootstrapped(quadratic)
    slopes = ((x - x.mean()) * (drawn - drawn.mean(1, keepdims=True))).sum(1) / ((x - x.mean()) ** 2).sum()
    difference = bootstrapped(linear) - drawn  # below 0 from where the linear cost is less
    last = [row.nonzero()[0][-1] for row in difference >= 0]
    passed = [x[i] + (x[i + 1] - x[i]) * d[i] / (d[i] - d[i + 1]) for i, d in zip(last, difference, strict=True)]
    intervals = exponent(quadratic)["interval"], crossover(linear, quadratic)["interval"]
    for values, (low, high) in zip((slopes, np.exp(passed)), intervals, strict=True):
        assert (values < low).mean() == pytest.approx(0.025, abs=0.012)
        assert (values > high).mean() == pytest.approx(0.025, abs=0.012)


def test_the_shortest_length_of_a_fit_counts():
    assert exponent({n: [float(n)] for n in LENGTHS}, shortest=1024)["lengths"] == [1024, 4096]
    bent = {256: [1.0], 512: [1.0], 1024: [1.0], 2048: [4.0], 4096: [4.0]}
    assert exponent(bent, shortest=1024)["exponent"] == pytest.approx(1.0), "of 2048 and 4096 alone it would be 0"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_pass_does_what_it_says(name, make_module):
    model = make_module(name, dropout=0.5).model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # untrained branches add nothing
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.randint(257, (1, 21), generator=torch.Generator().manual_seed(0))
    measure_costs({"m": model}, 20, rounds=1, passes=[], memory=False)
    assert not model.training, "without dropout"
    hidden = model.hidden(ids)
    torch.testing.assert_close(call(model, ids, "forward")(), model.hidden(ids[:, :20]))
    gradients = torch.autograd.grad(hidden[:, :20].sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(call(model, ids, "training")(), gradients)
    torch.testing.assert_close(call(model, ids, "decode")()[0], model(ids)[:, 20], msg="the token after all others")


def test_each_round_is_one_pass_and_memory_is_a_pass_of_its_own(make_module, monkeypatch):
    model = make_module("linear").model
    calls, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: (calls.append(torch.is_grad_enabled()), hidden(ids))[1])
    found = measure_costs({"m": model}, 20, rounds=3, passes=["forward", "training"])["m"]
    assert calls == [False] * 4 + [True] * 4 + [False, True], "one round of warm-up, three that count"
    assert not found.keys() & {"decode"}
    assert set(measure_costs({"m": model}, 20, rounds=1, passes=["decode"], memory=False)["m"]) == {
        "decode", "forward_flops", "state_bytes"
    }  # fmt: skip
    assert len(calls) == 10
