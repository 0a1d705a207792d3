"""Figures from the values of rows: pooled over seeds, with their intervals, and compared."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from bsbr_pl.values import exponent, ratio_interval

from .tables import Measured

Row = dict[str, Any]  # a row of results.jsonl
OWN = 0  # in the column `length`: at the length that training validated at
PARTS = {"slices": "slice", "recall": "slice", "by_position": "stop"}  # lists in the values, and what names an entry
FIGURES = ["length", "part", "which", "name"]  # what tells a figure of a row from the others


def finite(value: Any) -> float | None:
    """A number, unless it is missing or not finite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def entries(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every number in the values of a row of kind `text` or `recall`, as a record.

    Yields:
        part: "" for the whole, or the list it stands in; which: entry of the list; at: tokens of the entry, if it says;
        name, value, low, high.
    """
    intervals = values.get("interval") or {}
    for name, value in values.items():
        yield _entry("", "", None, name, value, intervals.get(name))
    for part, by in PARTS.items():
        for entry in values.get(part) or []:
            for name, value in entry.items():
                yield _entry(part, entry.get(by), entry.get("length"), name, value, entry.get("interval"))


def _entry(part: str, which: Any, at: Any, name: str, value: Any, interval: Any) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {
        **{"part": part, "which": which, "at": at, "name": name},
        **{"value": finite(value), "low": finite(low), "high": finite(high)},
    }


def pooled(rows: Iterable[tuple[int, Row]], runs: int) -> pd.DataFrame:
    """The mean over seeds with the least and the largest; of a single run, its value with its own interval.

    Args:
        rows: length (or OWN) and row, of every run.
        runs: how many there are; a figure that one of them lacks is left out.

    Returns:
        Columns length, part, which, name, at, and figure (Measured).
    """
    numbers = [{"length": length, **entry} for length, row in rows for entry in entries(row["values"])]
    found = pd.DataFrame(numbers, columns=[*FIGURES, "at", "value", "low", "high"]).dropna(subset="value")
    of = found.groupby(FIGURES, sort=False).agg(
        **{"runs": ("value", "size"), "mean": ("value", fmean), "least": ("value", "min"), "largest": ("value", "max")},
        **{"low": ("low", "first"), "high": ("high", "first"), "at": ("at", "first")},
    )
    of = of[of["runs"] == runs].reset_index()
    low, high = (of["low"], of["high"]) if runs == 1 else (of["least"], of["largest"])
    figures = [Measured(*numbers) for numbers in zip(of["mean"], _plain(low), _plain(high), strict=True)]
    return of[[*FIGURES, "at"]].assign(figure=pd.Series(figures, index=of.index, dtype=object))


def _plain(numbers: pd.Series) -> Iterable[float | None]:
    return numbers.astype(object).where(numbers.notna(), None)


def wide(figures: pd.DataFrame, index: str, columns: str, **where: Any) -> pd.DataFrame:
    """A frame of figures: a row for each `index`, a column for each value of `columns`, in the order of appearance.

    Args:
        where: values that the other columns must have.
    """
    for name, value in where.items():
        figures = figures[figures[name] == value]
    return figures.pivot(index=index, columns=columns, values="figure")[list(figures[columns].unique())]


def difference(rows: Sequence[Row], others: Sequence[Row]) -> Measured | None:
    """Bits per byte more than others have, documents paired, seeds averaged.

    A tie if the interval over documents holds 0, or if the seeds of the two overlap.
    """
    nats, size = _blocks(rows)
    theirs, their_size = _blocks(others)
    if nats is None or theirs is None or not np.array_equal(size, their_size):
        return None
    more, bits = nats - theirs, math.log(2) * size
    if not np.isfinite(more).all() or not bits.sum() > 0:
        return None
    low, high = ratio_interval(more, bits)
    ours, other = _nats(rows), _nats(others)
    overlap = len(ours) + len(other) > 2 and min(ours) <= max(other) and min(other) <= max(ours)
    return Measured(float(more.sum() / bits.sum()), low, high, "tied" if low <= 0 <= high or overlap else "")


def _blocks(rows: Sequence[Row]) -> tuple[np.ndarray | None, np.ndarray]:
    """Nats of each block of documents, averaged over seeds, and its bytes."""
    blocks = [row["values"].get("blocks") for row in rows]
    if not blocks or None in blocks or len({tuple(block["bytes"]) for block in blocks}) > 1:
        return None, np.zeros(0)
    return np.mean([np.array(block["nats"], float) for block in blocks], 0), np.array(blocks[0]["bytes"], float)


def _nats(rows: Sequence[Row]) -> list[float]:
    return [sum(row["values"]["blocks"]["nats"]) for row in rows]


def timing(value: Any) -> dict[str, Any] | None:
    """A cost of a row: its figure, and the samples above 0; None if it is no cost."""
    if not isinstance(value, Mapping):
        number = finite(value)
        return None if number is None else {"figure": Measured(number), "samples": [number] if number > 0 else []}
    seconds, samples = finite(value.get("seconds")), value.get("samples") or []
    low, high = value.get("interval") or (None, None)
    sound = all((number := finite(one)) is not None and number > 0 for one in samples)
    figure = None if seconds is None else Measured(seconds, finite(low), finite(high))
    return figure and {"figure": figure, "samples": samples if sound else []}


def power(samples: Mapping[int, Sequence[float]], shortest: int) -> Measured | None:
    """The exponent that a cost grows with; None with fewer than two lengths."""
    found = exponent(samples, shortest)
    return None if found is None else Measured(found["exponent"], *found["interval"])


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of points (x, y) that no other point is below in one and not above in the other, in order of x."""

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(*points[name])), key=lambda name: (points[name], name))


def nearest(lengths: Iterable[int], length: int | None) -> int | None:
    """The length nearest to another by ratio; the shorter of two."""
    return min(lengths, key=lambda one: (abs(math.log(one / length)), one), default=None) if length else None
