"""The verdict: every architecture in one row, in words, and on the fronts of quality and cost."""

from collections.abc import Sequence

from .budgets import sentence, unequal
from .findings import Findings, Group, Study
from .numbers import difference, fitted_from, front, nearest, pooled, power, slices
from .plot import Plot, pareto
from .quality import bits_at, slice_of
from .sources import failed
from .table import ARCHITECTURE, SCALES, Cell, Column, Columns, Measured, Table, tabulate


def ranking(study: Study, findings: Findings) -> Table | None:
    """One row for each group, the best first, the disqualified at the end."""
    groups, ranked = study.ordered()
    among, on_front = groups[:ranked], quality_front(study)
    longest = max((length for group in groups for length in group.costs), default=0)
    at, last = f" at {longest:,}" if longest else "", study.lengths[-1:]
    names = list(dict.fromkeys(name for group in groups for name in slices(group.own, "slices", "accuracy")))
    shortest = fitted_from([group.costs for group in groups])
    columns: Columns = [
        (ARCHITECTURE, lambda group: group.label),
        (Column("seeds"), _seeds),
        (Column("certificate"), _outcome),
        (Column("parameters"), lambda group: _parameters(group)),
        (Column("run"), lambda group: group.run.status),
        (Column("steps"), lambda group: group.run.steps),
        (Column("batch", "windows"), lambda group: group.run.batch),
        (Column("training tokens"), lambda group: group.run.tokens),
        (Column("training FLOPs, counted", "GFLOP"), lambda group: group.training_flops),
        (Column("training length", "tokens"), lambda group: group.trained_length),
        (Column("bits per byte", best="low"), lambda group: pooled(group.own, "bits_per_byte")),
        (Column("bits per byte above the best", signed=True), lambda group: _above(group, among)),
        (Column("accuracy" if study.recall else "top-1 accuracy", "%", "high"), lambda g: pooled(g.own, "accuracy")),
        *((Column(f"accuracy, {n}", "%", "high"), slice_of("slices", n, "accuracy")) for n in names if len(names) > 1),
        (Column("loss on recall hits", best="low"), slice_of("recall", "hits", "loss")),
        (Column("loss on the rest", best="low"), slice_of("recall", "rest", "loss")),
        *((Column(f"bits per byte at {n:,} tokens", best="low"), bits_at(n)) for n in last if len(study.lengths) > 1),
        (Column(f"training pass{at}", "s", "low"), lambda group: group.cost(longest, "training")),
        (Column(f"forward pass{at}", "s", "low"), lambda group: group.cost(longest, "forward")),
        (Column(f"decoded token{at}", "ms", "low"), lambda group: group.cost(longest, "decode")),
        (Column(f"decode state{at}", "MB", "low"), lambda group: group.cost(longest, "state_bytes")),
        (Column(f"training memory{at}", "MB", "low"), lambda group: group.cost(longest, "training_bytes")),
        (
            Column("exponent of training time", best="low", decimals=2),
            lambda group: power(group.costs, "training", shortest),
        ),
        (Column("Pareto front"), lambda group: "front" if group in among and group.label in on_front else ""),
    ]
    seeds = any(len(group.members) > 1 for group in groups)
    caption = "Only runs with this budget; those with others stand in other tables. " * bool(unequal(study))
    caption += (
        f"Sorted by {'accuracy' if study.recall else 'bits per byte'}; marked is the best among the certified. In "
        f"brackets: {'the least and the largest of several seeds, else ' if seeds else ''}95 % bootstrap intervals, "
        f"of accuracies over {study.units}, of times over rounds. "
    )
    if len(among) > 1 and not study.recall:
        caption += (
            f"The distance to the best is paired by document{', seeds averaged' if seeds else ''}: where its interval "
            f"holds 0{', or seeds of the two overlap' if seeds else ''}, the two are tied. Recall hits are tokens "
            "whose bigram occurred before in the context. "
        )
    if on_front:
        caption += "Pareto front: no other is better and as quick to train, or as good and quicker. "
    used = [*study.rows, *(row for group in groups for row in group.costs.values())]
    name, title = f"verdict_{study.name}", "Architectures, best first"
    return tabulate(name, title, caption + findings.source(used), groups, columns, ranked)


def _above(group: Group, ranked: Sequence[Group]) -> Measured | None:
    """Bits per byte above the best of the ranked."""
    if group not in ranked or len(ranked) < 2 or pooled(group.own, "bits_per_byte") is None:
        return None
    return Measured(0.0, note="best") if group is ranked[0] else difference(group.own, ranked[0].own)


