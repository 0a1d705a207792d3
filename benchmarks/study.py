"""The study: every model on every task, at equal budgets, each at the learning rate that suits it, with several seeds.

    python benchmarks/study.py runs/study                               # everything that configs/study/ describes
    python benchmarks/study.py runs/study --tasks text --models standard bsbr --seeds 0 1 2
    python evaluate.py runs/study/text/final --output_dir=results/text --lengths=[]

A model is `configs/study/models/MODEL.yaml`, a task `configs/study/TASK.yaml`, and what a task changes in a model, such
as its window, `configs/study/TASK/MODEL.yaml`: these are what train.py is given beside base.yaml. Where the models have
feed-forward networks, these are widened or narrowed until all have as many parameters as `standard`; what mismatch
remains is printed. Then each model is trained at every rate for a part of the steps, with seed 0, and the rate of the
least validation loss is used for the runs that count. Data, order, schedule and steps are the same for all. A run that
has finished or diverged is not made again, one that was interrupted is resumed, and OUTPUT/TASK.json says what was
found. A run that failed for another reason is tried again by the next call; until then it is missing, the last lines
say why, and the exit code is 1. Trainings end with this process, and several studies may share one output folder.
Everything after `--` goes to train.py.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from common import ROOT, parse_with_rest
from filelock import FileLock
from trainings import Training, diverged, finished_record, train_all, validation_loss

from bsbr_pl.evals.matching import match, table
from bsbr_pl.spec import specs_of
from bsbr_pl.utils.records import environment, write_json

STUDY = ROOT / "configs" / "study"
SEGMENT = "val/accuracy_"  # what the accuracy of a recall task's segment is called in a record
CHANGES_OF = dict.fromkeys(("induction", "selective_copy", "needle"), "mqar")  # whose changes of the models they take
SWEEP_SHARE = 4  # a run of the sweep has this part of the steps of one that counts


def configurations(task: str, model: str) -> list[Path]:
    """The files of a model and a task; later ones win."""
    changes = STUDY / CHANGES_OF.get(task, task) / f"{model}.yaml"
    return [STUDY / "models" / f"{model}.yaml", STUDY / f"{task}.yaml", *([changes] if changes.exists() else [])]


class Run(NamedTuple):
    """One training; its folder names all that tells it from the others."""

    task: str
    model: str
    rate: float
    seed: int
    steps: int
    kind: str  # sweep or final

    def __str__(self) -> str:
        return f"{self.kind} {self.task} {self.model} rate {self.rate:g} seed {self.seed}"

    def folder(self, output: Path) -> Path:
        return output / self.task / self.kind / self.model / f"rate{self.rate:g}_steps{self.steps}_seed{self.seed}"


def loss(run: Run, output: Path) -> float | None:
    """The last validation loss; infinite where it was no longer a number; None where the run is missing."""
    folder = run.folder(output)
    if record := finished_record(folder):
        value = validation_loss(record)
        return math.inf if value is None else value
    return math.inf if diverged(folder) else None


def result(run: Run, output: Path) -> dict[str, Any]:
    """What is published of a run."""
    record = finished_record(run.folder(output)) or {}
    last = {name: column["value"][-1] for name, column in record.get("metrics", {}).items() if name.startswith("val/")}
    facts = {"seconds": record.get("seconds"), "data": record.get("data_fingerprint"), "git": record.get("git")}
    machine = record.get("environment", {})
    return {**run._asdict(), **last, **facts, "device": machine.get("gpu", machine.get("cpu"))}


def with_earlier(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """What was found, with what earlier calls found of other models and runs."""
    new = [[one[name] for name in Run._fields] for one in found["runs"]]
    kept = [one for one in earlier["runs"] if [one[name] for name in Run._fields] not in new]
    merged = {name: earlier[name] | found[name] for name in ("rates", "matched")}
    return merged | {"runs": kept + found["runs"]}


def matched_arguments(task: dict[str, Any], models: list[str]) -> dict[str, dict[str, Any]]:
    """Model -> the arguments at which it has as many parameters as `standard`, where the task leaves them free."""
    sizes = {name: task["model"][name] for name in ("hidden_dim", "num_layers", "num_heads")}
    if "ff_dim" in task["model"]:
        return {name: {} for name in models}
    given = {}
    for name in dict.fromkeys(["standard", *models]):
        described = yaml.safe_load((STUDY / "models" / f"{name}.yaml").read_text())["model"]["attention"]
        attention = specs_of(described)
        vocab_size = task["data"]["init_args"]["bpe_vocab_size"]
        given[name] = {"attention": attention, "vocab_size": vocab_size, **sizes}
    length = task["data"]["init_args"]["context_length"]
    found = match("params", given, length, "standard")
    print(table("params", length, found, "standard") + "\n", flush=True)
    return {name: found[name].turned for name in models}


def make(
    runs: list[Run], output: Path, arguments: dict[str, dict[str, Any]], options: list[str], workers: int = 1
) -> dict[str, str]:
    """Make runs, with the arguments of their models, and leave those that are there. Run -> why it is missing."""
    trainings = []
    for run in runs:
        chosen = [
            *(f"--model.{name}={value}" for name, value in arguments[run.model].items()),
            f"--model.learning_rate={run.rate}",
            *(f"--trainer.max_steps={run.steps}", f"--trainer.val_check_interval={run.steps}", *options),
        ]
        configs = configurations(run.task, run.model)
        trainings.append(Training(str(run), run.folder(output), run.seed, configs, chosen))
    return train_all(trainings, workers)


def best_rates(sweep: list[Run], output: Path) -> dict[str, float]:
    """Model -> the rate of the least loss, of every model whose runs are all there and did not all diverge."""
    losses: dict[str, dict[float, float | None]] = {}
    for run in sweep:
        losses.setdefault(run.model, {})[run.rate] = loss(run, output)
    best = {}
    for model, by_rate in losses.items():
        known = {rate: value for rate, value in by_rate.items() if value is not None}
        if len(known) == len(by_rate) and min(known.values()) < math.inf:
            best[model] = min(known, key=known.__getitem__)
    return best


def counted(found: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The runs that count, each with its bits per byte, or the mean accuracy over the segments of a recall task."""
    pairs = []
    for run in found["runs"]:
        by_segment = [value for name, value in run.items() if name.startswith(SEGMENT)]
        value = run.get("val/bits_per_byte", fmean(by_segment) if by_segment else None)
        if run["kind"] == "final" and value is not None:
            pairs.append((run, value))
    return pairs


