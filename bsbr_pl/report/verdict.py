"""The verdict: which is the best, what makes the comparison unequal, one picture and one table; the rest is folded."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .budgets import named, sentence, unequal
from .plots import Picture, pareto
from .studies import Group, Study, counted
from .tables import SCALES, WORDS, Column, Measured, Table, table

#: Costs in the verdict: the key in the values, the words for the least, the unit.
CHEAPEST = (
    ("decode", "Cheapest decoded token", "ms"),
    ("training", "Quickest training pass", "s"),
    ("state_bytes", "Smallest decode state", "MB"),
)
MOST_OTHERS = 2  # that are named; more are counted
EQUAL = 1.01  # parameters that differ by a factor of at most this are called equal
TIED, APART, UNSURE, UNKNOWN = "tied", "apart", "one seed cannot tell", "not compared"


def first(study: Study) -> Table | None:
    """The first table: at most seven columns, the best first; compressors of the same text between the models."""
    rows, number = study.overview.to_dict("records"), len(study.ranked)
    against = against_best(study)
    for row, group in zip(rows, study.groups, strict=True):
        if figure := _quality(study, group):
            note = "tied with the best" * (against.get(group.label) == TIED)
            row[f"best {study.quality}"] = Measured(figure.value, figure.low, figure.high, note)
        if "cost training" in row:
            row["run.flops"] = None
    ranked, rest = rows[:number], rows[number:]
    for name, bits in study.compressors.items() if ranked and not study.recall else ():
        place = sum(row["best bits_per_byte"].value <= bits for row in ranked)
        ranked.insert(place, {"architecture": f"{name} (compressor)", "best bits_per_byte": Measured(bits)})
    frame = pd.DataFrame([*ranked, *rest], dtype=object)
    if set(study.overview["certificate"]) == {"passed"}:
        frame = frame.drop(columns="certificate")
    return table("first", study.name, frame, ranked=len(ranked), **_facts(study))


def _quality(study: Study, group: Group) -> Measured | None:
    """The quality of a group. One seed among groups of several has no interval here: it would be of another kind."""
    figure = group.quality(study.quality)
    several = any(len(one.members) > 1 for one in study.ranked)
    return Measured(figure.value) if figure and several and len(group.members) == 1 else figure


def ranking(study: Study) -> Table | None:
    """One row for each group in all columns, the best first, the disqualified at the end."""
    slices = [Column(name, "%", "high") for name in study.overview if name.startswith("accuracy, ")]
    several = slices if len(slices) > 1 else []
    return table("verdict", study.name, study.overview, several, len(study.ranked), **_facts(study))


def _facts(study: Study) -> dict[str, Any]:
    """The values of {names} of the verdict's tables in words.toml."""
    words, several = WORDS["tables"]["verdict"], any(len(group.members) > 1 for group in study.groups)
    averaged, overlap = ", seeds averaged" * several, ", or seeds of the two overlap" * several
    paired = words["paired"].format(averaged=averaged, overlap=overlap)
    over = f"95 % over {study.facts['units']}"
    return study.facts | {
        "longest": f"{study.longest:,}",
        "far": f"{max(study.lengths, default=0):,}",
        "quality": "accuracy" if study.recall else "bits per byte",
        "interval": "least to largest seed" if any(len(group.members) > 1 for group in study.ranked) else over,
        "spread": f"{'the least and the largest of several seeds, else ' * several}95 % bootstrap intervals",
        "unequal": words["unequal"] * bool(unequal(study)),
        "paired": paired * (len(study.ranked) > 1 and not study.recall),
        "front": words["front"] * bool(_on_front(study)),
    }


def _on_front(study: Study) -> list[str]:
    """The ranked groups for which no other is both better and quicker to train."""
    return list(study.overview[study.overview["front"] == "front"]["architecture"])


def against_best(study: Study) -> dict[str, str]:
    """Label -> how each ranked group stands to the best one: TIED, APART, UNSURE or UNKNOWN.

    Text: tied if `studies.difference` says so. Recall: tied if both have several seeds and their ranges overlap. If one
    of the two has one seed, nothing is called apart.
    """
    found = {}
    for i, group in enumerate(study.ranked[1:], 1):
        best, more = study.ranked[0], study.overview["above"][i]
        one_seed = min(len(group.members), len(best.members)) == 1
        if study.recall:
            low, high = group.quality(study.quality).bounds  # type: ignore[union-attr]
            least, most = best.quality(study.quality).bounds  # type: ignore[union-attr]
            tied = not one_seed and low <= most and least <= high
        else:
            tied = isinstance(more, Measured) and more.note == "tied"
        unknown = not study.recall and not isinstance(more, Measured)
        found[group.label] = TIED if tied else UNSURE if one_seed else UNKNOWN if unknown else APART
    return found


def summary(study: Study) -> str:
    """The verdict in words: the best, its ties, what is unequal, compressors that are better, the disqualified."""
    if not study.ranked:
        words = ["Nothing is ranked: no certified checkpoint has an accuracy."]
    else:
        words = [_best(study), _parameters(study.ranked), _convolutions(study.ranked), _compressors(study)]
    out = sorted({group.label for group in study.groups if group.status == "disqualified"})
    return " ".join(filter(None, [*words, f"Disqualified: {named(out)}." if out else ""]))


