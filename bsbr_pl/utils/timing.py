"""Wall-clock time: of callables in interleaved rounds, of training steps and the waits between them, with intervals."""

import contextlib
import math
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bsbr_pl.utils.files import default_cache_dir, own_folder
from bsbr_pl.values import bootstrap_interval

Clock = Callable[[], float]  # seconds from any start, never going back
Span = tuple[Any, Any]  # its first and its last mark: seconds, or CUDA events


def synchronize(device: str | torch.device) -> None:
    """Wait until `device` has finished its work; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timing_lock() -> FileLock:
    """Lock for measuring times: only one process of this user on this machine holds it at a time.

    Raises:
        OSError: naming the folder, in the user's cache, that cannot be made or used.
    """
    return FileLock(own_folder(default_cache_dir() / "locks") / f"times-{platform.node()}.lock")


def timing_problem() -> str:
    """Why times cannot be locked, as a sentence; empty if they can, now or after another process."""
    try:
        with contextlib.suppress(Timeout), timing_lock().acquire(blocking=False):
            pass
    except OSError as error:
        return f"costs: times cannot be locked ({error.filename or ''}: {error.strerror})"
    return ""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: every sample, their median, and the 95 % bootstrap interval of that median."""

    samples: list[float]
    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as rows hold them."""
        return {"seconds": self.median, "interval": [self.low, self.high], "samples": self.samples}


def measure(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    warmup: int = 2,
    min_seconds: float = 0.0,
    device: str | torch.device = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time several callables in interleaved rounds, so that a drift of the machine's speed affects all of them equally.

    The order within a round is shuffled (the same way every time), and the device is synchronised before and after
    each sample.

    Args:
        calls: what to time, by name.
        rounds: samples of each call.
        warmup: rounds that are not counted, at least 1.
        min_seconds: a sample repeats its call until it should last this long, and is divided by the repeats.
        device: where the calls do their work.
        clock: seconds; another one for tests.

    Raises:
        ValueError: if `rounds` or `warmup` is below 1.
    """
    for name, value in (("rounds", rounds), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    def sample(call: Callable[[], object], repeats: int) -> float:
        synchronize(device)
        start = clock()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (clock() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            seconds = sample(call, 1)
        repeats[name] = max(1, math.ceil(min_seconds / max(seconds, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(sample(calls[name], repeats[name]))
    return {name: summarize(values) for name, values in samples.items()}


def one_more_token(model: Any, ids: Tensor) -> Callable[[], object]:
    """A call that decodes the last of the tokens ids (1, T + 1) of a LanguageModel, each time after the one before.

    It continues the text, as `generate` does: a second step from one state would copy its cache. The text starts again
    after T / 16 tokens, or where positions end.

    Returns:
        The call. It returns logits, the states after it and those before it, which whoever replays it as a CUDA graph
        has to keep.
    """
    with torch.no_grad():
        states = start = model.prefill(ids[:, :-1])[1]
    T = ids.shape[1] - 1
    longest = min(T + max(1, T // 16), model.max_length or 2 * T)

    @torch.no_grad()
    def decode() -> object:
        nonlocal states
        before, (output, after) = states, model.step(ids[:, -1], states)
        states = start if after[0].tokens >= longest else after
        return output, after, before

    return decode


def summarize(samples: Sequence[float]) -> Timing:
    """The median of some seconds and its interval."""
    low, high = bootstrap_interval(samples)
    return Timing(list(samples), float(np.median(samples)), low, high)


@dataclass
class Step:
    """One optimiser step in seconds: its work, and the wait for its data (None if the wait was interrupted)."""

    seconds: float
    wait: float | None


class StepClock:
    """Times optimiser steps of one or more batches, and the waits between batches.

    On CUDA the marks are events in the stream, so that nothing is synchronised before `read`.

    Args:
        device: where the steps are computed.
        clock: seconds, for a CPU.
    """

    def __init__(self, device: str | torch.device = "cpu", clock: Clock = time.perf_counter) -> None:
        self.device = torch.device(device)
        self.clock = clock
        self._start: Any = None  # mark of the current batch
        self._end: Any = None  # mark of the last batch's end; None if the wait since then does not count
        self._spans: list[Span] = []  # the batches of the current step
        self._waits: list[Span | None] = []  # before these batches; None if interrupted
        self._steps: list[tuple[list[Span], list[Span | None]]] = []  # spans and waits of completed steps

    def begin(self) -> None:
        """Mark the start of a batch."""
        self._start = self._mark()
        self._waits.append(None if self._end is None else (self._end, self._start))

    def end(self, stepped: bool = True) -> None:
        """Mark the end of a batch, with an optimiser step or without one (accumulation)."""
        self._end = self._mark()
        self._spans.append((self._start, self._end))
        if stepped:
            self._steps.append((self._spans, self._waits))
            self._spans, self._waits = [], []

    def interrupt(self) -> None:
        """Do not count the time until the next `begin` as a wait for data (a validation or a checkpoint)."""
        self._end = None

    def read(self) -> list[Step]:
        """The steps completed since the last call."""
        if self._steps:
            synchronize(self.device)
        steps = []
        for spans, waits in self._steps:
            known = [self._between(*wait) for wait in waits if wait is not None]
            wait = sum(known) if len(known) == len(waits) else None
            steps.append(Step(sum(self._between(*span) for span in spans), wait))
        self._steps = []
        return steps

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3
