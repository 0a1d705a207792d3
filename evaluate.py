"""Trained checkpoints in, results and a report out: `python evaluate.py runs/`, or `--help`."""

import sys

from bsbr_pl.__main__ import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:], "evaluate.py"))
