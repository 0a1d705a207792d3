"""The verdict: every architecture in one row, in words, and on the fronts of quality and cost."""

import dataclasses

import pandas as pd

from .budgets import sentence, unequal
from .figures import OWN, difference, front, nearest, power
from .costs import fitted_from, samples
from .plots import Plot, pareto
from .quality import ARCHITECTURE
from .sources import failed
from .studies import Findings, Group, Study
from .tables import SCALES, Column, Measured, Table, tabulate

BITS = Column("bits per byte", best="low")
ABOVE = Column("bits per byte above the best", signed=True)
TRAINING = (
    *(Column("parameters"), Column("run"), Column("steps"), Column("batch", "windows"), Column("training tokens")),
    *(Column("training FLOPs, counted", "GFLOP"), Column("training length", "tokens")),
)
TEXT = (Column("loss on recall hits", best="low"), Column("loss on the rest", best="low"))
#: The costs of the verdict: the key in the values, its name, its unit, and what is said of the least.
COSTS = (
    ("training", "training pass", "s", "Quickest training pass"),
    ("forward", "forward pass", "s", ""),
    ("decode", "decoded token", "ms", "Cheapest decoded token"),
    ("state_bytes", "decode state", "MB", "Smallest decode state"),
    ("training_bytes", "training memory", "MB", ""),
)
SHORT = 7  # columns of the first table
PAIRED = (
    "The distance to the best is paired by document{averaged}: if its interval holds 0{overlap}, the two are tied. "
    "Recall hits are tokens whose bigram occurred before in the context. "
)


def tables(study: Study) -> list[Table | None]:
    """One row for each group, the best first, the disqualified at the end: in a few columns, and in all."""
    whole = ranking(study)
    if whole is None:
        return []
    costs = [f"{name} at {study.cost_length:,}" for _, name, *_ in COSTS[:4:3]]  # training and the state
    first = ["architecture", "bits per byte", "accuracy", ABOVE.name, "seeds", "parameters", *costs]
    place = {column.name: i for i, column in enumerate(whole.columns)}
    outcomes = set(whole.frame.iloc[:, place["certificate"]])
    chosen = [place[name] for name in first if name in place][: SHORT - (outcomes != {"passed"})]
    chosen += [place["certificate"]] if outcomes != {"passed"} else []
    columns, frame = [whole.columns[i] for i in chosen], whole.frame.iloc[:, chosen]
    name, title = f"first_{study.name}", "Architectures, best first"
    short = Table(name, title, _short_caption(study) + study.source, columns, frame, whole.ranked)
    return [short, dataclasses.replace(whole, title="The same with every column", folded=True)]


def _short_caption(study: Study) -> str:
    return f"Marked is the best among the certified. In brackets: {_spread(study)} of {study.units}. "


def _several(study: Study) -> bool:
    return any(len(group.members) > 1 for group in study.groups)


def _spread(study: Study) -> str:
    return f"{'the least and the largest of several seeds, else ' * _several(study)}95 % bootstrap intervals"


def ranking(study: Study) -> Table | None:
    """One row for each group, the best first, the disqualified at the end."""
    longest, on_front = study.cost_length, quality_front(study)
    figures = study.wide("name", length=OWN, part="")
    slices = study.wide("which", length=OWN, part="slices", name="accuracy").add_prefix("accuracy, ")
    hits = study.wide("which", length=OWN, part="recall", name="loss")
    far = study.wide("length", part="", name="bits_per_byte").reindex(columns=study.lengths[-1:])
    facts = pd.DataFrame([_facts(group, study, on_front) for group in study.groups], dtype=object)
    frame = pd.concat([facts, figures, slices, hits, far.add_prefix("at ")], axis=1)
    accuracy = Column("accuracy" if study.recall else "top-1 accuracy", "%", "high", key="accuracy")
    at = f" at {longest:,}" if longest else ""
    last = [Column(f"bits per byte at {n:,} tokens", best="low", key=f"at {n}") for n in study.lengths[-1:]]
    columns = [
        *(ARCHITECTURE, Column("seeds"), Column("certificate"), *TRAINING),
        *(dataclasses.replace(BITS, key="bits_per_byte"), ABOVE, accuracy),
        *(Column(name, "%", "high") for name in slices if slices.shape[1] > 1),
        *(dataclasses.replace(column, key=key) for column, key in zip(TEXT, ("hits", "rest"), strict=True)),
        *(last if len(study.lengths) > 1 else []),
        *(Column(name + at, unit, "low", key=f"cost {cost}") for cost, name, unit, _ in COSTS),
        *(Column("exponent of training time", best="low", decimals=2), Column("Pareto front")),
    ]
    caption = _caption(study, bool(on_front))
    return tabulate(f"verdict_{study.name}", "Architectures, best first", caption, frame, columns, len(study.ranked))


def _facts(group: Group, study: Study, on_front: list[str]) -> dict[str, object]:
    """What a row says beside the figures of its quality."""
    checkpoint, ranked = group.checkpoint, group in study.ranked
    shortest = fitted_from(pd.concat([one.costs["length"] for one in study.groups]))
    costs = {f"cost {cost}": group.cost(study.cost_length, cost) for cost, *_ in COSTS}
    return {
        "architecture": group.label,
        "seeds": _seeds(group),
        "certificate": _outcome(group),
        "parameters": checkpoint.count("parameters"),
        "run": checkpoint.text("run.status") or None,
        "steps": checkpoint.count("run.steps"),
        "batch": checkpoint.count("run.batch"),
        "training tokens": checkpoint.tokens,
        "training FLOPs, counted": group.training_flops,
        "training length": group.trained_length,
        ABOVE.name: _above(group, study.ranked) if ranked and not study.recall else None,
        **costs,
        "exponent of training time": power(samples(group.costs, "training"), shortest),
        "Pareto front": "front" if ranked and group.label in on_front else "",
    }


