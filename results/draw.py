"""Draw every published report, and the figures of README.md, again from their rows: `make results`. Needs no torch."""

import json
from pathlib import Path
from typing import Any

from bsbr_pl.report import study, write_report
from bsbr_pl.report.plots import drawn
from bsbr_pl.report.quality import by_length
from bsbr_pl.report.studies import Findings
from bsbr_pl.utils.files import write_whole

RESULTS = Path(__file__).parent
PANELS = {  # what is measured -> the task
    "bits per byte of text (less is better)": "longer",
    "recall from beyond the window, accuracy": "mqar",
}


def rows(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / task / "results.jsonl").read_text().splitlines()]


def main() -> None:
    for path in sorted(RESULTS.glob("*/results.jsonl")):
        print(write_report(rows(path.parent.name), path.parent))
    write_whole(RESULTS / "study.png", study.figure({label: rows(task) for label, task in PANELS.items()}))
    (longer,) = Findings(rows("longer")).studies
    (picture,) = (
        part
        for part in by_length(longer)
        if part and part.name == f"by_length_{longer.name}" and part.kind == "picture"
    )
    write_whole(RESULTS / "by_length.png", drawn(picture.figure, "png"))


if __name__ == "__main__":
    main()
