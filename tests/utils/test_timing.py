"""Timing with a scripted clock gives exact numbers; a mocked CUDA is synchronised where it must be only."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bsbr_pl.utils.timing import StepClock, measure, synchronize
from bsbr_pl.values import bootstrap_interval


class ScriptedClock:
    """A clock that advances only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds

        return work


def test_measure_gives_what_the_clock_says_and_interleaves():
    clock, order = ScriptedClock(), []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            order.append(name)
            clock.now += seconds

        return work

    found = measure({"a": call("a", 0.5), "b": call("b", 0.25)}, rounds=4, warmup=2, clock=clock)
    assert found["a"].samples == [0.5] * 4
    assert found["a"].median == 0.5 == found["a"].low == found["a"].high
    assert found["b"].median == 0.25
    counted = order[4:]  # behind two warm-up rounds of two calls
    assert [sorted(counted[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert counted[::2].count("a") not in (0, 4), "the order of a round must change"


def test_measure_repeats_short_calls():
    clock, calls = ScriptedClock(), []

    def work() -> None:
        calls.append(1)
        clock.now += 0.125

    found = measure({"short": work}, rounds=3, warmup=1, min_seconds=1.0, clock=clock)
    assert len(calls) == 1 + 3 * 8
    assert found["short"].samples == [0.125] * 3


def test_measure_is_right_about_a_real_call():
    import time

    found = measure({"sleep": lambda: time.sleep(0.01)}, rounds=5)
    assert 0.01 <= found["sleep"].low <= found["sleep"].median <= found["sleep"].high < 0.1


@pytest.mark.parametrize("name", ["rounds", "warmup"])
def test_measure_refuses_nothing_to_measure(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        measure({}, **{name: 0})


def test_interval_covers_the_true_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = sum(
        low <= 1.0 <= high
        for low, high in (bootstrap_interval(random.normal(1.0, 0.3, 30), resamples=400) for _ in range(200))
    )
    assert 0.9 <= hits / 200 <= 0.99


def test_interval_is_reproducible_takes_a_statistic_and_leaves_random_state_alone():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    values = [1.0, 2.0, 3.0, 10.0]
    assert bootstrap_interval(values, np.mean) == bootstrap_interval(values, np.mean)
    assert bootstrap_interval(values, np.mean)[1] < bootstrap_interval(values, np.max)[1] == 10.0
    assert bootstrap_interval([2.0]) == (2.0, 2.0)
    parts = []
    bootstrap_interval(np.arange(1500.0), lambda rows, axis: parts.append(len(rows)) or rows.mean(axis))
    assert parts == [1333, 667], "large samples, in parts"
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    with pytest.raises(ValueError, match="samples is empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="samples must be finite numbers, got nan"):
        bootstrap_interval([1.0, np.nan])
    for wrong in ({"confidence": 1.5}, {"resamples": 0}):
        with pytest.raises(ValueError, match=r"confidence=.* must be from 0 to 1 and resamples=.* at least 1"):
            bootstrap_interval([1.0], **wrong)


def test_steps_of_several_batches_and_interrupted_waits():
    clock = ScriptedClock()
    steps = StepClock("cpu", clock)

    def batch(wait: float, work: float, stepped: bool) -> None:
        clock.now += wait
        steps.begin()
        clock.now += work
        steps.end(stepped)

    batch(9.0, 1.0, False)  # the wait before the first batch is not known
    batch(0.5, 2.0, True)
    batch(0.25, 1.0, False)
    batch(0.25, 1.0, True)
    steps.interrupt()  # a validation of an hour
    batch(3600.0, 4.0, True)
    assert [(step.seconds, step.wait) for step in steps.read()] == [(3.0, None), (2.0, 0.5), (4.0, None)]
    assert steps.read() == []


def test_cuda_marks_are_events_and_only_read_synchronises(monkeypatch):
    calls, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")
            now[0] += 10.0  # milliseconds
            self.at = now[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    fake = SimpleNamespace(Event=Event, synchronize=lambda device: calls.append(f"synchronize {device}"))
    monkeypatch.setattr(torch, "cuda", fake)
    steps = StepClock("cuda:0")
    for _ in range(3):
        steps.begin()
        steps.end()
    assert calls == ["record"] * 6
    assert [(step.seconds, step.wait) for step in steps.read()] == [(0.01, None), (0.01, 0.01), (0.01, 0.01)]
    assert calls[6:] == ["synchronize cuda:0"]
    synchronize("cpu")
    assert len(calls) == 7, "a CPU is never synchronised"


def test_one_resample_has_no_spread():
    low, high = bootstrap_interval([1.0, 2.0, 5.0], np.mean, resamples=1)
    assert low == high
    with pytest.raises(ValueError, match="resamples=0 at least 1"):
        bootstrap_interval([1.0], resamples=0)
