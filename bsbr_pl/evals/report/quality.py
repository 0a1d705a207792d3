"""How well each predicts: every checkpoint, by length and position, on tokens seen before, on recall tasks."""

from collections.abc import Callable
from typing import Any

from ..checkpoints import Checkpoint
from .findings import MALFORMED, Findings, Group, Member, Study
from .numbers import Row, finite, pool, pooled, slices
from .plot import Plot, curves
from .table import ARCHITECTURE, Cell, Column, Columns, Measured, Table, tabulate

AGREES = 1e-6  # nats a token by which an evaluation may differ from the run's own validation


def by_checkpoint(study: Study, findings: Findings) -> Table | None:
    """Every checkpoint by itself, beside what its own run measured."""
    members = [(group.label, m, m.own) for group in study.groups for m in group.members if m.own]

    def figure(name: str) -> Callable[[Any], Cell]:
        return lambda one: pooled([one[2]], name)

    def count(name: str) -> Callable[[Any], Cell]:
        return lambda one: one[2]["values"].get(name)

    columns: Columns = [
        (Column("checkpoint"), lambda one: one[1].checkpoint.name),
        (ARCHITECTURE, lambda one: one[0]),
        (Column("seed"), lambda one: one[1].checkpoint.seed),
        (Column("step"), lambda one: one[1].checkpoint.step),
        (Column("context", "tokens"), lambda one: one[2]["identity"].get("length")),
        (Column("loss", "nats"), figure("loss")),
        (Column("perplexity"), figure("perplexity")),
        (Column("bits per byte"), figure("bits_per_byte")),
        (Column("accuracy" if study.recall else "top-1 accuracy", "%"), figure("accuracy")),
        *((Column(name), count(name)) for name in ("tokens", "documents", "samples")),
        (Column("run's own val/loss", "nats"), lambda one: own_loss(one[1].checkpoint, study.split)),
        (Column("difference to it", "nats", signed=True), lambda one: to_own(one[1], one[2], study.split)),
    ]
    caption = (
        f"At the length that the run validated at; 95 % bootstrap intervals over {study.units}. The run's own loss "
        "is of its validation at the checkpoint's step; the difference is given where kind of device, precision, split "
        f"and length are the same, and named where it is above {AGREES:g}. "
    )
    used = [row for _, _, row in members]
    title = f"Accuracy of each checkpoint: {study.title}"
    return tabulate(f"accuracy_{study.name}", title, caption + findings.source(used), members, columns)


def own_loss(checkpoint: Checkpoint, split: str = "val") -> float | None:
    """The validation loss that a run recorded at its checkpoint's step; None on another split."""
    try:
        column = checkpoint.record["metrics"]["val/loss"]
        at_checkpoint = 0 <= checkpoint.step - column["step"][-1] <= 1  # a logger counts from 0
        return finite(column["value"][-1]) if split == "val" and at_checkpoint else None
    except MALFORMED:
        return None


def to_own(member: Member, row: Row, split: str) -> Measured | None:
    """The loss less the run's own, where both are the same measurement: device, float32, split and length."""
    recorded, loss = own_loss(member.checkpoint, split), finite(row["values"].get("loss"))
    try:
        trained_on, precision = (member.checkpoint.record[part] for part in ("environment", "training"))
        devices = {str(of["device"]).split(":")[0] for of in (trained_on, row["identity"]["environment"])}
        precisions = row["identity"]["environment"]["dtype"], str(precision["precision"])[:2]
    except MALFORMED:
        return None
    same = len(devices) == 1 and precisions == ("float32", "32")
    if recorded is None or loss is None or not same or row["identity"].get("length") not in (None, member.length):
        return None
    return Measured(loss - recorded, note="" if abs(loss - recorded) <= AGREES else "does not agree")


def by_length(study: Study, findings: Findings) -> Table | None:
    """Bits per byte at each context length."""
    groups, ranked = study.ordered()
    trained = {group.trained_length for group in groups}

    def header(length: int) -> str:
        (own,) = trained if len(trained) == 1 else (None,)
        return f"{length:,} tokens" + (f" ({length // own}x)" if own and length % own == 0 else "")

    columns: Columns = [
        (ARCHITECTURE, lambda group: group.label),
        *((Column(header(length), best="low"), bits_at(length)) for length in study.lengths),
    ]
    caption = "Bits per byte when the same text is read in contexts of one, two, ... times the length of training. "
    title = f"Bits per byte by length of context: {study.title}"
    return tabulate(f"by_length_{study.name}", title, caption + findings.source(study.rows), groups, columns, ranked)


def by_distance(study: Study, findings: Findings) -> Table | None:
    """Loss by the distance at which a token's bigram was last seen."""
    groups, ranked = study.ordered()
    names = list(dict.fromkeys(name for group in groups for name in slices(group.own, "recall", "loss")))
    columns: Columns = [
        (ARCHITECTURE, lambda group: group.label),
        *((Column(name, "nats", "low"), slice_of("recall", name, "loss")) for name in names),
    ]
    caption = (
        "Hits are tokens whose bigram with the token before occurred earlier in the context, by how many tokens ago; "
        "the rest could not be looked up. "
    )
    title = f"Loss on recall hits: {study.title}"
    return tabulate(f"hits_{study.name}", title, caption + findings.source(study.rows), groups, columns, ranked)


