"""Numbers from rows of results: pooled over seeds, with their intervals, and compared."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from bsbr_pl.values import exponent, ratio_interval

from .table import Measured

Row = dict[str, Any]  # a row of results.jsonl
LONG = 2048  # tokens from which on exponents are fitted, where there are lengths enough


def finite(value: Any) -> float | None:
    """A number, unless it is missing or not finite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def pooled(rows: Sequence[Row], name: str) -> Measured | None:
    """The mean over seeds with the least and the largest; of a single run, its value with its own interval."""
    return pool([row["values"].get(name) for row in rows], [_interval(row["values"], name) for row in rows])


def slices(rows: Sequence[Row], part: str, name: str, by: str = "slice") -> dict[Any, Measured]:
    """`pooled` for each entry of a list in the values, by the entry's `by`."""
    found: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        for entry in row["values"].get(part) or []:
            found[entry[by]].append(entry)
    values = {
        which: pool([entry.get(name) for entry in of], [entry.get("interval") for entry in of])
        for which, of in found.items()
        if len(of) == len(rows)
    }
    return {which: value for which, value in values.items() if value}


def _interval(values: Mapping[str, Any], name: str) -> Any:
    return (values.get("interval") or {}).get(name)


def pool(values: Sequence[Any], intervals: Sequence[Any]) -> Measured | None:
    known = [number for value in values if (number := finite(value)) is not None]
    if not known or len(known) < len(values):
        return None
    if len(known) > 1:
        return Measured(fmean(known), min(known), max(known))
    low, high = intervals[0] or (None, None)
    return Measured(known[0], finite(low), finite(high))


def difference(rows: Sequence[Row], others: Sequence[Row]) -> Measured | None:
    """Bits per byte more than others have, documents paired, seeds averaged.

    A tie where the interval over documents holds 0, or where the seeds of the two overlap.
    """
    nats, size = _blocks(rows)
    theirs, their_size = _blocks(others)
    if nats is None or theirs is None or not np.array_equal(size, their_size):
        return None
    more, bits = nats - theirs, math.log(2) * size
    if not np.isfinite(more).all() or not bits.sum() > 0:
        return None
    low, high = ratio_interval(more, bits)
    ours, other = ([sum(row["values"]["blocks"]["nats"]) for row in which] for which in (rows, others))
    overlap = len(ours) + len(other) > 2 and min(ours) <= max(other) and min(other) <= max(ours)
    return Measured(float(more.sum() / bits.sum()), low, high, "tied" if low <= 0 <= high or overlap else "")


def _blocks(rows: Sequence[Row]) -> tuple[np.ndarray | None, np.ndarray]:
    """Nats of each block of documents, averaged over seeds, and its bytes."""
    blocks = [row["values"].get("blocks") for row in rows]
    if not blocks or None in blocks or len({tuple(block["bytes"]) for block in blocks}) > 1:
        return None, np.zeros(0)
    return np.mean([np.array(block["nats"], float) for block in blocks], 0), np.array(blocks[0]["bytes"], float)


def cost(row: Row | None, name: str) -> Measured | None:
    """A time with its interval, or a plain number of a row of costs."""
    value = row["values"].get(name) if row else None
    if isinstance(value, Mapping):
        return pool([value.get("seconds")], [value.get("interval")])
    found = finite(value)
    return None if found is None else Measured(found)


def samples(rows: Mapping[int, Row], name: str) -> dict[int, list[float]]:
    """Length -> the samples of a time, or the one number; what is missing or not above 0 is left out."""
    found = {}
    for length, row in sorted(rows.items()):
        value = row["values"].get(name)
        values = value.get("samples") or [] if isinstance(value, Mapping) else [value]
        known = [number for one in values if (number := finite(one)) is not None and number > 0]
        if known and len(known) == len(values):
            found[length] = known
    return found


def fitted_from(costs: Sequence[Mapping[int, Row]]) -> int:
    """The length from which on exponents are fitted: 2,048 where there are two such lengths, else the shortest."""
    return LONG if len({length for rows in costs for length in rows if length >= LONG}) > 1 else 0


def power(rows: Mapping[int, Row], name: str, shortest: int) -> Measured | None:
    """The exponent that a cost grows with."""
    found = exponent(samples(rows, name), shortest)
    return None if found is None else Measured(found["exponent"], *found["interval"])


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of points (x, y) that no other point is below in one and not above in the other, in order of x."""
    found = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(found, key=lambda name: (points[name], name))


def nearest(lengths: Any, length: int | None) -> int | None:
    """The length nearest to another by ratio; the shorter of two."""
    return min(lengths, key=lambda one: (abs(math.log(one / length)), one), default=None) if length else None
