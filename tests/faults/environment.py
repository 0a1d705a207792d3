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
from typing import NoReturn

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


def with_few_files_at_first() -> None:
    """The soft limit alone, which a process may raise."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def on_a_full_disk() -> None:
    """No file can grow beyond 4 kB: less than TensorBoard writes, more than this process says."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))


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


def with_a_huge_file() -> None:
    """huge.yaml has 8 GB of zeros, and there is memory for 4 more."""
    Path("huge.yaml").touch()
    os.truncate("huge.yaml", 8 * 2**30)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))


def with_a_signal_while_saving() -> None:
    """SIGTERM while the first checkpoint is written."""
    write, pending = os.fsync, [signal.SIGTERM]

    def fsync(number: int) -> None:
        if pending:
            os.kill(os.getpid(), pending.pop())
        write(number)

    os.fsync = fsync


TOO_LONG = "has more than 100,000 bytes, as no configuration has"
#: The change, options besides those of `damage.tiny`, whether a run is resumed, the exit code, words of the last line.
CASES: dict[str, tuple[Change, list[str], bool, int, str]] = {
    "no home": (without_home, ["--data.cache_dir=null"], False, 1, "there is no home folder"),
    "no home, cache named": (without_home, [], False, 0, ""),
    "few files": (with_few_files, ["--data.num_workers=2"], False, 1, "num_workers=2 needs 96 open files, and `ulimit"),
    "few files, no workers": (with_few_files, [], False, 0, ""),
    "few files at first": (with_few_files_at_first, ["--data.num_workers=2"], False, 0, ""),
    "full disk": (on_a_full_disk, [], False, 1, "not enough disk space"),
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
    "nothing to train on": (
        nothing,
        ["--trainer.limit_train_batches=0.0001"],
        False,
        1,
        "0.0001 * 28 < 1",
    ),
    "nothing to overfit": (nothing, ["--trainer.overfit_batches=0.0001"], False, 1, "0.0001 * 28 < 1"),
    "no steps": (nothing, ["--trainer.max_steps=0"], False, 1, "max_steps=0 trains nothing"),
    "no time": (nothing, ["--trainer.max_time=00:00:00:00"], False, 1, "trains nothing"),
    "a huge configuration": (with_a_huge_file, ["--config=huge.yaml"], False, 2, TOO_LONG),
    "a huge file for a section": (with_a_huge_file, ["--trainer=huge.yaml"], False, 2, TOO_LONG),
    "a huge file for a class": (
        with_a_huge_file,
        ["--model.attention=huge.yaml"],
        False,
        2,
        "huge.yaml is a file and no class: use --config=huge.yaml",
    ),
    "a huge file for data": (with_a_huge_file, ["--data=huge.yaml"], False, 2, TOO_LONG),
    "a huge file for a list": (with_a_huge_file, ["--trainer.callbacks=huge.yaml"], False, 2, TOO_LONG),
    "a huge file as a checkpoint": (
        with_a_huge_file,
        ["--ckpt_path=huge.yaml"],
        False,
        1,
        "huge.yaml is not a readable",
    ),
    "an endless configuration": (nothing, ["--config=/dev/zero"], False, 2, "Path is not a file: '/dev/zero'"),
    "an endless text": (nothing, ["--data.source=/dev/zero"], False, 1, "/dev/zero"),
    "an endless checkpoint": (nothing, ["--ckpt_path=/dev/zero"], False, 1, "/dev/zero is not a readable"),
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


def preload(module: str) -> None:
    """Fork later processes from one that has imported this module."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train", module])


def main() -> int:
    preload("faults.environment")
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