def recall(study: Study, findings: Findings) -> Table | None:
    """Accuracy of every checkpoint on every slice of a recall task."""
    members = [(group.label, member) for group in study.groups for member in group.members]
    entries = [(label, m, entry) for label, m in members if m.recall for entry in m.recall["values"]["slices"]]
    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("seed"), lambda one: one[1].checkpoint.seed),
        (Column("slice"), lambda one: one[2]["slice"]),
        (Column("length", "tokens"), lambda one: one[2].get("length")),
        (Column("accuracy", "%"), lambda one: pool([one[2].get("accuracy")], [one[2].get("interval")])),
    ]
    caption = "Share of questions answered right, with 95 % bootstrap intervals over samples. "
    title = f"Recall by slice: {study.title}"
    return tabulate(f"recall_{study.name}", title, caption + findings.source(study.rows), entries, columns)


def routing(study: Study, findings: Findings) -> Table | None:
    """Of every BSBR layer on a recall task: whether its router missed, or what it found was lost behind it."""
    members = [(group.label, m, m.recall["values"]) for group in study.groups for m in group.members if m.recall]
    found = [(label, m, values["retrieval"]) for label, m, values in members if "retrieval" in values]
    entries = [(label, m, one, layer) for label, m, one in found for layer in one["layers"]]

    def of_best_head(name: str) -> Callable[[Any], Cell]:
        return lambda one: None if one[3]["best_head"] is None else one[3]["heads"][one[3]["best_head"]][name]

    def accuracy(kind: str, which: str) -> Callable[[Any], Cell]:
        return lambda one: one[2][kind][which]["accuracy"] if one[3] is one[2]["layers"][-1] else None

    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("seed"), lambda one: one[1].checkpoint.seed),
        (Column("BSBR layer"), lambda one: one[3]["layer"]),
        (Column("chunk", "tokens"), lambda one: one[3]["chunk_size"]),
        (Column("far answers"), lambda one: one[3]["questions"]),
        (Column("hit@1", "%"), of_best_head("hit")),
        (Column("by chance", "%"), lambda one: one[3]["chance"]),
        (Column("mean rank"), of_best_head("rank")),
        (Column("accuracy where hit", "%"), accuracy("routed", "hit")),
        (Column("where missed", "%"), accuracy("routed", "missed")),
        (Column("where near", "%"), accuracy("reach", "near")),
    ]
    caption = (
        "Far answers are those beyond what BSBR sees exactly; hit@1 is the share of these where the best head's router "
        "gives the answer's chunk most weight. Where it hit and the answer is wrong, the chunk's state or its reading "
        "lost it. Accuracies are by the last BSBR layer's routing. "
    )
    title = f"The router and what it found: {study.title}"
    return tabulate(f"routing_{study.name}", title, caption + findings.source(study.rows), entries, columns)


def length_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Bits per byte by length; loss by position, in contexts of training's length and in the longest."""
    groups, source = _certified(study), f"{study.title}. {findings.source(study.rows)}"
    lines = {
        group.label: {n: value for n in study.lengths if (value := pooled(group.at(n), "bits_per_byte"))}
        for group in groups
    }
    caption = f"The same text, read in longer contexts than in training. {source}"
    name, title, x = f"by_length_{study.name}", "Bits per byte by length of context", "context (tokens)"
    plots = [curves(name, title, caption, lines, x, "bits per byte")] if len(study.lengths) > 1 else []
    validated = [n for n in study.lengths if n in {member.length for group in groups for member in group.members}]
    for length in dict.fromkeys([*validated[:1], *study.lengths[-1:]]):
        lines = {group.label: slices(group.at(length), "by_position", "loss", by="stop") for group in groups}
        caption = f"Mean loss of the tokens after the mark before and up to each mark. {source}"
        name, title = f"by_position_{length}_{study.name}", f"Loss by position, contexts of {length:,} tokens"
        plots.append(curves(name, title, caption, lines, "position in the context (tokens)", "loss (nats a token)"))
    return plots


def hits_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Loss by the distance at which a token's bigram was last seen."""
    found = {group.label: slices(group.own, "recall", "loss") for group in _certified(study)}
    lines = {label: {name: value for name, value in of.items() if name != "hits"} for label, of in found.items()}
    caption = "How many tokens ago a token's bigram was last seen; the rest had not been. "
    caption += f"{study.title}. {findings.source(study.rows)}"
    name, title = f"hits_{study.name}", "Loss on recall hits by distance"
    return [curves(name, title, caption, lines, "bigram last seen (tokens)", "loss (nats a token)")]


def recall_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Accuracy by length where the slices differ in it, else by slice."""
    lines: dict[str, dict[Any, Measured]] = {}
    for group in _certified(study):
        lengths = {entry["slice"]: entry.get("length") for row in group.own for entry in row["values"]["slices"]}
        distinct = len(set(lengths.values())) == len(lengths) and None not in lengths.values()
        found = slices(group.own, "slices", "accuracy")
        lines[group.label] = {lengths[name] if distinct else name: value for name, value in found.items()}
    places = {place for points in lines.values() for place in points}
    if len(places) < 2:
        return []
    x = "slice" if any(isinstance(place, str) for place in places) else "length (tokens)"
    caption = f"Share of questions answered right. {study.title}. {findings.source(study.rows)}"
    name, title = f"recall_{study.name}", f"Recall by {x.split()[0]}"
    return [curves(name, title, caption, lines, x, "accuracy (%)", scale=100)]


def slice_of(part: str, which: str, name: str) -> Callable[[Group], Cell]:
    return lambda group: slices(group.own, part, name).get(which)


def bits_at(length: int) -> Callable[[Group], Cell]:
    return lambda group: pooled(group.at(length), "bits_per_byte")


def _certified(study: Study) -> list[Group]:
    return [group for group in study.groups if group.status != "disqualified"]
