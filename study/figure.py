"""Draw the published study on text, a dot for each run that counts.

python study/figure.py            # rows of results/text -> results/study.png
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from bsbr_pl.report.study import figure
from bsbr_pl.results import read_rows
from bsbr_pl.utils.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PANELS = {"bits per byte of the test text (less is better)": "text"}  # what is measured -> its task


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of TASK/results.jsonl")
    folder = parser.parse_args().results
    rows = {label: read_rows([folder / task / "results.jsonl"]) for label, task in PANELS.items()}
    write_whole(folder / "study.png", figure(rows))
    print(folder / "study.png")


if __name__ == "__main__":
    main()
