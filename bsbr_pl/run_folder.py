"""The folder of a run, `runs/version_N`: record, configuration, checkpoints and logs, with any logger."""

import contextlib
import csv
import glob
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from bsbr_pl.utils.files import write_whole

from .checkpoint import load_checkpoint
from .run import LOCATIONS, Arguments, fixed_differences, in_words, run_of

ROOT = "runs"  # holds the folders of runs, unless a logger or default_root_dir names another folder
OWN_FOLDERS = ("TensorBoardLogger", "CSVLogger")  # which log into save_dir/name/version


def run_folder(trainer: Trainer) -> Path:
    """The folder of the Trainer's run; every process must call this."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def loggers(options: Namespace) -> list[Namespace]:
    """The configurations of the loggers in a Trainer's options."""
    given = options.logger if isinstance(options.logger, list) else [options.logger]
    return [logger for logger in given if isinstance(logger, Namespace)]


def root(options: Namespace) -> Path:
    """The folder with the runs' folders: that of the first logger that names one."""
    return _root_of_loggers(options) or Path(options.default_root_dir or ROOT)


def check_root(options: Namespace) -> None:
    """Refuse a default_root_dir that a logger's folder would replace without a word.

    Raises:
        ValueError: naming both folders, and the option that sets the folder.
    """
    folder = _root_of_loggers(options)
    if options.default_root_dir and folder:
        raise ValueError(
            f"default_root_dir={options.default_root_dir} has no effect beside a logger that writes to {folder}: use "
            "--trainer.logger.save_dir"
        )


def _root_of_loggers(options: Namespace) -> Path | None:
    for logger in loggers(options):
        arguments = logger.init_args
        if _has_own_folder(logger):
            return Path(arguments.save_dir, arguments.get("name") or "")
        if arguments.get("save_dir") not in (None, "."):
            return Path(arguments.save_dir)
    return None


def version(options: Namespace) -> str | None:
    """The name of the run's folder, if a logger gives one."""
    given = (logger.init_args.get("version") for logger in loggers(options) if _has_own_folder(logger))
    asked = next((value for value in given if value is not None), None)
    return f"version_{asked}" if isinstance(asked, int) else asked


def sub_dir(options: Namespace) -> str:
    """The folder below the run's folder that the first logger writes to; mostly ""."""
    return next((logger.init_args.get("sub_dir") or "" for logger in loggers(options)[:1]), "")


def next_version(folder: Path) -> str:
    """version_N, with N above those of all folders."""
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return f"version_{max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)}"


def reserve(folder: Path) -> Path:
    """Make the next `version_N`, one that no other process has made."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        found = folder / next_version(folder)
        with contextlib.suppress(FileExistsError):  # another run started at the same time
            found.mkdir()
            return found


def discard(folder: Path) -> None:
    """Remove the folder of a run that failed before it left anything, and the folder of all runs if it is empty."""
    if not holds_a_run(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs are in it
            folder.parent.rmdir()


def holds_a_run(folder: Path) -> bool:
    """Whether a run has left a record or a checkpoint in the folder."""
    return (folder / "record.json").exists() or any(folder.rglob("*.ckpt"))


def assign(options: Namespace, folder: Path) -> None:
    """Make every logger and the Trainer write into `folder`."""
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
    """3 for version_3, as progress bars show it; any other name unchanged."""
    number = name.removeprefix("version_")
    return int(number) if number.isdecimal() and name == f"version_{int(number)}" else name


def _has_own_folder(logger: Namespace) -> bool:
    return logger.class_path.rpartition(".")[2] in OWN_FOLDERS


def _id_of_wandb(folder: Path) -> str | None:
    """The id of the WandB run in a folder, with which it is continued; None if there is none."""
    runs = sorted(folder.glob("wandb/*run-*"))
    return runs[-1].name.rpartition("-")[2] if runs else None


def peek(path: Path) -> dict[str, Any] | None:
    """A checkpoint without its tensors; None if it is not readable or records no run."""
    try:
        checkpoint = load_checkpoint(path, with_tensors=False)
        run_of(checkpoint)
        return checkpoint
    except Exception:  # damage can fail anywhere; loading the checkpoint says what is wrong
        return None


def find_last(options: Namespace, wanted: Arguments) -> Path:
    """The newest `checkpoints/last*.ckpt` of the runs with the wanted arguments.

    Data may lie elsewhere, if no run has it at the same location: its fingerprint is compared when it is read. An
    unreadable checkpoint counts as one of the run, so that the user hears of it.

    Args:
        options: of the Trainer; its loggers say where runs are, and may name one.
        wanted: the arguments; the fixed ones must be equal.

    Raises:
        ValueError: if there is none; names the runs that there are, and how they differ.
    """
    folder, name = root(options), version(options)
    pattern = Path(glob.escape(name) if name else "*", sub_dir(options), "checkpoints", "last*.ckpt")
    found = sorted(folder.glob(str(pattern)), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if not found:
        missing = folder / pattern.with_name("last.ckpt")
        raise ValueError(f"--ckpt_path=last: there is no {missing}, so start without it")
    moved, others = [], []
    for path in found:
        checkpoint = peek(path)
        unequal = [] if checkpoint is None else fixed_differences(wanted, run_of(checkpoint)["arguments"])
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
    """Rename metrics.csv before a run is resumed: a CSVLogger deletes it when it starts."""
    for metrics, earlier, _ in _csv_files(trainer):
        if metrics.exists() and not earlier.exists():
            metrics.rename(earlier)


def put_csv_rows_back(trainer: Trainer) -> None:
    """Write the rows that were logged before the step from which a run is resumed; half a last line is none."""
    for metrics, earlier, logger in _csv_files(trainer):
        if not earlier.exists():
            continue
        with earlier.open(newline="") as stream:
            rows = csv.DictReader(line for line in stream if line.endswith("\n"))
            numbered = [row for row in rows if (row.get("step") or "").isdecimal()]
            kept = [row for row in numbered if int(row["step"]) < trainer.global_step]
            columns = list(rows.fieldnames or [])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(kept)
        write_whole(metrics, text.getvalue().encode())
        logger.experiment.metrics_keys = columns
        earlier.unlink()


def _csv_files(trainer: Trainer) -> Iterator[tuple[Path, Path, CSVLogger]]:
    """For each CSVLogger: its metrics.csv, the name of that file while a resumed run starts, and the logger."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            metrics = Path(logger.log_dir, "metrics.csv")
            yield metrics, metrics.with_name("metrics_before_resume.csv"), logger


class SaveConfig(SaveConfigCallback):
    """Saves the configuration with the run, in a folder that no other process trains in.

    A folder that holds a run already is only used with a `ckpt_path`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, config, overwrite=True, **options)
        self.resumed = config.get("ckpt_path") is not None
        self.lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":  # validate and test may use a run's folder, which keeps its configuration
            return
        folder = run_folder(trainer)
        if not self.resumed and holds_a_run(folder):
            raise ValueError(f"{folder} holds another run: choose another one, or give its ckpt_path to resume it")
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(folder / ".training.lock")  # the operating system's: it ends with the process
            try:
                self.lock.acquire(blocking=False)
            except Timeout as error:
                raise ValueError(f"another process trains in {folder}: start again, or choose another one") from error
            path = str(folder / self.config_filename)  # not in trainer.log_dir, which MLflow with a database lacks
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
