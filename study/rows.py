"""The runs of a study as rows of kind `training` (the schema is in bsbr_pl/results.py), and their table."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from trainings import diverged, finished_record

from bsbr_pl.results import Results
from bsbr_pl.values import digest

Row = dict[str, Any]
VERSION = 1  # of the meaning of these rows
SEGMENT = "val/accuracy_"  # prefix of a recall task's accuracy on one segment
MOST_POINTS = 1000  # of a curve


class Run(NamedTuple):
    """One training. Its folder's name tells it from all others."""

    task: str
    model: str
    rate: float
    seed: int
    steps: int
    phase: str  # sweep or final

    def __str__(self) -> str:
        return f"{self.phase} {self.task} {self.model} rate {self.rate:g} seed {self.seed}"

    def folder(self, output: Path) -> Path:
        return output / self.task / self.phase / self.model / f"rate{self.rate:g}_steps{self.steps}_seed{self.seed}"

    def facts(self) -> dict[str, Any]:
        """What a row's `about.study` holds."""
        return {"task": self.task, "model": self.model, "phase": self.phase, "rate": self.rate}


def results(output: Path, task: str) -> Results:
    """The rows of a task, which several studies may write at once."""
    return Results(output / task / "results.jsonl")


def keep(runs: Iterable[Run], output: Path, kept: Results, command: str, options: list[str]) -> None:
    """Write the row of each run that has finished or diverged, unless it is there."""
    for run in runs:
        folder = run.folder(output)
        record, failed = finished_record(folder), diverged(folder)
        if record is None and failed is None:
            continue
        study = run.facts() | ({"options": options} if options else {})
        identity = {"kind": "training", "checkpoint": digest([run, record and record["run"]]), "version": VERSION}
        about = {"study": study, "seed": run.seed, "command": command, **_about(record or {})}
        about["run"] |= {"planned_steps": run.steps} | ({} if record else {"status": "diverged", "problem": failed})
        with kept.claim(identity, wait=True):
            if kept.get(identity) is None:
                kept.add(identity, _values(record or {}), about)


def _about(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a run says about the run. What the record lacks is absent."""
    done, data = record.get("run", {}), record.get("data") or {}
    about = {
        "parameters": record.get("parameters"),
        "config": {name: value for name, value in done.get("arguments", {}).items() if name != "seed"} or None,
        "data": {"class": data["class"], "fingerprint": record.get("data_fingerprint")} if data else None,
    }
    run = {name: record.get(name, done.get(name)) for name in ("status", "ended_by", "steps", "tokens")}
    return {name: value for name, value in about.items() if value is not None} | {
        "run": {name: value for name, value in run.items() if value is not None}
    }


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The validation curves of a run, its seconds, and where it was trained."""
    chosen = {name: curve for name, curve in record.get("metrics", {}).items() if name.startswith("val/")}
    values = {
        "metrics": {name: {key: thinned(column) for key, column in curve.items()} for name, curve in chosen.items()},
        "seconds": record.get("seconds"),
        "environment": record.get("environment", {}) | ({"commit": record["git"]} if record.get("git") else {}),
        "precision": record.get("training", {}).get("precision"),
        "processes": record.get("environment", {}).get("processes"),
    }
    return {name: value for name, value in values.items() if value is not None}


def thinned(column: list[Any]) -> list[Any]:
    """At most MOST_POINTS values at equal distances, the last among them."""
    every = math.ceil(len(column) / MOST_POINTS)
    return column[::-1][::every][::-1] if every > 1 else column


def runs_in(rows: Iterable[Row]) -> dict[Run, Row]:
    """Run -> its row, of the rows that a study wrote."""
    found = {}
    for row in rows:
        about = row["about"]
        if row["identity"].get("kind") == "training" and "study" in about:
            facts = {name: about["study"][name] for name in ("task", "model", "phase", "rate")}
            found[Run(**facts, seed=about["seed"], steps=about["run"]["planned_steps"])] = row
    return found


def last(row: Row, name: str) -> float | None:
    """The last value of a metric, or None."""
    values = row["values"].get("metrics", {}).get(name, {}).get("value") or [None]
    return values[-1]


def loss(row: Row) -> float:
    """The last validation loss; infinite if the run diverged."""
    found = last(row, "val/loss")
    return math.inf if found is None else found


def best_rates(sweep: Iterable[Run], found: Mapping[Run, Row]) -> dict[str, float]:
    """Model -> the rate of the least loss, of every model whose runs are all there and did not all diverge."""
    losses: dict[str, dict[float, float]] = {}
    incomplete = set()
    for run in sweep:
        if run in found:
            losses.setdefault(run.model, {})[run.rate] = loss(found[run])
        else:
            incomplete.add(run.model)
    best = {model: min(by_rate, key=by_rate.__getitem__) for model, by_rate in losses.items()}
    return {model: rate for model, rate in best.items() if model not in incomplete and losses[model][rate] < math.inf}


# The table, until the report draws it.


def score(row: Row) -> float | None:
    """Bits per byte, or the mean accuracy over the segments of a recall task."""
    bits = last(row, "val/bits_per_byte")
    accuracies = [value for name in segments([row]) if (value := last(row, name)) is not None]
    return bits if bits is not None else fmean(accuracies) if accuracies else None


def segments(rows: Iterable[Row]) -> list[str]:
    """The metrics of a recall task's segments, in the order of the rows."""
    names = dict.fromkeys(name for row in rows for name in row["values"].get("metrics", {}))
    return [name for name in names if name.startswith(SEGMENT)]


def counted(rows: Iterable[Row]) -> dict[Run, Row]:
    """The runs that count: final ones with a score."""
    return {run: row for run, row in runs_in(rows).items() if run.phase == "final" and score(row) is not None}


def as_markdown(rows: Iterable[Row]) -> str:
    """The runs that count as a Markdown table, one line for each model, best first."""
    runs = counted(rows)
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for run, row in runs.items():
        groups.setdefault((run.model, run.rate, run.steps), []).append(row)
    text = any(last(row, "val/bits_per_byte") is not None for row in runs.values())
    digits = 4 if text else 3
    shown = segments(runs.values())
    shown = shown if len(shown) > 1 else []
    columns = ["model", "steps", "learning rate", "seeds", "bits per byte" if text else "accuracy", "least to largest"]
    columns += [name.removeprefix(SEGMENT).replace("_N", ", N").replace("_", " ") for name in shown]
    lines = []
    for (model, rate, steps), group in groups.items():
        scores = [value for row in group if (value := score(row)) is not None]
        mean, least, largest = (f"{value:.{digits}f}" for value in (fmean(scores), min(scores), max(scores)))
        cells = [model, f"{steps:,}", f"{rate:g}", str(len(group)), mean, f"{least} to {largest}"]
        cells += [f"{fmean(last(row, name) or 0.0 for row in group):.2f}" for name in shown]
        lines.append((fmean(scores), "| " + " | ".join(cells) + " |"))
    lines.sort(key=lambda line: line[0], reverse=not text)
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(line for _, line in lines)]) + "\n"
