"""Figures from the values of rows: pooled over seeds, with their intervals, and compared."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from bsbr_pl.results import Row
from bsbr_pl.values import exponent, ratio_interval

from .tables import Column, Measured

LONG = 2048  # tokens from which on exponents are fitted, if there are two such lengths
OWN = 0  # as a length: that at which training validated
LISTS = {"slices": "slice", "recall": "slice", "by_position": "stop"}  # in the values, and the name of an entry
FIGURE = ["length", "part", "which", "name", "at"]  # identify a figure of a checkpoint


def entries(length: int, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Every number in the values of a row of kind `text` or `recall`, as FIGURE, value, low, high.

    `part` is "" for the whole, or the list that the number stands in; `which`, the entry of the list; `at`, the tokens
    that the entry gives.
    """
    intervals = values.get("interval") or {}
    for name, value in values.items():
        if not isinstance(value, list | dict):
            interval = intervals.get(name) or (None, None)
            yield length, "", "", name, None, value, *interval
    for part, by in LISTS.items():
        for entry in values.get(part) or []:
            interval = entry.get("interval") or (None, None)
            yield length, part, entry[by], "accuracy", entry.get("length"), entry.get("accuracy"), *interval
            yield length, part, entry[by], "loss", None, entry.get("loss"), None, None


def pooled(rows: Iterable[tuple[int, Row]], runs: int) -> pd.DataFrame:
    """The mean over seeds with the least and the largest; of a single run, its value with its own interval.

    Args:
        rows: length (or OWN) and row, of every run.
        runs: number of runs; a figure that is missing in one run is left out.

    Returns:
        Columns length, part, which, name, at, and figure (Measured).
    """
    found: dict[tuple[Any, ...], list[Measured]] = {}
    for length, row in rows:
        for *key, value, low, high in entries(length, row["values"]):
            if value is not None:
                found.setdefault(tuple(key), []).append(Measured(value, low, high))
    figures = []
    for figure, measured in found.items():
        if len(measured) == runs:
            values = [one.value for one in measured]
            low, high = (measured[0].low, measured[0].high) if runs == 1 else (min(values), max(values))
            figures.append((*figure, Measured(fmean(values), low, high)))
    return pd.DataFrame(figures, columns=[*FIGURE, "figure"], dtype=object)


def wide(figures: pd.DataFrame, index: str, columns: str, **where: Any) -> pd.DataFrame:
    """A frame of figures: a row for each `index`, a column for each value of `columns`, in the order of appearance.

    Args:
        where: values that the other columns must have.
    """
    figures = _chosen(figures, where)
    return figures.pivot(index=index, columns=columns, values="figure")[list(figures[columns].unique())]


def difference(rows: Sequence[Row], others: Sequence[Row]) -> Measured | None:
    """Difference in bits per byte to others, paired by document, seeds averaged.

    A tie if the interval over documents contains 0, or if the seeds of the two overlap.
    """
    nats, size = _blocks(rows)
    theirs, their_size = _blocks(others)
    if not len(size) or not np.array_equal(size, their_size):
        return None
    more, bits = nats.mean(0) - theirs.mean(0), math.log(2) * size
    if not np.isfinite(more).all() or not bits.sum() > 0:
        return None
    low, high = ratio_interval(more, bits)
    ours, other = nats.sum(1), theirs.sum(1)  # of each seed
    several = len(ours) > 1 or len(other) > 1
    overlap = several and ours.min() <= other.max() and other.min() <= ours.max()
    return Measured(float(more.sum() / bits.sum()), low, high, "tied" if low <= 0 <= high or overlap else "")


def _blocks(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Nats (seeds, blocks) of blocks of documents, and their bytes (blocks,); empty if the seeds have other blocks."""
    blocks = [row["values"].get("blocks") for row in rows]
    sizes = {(len(block["nats"]), *block["bytes"]) for block in blocks if block}
    if not blocks or None in blocks or len(sizes) > 1 or len(blocks[0]["nats"]) != len(blocks[0]["bytes"]):
        return np.zeros((0, 0)), np.zeros(0)
    return np.array([block["nats"] for block in blocks], float), np.array(blocks[0]["bytes"], float)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points on the Pareto front (less is better), in order of x."""

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(*points[name])), key=lambda name: (points[name], name))


def nearest(lengths: Iterable[int], length: int | None) -> int | None:
    """The length nearest to another by ratio; the shorter of two."""
    if not length:
        return None
    return min(lengths, key=lambda one: (abs(math.log(one / length)), one), default=None)


def only(figures: pd.DataFrame, **where: Any) -> Measured | None:
    """The first figure with these values in its columns, or None."""
    found = _chosen(figures, where)["figure"]
    return None if found.empty else found.iloc[0]


def _chosen(figures: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for name, value in where.items():
        figures = figures[figures[name] == value]
    return figures


def cost_figure(value: Any) -> tuple[Measured | None, list[float]]:
    """A cost of a row: its figure, and every time or the number itself, if all are above 0."""
    timed = value if isinstance(value, dict) else {"seconds": value, "samples": [value]}
    low, high = timed.get("interval") or (None, None)
    seconds, samples = timed.get("seconds"), timed.get("samples") or []
    if None in samples or min(samples, default=0) <= 0:
        samples = []
    return None if seconds is None else Measured(seconds, low, high), samples


def fitted_from(lengths: pd.Series) -> int:
    """The length from which on exponents are fitted: 2,048 if there are two such lengths, else the shortest."""
    return LONG if lengths[lengths >= LONG].nunique() > 1 else 0


def samples(costs: pd.DataFrame, cost: str) -> dict[int, list[float]]:
    """Length -> samples of one body; lengths without sound samples are left out."""
    found = costs[(costs["cost"] == cost) & (costs["samples"].map(len) > 0) & (costs["length"] > 0)]
    return dict(zip(found["length"], found["samples"], strict=True))


def power(costs: pd.DataFrame, cost: str, shortest: int) -> Measured | None:
    """The growth exponent of a cost of one body; None with fewer than two lengths."""
    found = exponent(samples(costs, cost), shortest)
    return None if found is None else Measured(found["exponent"], *found["interval"])


def failed(certificate: Row) -> str:
    """The first check that failed, with its value and its limit; and the number of other failed checks."""
    checks = [check for check in certificate["values"]["checks"] if not check["passed"]]
    if not checks:
        return "no check says why"
    first, number, more = checks[0], Column("").number, len(checks) - 1
    measured = "not finite" if first["measured"] is None else number(first["measured"])
    words = f"{first['name']} {measured} above {number(first['limit'])}"
    if more:
        words += f", and {more} more checks" if more > 1 else ", and 1 more check"
    return words
