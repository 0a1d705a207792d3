"""Start-up times: imports, `--help`, and one training step on a prepared data set.

    python benchmarks/start_up.py

Each is a separate process, timed from start to end, in interleaved rounds.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, parser, publish, ratio

from bsbr_pl.utils.timing import measure

TRAIN = [sys.executable, str(ROOT / "train.py"), "fit"]


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--config", type=Path, default=ROOT / "configs" / "bsbr.yaml", help="of the training step")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one_step = [
            *TRAIN,
            *("--config", str(chosen.config.resolve())),
            *("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.callbacks=[]"),
            *("--trainer.enable_checkpointing=false", "--trainer.logger=false", "--without=[LastCheckpoint]"),
        ]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "import bsbr_pl": [sys.executable, "-c", "import bsbr_pl"],
            "import bsbr_pl.attention": [sys.executable, "-c", "import bsbr_pl.attention"],
            "train.py fit --help": [*TRAIN, "--help"],
            "train.py fit, one step": one_step,
        }

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, capture_output=True, cwd=folder)

        calls = {name: lambda command=command: run(command) for name, command in commands.items()}
        timings = measure(calls, chosen.rounds, warmup=1)
    baseline = timings["import torch"]
    rows = [
        {"start": name, "seconds": timing.median, "over import torch": ratio(timing, baseline).median}
        for name, timing in timings.items()
    ]
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()
