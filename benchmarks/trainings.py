"""Runs many trainings: several at once, none twice, each resumed from where it was interrupted.

Any number of scripts may train in the same folders at once: a run that another process trains is left to it and waited
for. Only a run whose loss is no longer a number has failed for good, and failed.txt in its folder says so. Every other
failure (a full disk, a kill, no memory, a refused argument) may pass: the next call tries the run again.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from children import Children
from common import ROOT
from filelock import FileLock, Timeout

SECONDS_BETWEEN_LOOKS = 0.2
DIVERGED = re.compile(r"error: (the loss is (?:nan|-?inf) .*|\S+ is not finite after .*)")  # said by FiniteLoss


class Training(NamedTuple):
    """One call of `train.py fit`."""

    name: str  # for the user; each has its own
    folder: Path  # of the run
    seed: int
    configs: list[Path]
    arguments: list[str]

    def command(self) -> list[str]:
        resumed = ["--ckpt_path=last"] if last_checkpoint(self.folder).exists() else []
        return [
            *(sys.executable, str(ROOT / "train.py"), "fit", *(f"--config={path}" for path in self.configs)),
            *(f"--seed_everything={self.seed}", f"--data.seed={self.seed}"),  # after the configurations, to win
            f"--trainer.logger.init_args.save_dir={self.folder.parent}",
            *("--trainer.logger.init_args.name=", f"--trainer.logger.init_args.version={self.folder.name}"),
            *("--trainer.enable_progress_bar=false", *self.arguments, *resumed),
        ]


def train_all(trainings: list[Training], workers: int = 1) -> dict[str, str]:
    """Train every run that has neither finished nor diverged, `workers` at once, and print how each one ended.

    What train.py prints goes to output.txt in the run's folder.

    Returns:
        Name -> reason, of every training without a result.
    """
    missing: dict[str, str] = {}
    with Children() as children:
        running: set[Path] = set()
        unfinished = {one.name: _train(one, children, running, workers) for one in trainings}
        while unfinished:
            for name, steps in list(unfinished.items()):
                try:
                    next(steps)
                    continue
                except StopIteration as end:
                    reason = end.value
                except OSError as error:  # a full disk, no permission
                    reason = str(error)
                del unfinished[name]
                if reason:
                    missing[name] = reason
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return {one.name: missing[one.name] for one in trainings if one.name in missing}


def _train(
    training: Training, children: Children, running: set[Path], workers: int
) -> Generator[None, None, str | None]:
    """One training, which yields while it waits. Returns why it has no result, or None."""
    folder, output = training.folder, training.folder / "output.txt"
    told = False
    while len(running) >= workers or (claim := _claim(folder)) is None:
        if len(running) < workers and not told:
            print(f"{training.name}: another process trains in {folder}: waiting for it", flush=True)
            told = True
        yield
    with claim:
        if is_settled(folder):
            return None
        print(f"{training.name}: started, with its output in {output}", flush=True)
        with output.open("w") as stream:
            process = children.start(training.command(), env=_environment(workers), stdout=stream, stderr=stream)
        running.add(folder)
        while (code := children.poll(process)) is None:
            yield
        running.remove(folder)
        return _outcome(training, code, output.read_text(errors="replace"))


def _environment(workers: int) -> dict[str, str]:
    """The environment of a child: the cores are divided between the workers."""
    if workers == 1:
        return dict(os.environ)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    return os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _claim(folder: Path) -> AbstractContextManager | None:
    """A lock against other scripts that would start this run; None while any process is at it.

    What an attempt without last.ckpt left in the folder is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        claim = lock.acquire(blocking=False)
        with FileLock(folder / ".training.lock").acquire(blocking=False):  # train.py's own
            if not (is_settled(folder) or last_checkpoint(folder).exists()):
                for path in folder.iterdir():
                    if path.name != ".training.lock":  # or two processes could hold it
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except Timeout:
        lock.release()
        return None
    return claim


def _outcome(training: Training, code: int, output: str) -> str | None:
    """Print how an attempt ended, and keep a diverged one as failed.txt. Returns why it has no result, or None."""
    folder, reason = training.folder, None
    if record := finished_record(folder):
        value = validation_loss(record)
        said = "finished, " + ("without a validation loss" if value is None else f"val/loss {value:.4f}")
    elif found := DIVERGED.search(output):
        (folder / "failed.txt").write_text(output)
        said = found[1]
    else:
        said = reason = _last_words(code, output)
    print(f"{training.name}: {said}", flush=True)
    return reason


def _last_words(code: int, output: str) -> str:
    """Why train.py ended: the signal, its error message, or the last line of what it printed."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("train.py: error: ")]
    return (errors or lines or [f"train.py ended with {code} and printed nothing"])[-1]


def is_settled(folder: Path) -> bool:
    """Whether the run has finished or diverged, so that it is not tried again."""
    return finished_record(folder) is not None or diverged(folder) is not None


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run that has finished, or None."""
    path = folder / "record.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("status") == "finished" else None


def diverged(folder: Path) -> str | None:
    """What a run said whose loss was no longer a number, or None."""
    path = folder / "failed.txt"
    found = DIVERGED.search(path.read_text(errors="replace")) if path.exists() else None
    return found[1] if found else None


def validation_loss(record: dict[str, Any]) -> float | None:
    """The last validation loss of a record; None where it is not a number, or there was no validation."""
    values = record["metrics"].get("val/loss", {"value": [None]})["value"]
    return values[-1]
