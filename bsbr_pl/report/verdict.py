"""The verdict: every architecture in one row, in words, and on the fronts of quality and cost."""

from typing import Any

import pandas as pd

from .budgets import sentence, unequal
from .costs import fitted_from, power
from .figures import OWN, difference, front
from .plots import Picture, pareto
from .sources import failed
from .studies import Group, Study
from .tables import SCALES, WORDS, Column, Measured, Table, table

COSTS = ("training", "forward", "decode", "state_bytes", "training_bytes")
#: Costs that are said in words: the key in the values, what is said of the least, the unit.
CHEAPEST = (
    ("decode", "Cheapest decoded token", "ms"),
    ("training", "Quickest training pass", "s"),
    ("state_bytes", "Smallest decode state", "MB"),
)


def tables(study: Study) -> list[Table | None]:
    """One row for each group, the best first, the disqualified at the end: in a few columns, and in all."""
    whole = ranking(study)
    if whole is None:
        return []
    frame, facts = _frame(study), _facts(study)
    if set(frame["certificate"]) == {"passed"}:
        frame = frame.drop(columns="certificate")
    whole.folded = True
    return [table("first", study.name, frame, ranked=len(study.ranked), **facts), whole]


def ranking(study: Study) -> Table | None:
    """One row for each group in all columns, the best first, the disqualified at the end."""
    frame = _frame(study)
    slices = [Column(name, "%", "high") for name in frame if name.startswith("accuracy, ")]
    facts = _facts(study)
    return table("verdict", study.name, frame, slices if len(slices) > 1 else [], len(study.ranked), **facts)


def _frame(study: Study) -> pd.DataFrame:
    """All that is known of each group."""
    far = study.lengths[-1:] if len(study.lengths) > 1 else []
    frames = [
        study.wide("name", length=OWN, part=""),
        study.wide("which", length=OWN, part="slices", name="accuracy").add_prefix("accuracy, "),
        study.wide("which", length=OWN, part="recall", name="loss"),
        study.wide("length", part="", name="bits_per_byte").reindex(columns=far).set_axis(["far"] * len(far), axis=1),
    ]
    own = pd.DataFrame([_own(group, study) for group in study.groups], dtype=object)
    return pd.concat([own, *(frame.reset_index(drop=True) for frame in frames)], axis=1)


def _own(group: Group, study: Study) -> dict[str, Any]:
    """What is known of a group beside its accuracies."""
    checkpoint = group.checkpoint
    return {
        "architecture": group.label,
        "seeds": _seeds(group),
        "certificate": _outcome(group),
        "parameters": checkpoint.get("parameters"),
        "run": checkpoint.get("run.status"),
        "steps": checkpoint.get("run.steps"),
        "batch": checkpoint.get("run.batch"),
        "training tokens": checkpoint.get("run.tokens"),
        "flops": checkpoint.get("run.flops"),
        "training length": checkpoint.get("data.trained_length"),
        "above": study.above(group),
        **{f"cost {cost}": group.cost(study.longest, cost) for cost in COSTS},
        "exponent": power(group.costs, "training", fitted_from(pd.concat([one.costs["length"] for one in study.groups]))),
        "front": "front" if group in study.ranked and group.label in quality_front(study) else "",
    }


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
        "front": words["front"] * bool(quality_front(study)),
    }


def _seeds(group: Group) -> str | Measured:
    """How many; and of how many runs, if one came twice."""
    seeds, runs = {member.checkpoint.seed for member in group.members}, len(group.members)
    if None in seeds:
        return f"unknown, {runs} run{'s' * (runs > 1)}"
    return Measured(len(seeds), note=f"{runs} runs" if len(seeds) < runs else "")


def _outcome(group: Group) -> str:
    if group.status != "disqualified":
        return group.status
    return f"disqualified: {' / '.join(dict.fromkeys(failed(m.certificate) for m in group.members if m.certificate))}"


def quality_front(study: Study) -> list[str]:
    """The ranked groups that no other is both better and quicker to train than."""
    points, worse = {}, study.worse
    for group in study.ranked:
        quality, seconds = group.quality(study.quality), group.cost(group.training_length, "training")
        if quality and seconds:
            points[group.label] = (seconds.value, worse * quality.value)
    return front(points)


def summary(study: Study) -> str:
    """The verdict in words."""
    out = sorted({group.label for group in study.groups if group.status == "disqualified"})
    last = f"Disqualified: {', '.join(out)}." if out else ""
    if not study.ranked:
        return f"Nothing is ranked: no certified checkpoint has an accuracy. {last}".strip()
    words = [_best(study), sentence(study)]
    for cost, least_of, unit in CHEAPEST:
        found = {group.label: figure.value for group in study.ranked if (figure := group.cost(study.longest, cost))}
        if len(set(found.values())) > 1:
            least = min(found.values())
            names = ", ".join(label for label, value in found.items() if value == least)
            words.append(f"{least_of} at {study.longest:,} tokens: {names}, {Column('', unit).number(least)}\u00a0{unit}.")
    if len(study.ranked) > 1 and (on_front := quality_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join([*words, last]).strip()


def _best(study: Study) -> str:
    """Which is the best, and which are tied with it; first of all, that other budgets stand apart."""
    best, unit = study.ranked[0], "% right" if study.recall else "bits per byte"
    quality = best.quality(study.quality)
    assert quality is not None
    words = f"{best.label}, {Column('', '%' if study.recall else '').number(quality.value)} {unit}"
    words += "" if study.recall else _ties(study)
    if not (others := unequal(study)):
        return f"Best: {words}."
    return f"{others}. {'Best' if len(study.ranked) > 1 else 'The only one'} with this budget: {words}."


def _ties(study: Study) -> str:
    """Which are tied with the best, and what one seed cannot tell."""
    best, *others = study.ranked
    above = {group.label: study.above(group) for group in others}
    tied = [label for label, more in above.items() if more and more.note]
    words = f"; tied with: {', '.join(tied)}" if tied else ""
    unsure = [group.label for group in others if group.label not in tied and len(group.members) == 1]
    if others and len(best.members) == 1:
        return f"{words}; it has one seed, which cannot tell whether {'others are' if tied else 'another is'} tied with it"
    if unsure:
        return f"{words}; one seed cannot tell whether these are tied with it: {', '.join(unsure)}"
    return words or "; none is tied with it" * bool(others and all(above.values()))


def fronts(study: Study) -> list[Picture | None]:
    """Quality against the time to train and against the decode state."""
    y, scale = ("accuracy (%)", 100) if study.recall else ("bits per byte", 1)
    quality, better = ("Accuracy", "upper") if study.recall else ("Bits per byte", "lower")
    at = sorted({group.training_length for group in study.ranked if group.training_length})
    lengths = " or ".join(f"{n:,}" for n in at)
    facts = {"y": y, "quality": quality, "better": better, "at": lengths, "longest": f"{study.longest:,}", **study.facts}
    found: dict[str, dict[str, tuple[float, Measured]]] = {"pareto_training": {}, "pareto_state": {}}
    for group in study.ranked:
        figure = group.quality(study.quality)
        seconds, state = group.cost(group.training_length, "training"), group.cost(study.longest, "state_bytes")
        for key, x, unit in (("pareto_training", seconds, "ms"), ("pareto_state", state, "MB")):
            if figure and x:
                found[key][group.label] = SCALES[unit] * x.value, figure.times(scale)
    worse = study.worse
    return [pareto(key, study.name, points, worse, **facts) for key, points in found.items()]
