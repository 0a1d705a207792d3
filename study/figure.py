"""Draw the published study, a dot for each run that counts: text on the left, recall on the right.

python study/figure.py            # rows of results/longer and results/mqar -> results/study.png
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from rows import counted, score
from trainings import ROOT

from bsbr_pl.evals.report.plot import SETTINGS, STYLES, Plot
from bsbr_pl.results import Results
from bsbr_pl.utils.files import write_whole

PANELS = {  # task -> what is measured
    "longer": "bits per byte of text (less is better)",
    "mqar": "recall from beyond the window, accuracy",
}


def scores(path: Path) -> dict[str, list[float]]:
    """Model -> the scores of its runs that count."""
    by_model: dict[str, list[float]] = {}
    for run, row in counted(Results(path).rows).items():
        by_model.setdefault(run.model, []).append(score(row) or 0.0)
    return by_model


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of TASK/results.jsonl")
    folder = parser.parse_args().results
    found = {task: scores(folder / task / "results.jsonl") for task in PANELS}
    first = found["longer"]
    models = sorted(first, key=lambda model: -sum(first[model]) / len(first[model]))  # the best at the top
    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.6, 0.34 * len(models) + 0.9), layout="constrained")
        for axes, (task, label) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
            for y, model in enumerate(models):
                color, marker = STYLES[max((key for key in STYLES if model.startswith(key)), key=len)]
                points = found[task].get(model, [])
                axes.plot(points, [y] * len(points), marker, color=color, fillstyle="none", markersize=6)
            axes.set_xlabel(label)
            axes.set_ylim(-0.6, len(models) - 0.4)
        axes.set_yticks(range(len(models)), [model.replace("_", " ") for model in models])
        axes.set_xlim(-0.03, 1.03)
    write_whole(folder / "study.png", Plot("study", "", "", figure).image("png"))
    print(folder / "study.png")


if __name__ == "__main__":
    main()