def background(study: Study) -> str:
    """The budget, the least costs and the Pareto front, in words; empty if nothing is ranked."""
    if not study.ranked:
        return ""
    frame, words = study.overview.set_index("architecture"), [sentence(study)]
    for cost, least_of, unit in CHEAPEST:
        if f"cost {cost}" in frame:
            found = frame[f"cost {cost}"][: len(study.ranked)].dropna().map(lambda figure: figure.value)
            if found.nunique() > 1:
                names, least = ", ".join(found.index[found == found.min()]), Column("", unit).number(found.min())
                words.append(f"{least_of} at {study.longest:,} tokens: {names}, {least}\u00a0{unit}.")
    if len(study.ranked) > 1 and (on_front := _on_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join(words)


def _best(study: Study) -> str:
    """The best and those tied with it; before it, that other budgets have tables of their own."""
    unit, best = "% right" if study.recall else "bits per byte", _equal(study)
    quality = study.ranked[0].quality(study.quality)
    assert quality is not None
    number = Column("", "%" if study.recall else "").number(quality.value)
    words = f"{named(best)}, {'each ' * (len(best) > 1)}{number} {unit}{_ties(study)}"
    title, others = "Best" if len(study.ranked) > 1 else "The only one", unequal(study)
    return f"{others}. {title} with this budget: {words}." if others else f"{title}: {words}."


def _equal(study: Study) -> list[str]:
    """The best, and those with exactly its quality."""
    found: dict[float, list[str]] = {}  # the best first
    for group in study.ranked:
        figure = group.quality(study.quality)
        assert figure is not None
        found.setdefault(figure.value, []).append(group.label)
    return next(iter(found.values()))


def _ties(study: Study) -> str:
    """Which others are tied with the best, and what one seed cannot tell."""
    equal = _equal(study)
    whom = "them" if len(equal) > 1 else "it"
    stands = {name: which for name, which in against_best(study).items() if name not in equal}
    tied, unsure = (named([name for name in stands if stands[name] == which]) for which in (TIED, UNSURE))
    words = f"; tied with: {tied}" if tied else ""
    if len(study.ranked[0].members) == 1 and stands:
        return f"{words}; one seed cannot tell whether {'others are' if tied else 'another is'} tied with {whom}"
    if unsure:
        return f"{words}; one seed cannot tell whether these are tied with {whom}: {unsure}"
    return words or f"; none is tied with {whom}" * bool(stands and set(stands.values()) == {APART})


def _parameters(groups: Sequence[Group]) -> str:
    """That parameters are unequal, if they are by more than 1 %."""
    found = counted(groups, "parameters")
    if found.empty or found.max() <= EQUAL * found.min():
        return ""
    least, most = found.idxmin(), found.idxmax()
    return f"Unequal parameters: from {found[least]:,.0f} ({least}) to {found[most]:,.0f} ({most})."


def _convolutions(groups: Sequence[Group]) -> str:
    """That some have a short convolution before their attention and others have none, as far as rows say."""
    known = {group.label: max(sizes) for group in groups if (sizes := group.checkpoint.get("conv_size"))}
    having, lacking = ([name for name in known if (known[name] > 1) == which] for which in (True, False))
    if not having or not lacking:
        return ""
    few, rest, how, rest_how = lacking, having, "without", "with one"
    if len(having) < len(lacking):
        few, rest, how, rest_how = having, lacking, "with", "without"
    others = named(rest) if len(rest) <= MOST_OTHERS else f"{len(rest)} others"
    return f"Unequal convolutions: {named(few)} {how} a short convolution, {others} {rest_how}."


def _compressors(study: Study) -> str:
    """Which models are worse than a compressor of the same text."""
    bits = study.compressors
    if study.recall or not bits:
        return ""
    number, words = Column("").number, []
    for name, of in bits.items():
        quality = [(group.label, group.quality(study.quality)) for group in study.ranked]
        if worse := [label for label, figure in quality if figure and figure.value > of]:
            which = "every model" if 1 < len(worse) == len(quality) else named(worse)
            words.append(f"Worse than {name} ({number(of)}): {which}.")
    return " ".join(words) or f"No model is worse than {' or '.join(f'{n} ({number(of)})' for n, of in bits.items())}."


def picture(study: Study) -> Picture | None:
    """Quality against the first cost that is known: time of a training pass, training FLOPs, parameters."""
    return (
        _front(study, "pareto_training", _costs(study, "training"), "ms")
        or _front(study, "pareto_flops", counted(study.ranked, "run.flops").map(Measured).to_dict(), "GFLOP")
        or _front(study, "pareto_parameters", counted(study.ranked, "parameters").map(Measured).to_dict(), "")
    )


def state_picture(study: Study) -> Picture | None:
    """Quality against the size of the decode state."""
    return _front(study, "pareto_state", _costs(study, "state_bytes", study.longest), "MB")


def _costs(study: Study, cost: str, length: int | None = None) -> dict[str, Measured]:
    """A cost of the ranked groups by label, at a length or at that of their training."""
    found = {}
    for group in study.ranked:
        if figure := group.cost(group.training_length if length is None else length, cost):
            found[group.label] = figure
    return found


def _front(study: Study, key: str, costs: Mapping[str, Measured], unit: str) -> Picture | None:
    """Quality against costs by label, in a unit; None unless two groups have both."""
    y, scale = ("accuracy (%)", 100) if study.recall else ("bits per byte", 1)
    quality, better = ("Accuracy", "upper") if study.recall else ("Bits per byte", "lower")
    points: dict[str, tuple[Measured, Measured]] = {}
    for group in study.ranked:
        if group.label in costs and (figure := _quality(study, group)):
            points[group.label] = costs[group.label].times(SCALES.get(unit, 1)), figure.times(scale)
    at = " or ".join(f"{n:,}" for n in sorted({group.training_length or 0 for group in study.ranked}))
    facts = _facts(study) | {"y": y, "quality": quality, "better": better, "at": at}
    return pareto(key, study.name, points, study.worse, **facts)
