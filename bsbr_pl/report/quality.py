"""How well each predicts: every checkpoint, by length and position, on tokens seen before, on recall tasks."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from .clocks import VALIDATION
from .figures import OWN, Row, finite
from .plots import Plot, curves
from .rows import Checkpoint
from .studies import Findings, Group, Member, Study
from .tables import Column, Measured, Table, tabulate

AGREES = 1e-6  # nats a token by which an evaluation may differ from the run's own validation
ARCHITECTURE = Column("architecture")
CHECKPOINT = [
    *(Column("checkpoint"), ARCHITECTURE, Column("seed"), Column("step"), Column("context", "tokens")),
    *(Column("loss", "nats", key="loss"), Column("perplexity"), Column("bits per byte", key="bits_per_byte")),
    *(Column("accuracy", "%", key="recall accuracy"), Column("top-1 accuracy", "%", key="accuracy")),
    *(Column("tokens"), Column("documents"), Column("samples"), Column("run's own val/loss", "nats")),
    Column("difference to it", "nats", signed=True),
]
SLICES = [ARCHITECTURE, Column("seed"), Column("slice"), Column("length", "tokens"), Column("accuracy", "%")]
ROUTING = [
    *(ARCHITECTURE, Column("seed"), Column("BSBR layer", key="layer"), Column("chunk", "tokens", key="chunk_size")),
    *(Column("far answers", key="questions"), Column("hit@1", "%", key="hit"), Column("by chance", "%", key="chance")),
    *(Column("mean rank", key="rank"), Column("accuracy where hit", "%", key="where hit")),
    *(Column("where missed", "%"), Column("where near", "%")),
]
READ_LONGER = "Bits per byte when the same text is read in contexts of one, two, ... times the length of training. "
HITS = (
    "Hits are tokens whose bigram with the token before occurred earlier in the context, by how many tokens ago; the "
    "rest could not be looked up. "
)
ROUTED = (
    "Far answers are those beyond what BSBR sees exactly; hit@1 is the share of these for which the best head's router "
    "gives the answer's chunk most weight. If it hit and the answer is wrong, the chunk's state or its reading lost it. "
    "Accuracies are by the last BSBR layer's routing. "
)


def by_checkpoint(study: Study, findings: Findings) -> Table | None:
    """Every checkpoint by itself, beside what its own run measured."""
    found: list[dict[str, Any]] = []
    for group, member in study.members:
        row, checkpoint = member.own, member.checkpoint
        if row is None:
            continue
        own = member.figures[(member.figures["length"] == OWN) & (member.figures["part"] == "")]
        figures = dict(zip(own["name"], own["figure"], strict=True))
        if study.recall:
            figures["recall accuracy"] = figures.pop("accuracy", None)
        counts = {name: row["values"].get(name) for name in ("tokens", "documents", "samples")}
        training = findings.of("training").get(checkpoint.digest)
        found.append({"checkpoint": checkpoint.name, "architecture": group.label, "seed": checkpoint.seed,
                      "step": checkpoint.count("step"), "context": row["identity"].get("length"), **figures, **counts,
                      "run's own val/loss": own_loss(checkpoint, training, study.split),
                      "difference to it": to_own(member, row, training, study.split)})  # fmt: skip
    caption = (
        f"At the length that the run validated at; 95 % bootstrap intervals over {study.units}. The run's own loss is "
        "of its validation at the checkpoint's step; the difference is given if kind of device, precision, split and "
        f"length are the same, and named if it is above {AGREES:g}. "
    )
    title, frame = f"Accuracy of each checkpoint: {study.title}", pd.DataFrame(found, dtype=object)
    return tabulate(f"accuracy_{study.name}", title, caption + study.source, frame, CHECKPOINT)


def own_loss(checkpoint: Checkpoint, training: Row | None, split: str) -> float | None:
    """The validation loss that a run recorded at its checkpoint's step; None on another split."""
    course = (training or {"values": {}})["values"].get("metrics", {}).get(VALIDATION)
    if not course or not course["step"] or split != "val":
        return None
    at_checkpoint = 0 <= (checkpoint.count("step") or 0) - course["step"][-1] <= 1  # a logger counts from 0
    return finite(course["value"][-1]) if at_checkpoint else None


def to_own(member: Member, row: Row, training: Row | None, split: str) -> Measured | None:
    """The loss less the run's own, if both are the same measurement: device, float32, split and length."""
    recorded, loss = own_loss(member.checkpoint, training, split), finite(row["values"].get("loss"))
    if training is None or recorded is None or loss is None:
        return None
    trained, here = training["values"].get("environment") or {}, row["identity"].get("environment") or {}
    kinds = {str(of.get("device")).split(":")[0] for of in (trained, here)}
    precisions = here.get("dtype"), str(training["values"].get("precision"))[:2]
    if len(kinds) > 1 or precisions != ("float32", "32") or row["identity"].get("length") not in (None, member.length):
        return None
    return Measured(loss - recorded, note="" if abs(loss - recorded) <= AGREES else "does not agree")


