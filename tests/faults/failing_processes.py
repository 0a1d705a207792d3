"""One of two processes fails in the middle of training: how soon have both ended, and what is the exit code?

    python tests/faults/failing_processes.py                    # both launchers, strategies, ranks and ways to fail
    python tests/faults/failing_processes.py --launchers torchrun --strategies ddp --ranks 1 --ways raised --rounds 10

Prints a line for each run. The exit code is 1 if a run exited with 0 or left a process after three minutes. CPU, gloo;
needs pgrep.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180
LAUNCHERS = {"own": [], "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}
TRAIN = """
import os
import sys

import train
from bsbr_pl.module import LanguageModule

step = LanguageModule.training_step


def failing(module, batch, batch_idx):
    if module.global_step == 3 and module.global_rank == int(os.environ["FAIL_RANK"]):
        if os.environ["FAIL_WAY"] == "killed":
            os.kill(os.getpid(), 9)
        raise RuntimeError("this process fails")
    return step(module, batch, batch_idx)


if __name__ == "__main__":
    LanguageModule.training_step = failing
    train.main()
"""


def remaining(folder: Path) -> list[str]:
    """The processes whose command line names the folder."""
    return subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()


def fail(folder: Path, launcher: str, strategy: str, rank: int, way: str) -> tuple[int | None, float, list[str]]:
    """Exit code (None if it did not end), seconds until the last process had ended, and the processes that remain."""
    (folder / "failing.py").write_text(TRAIN)
    (folder / "text.txt").write_text("".join(f"line {i}, the same as {i * i % 97}\n" for i in range(2000)))
    data = {"source": "text.txt", "tokenizer": "bytes", "context_length": 32, "batch_size": 2, "cache_dir": "cache"}
    trainer = {"max_steps": 6, "val_check_interval": 2, "accelerator": "cpu", "devices": 2, "strategy": strategy}
    sections = {"data": data, "trainer": trainer, "model": {"hidden_dim": 16, "num_heads": 2}}
    options = [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    command = [sys.executable, "-W", "ignore", *LAUNCHERS[launcher], str(folder / "failing.py"), "fit"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FAIL_RANK": str(rank), "FAIL_WAY": way}
    with (folder / "log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"--config={ROOT / 'configs/bsbr.yaml'}", *options],
            **{"cwd": folder, "env": environment, "stdout": log, "stderr": log},
        )
        while remaining(folder) and time.perf_counter() - start < SECONDS:
            process.poll()  # or it would remain as a zombie
            time.sleep(0.1)
    seconds, left = time.perf_counter() - start, remaining(folder)
    for pid in left:
        os.kill(int(pid), 9)
    return (None if left else process.wait()), seconds, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--ways", nargs="+", choices=["raised", "killed"], default=["raised", "killed"])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    bad = 0
    runs = itertools.product(range(options.rounds), options.launchers, options.strategies, options.ranks, options.ways)
    for _, *run in runs:
        with tempfile.TemporaryDirectory(prefix="failing-") as folder:
            code, seconds, left = fail(Path(folder), *run)
            said = "this process fails" in Path(folder, "log").read_text()
        print(*run, f"exit code {code}, {seconds:.1f} s, error shown: {said}, left: {len(left)}", flush=True)
        bad += code in (0, None)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
