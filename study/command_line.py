"""The command line of study/run.py. It is checked before a run is trained."""

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

from rows import results
from settings import given
from trainings import ROOT, parse_with_rest

from bsbr_pl.attention import ARCHITECTURES

CONFIGS, TRAIN = ROOT / "study" / "configs", ROOT / "train.py"
#: Option of train.py that the study sets -> the study's option for it.
SET_BY_STUDY = {
    "--trainer.max_steps": "--steps",
    "--trainer.val_check_interval": "--steps",
    "--model.learning_rate": "--rates",
    "--seed_everything": "--seeds",
}
#: The same of all options that are refused after `--`.
REFUSED = SET_BY_STUDY | {
    "--data.seed": "--seeds",
    "--data.init_args.seed": "--seeds",
    "--model.attention": "--models",
    "--ckpt_path": "the same command again, which resumes its runs",
}
DIGITS = 6  # of a rate in the name of a folder


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def model_names(configs: Path) -> list[str]:
    """The models of a folder; those of the study, and every architecture without options."""
    return sorted({*names(configs / "models"), *(ARCHITECTURES if configs == CONFIGS else ())})


def choose(description: str) -> tuple[argparse.Namespace, list[str]]:
    """The command line, checked, and the arguments for train.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the runs")
    parser.add_argument("--tasks", nargs="+", help=f"default all: {', '.join(names(CONFIGS))}")
    parser.add_argument("--models", nargs="+", help=f"default all: {', '.join(model_names(CONFIGS))}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of runs that count")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try; a single one is not swept")
    parser.add_argument("--decays", nargs="+", type=float, help="weight decays to try; default: the configuration's")
    parser.add_argument("--max_rates", type=int, default=8, help="for each model, those beyond the edges included")
    parser.add_argument("--sweep_share", type=float, default=1.0, help="of the steps, in a sweep")
    parser.add_argument("--steps", type=int, help="of a run that counts; default: those of the task")
    parser.add_argument("--workers", type=int, help="runs at once; here, where they share the cores, the default is 1")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of tasks and models")
    parser.add_argument(
        "--train", type=Path, default=TRAIN, help="script to train with, which may register your architectures"
    )
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local", help="where the runs are trained")
    parser.add_argument(
        "--sbatch", nargs="+", default=[], metavar="OPTION=VALUE", help="options of sbatch, as in --sbatch gpus=1"
    )
    parser.add_argument("--no_wait", action="store_true", help="submit jobs and collect results, but wait for none")
    chosen, options = parse_with_rest(parser)
    tasks, models = names(chosen.configs), model_names(chosen.configs)
    for name, folder, default, others, missing in (
        ("tasks", chosen.configs, tasks, [], " of a task"),
        ("models", chosen.configs / "models", models, list(ARCHITECTURES), ", so name the --models"),
    ):
        given, known = getattr(chosen, name) or default, sorted({*default, *others})
        if not given:
            parser.error(f"--configs: {folder} has no YAML file{missing}")
        if unknown := [one for one in given if one not in known]:
            parser.error(f"--{name}: {', '.join(unknown)} not in {folder}: choose from {', '.join(known)}")
        setattr(chosen, name, given)
    if not 0 < chosen.sweep_share <= 1:
        parser.error(f"--sweep_share must be above 0 and at most 1, got {chosen.sweep_share}")
    for name in ("steps", "workers", "max_rates"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    for name in ("tasks", "models", "seeds", "rates", "decays"):
        if mistake := _mistake_in(name, getattr(chosen, name) or []):
            parser.error(mistake)
    if chosen.launcher == "local" and (chosen.sbatch or chosen.no_wait):
        parser.error("--sbatch and --no_wait need --launcher=slurm")
    if mistake := _mistake(chosen, options):
        parser.error(mistake)
    return chosen, options


def _mistake_in(name: str, values: list[Any]) -> str | None:
    """What is wrong with a list: a value that is there twice, or a number out of range."""
    for value in values if name in ("rates", "decays") else ():
        if not 0 <= value < math.inf or (name == "rates" and not value):
            return f"--{name} must be finite and {'above 0' if name == 'rates' else 'at least 0'}, got {value:g}"
    shown = [f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value) for value in values]
    twice = [one for i, one in enumerate(shown) if one in shown[:i]]
    words = f" ({DIGITS} digits tell numbers apart)" if name in ("rates", "decays") else ""
    return f"--{name}: {twice[0]} is there twice{words}" if twice else None


def _mistake(chosen: argparse.Namespace, options: list[str]) -> str | None:
    """The mistake in the options for train.py: the study sets one, or the folder has runs with other options."""
    refused = REFUSED | ({"--model.weight_decay": "--decays"} if chosen.decays else {})
    for name, _ in given(options):
        if name in refused:
            return f"{name} after --: the study sets it: use {refused[name]}"
    for task in chosen.tasks:
        studies = [row["about"]["study"] for row in results(chosen.output, task).rows if "study" in row["about"]]
        for study in studies:
            if (theirs := study.get("options", [])) != options:
                others, ours = shlex.join(theirs) or "none", shlex.join(options) or "none"
                folder = chosen.output / task
                return f"{folder} has runs with other options after --: {others}, not {ours}: choose another folder"
    return None
