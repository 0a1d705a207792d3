"""Draw every published report, and bits per byte by length, again from their rows. Needs no torch.

`make results` runs this script and study/figure.py.
"""

from pathlib import Path

from bsbr_pl.report import write_report
from bsbr_pl.report.plots import drawn
from bsbr_pl.report.quality import by_length
from bsbr_pl.report.studies import Findings
from bsbr_pl.results import read_rows
from bsbr_pl.utils.files import write_whole

RESULTS = Path(__file__).parent


def main() -> None:
    for path in sorted(RESULTS.glob("*/results.jsonl")):
        print(write_report(read_rows([path]), path.parent))
    (longer,) = Findings(read_rows([RESULTS / "longer" / "results.jsonl"])).studies
    (picture,) = (
        part
        for part in by_length(longer)
        if part and part.name == f"by_length_{longer.name}" and part.kind == "picture"
    )
    write_whole(RESULTS / "by_length.png", drawn(picture.figure, "png"))


if __name__ == "__main__":
    main()
