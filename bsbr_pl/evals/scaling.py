"""How the cost of models grows with the length of the sequence: time, memory, FLOPs, decode state.

The cost is that of a model's body, embedding to last norm, for one sequence. The head is left out: it costs every
architecture the same per token, and would hide what is compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.memory import measure_memory
from bsbr_pl.utils.timing import Timing, measure

#: What is timed: the forward pass, forward and backward, and one more token after T of them.
PASSES = ("forward", "training", "decode")


def measure_costs(
    models: Mapping[str, LanguageModel],
    length: int,
    rounds: int = 5,
    passes: Sequence[str] = PASSES,
    memory: bool = True,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The cost of every model at one length, batch size 1, all timed in the same interleaved rounds.

    Args:
        models: by name, on one device; they are put into evaluation mode, and their gradients stay as they were.
        length: tokens T of the sequence.
        rounds: samples of each time.
        passes: which of `forward`, `training` and `decode` to time.
        memory: also measure peak memory, by one more forward and training pass.
        seed: of the random tokens.

    Returns:
        for each name: forward, training, decode -> {"seconds": median, "interval": [low, high], "samples"};
        forward_bytes, training_bytes -> peak beyond what the model and its input hold; forward_flops (2 a
        multiply-add, by the closed form); state_bytes of the decode state in the model's dtype.
    """
    device = next(iter(models.values())).embedding.weight.device
    ids = {
        name: torch.randint(model.eval().vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(seed)).to(
            device
        )
        for name, model in models.items()
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for one in passes:
        calls = {name: call(model, ids[name], one) for name, model in models.items()}
        shortest = 0.02 if one == "decode" else 0.0  # a decoded token is too quick for one reading of the clock
        for name, timing in measure(calls, rounds, warmup=1, min_seconds=shortest, device=device).items():
            found[name][one] = as_dict(timing)
    for name, model in models.items():
        weight = model.embedding.weight
        if memory:
            for one in ("forward", "training"):
                used = measure_memory(call(model, ids[name], one), device, [model, ids[name]])
                found[name][f"{one}_bytes"] = used["peak_bytes"] - used["held_bytes"]
        found[name]["forward_flops"] = model.flops(length) - 2 * length * weight.numel()
        found[name]["state_bytes"] = model.state_size(length) * weight.element_size()
    return found


def call(model: LanguageModel, ids: Tensor, one: str) -> Callable[[], object]:
    """One of the `PASSES` over ids (1, T + 1): over the first T tokens, or over the last one after them."""

    @torch.no_grad()
    def forward() -> object:
        return model.hidden(ids[:, :-1])

    def training() -> object:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(model.hidden(ids[:, :-1]).sum(), parameters, allow_unused=True)

    if one == "forward":
        return forward
    if one == "training":
        return training
    if one != "decode":
        raise ValueError(f"passes must be among {', '.join(PASSES)}, got {one!r}")
    with torch.no_grad():
        states = model.prefill(ids[:, :-1])[1]

    @torch.no_grad()
    def decode() -> object:
        return model.step(ids[:, -1], states)

    return decode


def as_dict(timing: Timing) -> dict[str, Any]:
    """Plain values, for a record."""
    return {"seconds": timing.median, "interval": [timing.low, timing.high], "samples": timing.samples}


# What the measurements say. `samples`: length -> values, one for each round; a single value has no spread.

Samples = Mapping[int, Sequence[float]]


def _above_zero(samples: Samples) -> list[int]:
    """The lengths whose values all have a logarithm.

    Raises:
        ValueError: a length below 1, or a value that is no finite number.
    """
    for length, values in samples.items():
        if length < 1 or not np.isfinite(values).all():
            raise ValueError(f"samples must map lengths of at least 1 to finite numbers, got {length}: {list(values)}")
    return sorted(length for length, values in samples.items() if len(values) and min(values) > 0)


def exponent(samples: Samples, shortest: int = 0, resamples: int = 1000) -> dict[str, Any] | None:
    """The slope of ln(median) over ln(length): the cost grows as length^exponent.

    Args:
        samples: values at each length; those with a value of 0 or less are left out.
        shortest: lengths below are left out.
        resamples: bootstrap resamples of the rounds, for the interval.

    Returns:
        exponent, interval [low, high] (95 %), lengths [shortest, longest]; None with fewer than two lengths.
    """
    lengths = [length for length in _above_zero(samples) if length >= shortest]
    if len(lengths) < 2:
        return None
    drawn = np.log([_medians(samples[length], resamples, length) for length in lengths])  # (lengths, 1 + resamples)
    slopes = np.polyfit(np.log(lengths), drawn, 1)[0]
    low, high = np.quantile(slopes[1:], [0.025, 0.975])
    return {"exponent": float(slopes[0]), "interval": [float(low), float(high)], "lengths": [lengths[0], lengths[-1]]}


def crossover(samples: Samples, other: Samples, resamples: int = 1000) -> dict[str, Any]:
    """From which length on `samples` stays below `other`, between lengths on straight lines in logarithms.

    Lengths that either has no value above 0 for are left out.

    Returns:
        length: where it passes; the shortest common length if it was below all along; None if it is not below at the
        longest. interval: [low, high], 95 %, over bootstrap resamples of the rounds; high None where more than 2.5 %
        of these do not pass. longest: the longest common length.
    """
    lengths = sorted({*_above_zero(samples)} & {*_above_zero(other)})
    if not lengths:
        return {"length": None, "interval": None, "longest": None}
    ours, theirs = (
        np.log([_medians(which[length], resamples, 2 * length + i) for length in lengths])
        for i, which in enumerate((samples, other))
    )
    passed = np.array([_last_zero(np.log(lengths), column) for column in (ours - theirs).T])
    low, high = np.quantile(passed[1:], [0.025, 0.975], method="nearest")
    as_length = [round(math.exp(value)) if math.isfinite(value) else None for value in (passed[0], low, high)]
    return {"length": as_length[0], "interval": as_length[1:], "longest": lengths[-1]}


def _medians(values: Sequence[float], resamples: int, seed: int) -> np.ndarray:
    """(1 + resamples,): the median, then those of values drawn anew with replacement."""
    array = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    return np.concatenate(([np.median(array)], np.median(array[chosen], axis=1)))


def _last_zero(x: np.ndarray, difference: np.ndarray) -> float:
    """Where a piecewise linear function last falls below 0; x[0] if it always is, infinity if not at its end."""
    if difference[-1] >= 0:
        return math.inf
    above = np.flatnonzero(difference >= 0)
    if not len(above):
        return float(x[0])
    i = above[-1]
    return float(x[i] + (x[i + 1] - x[i]) * difference[i] / (difference[i] - difference[i + 1]))
