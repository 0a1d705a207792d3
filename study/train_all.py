"""Train every architecture for a few steps with several seeds, as input for evaluate.py.

    python study/train_all.py runs/all                        # all architectures, two seeds, 160 steps each
    python study/train_all.py runs/long --seeds 0 1 2 --architectures bsbr linear -- --trainer.max_steps=640
    python evaluate.py runs/all

Arguments after `--` go to train.py; other arguments need another folder. The output of train.py goes to output.txt in
the run's folder. A finished run is not repeated, and an interrupted run is resumed. All trainings stop when this
process stops. The last lines name the runs without a result, and the exit code is then 1.
"""

import argparse
import sys
from pathlib import Path

from settings import BASE, fingerprint, given
from trainings import ROOT, Training, parse_with_rest, train_all

from bsbr_pl.attention import ARCHITECTURES

SEEDS = ("--seed_everything", "--data.seed", "--data.init_args.seed")
SET_HERE = {"--trainer.max_steps": 160, "--trainer.val_check_interval": 40}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the runs: output/ARCHITECTURE/seedN")
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    chosen, options = parse_with_rest(parser)
    for name, _ in given(options):
        if name in SEEDS:
            parser.error(f"{name} after --: it would be that of all runs: use --seeds")
    steps = [f"{name}={value}" for name, value in SET_HERE.items()]
    trainings = []
    for seed in chosen.seeds:
        for name in chosen.architectures:
            folder, config = chosen.output / name / f"seed{seed}", ROOT / "configs" / f"{name}.yaml"
            one = Training(f"{name}, seed {seed}", folder, seed, [config], [*steps, *options])
            trainings.append(one._replace(configuration=fingerprint([BASE, config], SET_HERE)))
    missing = train_all(trainings)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
