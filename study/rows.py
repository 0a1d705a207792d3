"""The runs of a study as rows of kind `training`; bsbr_pl/results.py describes rows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trainings import diverged, finished_record, last_checkpoint

from bsbr_pl.evals.checkpoints import open_checkpoint
from bsbr_pl.evals.evaluation import VERSIONS, Evaluation
from bsbr_pl.results import Results, Row
from bsbr_pl.values import digest


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


def results(output: Path, task: str) -> Results:
    """The rows of a task, which several studies may write at once."""
    return Results(output / task / "results.jsonl")


def keep(runs: Iterable[Run], output: Path, kept: Results, command: str, options: list[str]) -> dict[str, str]:
    """Write a row for each run that has finished or diverged, unless it has one.

    Args:
        runs: of the study.
        output: folder of the runs.
        kept: where rows are written.
        command: of the study.
        options: of train.py, the same in all runs.

    Returns:
        run -> why it has no row, for runs that finished and whose checkpoint cannot be read.
    """
    evaluation, known, unreadable = Evaluation(kept), runs_in(kept.rows), {}
    for run in runs:
        if run in known:
            continue
        folder = run.folder(output)
        study = {"task": run.task, "model": run.model, "phase": run.phase, "rate": run.rate}
        study |= {"options": options} if options else {}
        if finished_record(folder):
            try:
                subject = open_checkpoint(last_checkpoint(folder)).subject(command)
            except ValueError as error:
                unreadable[str(run)] = str(error)
                continue
            evaluation.courses([replace(subject, about=subject.about | {"study": study})])
        elif failed := diverged(folder):
            identity = {"kind": "training", "checkpoint": digest(run), "version": VERSIONS["training"]}
            about = {"study": study, "seed": run.seed, "command": command}
            about["run"] = {"planned_steps": run.steps, "finished": False, "status": f"diverged: {failed}"}
            with kept.claim(identity, wait=True):
                if kept.get(identity) is None:
                    kept.add(identity, {"metrics": {}}, about)
    return unreadable


def runs_in(rows: Iterable[Row]) -> dict[Run, Row]:
    """Run -> its row, of the rows that a study wrote."""
    found = {}
    for row in rows:
        about = row["about"]
        if row["identity"]["kind"] == "training" and "study" in about:
            facts = {name: about["study"][name] for name in ("task", "model", "phase", "rate")}
            found[Run(**facts, seed=about.get("seed"), steps=(about.get("run") or {}).get("planned_steps"))] = row
    return found


def loss(row: Mapping[str, Any]) -> float:
    """The last validation loss; infinite if the run diverged."""
    values = row["values"]["metrics"].get("val/loss", {"value": [None]})["value"]
    return math.inf if values[-1] is None else values[-1]


def best_rates(sweep: Iterable[Run], found: Mapping[Run, Row]) -> dict[str, float]:
    """Model -> the rate of the least loss, of every model whose runs are all there and did not all diverge."""
    losses: dict[str, dict[float, float]] = {}
    for run in sweep:
        losses.setdefault(run.model, {})[run.rate] = loss(found[run]) if run in found else math.nan
    best = {}
    for model, by_rate in losses.items():
        least = min(by_rate.values())
        if not any(map(math.isnan, by_rate.values())) and least < math.inf:
            best[model] = min(by_rate, key=by_rate.__getitem__)
    return best
