"""Train in an environment that lacks something: a short training, or one sentence and an exit code that is not 0.

    python tests/faults/environment.py           # every case; the exit code is 1 if one differs from what is expected

Each case is a process of its own, forked from one that has only imported everything.
"""

import contextlib
import multiprocessing
import os
import pwd
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.damage import tiny  # noqa: E402
from faults.kill_and_resume import start  # noqa: E402

import train  # noqa: E402

Change = Callable[[], None]


def nothing() -> None:
    """The usual environment."""


def without_home() -> None:
    """As for a user id that has no entry in the passwd file: `docker run --user 54321`."""

    def unknown(*_: object) -> NoReturn:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    pwd.getpwuid = unknown  # type: ignore[assignment]


def with_few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


def on_a_full_disk() -> None:
    """No file can have more than 100 bytes, less than TensorBoard writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def without_streams() -> None:
    """As Python starts where all three are closed."""
    for number in (0, 1, 2):
        os.close(number)
        os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]


def with_a_closed_pipe() -> None:
    """As in `train.py ... | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def without_a_folder_for_temporary_files() -> None:
    os.environ["TMPDIR"] = "/nowhere"
    tempfile.tempdir = None


def with_a_signal_while_saving() -> None:
    """SIGTERM while the first checkpoint is written."""
    write, pending = os.fsync, [signal.SIGTERM]

    def fsync(number: int) -> None:
        if pending:
            os.kill(os.getpid(), pending.pop())
        write(number)

    os.fsync = fsync


#: The change, the options besides those of `damage.tiny`, whether a run is resumed, the exit code, words of the last line.
CASES: dict[str, tuple[Change, list[str], bool, int, str]] = {
    "no home": (without_home, ["--data.cache_dir=null"], False, 1, "there is no home folder for a cache"),
    "no home, cache named": (without_home, [], False, 0, ""),
    "few files": (with_few_files, ["--data.num_workers=9"], False, 1, "too many open files: raise the limit"),
    "full disk": (on_a_full_disk, [], False, 1, "File too large"),
    "full disk, resumed": (on_a_full_disk, [], True, 1, "File too large"),
    "no streams": (without_streams, ["--trainer.enable_progress_bar=true"], False, 0, ""),
    "no streams, resumed": (without_streams, ["--trainer.enable_progress_bar=true"], True, 0, ""),
    "no streams, a mistake": (without_streams, ["--model.num_heads=3"], False, 1, ""),
    "a closed pipe": (with_a_closed_pipe, ["--trainer.enable_progress_bar=true"], False, 1, "Broken pipe"),
    "no folder for temporary files": (without_a_folder_for_temporary_files, [], False, 0, ""),
    "a signal while saving": (with_a_signal_while_saving, ["--trainer.max_steps=9"], False, 143, "stopped by SIGTERM"),
    "anomalies": (nothing, ["--trainer.detect_anomaly=true"], False, 0, ""),
    "a folder that cannot be written": (nothing, ["--trainer.logger.save_dir=/proc/none"], False, 1, "/proc/none"),
    "a cache that cannot be written": (nothing, ["--data.cache_dir=/proc/none"], False, 1, "/proc/none"),
    "nothing to train on": (nothing, ["--trainer.limit_train_batches=0.0001"], False, 1, "trains nothing"),
    "nothing to overfit": (nothing, ["--trainer.overfit_batches=0.0001"], False, 1, "trains nothing"),
    "no steps": (nothing, ["--trainer.max_steps=0"], False, 1, "max_steps=0 trains nothing"),
    "no time": (nothing, ["--trainer.max_time=00:00:00:00"], False, 1, "trains nothing"),
    "an endless file": (nothing, ["--config=/dev/zero"], False, 2, "/dev/zero has more than 100,000 bytes"),
    "an endless file for a section": (nothing, ["--trainer=/dev/zero"], False, 2, "has more than 100,000 bytes"),
    "an endless file for a class": (nothing, ["--model.attention=/dev/zero"], False, 2, "has more than 100,000 bytes"),
    "an endless file for a list": (nothing, ["--trainer.callbacks=/dev/zero"], False, 2, "more than 100,000 bytes"),
    "an endless file as a text": (nothing, ["--data.source=/dev/zero"], False, 1, "/dev/zero"),
    "an endless file as a checkpoint": (nothing, ["--ckpt_path=/dev/zero"], False, 1, "/dev/zero is not a readable"),
}


def job(name: str, *options: str) -> None:
    """What the process of a case does; its exit code is that of train.py."""
    threading.excepthook = train._print_in_a_line
    CASES[name][0]()
    try:
        train.command_line(["fit", *options])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            with contextlib.suppress(AttributeError):
                print(ended.code, file=sys.stderr, flush=True)
        os._exit(ended.code if isinstance(ended.code, int) else int(bool(ended.code)))


def attempt(name: str, folder: Path) -> str:
    """What is not as expected; empty if all is."""
    _, more, resumed, code, words = CASES[name]
    options = tiny(folder)
    if resumed:
        process = start(folder, job, "no folder for temporary files", *options)
        process.join()
        more = [*more, "--trainer.max_steps=4", "--ckpt_path=last"]
    before = last(folder)
    (folder / "output.txt").unlink(missing_ok=True)
    process = start(folder, job, name, *options, *more)
    process.join(60)
    said = (folder / "output.txt").read_text().strip().splitlines()
    if process.exitcode is None:
        process.kill()
    wrong = process.exitcode != code or "Traceback" in "".join(said) or (words and words not in "".join(said[-2:]))
    if code == 0 and not (last(folder) and last(folder) != before):
        wrong = True
    return "" if not wrong else f"exit code {process.exitcode}: " + " | ".join(said[-4:])[-600:]


def last(folder: Path) -> bytes:
    found = list(folder.glob("runs/*/checkpoints/last.ckpt"))
    return found[0].read_bytes() if found else b""


def prepare() -> Any:
    """A process from which those of the cases are forked."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train", "faults.environment"])


def main() -> int:
    prepare()
    failed = 0
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = attempt(name, Path(folder))
        failed += bool(found)
        print(f"{name}: {found or 'as expected'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    from faults import environment  # under the name that the forked processes know

    sys.exit(environment.main())
