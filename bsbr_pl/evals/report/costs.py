"""What each costs, by length: times, memory, FLOPs, decode state; how they grow, and where they cross."""

from collections.abc import Callable, Mapping
from typing import Any

from bsbr_pl.values import crossover

from ..checkpoints import kind
from ..scaling import PASSES
from .findings import Findings
from .numbers import LONG, cost, fitted_from, power, samples
from .plot import Plot, curves
from .table import ARCHITECTURE, SCALES, Cell, Column, Columns, Measured, Table, tabulate

SUBQUADRATIC = 1.1  # the largest exponent that is called so

#: What costs are shown: the key in the values, its name, its unit.
COSTS = (
    ("forward", "forward pass", "ms"),
    ("training", "training pass", "ms"),
    ("decode", "decoded token", "ms"),
    ("training_bytes", "training memory", "MB"),
    ("forward_bytes", "forward memory", "MB"),
    ("forward_flops", "forward FLOPs", "GFLOP"),
    ("state_bytes", "decode state", "MB"),
)


def by_length(findings: Findings, place: str, which: tuple[str, str, str]) -> Table | None:
    """One cost of every body in one environment, at each length."""
    value, title, unit = which
    bodies = findings.costs[place]

    def at(length: int) -> Callable[[Any], Cell]:
        return lambda one: cost(one[1].get(length), value)

    lengths = sorted({length for rows in bodies.values() for length in rows})
    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        *((Column(f"{length:,} tokens", unit, "low"), at(length)) for length in lengths),
    ]
    caption = "One sequence, embedding to last norm, without the head. "
    caption += "Median of the rounds, with its 95 % bootstrap interval. " * (value in PASSES)
    caption += "Peak beyond the model and its input. " * (value in ("forward_bytes", "training_bytes"))
    caption += "2 a multiply-add, by the closed form. " * (value == "forward_flops")
    caption += findings.cost_source(place)
    return tabulate(
        f"cost_{value}_{place}", f"{title[0].upper()}{title[1:]}, {place}", caption, list(bodies.items()), columns
    )


def exponents(findings: Findings, place: str) -> Table | None:
    """How every cost grows with the length, in one environment."""
    bodies = findings.costs[place]
    shortest = fitted_from(list(bodies.values()))

    def growth(name: str) -> Callable[[Any], Measured | None]:
        return lambda one: power(one[1], name, shortest)

    def words(one: Any) -> Cell:
        found = growth("training")(one)
        return found and f"{'sub-quadratic: ' * (found.value <= SUBQUADRATIC)}grows as T^{found.value:.2f}"

    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("training pass in words"), words),
        *((Column(title, best="low", decimals=2), growth(name)) for name, title, _ in COSTS),
    ]
    caption = (
        f"Slope of ln(cost) over ln(length), {f'from {LONG:,} tokens on' if shortest else 'over all lengths'}"
        f"{'' if shortest else f', as fewer than two reach {LONG:,} tokens'}; 95 % bootstrap intervals over rounds. "
        f"Called sub-quadratic up to {SUBQUADRATIC}. {findings.cost_source(place)}"
    )
    return tabulate(f"exponents_{place}", f"Exponents, {place}", caption, list(bodies.items()), columns)


def crossovers(findings: Findings, place: str) -> Table | None:
    """From which length on one costs less than another: than `standard`, or every pair where there is none."""
    bodies = findings.costs[place]
    standard = [name for name in bodies if kind(name) == "standard"]
    pairs = [(a, b) for b in standard or bodies for a in bodies if a not in standard and a != b]
    found = []
    for value, title, _ in COSTS:
        for a, b in pairs if value in (*PASSES, "training_bytes") else []:
            ours, theirs = samples(bodies[a], value), samples(bodies[b], value)
            if common := ours.keys() & theirs.keys():
                found.append((a, b, title, crossover(ours, theirs), min(common)))
    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("against"), lambda one: one[1]),
        (Column("cost"), lambda one: one[2]),
        (Column("from", "tokens"), lambda one: one[3]["length"]),
        (Column("low", "tokens"), lambda one: one[3]["interval"][0]),
        (Column("high", "tokens"), lambda one: one[3]["interval"][1]),
        (Column("in words"), lambda one: passes(*one)),
    ]
    caption = (
        "The length from which on the first costs less than the other, on straight lines in logarithms between the "
        "lengths measured, and its 95 % bootstrap interval over rounds; a blank was not reached. "
    )
    caption += findings.cost_source(place)
    return tabulate(f"crossovers_{place}", f"Crossovers, {place}", caption, found, columns)


def passes(ours: str, theirs: str, what: str, found: Mapping[str, Any], shortest: int) -> str:
    """A crossover in words."""
    length, longest = found["length"], found["longest"]
    if length is None:
        return f"{ours} does not pass {theirs} in its {what}: not reached by {longest:,}"
    low, high = (f"beyond {longest:,}" if bound is None else f"{bound:,}" for bound in found["interval"])
    if length <= shortest:
        return f"{ours} is below {theirs} in its {what} from the shortest length ({shortest:,}) on"
    return f"{ours} passes {theirs} in its {what} at T = {length:,} [{low}, {high}]"


def cost_plots(findings: Findings, place: str) -> list[Plot | None]:
    """Every cost against length, both in logarithms."""
    bodies, plots = findings.costs[place], []
    source = findings.cost_source(place)
    for value, title, unit in COSTS:
        lines = {
            name: {length: of for length, row in sorted(rows.items()) if (of := cost(row, value)) and of.value > 0}
            for name, rows in bodies.items()
        }
        name, scale = f"cost_{value}_{place}", SCALES[unit]
        shown = f"{title[0].upper()}{title[1:]} by length, {place}"
        plots.append(
            curves(name, shown, source, lines, "length (tokens)", f"{title} ({unit})", log_y=True, scale=scale)
        )
    return plots
