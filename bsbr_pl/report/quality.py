"""Accuracy: of every checkpoint, by length and position, on recall hits, on recall tasks."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pandas as pd

from bsbr_pl.results import Row

from .figures import OWN, pooled
from .plots import Picture, curves
from .rows import Checkpoint
from .studies import Findings, Group, Member, Study
from .tables import Column, Measured, Table, table

Parts = list[Table | Picture | None]
VALIDATION = "val/loss"
AGREES = 1e-6  # nats a token by which an evaluation may differ from the run's own validation


def by_checkpoint(study: Study, findings: Findings) -> Table | None:
    """Every checkpoint, with the loss that its own run measured."""
    training = findings.of("training") if study.place.split == "val" else {}  # it validated on no other split
    found = []
    for group, m in study.members:
        found += [_of_checkpoint(group, m.checkpoint, m.own, training.get(m.checkpoint.digest))] if m.own else []
    return table("accuracy", study.name, pd.DataFrame(found, dtype=object), agrees=AGREES, **study.facts)


def _of_checkpoint(group: Group, checkpoint: Checkpoint, row: Row, training: Row | None) -> dict[str, Any]:
    own = pooled([(OWN, row)], 1).query("part == ''")
    return {
        "checkpoint": checkpoint.name,
        **{"architecture": group.label, "seed": checkpoint.seed, "step": checkpoint.get("step")},
        "context": row["identity"].get("length"),
        **dict(zip(own["name"], own["figure"], strict=True)),
        **{name: row["values"].get(name) for name in ("tokens", "documents", "samples")},
        "own": own_loss(checkpoint, training),
        "difference": to_own(checkpoint, training, row),
    }


def own_loss(checkpoint: Checkpoint, training: Row | None) -> float | None:
    """The validation loss that a run recorded at its checkpoint's step."""
    course = (training or {"values": {}})["values"].get("metrics", {}).get(VALIDATION)
    if not course or not course["step"] or course["step"][-1] is None:
        return None
    at_checkpoint = 0 <= (checkpoint.get("step") or 0) - course["step"][-1] <= 1  # a logger counts from 0
    return course["value"][-1] if at_checkpoint else None


def to_own(checkpoint: Checkpoint, training: Row | None, row: Row) -> Measured | None:
    """The loss minus the run's own, if device, float32 and length are the same."""
    recorded, loss = own_loss(checkpoint, training), row["values"].get("loss")
    if training is None or recorded is None or loss is None:
        return None
    trained, here = training["values"].get("environment") or {}, row["identity"].get("environment") or {}
    kinds = {str(of.get("device")).split(":")[0] for of in (trained, here)}
    precisions = here.get("dtype"), str(training["values"].get("precision"))[:2]
    lengths = None, checkpoint.get("data.validation_length")
    if len(kinds) > 1 or precisions != ("float32", "32") or row["identity"].get("length") not in lengths:
        return None
    return Measured(loss - recorded, note="" if abs(loss - recorded) <= AGREES else "does not agree")


def by_length(study: Study) -> Parts:
    """Bits per byte at each context length; loss by position, in contexts as in validation and in the longest."""
    bits = {"part": "", "name": "bits_per_byte"}
    trained = {group.checkpoint.get("data.trained_length") for group in study.groups}
    own = trained.pop() if len(trained) == 1 else None
    times = {n: f" ({n // own}x)" if own and n % own == 0 else "" for n in study.lengths}
    columns = [Column(f"{n:,} tokens{times[n]}", best="low", key=n) for n in study.lengths]
    frame = study.wide("length", **bits).reindex(columns=study.lengths)
    lines = study.lines("length", **bits).reindex(columns=study.lengths)
    validated = {member.checkpoint.get("data.validation_length") for _, member in study.members}
    places = dict.fromkeys([*[n for n in study.lengths if n in validated][:1], *study.lengths[-1:]])
    return [
        table("by_length", study.name, frame.reset_index(), columns, len(study.ranked), **study.facts),
        curves("by_length", study.name, lines, **study.facts),
        *(_by_position(study, length) for length in places),
    ]


def _by_position(study: Study, length: int) -> Picture | None:
    lines = study.lines("which", length=length, part="by_position", name="loss")
    return curves("by_position", f"{length}_{study.name}", lines, length=length, **study.facts)


def by_distance(study: Study) -> Parts:
    """Loss by the distance to the last occurrence of a token's bigram."""
    hits = {"length": OWN, "part": "recall", "name": "loss"}
    frame = study.wide("which", **hits)
    columns = [Column(name, "nats", "low") for name in frame]
    lines = study.lines("which", **hits).drop(columns="hits", errors="ignore")
    return [
        table("hits", study.name, frame.reset_index(), columns, len(study.ranked), **study.facts),
        curves("hits", study.name, lines, **study.facts),
    ]


def recall(study: Study) -> Parts:
    """Accuracy on every slice of a recall task: by length if the slices differ in it; a table of every checkpoint."""
    every = [pooled(m.rows, 1).assign(architecture=group.label, seed=m.checkpoint.seed) for group, m in study.members]
    slices = pd.concat(every).query("length == @OWN and part == 'slices' and name == 'accuracy'")
    lengths = slices.groupby("which", sort=False)["at"].first()
    distinct = bool(lengths.notna().all() and lengths.is_unique)
    lines = study.lines("which", length=OWN, part="slices", name="accuracy")
    facts: dict[str, Any] = {"by": "length", "unit": " (tokens)"} if distinct else {"by": "slice", "unit": ""}
    lines = lines.rename(columns=lengths.to_dict()) if distinct else lines
    return [
        curves("recall", study.name, lines, scale=100, **facts, **study.facts),
        table("recall", study.name, slices, **study.facts),
        routing(study),
    ]


def routing(study: Study) -> Table | None:
    """For every layer with a router: how often it hits, and the accuracy with and without a hit."""
    found: list[dict[str, Any]] = []
    for group, member in study.members:
        with suppress(AttributeError, KeyError, TypeError):  # the schema does not say what `retrieval` holds
            found += _layers(group, member)
    return table("routing", study.name, pd.DataFrame(found, dtype=object), **study.facts)


def _layers(group: Group, member: Member) -> Iterator[dict[str, Any]]:
    values = (member.own or {"values": {}})["values"].get("retrieval") or {"layers": []}
    for layer in values["layers"]:
        best = {} if layer["best_head"] is None else layer["heads"][layer["best_head"]]
        last = values["routed"] | {"near": values["reach"]["near"]} if layer is values["layers"][-1] else {}
        accuracies = {f"where {which}": of["accuracy"] for which, of in last.items()}
        yield {"architecture": group.label, "seed": member.checkpoint.seed, **layer, **best, **accuracies}
