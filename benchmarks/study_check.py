"""Repeat a small part of the published study and compare: some runs of its sweep, which are the short ones.

    python benchmarks/study_check.py                                # what `make study-check` does, some minutes
    python benchmarks/study_check.py --published results/mqar.json --models bsbr standard

Each run is made with the arguments, rate, seed and steps that were published, and its validation loss must agree within
the tolerance: another machine adds in another order, and training enlarges what that leaves. A text that is not the
published one, as Python's standard library of another release, is said and not compared.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from common import ROOT
from study import Run, loss, make
from trainings import finished_record

MODELS = ("bsbr", "standard")


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=ROOT / "results" / "text.json", help="JSON file of study.py")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--output", type=Path, default=Path("runs/study_check"), help="folder for the runs")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the published loss, default 0.01")
    chosen = parser.parse_args()
    published = json.loads(chosen.published.read_text())
    if unknown := set(chosen.models) - set(published["rates"]):
        parser.error(f"--models: {', '.join(sorted(unknown))} is not in {chosen.published}")
    failed = 0
    for model in chosen.models:
        runs = [one for one in published["runs"] if one["model"] == model]
        row = min(runs, key=lambda one: (one["steps"], one["rate"] != published["rates"][model], one["seed"]))
        run = Run(**{name: row[name] for name in Run._fields})
        missing = make([run], chosen.output, published["matched"], published["options"])
        record = finished_record(run.folder(chosen.output))
        if record and record["data_fingerprint"] != row["data"]:
            print(f"{model}: not compared, since the data is not the published (another release of Python?)")
            continue
        found = loss(run, chosen.output)
        if found is None:
            failed += 1
            print(f"{model}: not compared: {missing[str(run)]}")
            continue
        difference = found / row["val/loss"] - 1
        verdict = "agrees" if abs(difference) <= chosen.tolerance else "DOES NOT AGREE"
        failed += verdict != "agrees"
        print(f"{model}: {found:.5f}, published {row['val/loss']:.5f} ({difference:+.3%}): {verdict}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
