"""What each costs, by length: times, memory, FLOPs, decode state; how they grow, and where they cross."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from bsbr_pl.values import crossover

from .figures import power
from .labels import kind
from .plots import Plot, curves
from .studies import Findings
from .tables import SCALES, Column, Table, tabulate

LONG = 2048  # tokens from which on exponents are fitted, if there are two such lengths
SUBQUADRATIC = 1.1  # the largest exponent that is called so
CROSSED = ("forward", "training", "decode", "training_bytes")
TIME = "Median of the rounds, with its 95 % bootstrap interval. "
PEAK = "Peak beyond the model and its input. "

#: What costs are shown: the key in the values, its name, its unit, and how it was measured.
COSTS = (
    ("forward", "forward pass", "ms", TIME),
    ("training", "training pass", "ms", TIME),
    ("decode", "decoded token", "ms", TIME),
    ("training_bytes", "training memory", "MB", PEAK),
    ("forward_bytes", "forward memory", "MB", PEAK),
    ("forward_flops", "forward FLOPs", "GFLOP", "2 a multiply-add, by the closed form. "),
    ("state_bytes", "decode state", "MB", ""),
)
BODY = Column("architecture", key="body")


def source(findings: Findings, costs: pd.DataFrame) -> str:
    """Where costs are from, and whether all of a length were timed against each other."""
    rows = list(costs["row"].drop_duplicates())
    rounds = {(row["identity"]["length"], str(row["about"].get("timed_with"))) for row in rows}
    apart = len(rounds) > len({length for length, _ in rounds})
    return "Not all of a length were timed in the same rounds. " * apart + findings.source(rows)


def fitted_from(lengths: pd.Series) -> int:
    """The length from which on exponents are fitted: 2,048 if there are two such lengths, else the shortest."""
    return LONG if lengths[lengths >= LONG].nunique() > 1 else 0


def samples(costs: pd.DataFrame, cost: str) -> dict[int, list[float]]:
    """Length -> samples of one body; lengths without sound samples are left out."""
    found = costs[(costs["cost"] == cost) & (costs["samples"].map(len) > 0)]
    return dict(zip(found["length"], found["samples"], strict=True))


def by_length(findings: Findings, costs: pd.DataFrame, place: str) -> list[Table | Plot | None]:
    """A table and a plot of each cost in one environment: a row or a line for each body."""
    made: list[Table | Plot | None] = []
    for cost, name, unit, how in COSTS:
        of = costs[costs["cost"] == cost]
        frame = of.pivot(index="body", columns="length", values="figure")
        columns = [Column(f"{length:,} tokens", unit, "low", key=length) for length in frame]
        title = f"{name[0].upper()}{name[1:]}"
        caption = f"One sequence, embedding to last norm, without the head. {how}{source(findings, of)}"
        file = f"cost_{cost}_{place}"
        made.append(tabulate(file, f"{title}, {place}", caption, frame.reset_index(), [BODY, *columns]))
        drawn = frame.map(lambda cell: cell if getattr(cell, "value", 0) > 0 else None)
        y = f"{name} ({unit})"
        made.append(curves(file, f"{title} by length, {place}", source(findings, of), drawn, "length (tokens)", y,
                           log_y=True, scale=SCALES[unit]))  # fmt: skip
    return made


def exponents(findings: Findings, costs: pd.DataFrame, place: str) -> Table | None:
    """How every cost grows with the length, in one environment."""
    shortest = fitted_from(costs["length"])
    found: dict[str, dict[str, Any]] = {}
    for body, of in costs.groupby("body"):
        powers: dict[str, Any] = {cost: power(samples(of, cost), shortest) for cost, *_ in COSTS}
        if training := powers["training"]:
            below = "sub-quadratic: " * (training.value <= SUBQUADRATIC)
            powers["words"] = f"{below}grows as T^{training.value:.2f}"
        found[body] = {"body": body, **powers}
    columns = [Column(name, best="low", decimals=2, key=cost) for cost, name, *_ in COSTS]
    caption = (
        f"Slope of ln(cost) over ln(length), {f'from {LONG:,} tokens on' if shortest else 'over all lengths'}"
        f"{'' if shortest else f', as fewer than two reach {LONG:,} tokens'}; 95 % bootstrap intervals over rounds. "
        f"Called sub-quadratic up to {SUBQUADRATIC}. {source(findings, costs)}"
    )
    frame = pd.DataFrame(list(found.values()), dtype=object)
    words = Column("training pass in words", key="words")
    return tabulate(f"exponents_{place}", f"Exponents, {place}", caption, frame, [BODY, words, *columns])


def crossovers(findings: Findings, costs: pd.DataFrame, place: str) -> Table | None:
    """From which length on one costs less than another: than `standard`, or every pair if there is none."""
    by_body = dict(iter(costs.groupby("body")))
    standard = [name for name in by_body if kind(name) == "standard"]
    pairs = [(a, b) for b in standard or by_body for a in by_body if a not in standard and a != b]
    found = []
    for cost, name, *_ in COSTS:
        for a, b in pairs if cost in CROSSED else []:
            ours, theirs = samples(by_body[a], cost), samples(by_body[b], cost)
            if common := ours.keys() & theirs.keys():
                crossed = crossover(ours, theirs)
                low, high = crossed["interval"]
                numbers = {"from": crossed["length"], "low": low, "high": high}
                found.append({"body": a, "against": b, "cost": name, **numbers,
                              "in words": passes(a, b, name, crossed, min(common))})  # fmt: skip
    caption = (
        "The length from which on the first costs less than the other, on straight lines in logarithms between the "
        "lengths measured, and its 95 % bootstrap interval over rounds. Blank: not reached. "
    )
    tokens = [Column(name, "tokens") for name in ("from", "low", "high")]
    columns = [BODY, Column("against"), Column("cost"), *tokens, Column("in words")]
    frame = pd.DataFrame(found, columns=["body", "against", "cost", "from", "low", "high", "in words"], dtype=object)
    return tabulate(f"crossovers_{place}", f"Crossovers, {place}", caption + source(findings, costs), frame, columns)


def passes(ours: str, theirs: str, what: str, found: Mapping[str, Any], shortest: int) -> str:
    """A crossover in words."""
    length, longest = found["length"], found["longest"]
    if length is None:
        return f"{ours} does not pass {theirs} in its {what}: not reached by {longest:,}"
    if length <= shortest:
        return f"{ours} is below {theirs} in its {what} from the shortest length ({shortest:,}) on"
    low, high = (f"beyond {longest:,}" if bound is None else f"{bound:,}" for bound in found["interval"])
    return f"{ours} passes {theirs} in its {what} at T = {length:,} [{low}, {high}]"
