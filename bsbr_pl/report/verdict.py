"""The verdict: every architecture in one row, in words, and on the fronts of quality and cost."""

from typing import Any

from .budgets import sentence, unequal
from .plots import Picture, pareto
from .studies import Study
from .tables import SCALES, WORDS, Column, Measured, Table, table

#: Costs that are said in words: the key in the values, what is said of the least, the unit.
CHEAPEST = (
    ("decode", "Cheapest decoded token", "ms"),
    ("training", "Quickest training pass", "s"),
    ("state_bytes", "Smallest decode state", "MB"),
)


def tables(study: Study) -> list[Table | None]:
    """One row for each group, the best first, the disqualified at the end: in at most seven columns, and in all."""
    frame, unshown = study.overview, [] if study.recall else ["accuracy"]
    unshown.append("certificate" if set(frame["certificate"]) == {"passed"} else "cost state_bytes")
    first = frame.drop(columns=unshown, errors="ignore")
    whole = ranking(study)
    if whole:
        whole.folded = True
    return [table("first", study.name, first, ranked=len(study.ranked), **_facts(study)), whole]


def ranking(study: Study) -> Table | None:
    """One row for each group in all columns, the best first, the disqualified at the end."""
    slices = [Column(name, "%", "high") for name in study.overview if name.startswith("accuracy, ")]
    several = slices if len(slices) > 1 else []
    return table("verdict", study.name, study.overview, several, len(study.ranked), **_facts(study))


def _facts(study: Study) -> dict[str, Any]:
    """What {names} of the verdict's tables in words.toml stand for."""
    words, several = WORDS["tables"]["verdict"], any(len(group.members) > 1 for group in study.groups)
    averaged, overlap = ", seeds averaged" * several, ", or seeds of the two overlap" * several
    paired = words["paired"].format(averaged=averaged, overlap=overlap)
    return study.facts | {
        "longest": f"{study.longest:,}",
        "far": f"{max(study.lengths, default=0):,}",
        "quality": "accuracy" if study.recall else "bits per byte",
        "spread": f"{'the least and the largest of several seeds, else ' * several}95 % bootstrap intervals",
        "unequal": words["unequal"] * bool(unequal(study)),
        "paired": paired * (len(study.ranked) > 1 and not study.recall),
        "front": words["front"] * bool(_on_front(study)),
    }


def _on_front(study: Study) -> list[str]:
    """Those ranked that no other is both better and quicker to train than."""
    return list(study.overview[study.overview["front"] == "front"]["architecture"])


def summary(study: Study) -> str:
    """The verdict in words."""
    frame = study.overview.set_index("architecture")
    out = sorted(set(frame.index[frame["certificate"].str.startswith("disqualified")]))
    last = [f"Disqualified: {', '.join(out)}."] if out else []
    if not study.ranked:
        return " ".join(["Nothing is ranked: no certified checkpoint has an accuracy.", *last])
    words = [_best(study), sentence(study)]
    for cost, least_of, unit in CHEAPEST:
        if f"cost {cost}" in frame:
            found = frame[f"cost {cost}"][: len(study.ranked)].dropna().map(lambda figure: figure.value)
            if found.nunique() > 1:
                names, least = ", ".join(found.index[found == found.min()]), Column("", unit).number(found.min())
                words.append(f"{least_of} at {study.longest:,} tokens: {names}, {least}\u00a0{unit}.")
    if len(study.ranked) > 1 and (on_front := _on_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join(words + last)


def _best(study: Study) -> str:
    """Which is the best, and which are tied with it; first of all, that other budgets stand apart."""
    best, unit = study.ranked[0], "% right" if study.recall else "bits per byte"
    quality = best.quality(study.quality)
    assert quality is not None
    words = f"{best.label}, {Column('', '%' if study.recall else '').number(quality.value)} {unit}{_ties(study)}"
    if not (others := unequal(study)):
        return f"Best: {words}."
    return f"{others}. {'Best' if len(study.ranked) > 1 else 'The only one'} with this budget: {words}."


def _ties(study: Study) -> str:
    """Which are tied with the best, and what one seed cannot tell."""
    if study.recall or len(study.ranked) < 2:
        return ""
    frame = study.overview[1 : len(study.ranked)].set_index("architecture")
    tied = frame["above"].map(lambda more: bool(more and more.note))
    names, unsure = ", ".join(frame.index[tied]), ", ".join(frame.index[~tied & (frame["runs"] == 1)])
    words = f"; tied with: {names}" if names else ""
    if len(study.ranked[0].members) == 1:
        return f"{words}; one seed cannot tell whether {'others are' if names else 'another is'} tied with it"
    if unsure:
        return f"{words}; one seed cannot tell whether these are tied with it: {unsure}"
    return words or "; none is tied with it" * bool(frame["above"].notna().all())


def fronts(study: Study) -> list[Picture | None]:
    """Quality against the time to train and against the decode state."""
    y, scale = ("accuracy (%)", 100) if study.recall else ("bits per byte", 1)
    quality, better = ("Accuracy", "upper") if study.recall else ("Bits per byte", "lower")
    at: set[str] = set()
    times: dict[str, tuple[float, Measured]] = {}
    states: dict[str, tuple[float, Measured]] = {}
    for group in study.ranked:
        figure, length = group.quality(study.quality), group.training_length
        if figure and (seconds := group.cost(length, "training")):
            times[group.label] = SCALES["ms"] * seconds.value, figure.times(scale)
            at.add(f"{length:,}")
        if figure and (state := group.cost(study.longest, "state_bytes")):
            states[group.label] = SCALES["MB"] * state.value, figure.times(scale)
    facts = {"y": y, "quality": quality, "better": better, "longest": f"{study.longest:,}", **study.facts}
    return [
        pareto("pareto_training", study.name, times, study.worse, at=" or ".join(sorted(at)), **facts),
        pareto("pareto_state", study.name, states, study.worse, **facts),
    ]
