"""Accuracy: of every checkpoint, by length and position, on recall hits, on recall tasks."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pandas as pd

from bsbr_pl.results import Row

from .figures import OWN, pooled
from .groups import Group, Member
from .plots import Picture, curves
from .rows import Checkpoint
from .studies import Findings, Study
from .tables import Column, Measured, Table, table

Parts = list[Table | Picture | None]
VALIDATION = "val/loss"
AGREES = 1e-6  # nats a token by which an evaluation may differ from the run's own validation


def by_checkpoint(study: Study, findings: Findings) -> Table | None:
    """Every checkpoint, with the loss that its own run measured."""
    training = findings.of("training") if study.data_split.split == "val" else {}  # it validated on no other split
    found = []
    for group, member in study.members:
        if member.own:
            run = training.get(member.checkpoint.digest)
            found.append(_of_checkpoint(group, member.checkpoint, member.own, run))
    return table("accuracy", study.name, pd.DataFrame(found, dtype=object), agrees=AGREES, **study.facts)


def _of_checkpoint(group: Group, checkpoint: Checkpoint, row: Row, training: Row | None) -> dict[str, Any]:
    whole = pooled([(OWN, row)], 1).query("part == ''")
    return {
        "checkpoint": checkpoint.name,
        "architecture": group.label,
        "seed": checkpoint.seed,
        "step": checkpoint.get("step"),
        "context": row["identity"].get("length"),
        **whole.set_index("name")["figure"].to_dict(),
        **{name: row["values"].get(name) for name in ("tokens", "documents", "samples")},
        "own": own_loss(checkpoint, training),
        "difference": to_own(checkpoint, training, row),
    }


def validations(training: Row | None) -> dict[str, Any]:
    """The course (step, value, seconds) of a run's validation loss; empty if its row has none."""
    metrics = training["values"].get("metrics", {}) if training else {}
    return metrics.get(VALIDATION) or {}


def own_loss(checkpoint: Checkpoint, training: Row | None) -> float | None:
    """The validation loss that a run recorded at its checkpoint's step."""
    course = validations(training)
    if not course or not course["step"] or course["step"][-1] is None:
        return None
    steps_since = (checkpoint.get("step") or 0) - course["step"][-1]
    return course["value"][-1] if 0 <= steps_since <= 1 else None  # a logger counts from 0


def to_own(checkpoint: Checkpoint, training: Row | None, row: Row) -> Measured | None:
    """The loss minus the run's own, if kind of device and length are the same, and both are in float32 and of the whole
    split."""
    recorded, loss = own_loss(checkpoint, training), row["values"].get("loss")
    if training is None or recorded is None or loss is None:
        return None
    trained, here = training["values"].get("environment") or {}, row["identity"].get("environment") or {}
    same_device = _device_kind(trained) == _device_kind(here)
    float32 = here.get("dtype") == "float32" and str(training["values"].get("precision")).startswith("32")
    same_length = row["identity"].get("length") in (None, checkpoint.get("data.validation_length"))
    limits = [checkpoint.config.get(f"trainer.{name}") for name in ("limit_val_batches", "overfit_batches")]
    if not (same_device and float32 and same_length) or any(limits):
        return None
    difference = loss - recorded
    return Measured(difference, note="" if abs(difference) <= AGREES else "does not agree")


def _device_kind(environment: Mapping[str, Any]) -> str:
    """`cuda` of `cuda:0`."""
    return str(environment.get("device")).split(":")[0]


def by_length(study: Study) -> Parts:
    """Bits per byte at each context length; loss by position, in contexts as in validation and in the longest."""
    bits = {"part": "", "name": "bits_per_byte"}
    trained = {group.checkpoint.get("data.trained_length") for group in study.groups}
    own = trained.pop() if len(trained) == 1 else None
    columns = []
    for length in study.lengths:
        multiple = f" ({length // own}x)" if own and length % own == 0 else ""
        columns.append(Column(f"{length:,} tokens{multiple}", best="low", key=length))
    frame = study.wide("length", **bits).reindex(columns=study.lengths)
    lines = study.lines("length", **bits).reindex(columns=study.lengths)
    parts: Parts = [
        table("by_length", study.name, frame.reset_index(), columns, len(study.ranked), **study.facts),
        curves("by_length", study.name, lines, **study.facts),
    ]
    validated = {member.checkpoint.get("data.validation_length") for _, member in study.members}
    as_validated = [length for length in study.lengths if length in validated]
    for length in dict.fromkeys(as_validated[:1] + study.lengths[-1:]):
        by_position = study.lines("which", length=length, part="by_position", name="loss")
        parts.append(curves("by_position", f"{length}_{study.name}", by_position, length=length, **study.facts))
    return parts


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
    every = []
    for group, member in study.members:
        every.append(pooled(member.rows, 1).assign(architecture=group.label, seed=member.checkpoint.seed))
    slices = pd.concat(every).query("length == @OWN and part == 'slices' and name == 'accuracy'")
    lines = study.lines("which", length=OWN, part="slices", name="accuracy")
    axis: dict[str, Any] = {"by": "slice", "unit": ""}
    lengths = slices.groupby("which", sort=False)["at"].first()
    if lengths.notna().all() and lengths.is_unique:
        lines = lines.rename(columns=lengths.to_dict())
        axis = {"by": "length", "unit": " (tokens)"}
    return [
        curves("recall", study.name, lines, scale=100, **axis, **study.facts),
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
    found = (member.own["values"].get("retrieval") if member.own else None) or {"layers": []}
    for layer in found["layers"]:
        row = {"architecture": group.label, "seed": member.checkpoint.seed, **layer}
        if layer["best_head"] is not None:
            row = {**row, **layer["heads"][layer["best_head"]]}
        if layer is found["layers"][-1]:
            for which, answers in {**found["routed"], "near": found["reach"]["near"]}.items():
                row[f"where {which}"] = answers["accuracy"]
        yield row
