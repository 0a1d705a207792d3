"""The runs of a study as rows of kind `training`; bsbr_pl/results.py describes rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from reached import reached
from trainings import diverged, finished_record, last_checkpoint, validation_loss

from bsbr_pl.evals.checkpoints import open_checkpoint
from bsbr_pl.evals.evaluation import VERSIONS, Evaluation
from bsbr_pl.evals.pictures import course
from bsbr_pl.evals.subject import Subject
from bsbr_pl.report.study_runs import quality
from bsbr_pl.results import Results, Row
from bsbr_pl.values import digest

NOISE = 0.02  # of an accuracy on a thousand samples: on a plateau the highest is not the best


class Run(NamedTuple):
    """One training. Its folder's name tells it from all others."""

    task: str
    model: str
    rate: float
    seed: int
    steps: int
    phase: str  # sweep or final
    decay: float | None = None  # weight decay; None for that of the configuration

    def __str__(self) -> str:
        return f"{self.phase} {self.task} {self.model} {self.point} seed {self.seed}"

    @property
    def point(self) -> str:
        """Of the sweep."""
        return f"rate {self.rate:g}" + ("" if self.decay is None else f" decay {self.decay:g}")

    def folder(self, output: Path) -> Path:
        point = self.point.replace(" decay ", "_decay").replace(" ", "")
        return output / self.task / self.phase / self.model / f"{point}_steps{self.steps}_seed{self.seed}"


def results(output: Path, task: str) -> Results:
    """The rows of a task, which several studies may write at once."""
    return Results(output / task / "results.jsonl")


def keep(
    runs: Iterable[Run],
    output: Path,
    kept: Results,
    command: str,
    options: list[str],
    configurations: Mapping[str, Mapping[str, str]],
    tried: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, str]:
    """Write the rows of each run that has finished or diverged, unless they are there.

    A run that counts is certified, its model predicts the test split, and its `training` row holds what it reached.

    Args:
        runs: of the study.
        output: folder of the runs.
        kept: where rows are written.
        command: of the study.
        options: of train.py, the same in all runs.
        configurations: model -> `Study.configuration`, which its rows hold.
        tried: model -> the rates of its sweep.

    Returns:
        run -> why it has no row, or no test result.
    """
    evaluation, known, missing = Evaluation(kept), runs_in(kept.rows), {}
    for run in runs:
        if run in known and (run.phase == "sweep" or is_complete(known[run])):
            continue
        folder = run.folder(output)
        study = {"task": run.task, "model": run.model, "phase": run.phase, "rate": run.rate}
        study |= {} if run.decay is None else {"weight_decay": run.decay}
        study |= {"rates": sorted(tried[run.model])} if tried and run.phase == "final" else {}
        study |= {"options": options} if options else {}
        study |= configurations[run.model]
        if finished_record(folder):
            try:
                subject = open_checkpoint(last_checkpoint(folder), trusted=True).subject(command)
            except ValueError as error:
                missing[str(run)] = str(error)
                continue
            if other := trained_otherwise(run, subject.about):
                missing[str(run)] = other
                continue
            subject = replace(subject, about=subject.about | {"study": study})
            values = course(subject.record)
            if run.phase == "final":
                values["result"] = reached(subject, evaluation, values["metrics"])
                if "test" not in values["result"]:
                    words = [row["values"]["problem"] for row in evaluation.problems]
                    missing[str(run)] = f"no test result: {words[-1] if words else 'its certificate failed'}"
            _add(kept, evaluation.identity(subject, "training"), values, subject.about)
        elif failed := diverged(folder):
            identity = {"kind": "training", "checkpoint": digest(run), "version": VERSIONS["training"]}
            about = {"study": study, "seed": run.seed, "command": command}
            about["run"] = {"planned_steps": run.steps, "finished": False, "status": f"diverged: {failed}"}
            _add(kept, identity, {"metrics": {}}, about)
    return missing


def trained_otherwise(run: Run, about: Mapping[str, Any]) -> str | None:
    """The first fact of a checkpoint that is not that of the run; None if all agree.

    Options after `--` have many spellings, and files of configurations may set anything.
    """
    of_run, data = about["run"], (about.get("data") or {}).get("arguments") or {}
    facts = {"seed": (about["seed"], run.seed), "data.seed": (data.get("seed"), run.seed)}
    facts["learning rate"] = about["config"].get("model.learning_rate"), run.rate
    facts |= {name: (of_run[name], run.steps) for name in ("planned_steps", "steps")}
    if run.decay is not None:
        facts["weight decay"] = about["config"].get("model.weight_decay"), run.decay
    for name, (theirs, ours) in facts.items():
        if theirs != ours:
            return f"trained with {name} {theirs} instead of {ours}: change the options after --, or the folder"
    return None


