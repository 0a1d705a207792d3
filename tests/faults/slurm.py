"""A study of 12 tiny runs on a real Slurm that is disturbed, compared with the same study on the local launcher.

    python tests/faults/slurm.py                      # some minutes on two cores; needs slurm-wlm, munge and submitit

The jobs are submitted by a process that does not wait. Then processes that wait are started, and this happens, each
time to a run that is in the middle: `scontrol requeue`; `scancel`; the signal that announces the end of a job's time;
the waiting process is killed, and two others take its place; slurmd is killed until the node counts as down, while its
jobs go on; slurmd and everything on the node is killed. The command is repeated until it has all results. No run may be
missing, finish twice or have two rows, and all rows must be those of the local launcher, to the last digit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from slurm_cluster import Cluster, told, wait_for

ROOT = Path(__file__).resolve().parents[2]
MODELS, RATES, SEEDS = ("linear", "sliding_window", "standard"), (5e-3, 2e-3), (1, 2)
STEPS = 800
CHOICES = [
    *("--tasks", "induction", "--models", *MODELS, "--steps", str(STEPS)),
    *("--rates", *map(str, RATES), "--max_rates", "2", "--seeds", *map(str, SEEDS)),
]
OPTIONS = ["--", "--data.batch_size=16", "--data.test_lengths=[64]", "--trainer.accelerator=cpu"]
SECONDS = 1800  # that anything may take


def command(output: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "study" / "run.py"), str(output), *CHOICES, *options, *OPTIONS]


class Disturbed:
    """The study on Slurm, and what is done to it."""

    def __init__(self, output: Path, cluster: Cluster) -> None:
        self.output, self.cluster = output, cluster
        self.hit: set[str] = set()  # jobs that were disturbed: each only once

    def start(self, *options: str) -> subprocess.Popen:
        with (self.output.parent / "launchers.txt").open("a") as log:
            return subprocess.Popen(command(self.output, "--launcher=slurm", *options), stdout=log, stderr=log)

    def job_in_the_middle(self, phase: str) -> str:
        """The id of a running job of the phase that has saved its first checkpoint, and that was not disturbed."""
        found: list[str] = []

        def look() -> bool:
            running = set(told("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()) - self.hit
            for file in (self.output / "induction" / phase).rglob(".*.job"):
                folder = file.with_name(file.stem[1:])
                begun, validated = folder / "checkpoints" / "last.ckpt", folder / "record.json"  # validated at the end
                if (job := file.read_text()) in running and begun.exists() and not validated.exists():
                    found.append(job)
            return bool(found)

        wait_for(look, SECONDS)
        self.hit.add(found[0])
        return found[0]

    def kill_node(self, with_jobs: bool) -> None:
        """Kill slurmd, and with it what runs on the node; start it again when the node counts as down."""
        self.cluster.stop("slurmd", signal.SIGKILL)
        if with_jobs:
            ours = os.environ["SLURM_CONF"]  # of the children: a slurmstepd overwrites its own environment with a title
            steps = [one for one in psutil.process_iter(["name"]) if one.info["name"] == "slurmstepd"]
            steps = [one for one in steps if any(p.environ().get("SLURM_CONF") == ours for p in one.children())]
            assert steps, "a job runs"
            tree = [*steps, *(child for step in steps for child in step.children(recursive=True))]
            for one in tree:
                one.kill()
        wait_for(lambda: "down" in told("sinfo", "--noheader", "--format=%T"), SECONDS)
        self.cluster.start("slurmd")

    def run(self) -> int:
        """Returns how many calls it took after the disturbances to have all results."""
        assert self.start("--no_wait").wait(SECONDS) == 1, "it says which runs are queued"
        waiting = self.start()
        for fault in ("scontrol requeue {}", "scancel {}", "scancel --signal=USR2 {}.0"):  # of the step 0, srun's
            done = fault.format(self.job_in_the_middle("sweep"))
            print(done, flush=True)
            subprocess.run(done.split(), check=True)
        job = self.job_in_the_middle("sweep")
        print("the waiting process is killed, two others take its place", flush=True)
        waiting.kill()
        waiting.wait()
        both = [self.start(), self.start()]
        for with_jobs in (False, True):
            job = self.job_in_the_middle("final")
            print(f"slurmd is killed{' with all on the node' * with_jobs}, while {job} runs", flush=True)
            self.kill_node(with_jobs)
        codes = [process.wait(SECONDS) for process in both]
        for calls in range(4):
            if 0 in codes:
                return calls
            codes = [self.start().wait(SECONDS)]
        raise AssertionError(f"exit codes {codes}; see {self.output.parent}/launchers.txt")


def rows(output: Path) -> dict[str, dict[str, Any]]:
    """Identity -> row, without what must differ: command, seconds, speed, starts, and the folder in its name."""
    found: dict[str, dict[str, Any]] = {}
    for line in (output / "induction" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        name, about, values = json.dumps(row["identity"], sort_keys=True), row["about"], row["values"]
        assert name not in found, f"measured twice: {name}"
        del about["command"]
        about["checkpoint"]["name"] = about["checkpoint"]["name"].removeprefix(str(output))
        values.pop("seconds", None)
        values.get("result", {}).pop("tokens_per_second", None)
        for metric, columns in values.get("metrics", {}).items():
            columns.pop("seconds", None)
            if metric == "flops/step_flops":  # which every start of a run logs
                assert len(set(columns["value"])) == 1, columns
                values["metrics"][metric] = columns["value"][0]
        found[name] = row
    return found


def check(disturbed: Path, local: Path) -> None:
    expected, found = rows(local), rows(disturbed)
    runs = [row for row in expected.values() if row["identity"]["kind"] == "training"]
    assert len(runs) == len(MODELS) * (len(RATES) + len(SEEDS)) == 12
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name] == row, f"{name}: {found[name]} is not {row}"
    launchers = (disturbed.parent / "launchers.txt").read_text()
    printed = "".join(path.read_text() for path in (disturbed / "jobs").glob("*_log.out"))
    finished = [line.split(":")[0] for line in printed.splitlines() if ": finished, val/loss" in line]
    assert len(finished) == len(set(finished)), f"finished twice: {sorted(finished)}"
    submitted = [line for line in launchers.splitlines() if ": submitted as job " in line]
    assert len(submitted) == 13, "12 runs, and again the cancelled one"
    records = [json.loads(path.read_text()) for path in (disturbed / "induction").rglob("record.json")]
    resumed = sorted(record["resumed_at_step"] for record in records if record.get("resumed_at_step"))
    assert len(resumed) >= 4, "after requeue, scancel, the end of time and the kill of all on the node"
    assert all(0 < step < STEPS for step in resumed)
    print(f"{len(found)} rows of 12 runs are equal, none twice; {len(resumed)} runs were resumed, at steps {resumed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    chosen = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.keep or Path(temporary)).resolve()
        (folder / "cluster").mkdir(parents=True)
        subprocess.run(command(folder / "local", "--workers=2"), check=True)
        with Cluster(folder / "cluster") as cluster:
            calls = Disturbed(folder / "slurm", cluster).run()
        print(f"all results, {calls} calls after the disturbances")
        check(folder / "slurm", folder / "local")


if __name__ == "__main__":
    main()
