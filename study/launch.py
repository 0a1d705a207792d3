"""Trains the runs of a study as jobs of a cluster, through submitit; `study/run.py --launcher=slurm` uses it.

A job trains one run and resumes it from last.ckpt. When its time is nearly over, the training saves, and the job enters
the queue again. A job that is cancelled, requeued or lost with its machine loses no more than the steps since the last
checkpoint. `.NAME.job` beside the folder of a run holds the id of its job, so that no call submits a run that is still
in the queue; the locks of trainings.py hold between jobs too. All machines must share the folder of the study, and its
file system must support locks.
"""

import os
import pickle
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from filelock import FileLock
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths
from trainings import QUEUED, Training, diverged, is_settled, other_arguments, train_all

SECONDS_BETWEEN_LOOKS = 20.0  # at the queue
SECONDS_TO_APPEAR = 60.0  # that a file of another machine may need, after its job has left the queue
MOST_REQUEUES = 100  # of a job whose time was over
MINUTES = 240  # of a job, unless `time` is given
#: Shell lines before a job. This folder has the modules of the job; srun >= 22.05 ignores sbatch's --cpus-per-task.
SETUP = [
    f"export PYTHONPATH={shlex.quote(str(Path(__file__).parent))}${{PYTHONPATH:+:$PYTHONPATH}}",
    '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
]


class TimeIsOverError(Exception):
    """The cluster will end this job soon."""


class Job:
    """One training. If the time of its job is over, the job enters the queue again."""

    def __call__(self, training: Training) -> dict[str, str]:
        """Train; returns what `train_all` does.

        A cluster sends SIGTERM to all processes of a job. It is ignored here, so that the training receives it once,
        saves and ends. SIGUSR2 announces that the time is nearly over.
        """
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        signal.signal(signal.SIGUSR2, _raise)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        try:
            return train_all([training])
        except TimeIsOverError:  # the training has saved and ended
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # ends this process
            raise

    def checkpoint(self, training: Training) -> DelayedSubmission:
        """The job that submitit submits again."""
        return DelayedSubmission(self, training)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise TimeIsOverError


class Launcher:
    """Submits trainings, and tells how their jobs ended. Never waits for a job.

    Args:
        executor: of submitit; its folder receives the logs.
        queue: returns the ids of all jobs that wait or run; raises an OSError while the queue cannot be read.
    """

    def __init__(self, executor: submitit.core.core.PicklingExecutor, queue: Callable[[], set[str]]) -> None:
        self._executor, self._queue = executor, queue
        self._seen: dict[str, float] = {}  # job -> when it was last in the queue
        self._looked = float("-inf")

    def __call__(self, trainings: list[Training]) -> dict[str, str]:
        """Submit every run that has neither finished nor diverged and is not in the queue.

        A job that ended without a result is submitted again by the next launcher, not by this one.

        Returns:
            Name -> reason, of every training without a result; QUEUED and the job's id if it is in the queue.
        """
        missing, new = {}, []
        self._executor.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._executor.folder / ".lock"):
            files = [job_file(one) for one in trainings]
            jobs = [file.read_text() if file.exists() else None for file in files]
            self._look({job for job in jobs if job})
            for one, file, job in zip(trainings, files, jobs, strict=True):
                if is_settled(one.folder):
                    if job:
                        print(f"{one.name}: {diverged(one.folder) or 'finished'}, job {job}", flush=True)
                        file.unlink()
                    if other := other_arguments(one):
                        missing[one.name] = other
                elif job and time.monotonic() - self._seen.get(job, float("-inf")) < SECONDS_TO_APPEAR:
                    missing[one.name] = QUEUED + job
                elif job in self._seen:
                    missing[one.name] = self._reason(job)
                else:
                    if job:
                        print(f"{one.name}: {self._reason(job)}", flush=True)
                    new.append(one)
            missing |= self._submit(new)
        return missing

    def _submit(self, trainings: list[Training]) -> dict[str, str]:
        """Submit an array of jobs. Returns name -> QUEUED and the job's id."""
        if not trainings:
            return {}
        for one in trainings:
            one.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            jobs = self._executor.map_array(Job(), trainings)
        except FailedJobError as error:
            raise ChildProcessError("no job was submitted: " + "; ".join(str(error).split("\n"))) from error
        for one, job in zip(trainings, jobs, strict=True):
            job_file(one).write_text(job.job_id)
            self._seen[job.job_id] = time.monotonic()
            print(f"{one.name}: submitted as job {job.job_id}, with its output in {one.folder}/output.txt", flush=True)
        return {one.name: QUEUED + job.job_id for one, job in zip(trainings, jobs, strict=True)}

    def _look(self, jobs: set[str]) -> None:
        """Note which jobs are in the queue; if it cannot be read, all known jobs count as queued.

        The last look serves for some seconds, unless another launcher has submitted one of `jobs` since.
        """
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS / 2 and jobs <= self._seen.keys():
            return
        try:
            found = self._queue()
        except OSError:
            if not self._seen:
                raise
            found = set(self._seen)
        self._seen |= dict.fromkeys(found, now)
        self._looked = now

    def _reason(self, job: str) -> str:
        """Why a job that is not in the queue has no result."""
        paths = JobPaths(self._executor.folder, job, 0)
        try:
            outcome, result = pickle.loads(paths.result_pickle.read_bytes())
        except (OSError, EOFError):
            return f"job {job} left the queue without a result; {paths.stderr} may say why (cancelled, out of memory)"
        words = list(result.values()) if outcome == "success" else result.strip().splitlines()[-1:]
        return f"job {job} ended without a result: {(words or ['its files are not there yet'])[0]}"


def job_file(training: Training) -> Path:
    """The file with the id of a run's job, until the run has a result."""
    return training.folder.with_name(f".{training.folder.name}.job")


def slurm(folder: Path, options: dict[str, Any], workers: int | None) -> Launcher:
    """A launcher of Slurm job arrays.

    Args:
        folder: for logs.
        options: of sbatch, such as `{"partition": "gpu", "time": "12:00:00", "gpus": 1}`.
        workers: jobs of an array that run at once; None: as many as Slurm permits.

    Raises:
        OSError: there is no Slurm here.
    """
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=MOST_REQUEUES)
    except RuntimeError as error:
        raise OSError(f"there is no Slurm on this machine: {error}") from error
    executor.update_parameters(
        job_name="study",
        time=MINUTES,
        setup=SETUP,
        array_parallelism=workers or 1000,
        additional_parameters={"requeue": True, **options},
    )
    return Launcher(executor, squeue)


def squeue() -> set[str]:
    """The ids of this user's jobs that wait, run or end: `12`, and `12_3` of an array."""
    done = subprocess.run(["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"squeue failed: {done.stderr.strip()}")
    return set(done.stdout.split())