def _add(kept: Results, identity: dict[str, Any], values: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a row, unless another process has written it meanwhile."""
    with kept.claim(identity, wait=True):
        found = kept.get(identity)
        if found is None or ("test" in values.get("result", {}) and "test" not in found.get("result", {})):
            kept.add(identity, values, about)


def is_complete(row: Row) -> bool:
    """Whether a row of a run that counts has its test result; a run that diverged has none."""
    return "test" in row["values"].get("result", {}) or not row["values"]["metrics"]


def runs_in(rows: Iterable[Row]) -> dict[Run, Row]:
    """Run -> its row, of the rows that a study wrote.

    Raises:
        ValueError: two rows are of one run, as after two files were joined; names the run and both checkpoints.
    """
    found: dict[Run, Row] = {}
    for row in rows:
        about = row["about"]
        if row["identity"]["kind"] == "training" and "study" in about:
            facts = {name: about["study"][name] for name in ("task", "model", "phase", "rate")}
            facts |= {"decay": about["study"].get("weight_decay"), "seed": about.get("seed")}
            run = Run(**facts, steps=(about.get("run") or {}).get("planned_steps"))
            if (other := found.setdefault(run, row)) is not row:
                both = " and ".join(one["identity"]["checkpoint"] for one in (other, row))
                raise ValueError(f"two rows are of the run '{run}', with checkpoints {both}: remove one of them")
    return found


def tested_runs(output: Path, task: str) -> dict[Run, Row]:
    """The runs that count of a folder, with a test result: neither diverged nor left out because of a certificate."""
    found = runs_in(results(output, task).rows)
    return {
        run: row for run, row in found.items() if run.phase == "final" and "test" in row["values"].get("result", {})
    }


def subject_of(run: Run, row: Row, output: Path) -> Subject:
    """The model of a run, from its folder.

    Raises:
        ValueError: the checkpoint is damaged, or not the one of the row.
    """
    path = last_checkpoint(run.folder(output))
    subject = open_checkpoint(path, trusted=True).subject()
    if subject.digest != row["identity"]["checkpoint"]:
        raise ValueError(f"{path} has other weights than the row of '{run}': it was trained again")
    return subject


def line_of(run: Run, row: Row) -> dict[str, Any]:
    """What tells the line of a run from those of others, in a file of lines."""
    facts = {"model": run.model, "rate": run.rate, "seed": run.seed, "steps": run.steps, "decay": run.decay}
    return facts | {"checkpoint": row["identity"]["checkpoint"]}


def loss(row: Mapping[str, Any]) -> float:
    """The last validation loss; infinite if the run diverged."""
    found = validation_loss(row["values"])
    return math.inf if found is None else found


def best_runs(sweep: Iterable[Run], found: Mapping[Run, Row]) -> dict[str, Run]:
    """Model -> its best run of a sweep on the validation split, of every model whose runs are all there.

    It has the least loss; of a recall task, among the runs whose mean accuracy is within `NOISE` of the highest. If
    several rates solve the task, the middle one of them: a loss of nearly 0 does not say which rate is safe with
    another seed.
    """
    by_model: dict[str, list[Run]] = {}
    for run in sweep:
        by_model.setdefault(run.model, []).append(run)
    best = {}
    for model, runs in by_model.items():
        if all(run in found for run in runs):
            accuracies = {run: _accuracy(found[run]) for run in runs}
            near = [run for run in runs if accuracies[run] >= max(accuracies.values()) - NOISE]
            solved = sorted({run.rate for run in near if accuracies[run] >= 1 - NOISE})
            if solved:
                near = [run for run in near if run.rate == solved[len(solved) // 2]]
            best[model] = min(near, key=lambda run: (loss(found[run]), run.rate))
    return best


def _accuracy(row: Row) -> float:
    """On the validation split; 0 on text, and if the run diverged."""
    value, text = quality(row["values"]["metrics"])
    return 0.0 if text or value is None else value


def next_rate(rates: Sequence[float], best: float, most: int) -> float | None:
    """The rate to try beyond the edge of a sweep; None if the best is inside, or `most` rates were tried."""
    if len(rates) >= most or min(rates) < best < max(rates):
        return None
    return best / 2 if best == min(rates) else best * 2
