"""The scores of memorization, as mad-lab defines them, of the runs that count.

    python study/mad_score.py runs/mad/* --out results/mad/memorization.jsonl

Each folder is the output of a study whose task is `memorization`. A run gets one line, with two accuracies on the test
split:

- `accuracy`: the share of asked positions that are right, as everywhere in this project;
- `class_accuracy`: what mad-lab reports. Within a batch of 128 samples, the mean over classes of the share of a class's
  positions that are right. A class that was predicted but not asked for counts as 0. Then the mean over batches.

A line that is there is not computed again. The tables show means over seeds, with the number of seeds and the least and
largest accuracy where they differ by 0.001, and their mean over the six vocabularies: the score. A folder such as
`2048_start` is one with other options: here mad-lab's start of the weights (`--train study/mad_start.py`).
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
from bsbr_pl.results import Row
from bsbr_pl.utils.files import write_whole

TASK = "memorization"
LADDER = [256, 512, 1024, 2048, 4096, 8192]  # vocabularies
PUBLISHED_RATE = 1e-3  # the largest of the published grid
MODELS = ("standard", "delta_net", "gated_delta_net", "gla", "mamba2", "rwkv7")  # of the published tables
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


def _cell(seeds: pd.Series) -> str:
    """The mean of an accuracy over seeds, and of several seeds also their least and largest."""
    mean = f"{seeds.mean():.3f}"
    if len(seeds) == 1:
        return mean
    spread = f"{seeds.min():.3f} to {seeds.max():.3f}" if seeds.max() - seeds.min() >= 0.001 else "equal"
    return f"{mean} ({len(seeds)}: {spread})"


def figure(lines: list[Line]) -> bytes:
    """A PNG: accuracy against the vocabulary at the published rate; lines are means over seeds, bars all seeds.

    Dashed: the same model without the short convolution (`_plain`). Dotted: the limit, the share of keys that the
    training set has. Models with other heads, starts or options are in the tables alone.
    """
    found = pd.DataFrame(lines)
    found = found[(found["rate"] == PUBLISHED_RATE) & ~found["study"].str.contains("_")]
    with rc_context(SETTINGS):
        picture = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = picture.subplots()
        for number, model in enumerate(MODELS):
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
    if chosen.figure:
        write_whole(chosen.figure, figure(lines))


if __name__ == "__main__":
    main()
