"""Repeat a small part of the published study and compare: for some models the shortest published run.

    python study/check.py                                # the runs of results/check, as `make study-check`: 3 minutes
    python study/check.py --published results/mqar/results.jsonl --models bsbr standard

Each run has the arguments, rate, seed and steps of the published one. Its validation loss must agree within the
tolerance: another machine adds numbers in another order, and training enlarges the difference. If the text is not the
published one (another release of Python has another standard library), the script prints this and does not compare.
"""

import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from rows import Run, loss, runs_in
from run import Study
from trainings import ROOT, finished_record, validation_loss

from bsbr_pl.results import Results, Row

MODELS = ("bsbr", "standard")


def shortest(model: str, published: dict[Run, Row]) -> tuple[Run, Row]:
    """The shortest run of a model, if possible at the rate of its runs that count."""
    best = {run.rate for run in published if run.model == model and run.phase == "final"}
    runs = [run for run in published if run.model == model]
    run = min(runs, key=lambda run: (run.steps, run.rate not in best, run.seed))
    return run, published[run]


def compare(run: Run, row: Row, output: Path, tolerance: float) -> tuple[bool, str]:
    """Repeat a run. Returns whether it failed or does not agree, and a sentence."""
    study = Study(output, row["about"]["study"].get("options", []))
    missing = study.train([run], study.matched_arguments(run.task, [run.model]))
    record = None if missing else finished_record(run.folder(output))
    if record and record["data_fingerprint"] != row["about"]["data"]["fingerprint"]:
        return False, "the data here is not the published data: not compared"
    found, published = (validation_loss(record) if record else None), loss(row)
    if found is None:
        return True, f"not compared: {missing.get(str(run), 'the run diverged')}"
    difference = found / published - 1
    agrees = abs(difference) <= tolerance
    verdict = "agrees" if agrees else "DOES NOT AGREE"
    return not agrees, f"{found:.5f}, published {published:.5f} ({difference:+.3%}): {verdict}"


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    default = ROOT / "results" / "check" / "results.jsonl"
    parser.add_argument("--published", type=Path, default=default, help="results.jsonl of study/run.py")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--output", type=Path, default=Path("runs/study_check"), help="folder for the runs")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the published loss, default 0.01")
    chosen = parser.parse_args()
    rows = runs_in(Results(chosen.published).rows)
    published = {run: row for run, row in rows.items() if loss(row) < math.inf}
    if unknown := set(chosen.models) - {run.model for run in published}:
        parser.error(f"--models: {', '.join(sorted(unknown))} is not in {chosen.published}")
    failed = False
    for model in chosen.models:
        disagrees, sentence = compare(*shortest(model, published), chosen.output, chosen.tolerance)
        print(f"{model}: {sentence}")
        failed |= disagrees
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
