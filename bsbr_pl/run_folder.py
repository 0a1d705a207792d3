"""The folder of a run: `runs/version_N`, which holds its record, configuration, checkpoints and logs, whatever logs."""

import csv
import glob
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from .run import LOCATIONS, Arguments, fixed_differences, in_words, recorded_arguments
from .utils.records import write_whole

ROOT = "runs"  # of the folders of runs, where neither a logger nor default_root_dir says another
OWN_FOLDERS = ("TensorBoardLogger", "CSVLogger")  # which log into save_dir/name/version


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run under way; every process must ask for it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def loggers(options: Namespace) -> list[Namespace]:
    """The configurations of the loggers that `trainer` options ask for."""
    asked = options.logger
    return [one for one in (asked if isinstance(asked, list) else [asked]) if isinstance(one, Namespace)]


def root(options: Namespace) -> Path:
    """The folder of the run's folder: of the first logger that says one."""
    for logger in loggers(options):
        arguments = logger.init_args
        if _has_own_folder(logger):
            return Path(arguments.save_dir, arguments.get("name") or "")
        if arguments.get("save_dir") not in (None, "."):
            return Path(arguments.save_dir)
    return Path(options.default_root_dir or ROOT)


def version(options: Namespace) -> str | None:
    """The name of the run's folder, where a logger says it."""
    given = (logger.init_args.get("version") for logger in loggers(options) if _has_own_folder(logger))
    asked = next((value for value in given if value is not None), None)
    return f"version_{asked}" if isinstance(asked, int) else asked


def sub_dir(options: Namespace) -> str:
    """The folder below the run's folder that the first logger writes to; mostly ""."""
    return next((logger.init_args.get("sub_dir") or "" for logger in loggers(options)[:1]), "")


def next_version(folder: Path) -> str:
    """version_N, with the least N above those of the folders that are there."""
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return f"version_{max((int(number) + 1 for number in numbers if number.isdigit()), default=0)}"


def assign(options: Namespace, folder: Path) -> None:
    """Have every logger, and what stands beside them, write into `folder`."""
    for logger in loggers(options):
        arguments = logger.init_args
        if _has_own_folder(logger):
            arguments.save_dir, arguments.name, arguments.version = str(folder.parent), "", _number_or_name(folder.name)
        elif "save_dir" in arguments:
            arguments.save_dir = str(folder)
            if "id" in arguments and arguments.id is None:
                arguments.id = _id_of_wandb(folder)
    options.default_root_dir = str(folder)


def _number_or_name(name: str) -> int | str:
    """3 of version_3, which a progress bar can show; any other name as it is."""
    number = name.removeprefix("version_")
    return int(number) if number.isdigit() and name == f"version_{int(number)}" else name


def _has_own_folder(logger: Namespace) -> bool:
    return logger.class_path.rpartition(".")[2] in OWN_FOLDERS


def _id_of_wandb(folder: Path) -> str | None:
    """The id of the WandB run in a folder, to continue it; None where there is none."""
    runs = sorted(folder.glob("wandb/*run-*"))
    return runs[-1].name.rpartition("-")[2] if runs else None


def peek(path: Path) -> dict[str, Any] | None:
    """A checkpoint without its tensors being read; None where it is not readable or does not describe a run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        recorded_arguments(checkpoint)
        return checkpoint
    except Exception:  # damage can fail anywhere; who loads it says what is wrong
        return None


def find_last(folder: Path, name: str | None, below: str, wanted: Arguments) -> Path:
    """The newest `checkpoints/last*.ckpt` of the runs in `folder` whose description is the wanted one.

    Args:
        folder: that the folders of runs lie in.
        name: of the run's folder; any where None.
        below: the folder within it that its logger writes to; mostly "".
        wanted: of the run's fixed arguments those that must be equal. Where data lies may differ, if no run has the
            same place; whether it is the same is found when it is read. An unreadable checkpoint counts as one of the
            run, so that it is not passed over in silence.

    Raises:
        ValueError: there is none; naming the runs that there are, and how they differ.
    """
    pattern = Path(glob.escape(name) if name else "*", below, "checkpoints", "last*.ckpt")
    found = sorted(folder.glob(str(pattern)), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if not found:
        missing = folder / pattern.with_name("last.ckpt")
        raise ValueError(f"--ckpt_path=last: there is no {missing}, so start without it")
    moved, others = [], []
    for path in found:
        checkpoint = peek(path)
        unequal = [] if checkpoint is None else fixed_differences(wanted, recorded_arguments(checkpoint))
        if not unequal:
            return path
        if all(argument in LOCATIONS for argument, *_ in unequal):
            moved.append(path)
        others.append(f"{path.parent.parent.relative_to(folder)} has {in_words(unequal, 2)}")
    if moved:
        return moved[0]
    more = f"; and {len(others) - 3} other runs" if len(others) > 3 else ""
    raise ValueError(
        f"--ckpt_path=last: no run in {folder} is this command's: {'; '.join(others[:3])}{more}. Give the run's own "
        "arguments, or start a new one without --ckpt_path"
    )


def set_csv_rows_aside(trainer: Trainer) -> None:
    """Before a run is resumed: a CSVLogger deletes metrics.csv when it starts."""
    for metrics, aside, _ in _csv_files(trainer):
        if metrics.exists() and not aside.exists():
            metrics.rename(aside)


def put_csv_rows_back(trainer: Trainer) -> None:
    """The rows that were logged up to the step that a run is resumed from."""
    for metrics, aside, logger in _csv_files(trainer):
        if not aside.exists():
            continue
        with aside.open(newline="") as stream:
            rows = csv.DictReader(stream)
            kept = [row for row in rows if int(row["step"]) < trainer.global_step]
            columns = list(rows.fieldnames or [])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(kept)
        write_whole(metrics, text.getvalue().encode())
        logger.experiment.metrics_keys = columns
        aside.unlink()


def _csv_files(trainer: Trainer) -> Iterator[tuple[Path, Path, CSVLogger]]:
    """Of each CSVLogger its metrics.csv, and where that is kept while a resumed run starts."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            metrics = Path(logger.log_dir, "metrics.csv")
            yield metrics, metrics.with_name("metrics_before_resume.csv"), logger
