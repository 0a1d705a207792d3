"""The study: every model on every task, with equal budgets, each at its own best learning rate, with several seeds.

    python study/run.py runs/study                               # all tasks and models in study/configs/
    python study/run.py runs/study --tasks text --models standard bsbr --seeds 1 2 3 4 5
    bsbr report runs/study/text/results.jsonl --output_dir=runs/study/report

`study/configs/models/MODEL.yaml` describes a model, or `configs/MODEL.yaml` an architecture without options;
`study/configs/TASK.yaml` describes a task, and `study/configs/TASK/MODEL.yaml` what a task changes in a model, such as
its window. These files and base.yaml are the configuration of train.py. Models that have feed-forward networks get as
many parameters as `standard`: the width of the networks changes, and the remaining difference is printed. All models
get the same data, order, schedule and steps.

The protocol, for each model on each task:

1. A sweep with seed 0 over four learning rates (a quarter, half, once and twice the task's) or those of `--rates`, and
   over the weight decays of `--decays` if given. A sweep that ends before a model has left the plateau chooses a rate
   for the wrong phase, so its runs have all steps of the task. `--sweep_share` shortens them.
2. The best point has the least loss on the validation split; of a recall task, among the points whose mean accuracy
   over slices is within 0.02 of the highest. If several rates solve a recall task (0.98 and more), the middle one of
   them: one seed does not say which rate is safe. If the rate is the lowest or the highest, half or twice that rate is
   tried too, until the best is inside or `--max_rates` were tried. The table marks a best rate at an edge.
3. Runs that count, with the best point and seeds 1, 2 and 3, which the choice has not seen. Each is certified and
   predicts the test split. The table shows test results, parameters, FLOPs, state and speed, and says which models
   have not learned the task yet: no better than `TokenData.plateau`. A second table compares each model with the best,
   paired by seed.

OUTPUT/TASK/results.jsonl holds the rows, each written when its run ends; `bsbr report` draws them. A run that finished
or diverged is not repeated, and an interrupted run is resumed. A run that failed for another reason is tried again by
the next call. The last lines say which runs are missing and why, and the exit code is then 1. All trainings stop when
this process stops. Arguments after `--` go to train.py. Studies may share one output folder if these arguments are the
same; a study with other arguments, or whose base.yaml or files of a model or task were edited since, is refused. A run
whose checkpoint has another rate, seed or number of steps than it should have gets no row.

    python study/run.py runs/study --launcher=slurm --sbatch partition=gpu gpus=1 time=12:00:00

trains each run as a job of a Slurm cluster (docs/howto/cluster.md). This process writes the rows as the runs end. If it
stops, the jobs continue, and the same command collects them.

`--configs` is a folder of tasks and models of your own. A task's file needs `trainer.max_steps` and
`model.learning_rate`. A model of a package of yours needs `--trust=PACKAGE` after `--`. Or `--train` gives a script
that registers architectures and data sets, and calls train.command_line() under `if __name__ == "__main__"`; the study
runs the script too, without that call.
"""

import argparse
import math
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from command_line import CONFIGS, SET_BY_STUDY, TRAIN, choose
from rows import Run, best_runs, keep, loss, next_rate, results, runs_in
from settings import BASE, fingerprint, merged, read, vocabulary
from trainings import QUEUED, ROOT, Training, diverged, train_all

from bsbr_pl.data import DATA_SETS
from bsbr_pl.evals.matching import match, table
from bsbr_pl.foreign import trust
from bsbr_pl.models import SIZES
from bsbr_pl.parsing import trusted_packages
from bsbr_pl.report.study import summary
from bsbr_pl.results import Results
from bsbr_pl.spec import specs_of
from bsbr_pl.values import digest

#: Task -> the task whose changes of a model it uses if it has none of its own.
CHANGES_OF = dict.fromkeys(("induction", "selective_copy", "needle"), "mqar")
SECONDS_BETWEEN_LOOKS = 20.0  # at the jobs of a cluster
SWEEP_SEED = 0
START = (0.25, 0.5, 1, 2)  # rates of a sweep, in rates of the task


class Grid(NamedTuple):
    """The points of a sweep."""

    rates: list[float]
    decays: list[float | None]
    steps: int
    most: int  # rates of a model, those beyond the edges included


#: Trainings, and a function to call with the name of each that has a result -> name -> why a training has none.
Launch = Callable[[list[Training], Callable[[str], object]], dict[str, str]]
Write = Callable[..., dict[str, str]]  # `keep` of one study


