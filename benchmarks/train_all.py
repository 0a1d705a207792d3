"""Train every architecture for a short while with several seeds, to have something to evaluate.

    python benchmarks/train_all.py runs/all                        # seven architectures, two seeds, 160 steps each
    python benchmarks/train_all.py runs/all --seeds 0 1 2 --architectures bsbr linear -- --trainer.max_steps=640
    python evaluate.py runs/all

Everything after `--` goes to train.py. A run that has finished is not trained again; one that was interrupted goes on.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bsbr_pl.attention import ARCHITECTURES  # noqa: E402


def finished(folder: Path) -> bool:
    record = folder / "record.json"
    return record.exists() and json.loads(record.read_text())["status"] == "finished"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the runs: output/ARCHITECTURE/seedN")
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    for seed in arguments.seeds:
        for name in arguments.architectures:
            folder = arguments.output / name / f"seed{seed}"
            if finished(folder):
                continue
            goes_on = (folder / "checkpoints" / "last.ckpt").exists()
            if not goes_on:  # stopped before there was anything to go on from
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{name}, seed {seed}", flush=True)
            command = [
                *(sys.executable, str(ROOT / "train.py"), "fit", f"--config={ROOT / 'configs' / name}.yaml"),
                *(f"--seed_everything={seed}", f"--data.seed={seed}"),
                *("--trainer.max_steps=160", "--trainer.val_check_interval=40"),
                f"--trainer.logger.init_args.save_dir={arguments.output / name}",
                *("--trainer.logger.init_args.name=", f"--trainer.logger.init_args.version=seed{seed}"),
                *("--trainer.enable_progress_bar=false", *options),
            ]
            if goes_on:
                command.append("--ckpt_path=last")
            if subprocess.run(command, check=False).returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