def _seeds(group: Group) -> Cell:
    """How many; and of how many runs, where one came twice."""
    seeds, runs = [member.checkpoint.seed for member in group.members], len(group.members)
    if None in seeds:
        return f"unknown, {runs} run{'s' * (runs > 1)}"
    return Measured(len(set(seeds)), note=f"{runs} runs" if len(set(seeds)) < runs else "")


def _outcome(group: Group) -> str:
    if group.status != "disqualified":
        return group.status
    return f"disqualified: {' / '.join(dict.fromkeys(failed(m.certificate) for m in group.members if m.certificate))}"


def _parameters(group: Group) -> int:
    module = group.members[0].checkpoint.module
    assert module is not None
    return sum(p.numel() for p in module.parameters())


def quality_front(study: Study) -> list[str]:
    """The ranked groups that no other is both better and quicker to train than."""
    points = {}
    for group in study.ranked():
        quality, seconds = pooled(group.own, "accuracy" if study.recall else "bits_per_byte"), group.training_seconds
        if quality and seconds:
            points[group.label] = (seconds.value, -quality.value if study.recall else quality.value)
    return front(points)


def summary(study: Study) -> str:
    """The verdict in words."""
    ranked = study.ranked()
    out = sorted({group.label for group in study.groups if group.status == "disqualified"})
    last = f"Disqualified: {', '.join(out)}." if out else ""
    if not ranked:
        return f"Nothing is ranked: no certified checkpoint has an accuracy. {last}".strip()
    words = [_best(study, ranked), sentence(study)]
    longest = max((length for group in ranked for length in group.costs), default=0)
    for name, superlative, number in (
        ("decode", "Cheapest decoded token", Column("", "ms")),
        ("training", "Quickest training pass", Column("", "s")),
        ("state_bytes", "Smallest decode state", Column("", "MB")),
    ):
        found = {group.label: value.value for group in ranked if (value := group.cost(longest, name))}
        if len(set(found.values())) > 1:
            least = min(found.values())
            names = ", ".join(label for label, value in found.items() if value == least)
            words.append(f"{superlative} at {longest:,} tokens: {names}, {number.number(least)}\u00a0{number.unit}.")
    if len(ranked) > 1 and (on_front := quality_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join([*words, last]).strip()


def _best(study: Study, ranked: Sequence[Group]) -> str:
    """Which is the best, and which are tied with it; first of all, that other budgets stand apart."""
    best, what, unit = ranked[0], "bits_per_byte", "bits per byte"
    if study.recall:
        what, unit = "accuracy", "% right"
    quality = pooled(best.own, what)
    assert quality is not None
    words = f"{best.label}, {Column('', '%' if study.recall else '').number(quality.value)} {unit}"
    if not study.recall and len(ranked) > 1:
        apart = {group.label: difference(group.own, best.own) for group in ranked[1:]}
        tied = [label for label, more in apart.items() if more and more.note]
        words += f"; tied with: {', '.join(tied)}" if tied else "; none is tied with it" * all(apart.values())
    if not (others := unequal(study)):
        return f"Best: {words}."
    return f"{others}. {'Best' if len(ranked) > 1 else 'The only one'} with this budget: {words}."


def pareto_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Quality against the time to train and against the decode state."""
    groups = study.ranked()
    what, y, scale = ("accuracy", "accuracy (%)", 100) if study.recall else ("bits_per_byte", "bits per byte", 1)
    title = "Accuracy" if study.recall else "Bits per byte"
    caption = f"The {'upper' if study.recall else 'lower'} left is better. "
    caption += f"{study.title}. {findings.source(study.rows)}"
    longest = max((length for group in groups for length in group.costs), default=0)
    at = sorted({n for group in groups if (n := nearest(group.costs, group.trained_length))})
    times: dict[str, tuple[float, Measured]] = {}
    states: dict[str, tuple[float, Measured]] = {}
    for group in groups:
        quality, seconds, state = pooled(group.own, what), group.training_seconds, group.cost(longest, "state_bytes")
        for points, x, unit in ((times, seconds, "ms"), (states, state, "MB")):
            if quality and x:
                points[group.label] = SCALES[unit] * x.value, quality.times(scale)
    x_time = f"training pass at {' or '.join(f'{n:,}' for n in at)} tokens (ms)"
    x_state = f"decode state at {longest:,} tokens (MB)"
    return [
        pareto(f"pareto_training_{study.name}", f"{title} and training time", caption, times, x_time, y, study.recall),
        pareto(f"pareto_state_{study.name}", f"{title} and decode state", caption, states, x_state, y, study.recall),
    ]