class Study(NamedTuple):
    """Where a study reads and writes, and how it trains."""

    output: Path
    options: list[str]  # of train.py, for every run
    configs: Path = CONFIGS
    script: Path = TRAIN
    launch: Launch = train_all

    def described(self, model: str) -> Path:
        """The file that describes a model."""
        own = self.configs / "models" / f"{model}.yaml"
        return own if own.exists() else ROOT / "configs" / f"{model}.yaml"

    def files(self, task: str, model: str) -> list[Path]:
        """The configuration of a model on a task; later files override earlier ones."""
        folders = (self.configs / folder for folder in (task, CHANGES_OF.get(task, task)))
        changes = [file for folder in folders if (file := folder / f"{model}.yaml").exists()]
        return [self.described(model), self.configs / f"{task}.yaml", *changes[:1]]

    def setting(self, task: str, name: str, option: str) -> Any:
        """A number that the file of a task says.

        Raises:
            ValueError: it does not, so that `option` of the study is needed.
        """
        file, (section, key) = self.configs / f"{task}.yaml", name.split(".")
        value = (read(file).get(section) or {}).get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{file} must have a positive {name}, or give {option}")
        return value

    def configuration(self, task: str, model: str) -> dict[str, str]:
        """Digests of what the files say of a model on a task, and of base.yaml, without what the study sets."""
        files = {"configuration": self.files(task, model), "base": [BASE]}
        return {name: fingerprint(paths, SET_BY_STUDY) for name, paths in files.items()}

    def check_configurations(self, task: str, models: list[str]) -> None:
        """Refuse a folder that has runs of an edited configuration. Rows of earlier versions do not say theirs.

        Raises:
            ValueError: naming the task and the model; or two rows of one run.
        """
        ours = {model: self.configuration(task, model) for model in models}
        for run, row in runs_in(results(self.output, task).rows).items():
            for name, own in ours.get(run.model, {}).items():
                if row["about"]["study"].get(name, own) != own:
                    files = "base.yaml was" if name == "base" else "its files were"
                    raise ValueError(
                        f"{self.output / task} has runs of {run.model} on {task} with another configuration: {files} "
                        "changed since, so choose another folder"
                    )

    def matched_arguments(self, task: str, models: list[str]) -> dict[str, dict[str, Any]]:
        """Model -> the arguments that give it as many parameters as `standard`; none if the task fixes `ff_dim`."""
        model, data_class, arguments = merged([BASE, self.configs / f"{task}.yaml"], self.options)
        if "ff_dim" in model:
            return {name: {} for name in models}
        data = DATA_SETS[data_class](**arguments)
        vocab_size = vocabulary(data)
        given = {}
        for name in dict.fromkeys(["standard", *models]):
            model, *_ = merged([BASE, *self.files(task, name)], self.options)
            sizes = {size.name: model[size.name] for size in SIZES if size.name in model}
            given[name] = {"attention": specs_of(model["attention"]), **sizes, "vocab_size": vocab_size}
        length = max(data.train_lengths)
        found = match("params", given, length, "standard")
        print(table("params", length, found, "standard") + "\n", flush=True)
        return {name: found[name].changed for name in models}

    def train(
        self,
        wanted: list[Run],
        arguments: dict[str, dict[str, Any]],
        ended: Callable[[Run], object] = lambda run: None,
    ) -> dict[str, str]:
        """Train the runs that are not there, each with the arguments of its model; `ended` is called with each that
        has a result. Returns run -> why it is missing."""
        trainings, runs = [], {str(run): run for run in wanted}
        for run in wanted:
            decay = [] if run.decay is None else [f"--model.weight_decay={run.decay}"]
            chosen = [
                *(f"--model.{name}={value}" for name, value in arguments[run.model].items()),
                *(f"--model.learning_rate={run.rate}", *decay),
                *(f"--trainer.max_steps={run.steps}", f"--trainer.val_check_interval={run.steps}", *self.options),
            ]
            files = self.files(run.task, run.model)
            configuration = digest(self.configuration(run.task, run.model))
            one = Training(str(run), run.folder(self.output), run.seed, files, chosen, self.script, configuration)
            trainings.append(one)
        return self.launch(trainings, lambda name: ended(runs[name]))

    def sweep(
        self, task: str, grid: Grid, arguments: dict[str, dict[str, Any]], kept: Results, write: Write
    ) -> tuple[dict[str, Run], dict[str, list[float]], dict[str, str]]:
        """Try every point of the grid for every model, and more rates until the best is inside.

        Returns:
            model -> the best run; model -> its rates; run -> why it is missing.
        """
        tried, missing = {model: list(grid.rates) for model in arguments}, {}
        while True:
            points = [(model, rate, decay) for model in tried for rate in tried[model] for decay in grid.decays]
            wanted = [Run(task, model, rate, SWEEP_SEED, grid.steps, "sweep", decay) for model, rate, decay in points]
            known = runs_in(kept.rows)
            untried = [run for run in wanted if run not in known and str(run) not in missing]
            missing |= self.train(untried, arguments, lambda run: write([run]))
            missing |= write([run for run in wanted if str(run) not in missing])
            found = runs_in(kept.rows)
            best = best_runs(wanted, found)
            more = {model: next_rate(tried[model], run.rate, grid.most) for model, run in best.items()}
            if not any(more.values()):
                learned = {model: run for model, run in best.items() if loss(found[run]) < math.inf}
                return learned, tried, missing
            for model, rate in more.items():
                tried[model] += [rate] if rate else []

    def run(
        self, task: str, arguments: dict[str, dict[str, Any]], seeds: list[int], grid: Grid, steps: int
    ) -> dict[str, str]:
        """Make the runs of a task and write their rows. Returns run -> why it is missing.

        `arguments` are those of `matched_arguments`. On a cluster this starts what can start now, and is called again.
        """
        models, kept = list(arguments), results(self.output, task)
        command = shlex.join(["python", "study/run.py", *sys.argv[1:]])
        configurations = {model: self.configuration(task, model) for model in models}
        about = {"command": command, "options": self.options, "configurations": configurations}
        write = partial(keep, output=self.output, kept=kept, **about)
        (first_rate, *_), (first_decay, *_) = grid.rates, grid.decays
        points, missing = {model: (first_rate, first_decay) for model in models}, {}
        tried: dict[str, list[float]] = {}
        if len(grid.rates) * len(grid.decays) > 1:
            best, tried, missing = self.sweep(task, grid, arguments, kept, write)
            points = {model: (run.rate, run.decay) for model, run in best.items()}
        for model in set(models) - set(points):
            missing[f"final {task} {model}"] = "not started, because its sweep has no best rate"
        final = [
            Run(task, model, rate, seed, steps, "final", decay)
            for seed in seeds
            for model, (rate, decay) in points.items()
        ]
        missing |= self.train(final, arguments, lambda run: write([run], tried=tried))
        missing |= write([run for run in final if str(run) not in missing], tried=tried)
        for run in final:
            if failed := diverged(run.folder(self.output)):
                missing.setdefault(str(run), failed)
        return missing

    def table(self, task: str) -> str:
        """The results of a task in this folder, also those of other studies."""
        return summary(results(self.output, task).rows)