def _caption(study: Study, with_front: bool) -> str:
    seeds, key = _several(study), "accuracy" if study.recall else "bits per byte"
    caption = "Only runs with this budget; those with others stand in other tables. " * bool(unequal(study))
    caption += f"Sorted by {key}; marked is the best among the certified. In brackets: {_spread(study)}, "
    caption += f"of accuracies over {study.units}, of times over rounds. "
    if len(study.ranked) > 1 and not study.recall:
        averaged, overlap = ", seeds averaged" * seeds, ", or seeds of the two overlap" * seeds
        caption += PAIRED.format(averaged=averaged, overlap=overlap)
    caption += "Pareto front: no other is better and as quick to train, or as good and quicker. " * with_front
    return caption + study.source


def _above(group: Group, ranked: list[Group]) -> Measured | None:
    """Bits per byte above the best of the ranked."""
    if len(ranked) < 2:
        return None
    return Measured(0.0, note="best") if group is ranked[0] else difference(group.own, ranked[0].own)


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
    points, worse = {}, -1 if study.recall else 1
    for group in study.ranked:
        quality, seconds = group.quality(study.quality), group.training_seconds
        if quality and seconds:
            points[group.label] = (seconds.value, worse * quality.value)
    return front(points)


def summary(study: Study) -> str:
    """The verdict in words."""
    out = sorted({group.label for group in study.groups if group.status == "disqualified"})
    last = f"Disqualified: {', '.join(out)}." if out else ""
    if not study.ranked:
        return f"Nothing is ranked: no certified checkpoint has an accuracy. {last}".strip()
    words = [_best(study), sentence(study), *_cheapest(study)]
    if len(study.ranked) > 1 and (on_front := quality_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join([*words, last]).strip()


def _cheapest(study: Study) -> list[str]:
    words = []
    for cost, _, unit, superlative in COSTS:
        found = {group.label: value.value for group in study.ranked if (value := group.cost(study.cost_length, cost))}
        if superlative and len(set(found.values())) > 1:
            least = min(found.values())
            names = ", ".join(label for label, value in found.items() if value == least)
            shown = f"{Column('', unit).number(least)}\u00a0{unit}"
            words.append(f"{superlative} at {study.cost_length:,} tokens: {names}, {shown}.")
    return words


def _best(study: Study) -> str:
    """Which is the best, and which are tied with it; first of all, that other budgets stand apart."""
    best, unit = study.ranked[0], "% right" if study.recall else "bits per byte"
    quality = best.quality(study.quality)
    assert quality is not None
    words = f"{best.label}, {Column('', '%' if study.recall else '').number(quality.value)} {unit}"
    words += "" if study.recall else _ties(study.ranked)
    if not (others := unequal(study)):
        return f"Best: {words}."
    return f"{others}. {'Best' if len(study.ranked) > 1 else 'The only one'} with this budget: {words}."


def _ties(ranked: list[Group]) -> str:
    """Which are tied with the best; what one seed cannot tell."""
    best, *others = ranked
    apart = {group.label: difference(group.own, best.own) for group in others}
    tied = [label for label, more in apart.items() if more and more.note]
    unsure = [g.label for g in others if g.label not in tied and min(len(g.members), len(best.members)) == 1]
    words = f"; tied with: {', '.join(tied)}" if tied else ""
    if len(best.members) == 1 and unsure:
        return f"{words}; one seed cannot tell whether {'another' if not tied else 'any other'} is tied with it"
    if unsure:
        return f"{words}; one seed each cannot tell whether these are tied with it: {', '.join(unsure)}"
    return words or "; none is tied with it" * bool(others and all(apart.values()))


def fronts(study: Study) -> list[Plot | None]:
    """Quality against the time to train and against the decode state."""
    y, scale = ("accuracy (%)", 100) if study.recall else ("bits per byte", 1)
    title, better = ("Accuracy", "upper") if study.recall else ("Bits per byte", "lower")
    caption = f"The {better} left is better. {study.title}. {study.source}"
    at = sorted({n for group in study.ranked if (n := nearest(group.cost_lengths, group.trained_length))})
    times: dict[str, tuple[float, Measured]] = {}
    states: dict[str, tuple[float, Measured]] = {}
    for group in study.ranked:
        quality, state = group.quality(study.quality), group.cost(study.cost_length, "state_bytes")
        for points, x, unit in ((times, group.training_seconds, "ms"), (states, state, "MB")):
            if quality and x:
                points[group.label] = SCALES[unit] * x.value, quality.times(scale)
    x_time = f"training pass at {' or '.join(f'{n:,}' for n in at)} tokens (ms)"
    x_state = f"decode state at {study.cost_length:,} tokens (MB)"
    return [
        pareto(f"pareto_training_{study.name}", f"{title} and training time", caption, times, x_time, y, study.recall),
        pareto(f"pareto_state_{study.name}", f"{title} and decode state", caption, states, x_state, y, study.recall),
    ]
