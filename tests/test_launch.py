"""study/launch.py with submitit's local executor: real processes, and a script that trains as little as it can.

tests/faults/slurm.py runs a whole study on a real Slurm.
"""

import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

submitit = pytest.importorskip("submitit")
sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import launch  # noqa: E402
from trainings import QUEUED, Training, train_all  # noqa: E402

#: Counts to the seed, a step every 50 ms, and saves on SIGTERM, as train.py does. Some seeds mean a mistake.
SCRIPT = textwrap.dedent("""
    import json, os, signal, sys, time
    from pathlib import Path

    options = dict(one.removeprefix("--").split("=", 1) for one in sys.argv[2:])
    folder = Path(options["trainer.logger.init_args.save_dir"]) / options["trainer.logger.init_args.version"]
    last, steps = folder / "checkpoints" / "last.ckpt", int(options["seed_everything"])
    done = int(last.read_text()) if options.get("ckpt_path") == "last" else 0
    with (folder / "starts.txt").open("a") as starts:
        starts.write(f"{done}\\n")
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if steps == 0:
        sys.exit("train.py: error: the loss is nan at step 1")
    if steps == 1:
        sys.exit("train.py: error: seed_everything must be above 1")
    assert os.environ["OMP_NUM_THREADS"] and "SLURM_JOB_ID" not in os.environ
    while done < steps and not stopped:
        time.sleep(0.05)
        done += 1
    last.parent.mkdir(exist_ok=True)
    last.write_text(str(done))
    if stopped:
        sys.exit(143)
    (folder / "record.json").write_text(json.dumps({"status": "finished", "metrics": {}, "steps": done}))
""")


class Executor(submitit.LocalExecutor):
    """Keeps its jobs, so that a queue can be asked for them, and that they end with a test."""

    jobs: list[submitit.LocalJob]

    def _internal_process_submissions(self, delayed_submissions):
        new = super()._internal_process_submissions(delayed_submissions)
        self.jobs += new
        return new


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a launcher, as a new process would, and trainings of so many steps."""
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 1.0)
    monkeypatch.setattr(launch, "SECONDS_TO_APPEAR", 1.5)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "script.py").write_text(SCRIPT)

    jobs: list[submitit.LocalJob] = []

    def make_launcher() -> launch.Launcher:
        executor = Executor(tmp_path / "jobs")
        executor.update_parameters(setup=launch.SETUP)
        executor.jobs = jobs
        return launch.Launcher(executor, lambda: {job.job_id for job in jobs if not job.done()})

    def make_training(steps: int) -> Training:
        return Training(f"run {steps}", tmp_path / f"steps{steps}", steps, [], [], tmp_path / "script.py")

    yield make_launcher, make_training
    for job in jobs:
        job._process.kill()
        job._process.wait()


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_queued(missing: dict[str, str]) -> bool:
    return any(reason.startswith(QUEUED) for reason in missing.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_run_once_whoever_looks(make, capsys, monkeypatch):
    """Two launchers share the jobs. A diverged run is settled; a failed one is submitted by the next launcher only."""
    make_launcher, make_training = make
    first, second = make_launcher(), make_launcher()
    trainings = [make_training(steps) for steps in (0, 1, 2, 20)]
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 600.0)
    assert second([]) == {}, "it has just looked at the queue"
    missing = first(trainings)
    assert second(trainings).items() <= missing.items()
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 1.0)
    assert list(missing) == ["run 0", "run 1", "run 2", "run 20"]
    assert all(reason.startswith(QUEUED) for reason in missing.values())
    until(lambda: not is_queued(first(trainings)))
    (reason,) = (missing := first(trainings)).values()
    assert list(missing) == ["run 1"]
    assert reason.startswith("job ")
    assert reason.endswith(" ended without a result: train.py: error: seed_everything must be above 1")
    assert first(trainings) == missing, "it does not try again"
    assert is_queued(third := make_launcher()(trainings))
    assert list(third) == ["run 1"]
    printed = capsys.readouterr().out
    assert printed.count(": submitted as job ") == 5
    assert printed.count("run 0: the loss is nan at step 1, job ") == 1
    assert printed.count("run 20: finished, job ") == 1
    until(lambda: not is_queued(second(trainings)))
    starts = [(one.folder / "starts.txt").read_text() for one in trainings]
    assert starts == ["0\n", "0\n", "0\n", "0\n"], "the failed run began anew in a clean folder"


def test_a_run_with_other_arguments_is_not_submitted(make):
    make_launcher, make_training = make
    training = make_training(2)
    assert train_all([training]) == {}
    assert make_launcher()([training]) == {}
    (reason,) = make_launcher()([training._replace(arguments=["--a=1"])]).values()
    assert reason == "trained with other arguments (nothing instead of --a=1): choose another folder"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_saves_before_its_time_is_over_and_goes_on(make):
    """SIGUSR2, which Slurm sends to all processes of a job: the training saves once, and the job is queued again.

    SIGTERM ends it, and the next launcher submits it again.
    """
    make_launcher, make_training = make
    training = make_training(60)
    launcher, starts = make_launcher(), training.folder / "starts.txt"
    assert is_queued(launcher([training]))
    until(lambda: starts.exists())
    time.sleep(0.3)
    signal_job(training.folder.parent, signal.SIGUSR2)
    until(lambda: len(starts.read_text().splitlines()) == 2)
    assert is_queued(launcher([training]))
    time.sleep(0.3)
    signal_job(training.folder.parent, signal.SIGTERM)
    until(lambda: not is_queued(launcher([training])))
    (reason,) = launcher([training]).values()
    assert "ended without a result" in reason or "left the queue without a result" in reason
    again = make_launcher()
    until(lambda: not again([training]))
    assert json.loads((training.folder / "record.json").read_text())["steps"] == 60
    saved = [int(line) for line in starts.read_text().splitlines()]
    assert saved[0] == 0
    assert 0 < saved[1] < saved[2] < 60


def signal_job(folder: Path, signum: signal.Signals) -> None:
    """Send a signal to the job and its training, as Slurm does: to all Python processes that name the folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            program, *arguments = path.read_text().split("\0")
        except OSError:  # it has ended
            continue
        if (
            program == sys.executable
            and "submitit.local._local" not in arguments
            and str(folder) in " ".join(arguments)
        ):
            os.kill(int(path.parent.name), signum)


def test_a_queue_that_cannot_be_asked(make, tmp_path):
    """Nothing is submitted before the queue is known; later, all known jobs count as queued."""
    _, make_training = make

    def unknown() -> set[str]:
        raise ChildProcessError("squeue failed: Unable to contact slurm controller")

    launcher = launch.Launcher(submitit.LocalExecutor(tmp_path / "jobs"), unknown)
    with pytest.raises(OSError, match="Unable to contact"):
        launcher([make_training(2)])
    assert not (tmp_path / "steps2").exists()


def test_there_is_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="there is no Slurm on this machine"):
        launch.slurm(tmp_path, {}, None)


def test_options_of_sbatch(tmp_path, monkeypatch):
    """What the user gives wins, and a job may be requeued."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = launch.slurm(tmp_path, {"partition": "gpu", "time": "12:00:00", "cpus-per-task": "4"}, 3)._executor
    text = executor._make_submission_file_text("command", "uid")
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines()]
    assert {"--partition=gpu", "--time=12:00:00", "--cpus-per-task=4", "--requeue"} <= set(lines)
    assert executor.parameters["array_parallelism"] == 3
