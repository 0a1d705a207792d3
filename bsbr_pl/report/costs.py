"""Costs by length: times, memory, FLOPs, decode state; their growth, and where they cross."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from bsbr_pl.values import crossover

from .figures import LONG, fitted_from, power, samples
from .labels import kind
from .plots import Picture, curves
from .rows import listed
from .studies import Findings
from .tables import SCALES, Column, Table, table

TABLE_ALONE = ("forward_bytes", "forward_flops")  # costs without a plot
SUBQUADRATIC = 1.1  # the largest exponent that is called so
CROSSED = ("forward", "training", "decode", "training_bytes")  # costs whose crossovers are shown
TIME = "Median of the rounds, with its 95 % bootstrap interval. "
PEAK = "Peak beyond the model and its input. "
FLOPS = "2 a multiply-add, by the closed form; of other modules, matrix products alone. "

#: What costs are shown: the key in the values, its name, its unit, and how it was measured.
COSTS = (
    ("forward", "forward pass", "ms", TIME),
    ("training", "training pass", "ms", TIME),
    ("decode", "decoded token", "ms", TIME),
    ("training_bytes", "training memory", "MB", PEAK),
    ("forward_bytes", "forward memory", "MB", PEAK),
    ("forward_flops", "forward FLOPs", "GFLOP", FLOPS),
    ("state_bytes", "decode state", "MB", ""),
)


def of_environment(findings: Findings, environment: str) -> list[Table | Picture | str | None]:
    """Everything about the costs in one environment."""
    costs = findings.costs[findings.costs["environment"] == environment]
    if costs.empty:
        return []
    return [
        exponents(findings, costs, environment),
        *crossovers(findings, costs, environment),
        *by_length(findings, costs, environment),
    ]


def source(findings: Findings, costs: pd.DataFrame) -> str:
    """Environments and commands of costs; and whether all of a length were timed in the same rounds."""
    rows = list(costs["row"])
    rounds = {(row["identity"]["length"], str(row["about"].get("timed_with"))) for row in rows}
    words = "Not all of a length were timed in the same rounds. " if len(rounds) > costs["length"].nunique() else ""
    return words + findings.source(rows)


def by_length(findings: Findings, costs: pd.DataFrame, environment: str) -> list[Table | Picture | None]:
    """A table and a plot of each cost: a row or a line for each body."""
    made: list[Table | Picture | None] = []
    for cost, name, unit, how in COSTS:
        rows = costs[costs["cost"] == cost]
        frame = rows.pivot(index="body", columns="length", values="figure")
        columns = [Column(f"{length:,} tokens", unit, "low", key=length) for length in frame]
        if cost == "forward_flops":
            how += counted(rows)
        facts: dict[str, Any] = {"cost": name[0].upper() + name[1:], "name": name, "unit": unit, "how": how}
        facts |= {"environment": environment, "source": source(findings, rows)}
        above = frame.map(lambda figure: figure if getattr(figure, "value", 0) > 0 else None)
        made.append(table("cost", f"{cost}_{environment}", frame.reset_index(), columns, **facts))
        if cost not in TABLE_ALONE:
            made.append(curves("cost", f"{cost}_{environment}", above, SCALES[unit], log_y=True, **facts))
    return made


def counted(costs: pd.DataFrame) -> str:
    """Sentences about models whose FLOPs are counted, because an attention has no closed form."""
    uncounted: dict[str, set[str]] = {}
    for body, row in zip(costs["body"], costs["row"], strict=True):
        if "uncounted" in row["values"]:
            uncounted.setdefault(body, set()).update(row["values"]["uncounted"])
    sentence = "{} has no closed form: torch's counter counted it; fvcore has no formula for {}. "
    return "".join(sentence.format(body, listed(names) or "no operator") for body, names in uncounted.items())


def exponents(findings: Findings, costs: pd.DataFrame, environment: str) -> Table | None:
    """The exponent with which every cost grows with the length."""
    shortest, found = fitted_from(costs["length"]), []
    for body, of_body in costs.groupby("body"):
        powers = {name: power(of_body, cost, shortest) for cost, name, *_ in COSTS}
        words = None
        if training := powers["training pass"]:
            words = f"grows as T^{training.value:.2f}"
            if training.value <= SUBQUADRATIC:
                words = f"sub-quadratic: {words}"
        found.append({"body": body, "words": words, **powers})
    fitted = f"from {LONG:,} tokens on" if shortest else f"over all lengths, as fewer than two reach {LONG:,} tokens"
    columns = [Column(name, best="low", decimals=2) for _, name, *_ in COSTS]
    facts: dict[str, Any] = {"environment": environment, "fitted": fitted, "subquadratic": SUBQUADRATIC}
    facts["source"] = source(findings, costs)
    return table("exponents", environment, pd.DataFrame(found, dtype=object), columns, **facts)


def crossovers(findings: Findings, costs: pd.DataFrame, environment: str) -> list[Table | str | None]:
    """The length above which a body costs less than `standard`; for every pair of bodies if there is no `standard`."""
    by_body = dict(iter(costs.groupby("body")))
    standard = [name for name in by_body if kind(name) == "standard"]
    pairs = []
    for other in standard or by_body:
        pairs += [(name, other) for name in by_body if name not in standard and name != other]
    found, words = [], []
    for cost, name, *_ in COSTS:
        if cost not in CROSSED:
            continue
        for a, b in pairs:
            ours, theirs = samples(by_body[a], cost), samples(by_body[b], cost)
            if common := ours.keys() & theirs.keys():
                crossed = crossover(ours, theirs)
                in_words = passes(a, b, name, crossed, min(common))
                found.append((a, b, name, crossed["length"], *crossed["interval"], in_words))
                if cost == "training":
                    words.append(in_words)
    frame = pd.DataFrame(found, columns=["body", "against", "cost", "from", "low", "high", "in words"], dtype=object)
    shown = table("crossovers", environment, frame, environment=environment, source=source(findings, costs))
    return [". ".join(words) + "." if words else None, shown]


def passes(ours: str, theirs: str, what: str, found: Mapping[str, Any], shortest: int) -> str:
    """A crossover in words."""
    length, longest = found["length"], found["longest"]
    if length is None:
        return f"{ours} does not pass {theirs} in its {what}: not reached by {longest:,}"
    if length <= shortest:
        return f"{ours} is below {theirs} in its {what} from the shortest length ({shortest:,}) on"
    bounds = [f"beyond {longest:,}" if bound is None else f"{bound:,}" for bound in found["interval"]]
    return f"{ours} passes {theirs} in its {what} at T = {length:,} [{', '.join(bounds)}]"
