"""Runs many trainings: several at once, none twice. Interrupted trainings are resumed.

Several scripts may train in the same folders at once: a script waits for a run that another process trains. A run
diverged if its loss was not finite; failed.txt in its folder records this, and the run is not repeated. After any
other failure (a full disk, a kill, no memory, a refused argument) the next call tries the run again.

A run is reused or resumed only by a call with the same arguments and configuration. arguments.json in its folder
records the arguments, and a digest of what the configurations say. Their paths are not compared.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from children import Children
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the scripts of this folder, which import this file

from bsbr_pl.evals.runs import read_record  # noqa: E402
from bsbr_pl.utils.files import write_json  # noqa: E402

SECONDS_BETWEEN_LOOKS = 0.2
QUEUED = "queued as job "  # how the reason starts why a run is missing, while it waits or runs on a cluster
DIVERGED = re.compile(r"error: (the loss is (?:nan|-?inf) .*|\S+ is not finite after .*)")  # what FiniteLoss says
ERROR = re.compile(r"\S+\.py: error: ")  # of train.py, or of the script that takes its place


class Training(NamedTuple):
    """One call of `train.py fit`."""

    name: str  # for the user; each has its own
    folder: Path  # of the run
    seed: int
    configs: list[Path]
    arguments: list[str]
    script: Path = ROOT / "train.py"
    configuration: str = ""  # a digest of what the configurations say; not compared where it is empty

    def command(self) -> list[str]:
        resumed = ["--ckpt_path=last"] if last_checkpoint(self.folder).exists() else []
        return [
            *(sys.executable, str(self.script), "fit", *(f"--config={path}" for path in self.configs)),
            *(f"--seed_everything={self.seed}", f"--data.seed={self.seed}"),  # after the configurations, to win
            f"--trainer.logger.init_args.save_dir={self.folder.parent}",
            *("--trainer.logger.init_args.name=", f"--trainer.logger.init_args.version={self.folder.name}"),
            *("--trainer.enable_progress_bar=false", *self.arguments, *resumed),
        ]


def train_all(
    trainings: list[Training], ended: Callable[[str], object] = lambda name: None, workers: int = 1
) -> dict[str, str]:
    """Train every run that has neither finished nor diverged, `workers` at once, and print how each run ended.

    The output of train.py goes to output.txt in the run's folder. `ended` is called with the name of each training when
    it has a result.

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
                else:
                    ended(name)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return {one.name: missing[one.name] for one in trainings if one.name in missing}


def _train(
    training: Training, children: Children, running: set[Path], workers: int
) -> Generator[None, None, str | None]:
    """One training, which yields while it waits. Returns why it has no result, or None."""
    folder, output = training.folder, training.folder / "output.txt"
    announced = False
    while len(running) >= workers or (claim := _claim(folder)) is None:
        if len(running) < workers and not announced:
            print(f"{training.name}: another process trains in {folder}: waiting for it", flush=True)
            announced = True
        yield
    with claim:
        if other := other_arguments(training):
            return other
        if is_settled(folder):
            return None
        keep_arguments(training)
        print(f"{training.name}: started, with its output in {output}", flush=True)
        with output.open("w") as stream:
            process = children.start(training.command(), env=_environment(workers), stdout=stream, stderr=stream)
        running.add(folder)
        while (code := children.poll(process)) is None:
            yield
        running.remove(folder)
        return _outcome(training, code, output.read_text(errors="replace"))


def _environment(workers: int) -> dict[str, str]:
    """The environment of a child process: the workers divide the cores.

    Slurm's variables are left out: Lightning would take one training for a process of many.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    if workers == 1:
        return own
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    return own | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _claim(folder: Path) -> AbstractContextManager | None:
    """Lock this run against other scripts. Returns None while another process trains it.

    Files of an earlier attempt that saved no last.ckpt are removed.
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
    """Print how an attempt ended, and write failed.txt if it diverged. Returns why the run has no result, or None."""
    folder, reason = training.folder, None
    if record := finished_record(folder):
        value = validation_loss(record)
        ending = "finished, " + ("without a validation loss" if value is None else f"val/loss {value:.4f}")
    elif found := DIVERGED.search(output):
        (folder / "failed.txt").write_text(output)
        ending = found[1]
    else:
        ending = reason = _last_words(code, output)
    print(f"{training.name}: {ending}", flush=True)
    return reason


def _last_words(code: int, output: str) -> str:
    """Why train.py ended: the signal, its error message, or the last line of its output."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or lines or [f"train.py ended with {code} and printed nothing"])[-1]


def is_settled(folder: Path) -> bool:
    """Whether the run has finished or diverged: it is not tried again."""
    return finished_record(folder) is not None or diverged(folder) is not None


def arguments_file(folder: Path) -> Path:
    """Where the arguments of a training are kept from its start on."""
    return folder / "arguments.json"


def keep_arguments(training: Training) -> None:
    """Write the file of a training that starts; one that was begun before there was such a file has none."""
    if not last_checkpoint(training.folder).exists():
        facts = {"arguments": training.arguments, "configuration": training.configuration}
        write_json(arguments_file(training.folder), facts)


def other_arguments(training: Training) -> str | None:
    """Why the run in the folder is another one: the first argument that differs. None if it is the same.

    Folders without the file, of earlier versions, are accepted; some have the arguments alone.
    """
    file = arguments_file(training.folder)
    if not file.exists():
        return None
    try:
        before = json.loads(file.read_text())
    except ValueError:
        before = None
    before = {"arguments": before} if isinstance(before, list) else before
    if not isinstance(before, dict) or not isinstance(before.get("arguments"), list):
        return f"{file.name} is damaged: choose another folder"
    for theirs, ours in zip_longest(before["arguments"], training.arguments, fillvalue="nothing"):
        if theirs != ours:
            return f"trained with other arguments ({theirs} instead of {ours}): choose another folder"
    kept = before.get("configuration")
    if kept and training.configuration and kept != training.configuration:
        return "trained with another configuration: its files or base.yaml were changed since, so choose another folder"
    return None


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run that has finished, or None; a damaged one is none."""
    found = read_record(last_checkpoint(folder))
    return found if found.get("status") == "finished" and "metrics" in found else None


def diverged(folder: Path) -> str | None:
    """The message of a run that diverged, or None."""
    path = folder / "failed.txt"
    found = DIVERGED.search(path.read_text(errors="replace")) if path.exists() else None
    return found[1] if found else None


def validation_loss(record: Mapping[str, Any]) -> float | None:
    """The last validation loss of a record or row; None where it is not a number, or there was no validation."""
    values = record["metrics"].get("val/loss", {}).get("value")
    return values[-1] if values else None


def parse_with_rest(options: ArgumentParser) -> tuple[Namespace, list[str]]:
    """The parsed arguments, and the arguments after `--`, which go to train.py."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return options.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
