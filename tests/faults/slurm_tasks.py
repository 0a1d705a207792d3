"""The job script of docs/multi_node.md on a real Slurm, with two tasks on the CPU, compared with one process.

    python tests/faults/slurm_tasks.py                # needs slurm-wlm and munge

The job is trained three times: undisturbed, requeued in the middle, and with the signal that announces the end of its
time. Then one is cancelled: it must not enter the queue again. In float64, all losses must be those of one process to
1e-9, and disturbed jobs must have exactly the losses of the undisturbed one. The learning rate is low: at a high one
training enlarges rounding (docs/multi_node.md).
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster, told, wait_for

ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(150))
OPTIONS = [
    *("--trainer.accelerator=cpu", "--trainer.precision=64-true", "--trainer.max_steps=800"),
    *("--trainer.val_check_interval=100", "--trainer.enable_progress_bar=false", "--data.source=text.txt"),
    *("--data.tokenizer=bytes", "--data.context_length=32", "--data.batch_size=4", "--data.cache_dir=cache"),
    *("--model.hidden_dim=32", "--model.num_layers=1", "--model.num_heads=2"),
    "--model.learning_rate=1e-3",
]
HERE = {  # what the page asks of a larger cluster -> what this one has
    "--nodes=2": "--nodes=1",
    "--ntasks-per-node=8": "--ntasks-per-node=2",
    "--cpus-per-task=8": "--cpus-per-task=1",
    "#SBATCH --gpus-per-node=8\n": "",
    "--trainer.num_nodes=2": "--trainer.num_nodes=1",
    "--trainer.devices=8": "--trainer.devices=2",
    "python train.py": f"{sys.executable} {ROOT / 'train.py'}",
    "configs/bsbr.yaml": str(ROOT / "configs" / "bsbr.yaml"),
}


def script() -> str:
    """The script of the page, for this machine."""
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs" / "multi_node.md").read_text(), re.S)
    for theirs, ours in HERE.items():
        assert theirs in text, theirs
        text = text.replace(theirs, ours)
    return text.replace("--trainer.strategy=ddp", f"--trainer.strategy=ddp {' '.join(OPTIONS)}")


def record(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/*/record.json")
    return json.loads(path.read_text())


def losses(found: dict[str, Any]) -> list[float]:
    return found["metrics"]["val/loss"]["value"]


def queued() -> str:
    return told("squeue", "--noheader", "--format=%i %T %R")


def train(folder: Path, *fault: str) -> dict[str, Any]:
    """The record of a job that a fault hits once, after its first checkpoint."""
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "job.sh").write_text(script())
    job = told("sbatch", "--parsable", f"--chdir={folder}", f"--output={folder}/job.out", str(folder / "job.sh"))
    if fault:
        wait_for(lambda: list(folder.glob("runs/*/checkpoints/last.ckpt")), 600)
        subprocess.run([*fault, job], check=True)
    wait_for(lambda: not queued(), 600)
    return record(folder)


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "one").mkdir()
        (folder / "cluster").mkdir()
        (folder / "one" / "text.txt").write_text(TEXT)
        config = f"--config={ROOT / 'configs' / 'bsbr.yaml'}"
        subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "fit", config, *OPTIONS], cwd=folder / "one", check=True
        )
        expected = losses(record(folder / "one"))
        print(f"one process: {expected[0]:.12f}, {expected[-1]:.12f}")
        undisturbed: list[float] = []
        faults = {"": (), "requeued": ("scontrol", "requeue"), "signalled": ("scancel", "--signal=TERM")}
        with Cluster(folder / "cluster"):
            for name, fault in faults.items():
                found = train(folder / f"two{name}", *fault)
                resumed = found.get("resumed_at_step")
                first, *_, last = losses(found)
                print(f"two tasks {name}: {found['status']}, {first:.12f}, {last:.12f}, resumed at step {resumed}")
                assert found["environment"]["processes"] == 2
                assert all(map(partial(math.isclose, rel_tol=1e-9), losses(found), expected))
                assert len(expected) == len(losses(found)) == 8
                undisturbed = undisturbed or losses(found)
                assert losses(found) == undisturbed
                assert (0 < resumed < 800) if fault else not resumed
            found = train(folder / "cancelled", "scancel")
            print(f"two tasks, cancelled: {found['status']} after {found['steps']} steps")
            assert found["status"] != "finished"


if __name__ == "__main__":
    main()
