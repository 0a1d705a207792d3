"""The study: every model on every task, at equal budgets, each at the learning rate that suits it, with several seeds.

    python benchmarks/study.py runs/study                               # everything that configs/study/ describes
    python benchmarks/study.py runs/study --tasks text --models standard bsbr --seeds 0 1 2
    python evaluate.py runs/study/text/final --output_dir=results/text --lengths=[]

A model is `configs/study/models/MODEL.yaml`, a task `configs/study/TASK.yaml`, and what a task changes in a model, such
as its window, `configs/study/TASK/MODEL.yaml`: these are what train.py is given beside base.yaml. Where the models have
feed-forward networks, these are widened or narrowed until all have as many parameters as `standard`; what mismatch
remains is printed. Then each model is trained at every rate for a part of the steps, with seed 0, and the rate of the
least validation loss is used for the runs that count. Data, order, schedule and steps are the same for all. A run that
has finished is not made again, one that was interrupted goes on, and OUTPUT/TASK.json says what was found. Everything
after `--` goes to train.py.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from common import ROOT, finished_record, parse_with_rest, train

from bsbr_pl.description import build_layers, describe_layers
from bsbr_pl.evals.matching import match, table
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

    def folder(self, output: Path) -> Path:
        return output / self.task / self.kind / self.model / f"rate{self.rate:g}_steps{self.steps}_seed{self.seed}"


def loss(run: Run, output: Path) -> float:
    """The last validation loss; infinite where the run failed, as one whose loss is no longer a number does."""
    found = finished_record(run.folder(output))
    value = found["metrics"]["val/loss"]["value"][-1] if found else None
    return math.inf if value is None else value


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
        attention = build_layers(describe_layers(described))
        vocab_size = task["data"]["init_args"]["bpe_vocab_size"]
        given[name] = {"attention": attention, "vocab_size": vocab_size, **sizes}
    length = task["data"]["init_args"]["context_length"]
    found = match("params", given, length, "standard")
    print(table("params", length, found, "standard") + "\n", flush=True)
    return {name: found[name].turned for name in models}


def make(run: Run, output: Path, arguments: dict[str, Any], threads: int, options: list[str]) -> None:
    """Make a run, go on with it, or leave it as it is."""
    folder = run.folder(output)
    failed = folder / "failed.txt"
    if finished_record(folder) or failed.exists():
        return
    chosen = [
        *(f"--model.{name}={value}" for name, value in arguments.items()),
        f"--model.learning_rate={run.rate}",
        *(f"--trainer.max_steps={run.steps}", f"--trainer.val_check_interval={run.steps}"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    configs = configurations(run.task, run.model)
    done = train(folder, run.seed, configs, [*chosen, *options], env=environment, **captured)
    print(f"{run.kind} {run.task} {run.model} rate {run.rate:g} seed {run.seed}: {loss(run, output):.4f}", flush=True)
    if done.returncode in (130, 143, -2, -9, -15):
        raise KeyboardInterrupt
    if done.returncode:
        folder.mkdir(parents=True, exist_ok=True)
        failed.write_text(done.stdout)
        print(*done.stdout.strip().splitlines()[-1:], flush=True)


def best_rate(task: str, model: str, rates: list[float], steps: int, output: Path) -> float:
    return min(rates, key=lambda rate: loss(Run(task, model, rate, 0, steps, "sweep"), output))


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


def main() -> None:
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
    threads = max(1, (os.cpu_count() or 1) // chosen.workers)

    def train_all(runs: list[Run]) -> None:
        with ThreadPoolExecutor(chosen.workers) as pool:
            list(pool.map(lambda run: make(run, chosen.output, matched[run.model], threads, options), runs))

    for task in chosen.tasks:
        settings = yaml.safe_load((STUDY / f"{task}.yaml").read_text())
        matched = matched_arguments(settings, chosen.models)
        steps = chosen.steps or settings["trainer"]["max_steps"]
        short, rate = steps // SWEEP_SHARE, settings["model"]["learning_rate"]
        rates = chosen.rates or [rate / 2, rate, rate * 2]
        sweep = [Run(task, model, rate, 0, short, "sweep") for model in chosen.models for rate in rates]
        sweep = sweep if len(rates) > 1 else []
        train_all(sweep)
        best = {model: best_rate(task, model, rates, short, chosen.output) for model in chosen.models}
        final = [
            Run(task, model, best[model], seed, steps, "final") for seed in chosen.seeds for model in chosen.models
        ]
        train_all(final)
        found = {"rates": best, "matched": matched, "runs": [result(run, chosen.output) for run in sweep + final]}
        facts = {"command": " ".join(sys.argv), "options": options, "environment": environment()}
        path = chosen.output / f"{task}.json"
        found = facts | (with_earlier(found, json.loads(path.read_text())) if path.exists() else found)
        write_json(path, found)
        print("\n" + as_markdown(found), flush=True)


if __name__ == "__main__":
    main()
