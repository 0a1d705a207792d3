"""Plain values and the statistics of them: intervals, growth exponents, crossovers, rankings. Needs no torch.

All intervals are 95 % percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13), the same for the same seed.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Numbers of numpy, also in lists and tuples, as Python's own, which a checkpoint can hold; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def finite(value: Any) -> Any:
    """Plain values for JSON: tuples as lists, keys as text, None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def as_json(value: Any) -> str:
    """Plain values as JSON, the same for every order of keys."""
    return json.dumps(finite(value), sort_keys=True, default=str)


def digest(value: Any) -> str:
    """A short sha256 of `as_json`."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:24]


def one_line(error: Exception, longest: int = 400) -> str:
    """An error's message on one line, cut at `longest` characters; of an error with a file, the file and the reason."""
    about_file = isinstance(error, OSError) and error.filename and error.strerror
    text = f"{error.filename}: {error.strerror}" if about_file else str(error)  # type: ignore[attr-defined]
    return " ".join(text.split())[:longest]


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, str], least: float = 0.6) -> str:
    """`: did you mean ...?` with the known name that a misspelt one resembles; empty where none does.

    A name that is equal but for case and underscores comes first, then the only one that begins with it, then the most
    similar one.

    Args:
        name: as it was typed.
        known: known names, or a mapping from each to what is shown in its place.
        least: similarity from 0 to 1.
    """
    shown = known if isinstance(known, Mapping) else {one: one for one in known}
    plain = {one: re.sub("[_-]", "", one).lower() for one in shown}
    asked = re.sub("[_-]", "", name).lower()
    equal = [one for one, text in plain.items() if text == asked]
    begun = [one for one, text in plain.items() if asked and text.startswith(asked)]
    near = equal[:1] or (begun if len(begun) == 1 else difflib.get_close_matches(name, shown, 1, least))
    return f": did you mean {shown[near[0]]}?" if near else ""


def number(value: float | None, form: str = ".3g") -> str:
    """A number for a table; `-` for None."""
    return "-" if value is None else format(value, form)


RESAMPLES = 2000  # of a bootstrap


def bootstrap_interval(
    samples: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.median,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (Efron & Tibshirani 1993, chapter 13); the same for the same seed.

    Args:
        samples: n independent values, or rows of values (n, ...), all finite.
        statistic: reduces the axis n of an array, which it is told as `axis`: np.median, np.mean, ...
        confidence: share of resampled statistics inside the interval.
        resamples: how many times n values are drawn, with replacement.
        seed: of the drawing; no global random state is used.

    Raises:
        ValueError: without samples, where one or its statistic is no finite number, or a confidence that is no share.
    """
    values = np.asarray(samples, dtype=float)
    if not len(values):
        raise ValueError("samples is empty: an interval needs at least one value")
    if not np.isfinite(values).all():
        raise ValueError(f"samples must be finite numbers, got {values[~np.isfinite(values)][0]}")
    if not 0 <= confidence <= 1 or resamples < 1:
        raise ValueError(f"confidence={confidence} must be from 0 to 1 and resamples={resamples} at least 1")
    random, found = np.random.default_rng(seed), []
    at_once = max(1, 2_000_000 // values.size)  # resamples held in memory
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        found.append(statistic(values[random.integers(len(values), size=(rows, len(values)))], axis=1))
    drawn, tail = np.concatenate(found), (1 - confidence) / 2
    if not np.isfinite(drawn).all():
        raise ValueError("samples have resamples of which the statistic is no finite number")
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(groups: Sequence[np.ndarray]) -> list[float]:
    """95 % bootstrap interval of the mean over groups of their means: values are drawn anew within each group."""
    random, drawn = np.random.default_rng(0), np.zeros(RESAMPLES)
    for values in groups:
        for i in range(RESAMPLES):
            drawn[i] += values[random.integers(len(values), size=len(values))].mean() / len(groups)
    return np.quantile(drawn, [0.025, 0.975]).tolist()


#: A text with fewer documents is cut into parts of equally many tokens, which its intervals are over.
FEW_DOCUMENTS = 5


def ratio_interval(above: np.ndarray, below: np.ndarray) -> list[float]:
    """95 % bootstrap interval of sum(above) / sum(below), both (n,): n documents are drawn anew, with replacement."""

    def ratio(drawn: np.ndarray, axis: int) -> np.ndarray:
        sums = drawn.sum(axis)
        return sums[..., 0] / sums[..., 1]

    return list(bootstrap_interval(np.stack((above, below), 1), ratio))


def paired_difference(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> dict[str, Any]:
    """The mean difference of two models over the seeds that both have, with Student's paired t-test.

    Args:
        ours, theirs: seed -> value.

    Returns:
        pairs; mean of ours - theirs; interval: [low, high], 95 %; p: of so large a mean by chance, two-sided. Interval
        and p are None with fewer than two pairs. The t-test takes the differences for normal: with three to five seeds
        nothing less can reject anything (a sign test of five pairs has p >= 0.06).
    """
    difference = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs], float)
    pairs = len(difference)
    if pairs < 2:
        return {"pairs": pairs, "mean": float(difference.mean()) if pairs else None, "interval": None, "p": None}
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(pairs)
    low, high = 0.0, 1e9  # the quantile of t, by bisection
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided_p(middle, pairs - 1) > 0.05 else (low, middle)
    p = _two_sided_p(abs(mean) / error, pairs - 1) if error else float(not mean)
    return {"pairs": pairs, "mean": mean, "interval": [mean - low * error, mean + low * error], "p": p}


def _two_sided_p(t: float, freedom: int) -> float:
    """The probability that Student's t is beyond -t or t (Abramowitz & Stegun 1972, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd, sine, square = freedom % 2, math.sin(angle), math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return max(0.0, 1 - inside)


def ranks(bounds: Mapping[str, tuple[float, float]]) -> dict[str, tuple[int, int]]:
    """The best and the worst rank that each name can have; less is better.

    Args:
        bounds: name -> the ends of its interval. One name is better than another if its interval lies below; names
            whose intervals overlap are tied.
    """
    found = {}
    for name, (low, high) in bounds.items():
        better = sum(other[1] < low for other in bounds.values())
        worse = sum(other[0] > high for other in bounds.values())
        found[name] = (1 + better, len(bounds) - worse)
    return found


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
