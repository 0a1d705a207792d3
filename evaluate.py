"""Trained checkpoints in, results and a report out: `python evaluate.py runs/`, or `--help`."""

import sys

from bsbr_pl.evals.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