def by_length(study: Study) -> list[Table | Plot | None]:
    """Bits per byte at each context length; loss by position, at the length of training and in the longest contexts."""
    found = {"part": "", "name": "bits_per_byte"}
    bits = study.wide("length", **found).reindex(columns=study.lengths)
    trained = {group.trained_length for group in study.groups}
    own = trained.pop() if len(trained) == 1 else None
    times = {n: f" ({n // own}x)" if own and n % own == 0 else "" for n in study.lengths}
    columns = [ARCHITECTURE, *(Column(f"{n:,} tokens{times[n]}", best="low", key=n) for n in study.lengths)]
    name, title = f"by_length_{study.name}", "Bits per byte by length of context"
    table = _ranked(study, name, f"{title}: {study.title}", READ_LONGER, bits, columns)
    caption = f"The same text, read in longer contexts than in training. {study.title}. {study.source}"
    lines = study.lines("length", **found).reindex(columns=study.lengths)
    longer = curves(name, title, caption, lines, "context (tokens)", "bits per byte") if len(study.lengths) > 1 else None
    validated = [n for n in study.lengths if n in {member.length for _, member in study.members}]
    places = dict.fromkeys([*validated[:1], *study.lengths[-1:]])
    return [table, longer, *(by_position(study, length) for length in places)]


def by_position(study: Study, length: int) -> Plot | None:
    lines = study.lines("which", length=length, part="by_position", name="loss")
    caption = f"Mean loss of the tokens after the mark before and up to each mark. {study.title}. {study.source}"
    name, title = f"by_position_{length}_{study.name}", f"Loss by position, contexts of {length:,} tokens"
    return curves(name, title, caption, lines, "position in the context (tokens)", "loss (nats a token)")


def _ranked(study: Study, name: str, title: str, caption: str, frame: pd.DataFrame, columns: Any) -> Table | None:
    """A table with a row for each group, the ranked first."""
    frame = frame.assign(architecture=[group.label for group in study.groups])
    return tabulate(name, title, caption + study.source, frame, columns, len(study.ranked))


def by_distance(study: Study) -> list[Table | Plot | None]:
    """Loss by the distance at which a token's bigram was last seen."""
    found = {"length": OWN, "part": "recall", "name": "loss"}
    losses = study.wide("which", **found)
    columns = [ARCHITECTURE, *(Column(name, "nats", "low") for name in losses)]
    name = f"hits_{study.name}"
    table = _ranked(study, name, f"Loss on recall hits: {study.title}", HITS, losses, columns)
    caption = "How many tokens ago a token's bigram was last seen; the rest had not been. "
    caption += f"{study.title}. {study.source}"
    lines = study.lines("which", **found).drop(columns="hits", errors="ignore")
    x = "bigram last seen (tokens)"
    return [table, curves(name, "Loss on recall hits by distance", caption, lines, x, "loss (nats a token)")]


def recall(study: Study) -> list[Table | Plot | None]:
    """Accuracy on every slice of a recall task: by length if the slices differ in it; a table of every checkpoint."""
    found = {"length": OWN, "part": "slices", "name": "accuracy"}
    every = [member.figures.assign(architecture=group.label, seed=member.checkpoint.seed) for group, member in study.members]
    slices = pd.concat(every).query("part == 'slices' and name == 'accuracy'")
    frame = slices.drop(columns="length").rename(columns={"which": "slice", "at": "length", "figure": "accuracy"})
    caption = "Share of questions answered right, with 95 % bootstrap intervals over samples. "
    name, title = f"recall_{study.name}", f"Recall by slice: {study.title}"
    table = tabulate(name, title, caption + study.source, frame.astype(object), SLICES)
    lengths = slices.groupby("which", sort=False)["at"].first()
    distinct = lengths.notna().all() and lengths.is_unique
    lines = study.lines("which", **found).rename(columns=lengths.to_dict() if distinct else {})
    x = "length (tokens)" if distinct else "slice"
    caption = f"Share of questions answered right. {study.title}. {study.source}"
    plot = curves(name, f"Recall by {x.split()[0]}", caption, lines, x, "accuracy (%)", scale=100)
    return [plot if lines.shape[1] > 1 else None, table, routing(study)]


def routing(study: Study) -> Table | None:
    """Of every layer that chooses among chunks: whether its router missed, or what it found was lost behind it."""
    found = [one for group, member in study.members if member.recall for one in _layers(group, member, member.recall)]
    title = f"The router and what it found: {study.title}"
    return tabulate(f"routing_{study.name}", title, ROUTED + study.source, pd.DataFrame(found, dtype=object), ROUTING)


def _layers(group: Group, member: Member, row: Row) -> Iterator[dict[str, Any]]:
    values = row["values"].get("retrieval") or {"layers": []}
    for layer in values["layers"]:
        best = {} if layer["best_head"] is None else layer["heads"][layer["best_head"]]
        last = layer is values["layers"][-1]
        routed = {f"where {which}": of["accuracy"] for which, of in values["routed"].items()} if last else {}
        near = {"where near": values["reach"]["near"]["accuracy"]} if last else {}
        yield {"architecture": group.label, "seed": member.checkpoint.seed, **layer, **best, **routed, **near}
