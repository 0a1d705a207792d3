"""Train every architecture for a short while with several seeds, to have something to evaluate.

    python benchmarks/train_all.py runs/all                        # all architectures, two seeds, 160 steps each
    python benchmarks/train_all.py runs/all --seeds 0 1 2 --architectures bsbr linear -- --trainer.max_steps=640
    python evaluate.py runs/all

Everything after `--` goes to train.py. A run that has finished is not trained again; one that was interrupted goes on.
"""

import argparse
import sys
from pathlib import Path

from common import ROOT, finished_record, parse_with_rest, train

from bsbr_pl.attention import ARCHITECTURES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the runs: output/ARCHITECTURE/seedN")
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    chosen, options = parse_with_rest(parser)
    for seed in chosen.seeds:
        for name in chosen.architectures:
            folder = chosen.output / name / f"seed{seed}"
            if finished_record(folder):
                continue
            print(f"{name}, seed {seed}", flush=True)
            steps = ["--trainer.max_steps=160", "--trainer.val_check_interval=40"]
            if train(folder, seed, [ROOT / "configs" / f"{name}.yaml"], [*steps, *options]).returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