def as_markdown(found: dict[str, Any]) -> str:
    """What was found, as Markdown: the runs that count of each model, best first."""
    groups: dict[tuple[str, float, int], list[tuple[dict[str, Any], float]]] = {}
    for run, value in counted(found):
        groups.setdefault((run["model"], run["rate"], run["steps"]), []).append((run, value))
    names = {name: None for run, _ in counted(found) for name in run}
    text = "val/bits_per_byte" in names
    digits = 4 if text else 3
    segments = [name for name in names if name.startswith(SEGMENT)]
    segments = segments if len(segments) > 1 else []
    columns = ["model", "steps", "learning rate", "seeds", "bits per byte" if text else "accuracy", "least to largest"]
    columns += [name.removeprefix(SEGMENT).replace("_N", ", N").replace("_", " ") for name in segments]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for (model, rate, steps), pairs in sorted(
        groups.items(), key=lambda group: fmean(value for _, value in group[1]), reverse=not text
    ):
        values = [value for _, value in pairs]
        mean, least, largest = (f"{value:.{digits}f}" for value in (fmean(values), min(values), max(values)))
        by_segment = [f"{fmean(run[name] for run, _ in pairs):.2f}" for name in segments]
        cells = [model, f"{steps:,}", f"{rate:g}", str(len(values)), mean, f"{least} to {largest}", *by_segment]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def study(task: str, chosen: argparse.Namespace, options: list[str]) -> dict[str, str]:
    """Make the runs of a task and publish what was found. Run -> why it is missing."""
    settings = yaml.safe_load((STUDY / f"{task}.yaml").read_text())
    matched = matched_arguments(settings, chosen.models)
    steps, rate = chosen.steps or settings["trainer"]["max_steps"], settings["model"]["learning_rate"]
    rates = chosen.rates or [rate / 2, rate, rate * 2]
    sweep: list[Run] = []
    best, missing = dict.fromkeys(chosen.models, rates[0]), {}
    if len(rates) > 1:
        short = max(1, steps // SWEEP_SHARE)
        sweep = [Run(task, model, rate, 0, short, "sweep") for model in chosen.models for rate in rates]
        missing = make(sweep, chosen.output, matched, options, chosen.workers)
        best = best_rates(sweep, chosen.output)
    for model in set(chosen.models) - set(best):
        missing[f"final {task} {model}"] = "not started, because its sweep has no best rate"
    final = [Run(task, model, best[model], seed, steps, "final") for seed in chosen.seeds for model in best]
    missing |= make(final, chosen.output, matched, options, chosen.workers)
    for run in final:
        if failed := diverged(run.folder(chosen.output)):
            missing[str(run)] = failed
    publish(task, {"rates": best, "matched": matched}, sweep + final, chosen.output, options)
    return missing


def publish(task: str, found: dict[str, Any], runs: list[Run], output: Path, options: list[str]) -> None:
    """Write OUTPUT/TASK.json, with what earlier calls found and other studies find meanwhile, and print the table."""
    there = [run for run in dict.fromkeys(runs) if loss(run, output) is not None]
    found = found | {"runs": [result(run, output) for run in there]}
    facts = {"command": " ".join(sys.argv), "options": options, "environment": environment()}
    path = output / f"{task}.json"
    with FileLock(output / f".{task}.lock"):
        found = facts | (with_earlier(found, json.loads(path.read_text())) if path.exists() else found)
        write_json(path, found)
    print("\n" + as_markdown(found), flush=True)


def main() -> int:
    tasks = sorted(path.stem for path in STUDY.glob("*.yaml"))
    models = sorted(path.stem for path in (STUDY / "models").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the runs")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try; one is not tried but used")
    parser.add_argument("--steps", type=int, help="of a run that counts; by default those of the task")
    parser.add_argument("--workers", type=int, default=1, help="runs at once; they share the processor's cores")
    chosen, options = parse_with_rest(parser)
    for name in ("steps", "workers"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    missing: dict[str, str] = {}
    for task in chosen.tasks:
        missing |= study(task, chosen, options)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:  # no space for the results
        sys.exit(f"study.py: error: {error}")