def launcher(chosen: argparse.Namespace) -> Launch:
    """Trains runs here until all have ended, or submits them and returns at once."""
    if chosen.launcher == "local":
        return partial(train_all, workers=chosen.workers or 1)
    try:
        from launch import slurm
    except ImportError as error:
        sys.exit(f"study/run.py: error: --launcher=slurm needs the package {error.name}: pip install 'bsbr-pl[slurm]'")
    sbatch = {name: value or True for name, _, value in (one.partition("=") for one in chosen.sbatch)}
    submit = slurm(chosen.output / "jobs", sbatch, chosen.workers)
    return lambda trainings, _: submit(trainings)  # rows are written at each look


def repeat(passes: dict[str, Callable[[], dict[str, str]]], no_wait: bool, study: Study) -> dict[str, str]:
    """Run each task until no run of it is queued, and print its table. Returns run -> why it is missing."""
    missing: dict[str, str] = {}
    while passes:
        for task, run in list(passes.items()):
            found = run()
            if no_wait or not any(reason.startswith(QUEUED) for reason in found.values()):
                print(f"\n{study.table(task)}", flush=True)
                missing |= found
                del passes[task]
        if passes:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return missing


def main() -> int:
    chosen, options = choose(__doc__)
    trust(trusted_packages(options))
    if chosen.train != TRAIN:
        sys.path.insert(0, str(chosen.train.parent))  # as for the script itself
        runpy.run_path(str(chosen.train))
    study = Study(chosen.output, options, chosen.configs, chosen.train, launcher(chosen))
    passes = {}
    for task in chosen.tasks:
        study.check_configurations(task, chosen.models)
    for task in chosen.tasks:
        steps = chosen.steps or study.setting(task, "trainer.max_steps", "--steps")
        rates = chosen.rates or [study.setting(task, "model.learning_rate", "--rates") * factor for factor in START]
        rates = sorted(set(rates))
        most = chosen.max_rates if len(rates) > 1 else 1
        grid = Grid(rates, chosen.decays or [None], max(1, round(chosen.sweep_share * steps)), most)
        arguments = study.matched_arguments(task, chosen.models)
        passes[task] = partial(study.run, task, arguments, chosen.seeds, grid, steps)
    missing = repeat(passes, chosen.no_wait, study)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:  # no space for the rows, or an edited configuration
        sys.exit(f"study/run.py: error: {error}")
