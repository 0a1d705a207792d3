"""The verdict: which is the best, what makes the comparison unequal, one picture and one table; the rest is folded."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .budgets import named, sentence, unequal
from .groups import Group, counted
from .plots import Picture, pareto
from .studies import Findings, Study
from .tables import SCALES, WORDS, Column, Measured, Table, table

#: Costs in the verdict: the key in the values, the words for the least, the unit.
CHEAPEST = (
    ("decode", "Cheapest decoded token", "ms"),
    ("training", "Quickest training pass", "s"),
    ("state_bytes", "Smallest decode state", "MB"),
)
MOST_OTHERS = 2  # that are named; more are counted
EQUAL = 1.01  # parameters that differ by a factor of at most this are called equal
TIED, WORSE, UNSURE, UNKNOWN = "tied", "worse", "one seed cannot tell", "not compared"


def first(study: Study) -> Table | None:
    """The first table: at most seven columns, the best first; compressors of the same text between the models."""
    rows, number = study.overview.to_dict("records"), len(study.ranked)
    against = against_best(study)
    for row, group in zip(rows, study.groups, strict=True):
        if figure := _quality(study, group):
            note = "tied with the best" if against.get(group.label) == TIED else ""
            row[f"best {study.quality}"] = Measured(figure.value, figure.low, figure.high, note)
        if "cost training" in row:
            row["run.flops"] = None
    ranked, rest = rows[:number], rows[number:]
    if ranked and not study.recall:
        for name, bits in study.compressors.items():
            compressor = {"architecture": f"{name} (compressor)", "best bits_per_byte": Measured(bits)}
            better = sum(row["best bits_per_byte"].value <= bits for row in ranked)
            ranked.insert(better, compressor)
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
    averaged, overlap, spread = "", "", "95 % bootstrap intervals"
    if several:
        averaged, overlap = ", seeds averaged", ", or seeds of the two overlap"
        spread = f"the least and the largest of several seeds, else {spread}"
    ranked_several = any(len(group.members) > 1 for group in study.ranked)
    are_paired = len(study.ranked) > 1 and not study.recall
    return study.facts | {
        "longest": f"{study.longest:,}",
        "far": f"{max(study.lengths, default=0):,}",
        "quality": "accuracy" if study.recall else "bits per byte",
        "interval": "least to largest seed" if ranked_several else f"95 % over {study.facts['units']}",
        "spread": spread,
        "unequal": words["unequal"] if unequal(study) else "",
        "paired": words["paired"].format(unit=study.unit, averaged=averaged, overlap=overlap) if are_paired else "",
        "front": words["front"] if _on_front(study) else "",
    }


def _on_front(study: Study) -> list[str]:
    """The ranked groups for which no other is both better and quicker to train."""
    return list(study.overview[study.overview["front"] == "front"]["architecture"])


def against_best(study: Study) -> dict[str, str]:
    """Label -> how each ranked group compares to the best one: TIED, WORSE, UNSURE or UNKNOWN.

    Text: tied if `figures.difference` says so. Recall: tied if both have several seeds and their ranges overlap. If one
    of the two has one seed, the other is never called worse.
    """
    found = {}
    for group, above in zip(study.ranked[1:], study.overview["above"][1:], strict=False):
        best = study.ranked[0]
        one_seed = min(len(group.members), len(best.members)) == 1
        if study.recall:
            low, high = group.quality(study.quality).bounds  # type: ignore[union-attr]
            least, most = best.quality(study.quality).bounds  # type: ignore[union-attr]
            known, tied = True, not one_seed and low <= most and least <= high
        else:
            known = isinstance(above, Measured)
            tied = known and above.note == "tied"
        if tied:
            found[group.label] = TIED
        elif one_seed:
            found[group.label] = UNSURE
        else:
            found[group.label] = WORSE if known else UNKNOWN
    return found


def summary(study: Study) -> str:
    """The verdict in words: the best, its ties, what is unequal, compressors that are better, the disqualified."""
    if not study.ranked:
        words = ["Nothing is ranked: no certified checkpoint has an accuracy."]
    else:
        words = [_best(study), _parameters(study.ranked), _convolutions(study.ranked), _compressors(study)]
    if disqualified := sorted({group.label for group in study.groups if group.status == "disqualified"}):
        words.append(f"Disqualified: {named(disqualified)}.")
    return " ".join(filter(None, words))


def background(study: Study) -> str:
    """The budget, the least costs and the Pareto front, in words; empty if nothing is ranked."""
    if not study.ranked:
        return ""
    frame, words = study.overview.set_index("architecture"), [sentence(study)]
    for cost, least_of, unit in CHEAPEST:
        if f"cost {cost}" in frame:
            found = frame[f"cost {cost}"][: len(study.ranked)].dropna().map(lambda figure: figure.value)
            if found.nunique() > 1:
                least = found.min()
                names = ", ".join(found.index[found == least])
                shown = Column("", unit).number(least)
                words.append(f"{least_of} at {study.longest:,} tokens: {names}, {shown}\u00a0{unit}.")
    if len(study.ranked) > 1 and (on_front := _on_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join(words)


def _best(study: Study) -> str:
    """The best and those tied with it; before it, that other budgets have tables of their own."""
    best = _equal(study)
    quality = study.ranked[0].quality(study.quality)
    assert quality is not None
    number = "each " if len(best) > 1 else ""
    if study.recall:
        number += f"{Column('', '%').number(quality.value)} % right"
    else:
        number += f"{Column('').number(quality.value)} bits per byte"
    title, others = "Best" if len(study.ranked) > 1 else "The only one", unequal(study)
    if others:
        title = f"{others}. {title} with this budget"
    return f"{title}: {named(best)}, {number}{_ties(study)}."


def _equal(study: Study) -> list[str]:
    """The best, and those with exactly its quality."""
    found: dict[float, list[str]] = {}  # the best first
    for group in study.ranked:
        figure = group.quality(study.quality)
        assert figure is not None
        found.setdefault(figure.value, []).append(group.label)
    return next(iter(found.values()))


def _ties(study: Study) -> str:
    """The other models that are tied with the best, and those for which one seed cannot tell."""
    equal = _equal(study)
    whom = "them" if len(equal) > 1 else "it"
    against = {name: how for name, how in against_best(study).items() if name not in equal}
    tied = [name for name in against if against[name] == TIED]
    unsure = [name for name in against if against[name] == UNSURE]
    words = f"; tied with: {named(tied)}" if tied else ""
    if len(study.ranked[0].members) == 1 and against:
        return f"{words}; one seed cannot tell whether {'others are' if tied else 'another is'} tied with {whom}"
    if unsure:
        return f"{words}; one seed cannot tell whether these are tied with {whom}: {named(unsure)}"
    return f"; none is tied with {whom}" if set(against.values()) == {WORSE} else words


def unlearned(study: Study, findings: Findings) -> str:
    """A sentence about the ranked models of which no run is better than the plateau of its task, as far as rows say."""
    rows, late = findings.of("training"), []
    for group in study.ranked:
        trainings = [rows[member.checkpoint.digest] for member in group.members if member.checkpoint.digest in rows]
        learned = [(row["values"].get("result") or {}).get("learned") for row in trainings]
        if learned and all(one is False for one in learned):
            late.append(group.label)
    return f"Not learned yet, no better than the plateau of the task: {named(late)}." if late else ""


def _parameters(groups: Sequence[Group]) -> str:
    """A sentence about the parameters, if they differ by more than 1 %."""
    found = counted(groups, "parameters")
    if found.empty or found.max() <= EQUAL * found.min():
        return ""
    least, most = found.idxmin(), found.idxmax()
    return f"Unequal parameters: from {found[least]:,.0f} ({least}) to {found[most]:,.0f} ({most})."


def _convolutions(groups: Sequence[Group]) -> str:
    """A sentence about short convolutions before the attention, if only some models are known to have one."""
    taps = {group.label: max(group.checkpoint.get("conv_size") or [0]) for group in groups}  # 0: not known
    having = [label for label in taps if taps[label] > 1]
    lacking = [label for label in taps if taps[label] == 1]
    if not having or not lacking:
        return ""
    few, rest, how, rest_how = lacking, having, "without", "with one"
    if len(having) < len(lacking):
        few, rest, how, rest_how = having, lacking, "with", "without"
    others = named(rest) if len(rest) <= MOST_OTHERS else f"{len(rest)} others"
    return f"Unequal convolutions: {named(few)} {how} a short convolution, {others} {rest_how}."


def _compressors(study: Study) -> str:
    """Sentences about the models that are worse than a compressor of the same text."""
    if study.recall or not study.compressors:
        return ""
    words, shown = [], []
    for name, bits in study.compressors.items():
        shown.append(f"{name} ({Column('').number(bits)})")
        worse = []
        for group in study.ranked:
            figure = group.quality(study.quality)
            if figure and figure.value > bits:
                worse.append(group.label)
        if worse:
            which = "every model" if 1 < len(worse) == len(study.ranked) else named(worse)
            words.append(f"Worse than {shown[-1]}: {which}.")
    return " ".join(words) or f"No model is worse than {' or '.join(shown)}."


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
    facts = _facts(study)
    if study.recall:
        scale, words = 100, {"y": "accuracy (%)", "quality": "Accuracy", "better": "upper"}
    else:
        scale, words = 1, {"y": "bits per byte", "quality": "Bits per byte", "better": "lower"}
    points: dict[str, tuple[Measured, Measured]] = {}
    for group in study.ranked:
        if group.label in costs and (figure := _quality(study, group)):
            points[group.label] = costs[group.label].times(SCALES.get(unit, 1)), figure.times(scale)
    lengths = sorted({group.training_length or 0 for group in study.ranked})
    at = " or ".join(f"{length:,}" for length in lengths)
    return pareto(key, study.name, points, study.worse, **facts | words, at=at)
