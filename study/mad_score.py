"""The scores of memorization, as mad-lab defines them, of the runs that count.

    python study/mad_score.py runs/mad/* --out results/mad/memorization.jsonl

Each folder is the output of a study whose task is `memorization`. A run gets one line, with two accuracies on the test
split:

- `accuracy`: the share of asked positions that are right, as everywhere in this project;
- `class_accuracy`: what mad-lab reports. Within a batch of 128 samples, the mean over classes of the share of a class's
  positions that are right. A class that was predicted but not asked for counts as 0. Then the mean over batches.

A line that is there is not computed again. The tables show means over seeds, with the least and the largest where they
differ by 0.01 or more, and their mean over the six vocabularies: the score. A folder such as `2048_start` is one with
other options: here mad-lab's start of the weights (`--train study/mad_start.py`).
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from lines import Line, add_missing
from matplotlib import rc_context
from matplotlib.figure import Figure
from rows import Run, line_of, subject_of, tested_runs
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from bsbr_pl.data.base import IGNORED
from bsbr_pl.report.plots import SETTINGS, drawn
from bsbr_pl.report.tables import pipes
from bsbr_pl.results import Row
from bsbr_pl.utils.files import write_whole

TASK = "memorization"
LADDER = [256, 512, 1024, 2048, 4096, 8192]  # vocabularies
PUBLISHED_RATE = 1e-3  # the largest of the published grid
#: Model -> its scores in arXiv 2406.06484, 2503.14456 and 2506.05233, and in lin-attn-bench, a public re-run.
PUBLISHED = {
    "standard": "0.852, 0.847, 0.788",
    "delta_net": "0.528, 0.408, 0.394",
    "gated_delta_net": "0.552, 0.817",
    "gla": "0.633, 0.771, 0.825",
    "mamba2": "0.420",
    "rwkv7": "0.891, 0.886",
}
MARKERS = "osv^Dx"
SAMPLES = 256 * 16  # keys of the training set, drawn with repetition


@torch.no_grad()
def scores(run: Run, row: Row, folder: Path) -> Line:
    """Both accuracies of a run on its test split, and what the run was."""
    subject = subject_of(run, row, folder)
    assert subject.open_data is not None
    data, model = subject.open_data(), subject.model.eval()
    data.setup("test")
    size = data.vocab_size
    share = MulticlassAccuracy(size, average="micro", ignore_index=IGNORED)
    by_class, mean = MulticlassAccuracy(size, average="macro", ignore_index=IGNORED), MeanMetric()
    for batch in data.test_dataloader():
        guesses = model(batch["input_ids"]).argmax(-1)
        share.update(guesses, batch["targets"])
        mean.update(by_class(guesses, batch["targets"]))  # of this batch alone
    return {
        "vocab_size": size,
        "architecture": subject.about["architecture"],
        "parameters": subject.about["parameters"],
        "accuracy": round(share.compute().item(), 4),
        "class_accuracy": round(mean.compute().item(), 4),
    }


def wanted(folders: Iterable[Path]) -> Iterator[tuple[Line, Callable[[], Line]]]:
    """Every run that counts: what identifies its line, and a function for the rest of the line."""
    for folder in folders:
        for run, row in tested_runs(folder, TASK).items():
            line = {"study": folder.name} | line_of(run, row)
            yield line, partial(scores, run, row, folder)


def table(lines: list[Line], value: str) -> str:
    """Means over seeds, and the score of each model and rate that has all vocabularies."""
    found = pd.DataFrame(lines)
    found["options"] = found["study"].map(lambda study: study.partition("_")[2])
    of = ["options", "model", "rate"]
    cells = found.pivot_table(value, of, "vocab_size", aggfunc=_cell).reindex(columns=LADDER).fillna("")
    means = found.pivot_table(value, of, "vocab_size").reindex(columns=LADDER)
    cells["score"] = means.mean(axis=1, skipna=False).map(lambda score: f"{score:.3f}", na_action="ignore")
    return cells.fillna("").reset_index().to_markdown(index=False, disable_numparse=True)


def as_published(lines: list[Line]) -> pd.DataFrame:
    """The runs at the published rate without other options."""
    found = pd.DataFrame(lines)
    return found[(found["rate"] == PUBLISHED_RATE) & ~found["study"].str.contains("_")]


def against_published(lines: list[Line]) -> str:
    """The models of the published tables at the published rate, with and without the short convolution."""
    found, shown = as_published(lines), []
    for model, published in PUBLISHED.items():
        for name in (model, f"{model}_plain"):
            own = found[found["model"] == name]
            if own.empty:
                continue
            by_size = own.groupby("vocab_size")["accuracy"]
            cells = {f"{size:,}": _cell(by_size.get_group(size)) if size in by_size.groups else "" for size in LADDER}
            scores = [own.groupby("vocab_size")[value].mean() for value in ("accuracy", "class_accuracy")]
            score, metric = (f"{one.mean():.3f}" if len(one) == len(LADDER) else "" for one in scores)
            shown.append({"model": name} | cells | {"score": score, "mad-lab's metric": metric, "published": published})
    return pipes(pd.DataFrame(shown))


def _cell(seeds: pd.Series) -> str:
    """The mean of an accuracy over seeds, with the least and the largest where they differ by 0.01 or more."""
    mean, least, largest = f"{seeds.mean():.3f}", seeds.min(), seeds.max()
    return f"{mean} ({least:.2f} to {largest:.2f})" if largest - least >= 0.01 else mean


def figure(lines: list[Line]) -> bytes:
    """A PNG: accuracy against the vocabulary at the published rate; lines are means over seeds, bars all seeds.

    Dashed: the same model without the short convolution (`_plain`). Dotted: the limit, the share of keys that the
    training set has. Models with other heads, starts or options are in the tables alone.
    """
    found = as_published(lines)
    with rc_context(SETTINGS):
        picture = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = picture.subplots()
        for number, model in enumerate(PUBLISHED):
            for name, style in ((model, "-"), (f"{model}_plain", "--")):
                seeds = found[found["model"] == name].groupby("vocab_size")["accuracy"]
                if not len(seeds):
                    continue
                mean = seeds.mean()
                ends = [mean - seeds.min(), seeds.max() - mean]
                look = {"fmt": style + MARKERS[number], "color": f"C{number}", "fillstyle": "none", "capsize": 2}
                axes.errorbar(mean.index, mean, ends, label=name, elinewidth=0.8, **look)
        keys = [(size - 1) // 2 for size in LADDER]
        axes.plot(LADDER, [1 - (1 - 1 / count) ** SAMPLES for count in keys], "k:", label="limit")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LADDER, [f"{size:,}" for size in LADDER])
        axes.set(xlabel="vocabulary", ylabel="accuracy", ylim=(-0.03, 1.03))
        picture.legend(loc="outside right upper")
    return drawn(picture, "png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/mad/memorization.jsonl"))
    parser.add_argument("--figure", type=Path, help="also draw accuracy against the vocabulary: a PNG")
    chosen = parser.parse_args()
    lines = add_missing(chosen.out, wanted(chosen.folders))
    for value in ("accuracy", "class_accuracy"):
        print(f"{value}\n{table(lines, value)}\n")
    print(against_published(lines))
    if chosen.figure:
        write_whole(chosen.figure, figure(lines))


if __name__ == "__main__":
    main()
