"""The scores of memorization, as mad-lab defines them, of the runs that count.

    python study/mad_score.py runs/mad/* --out results/mad/memorization.jsonl

Each folder is the output of a study whose task is `memorization`. A run gets one line, with two accuracies on the test
split:

- `accuracy`: the share of asked positions that are right, as everywhere in this project;
- `class_accuracy`: what mad-lab reports. Within a batch of 128 samples, the mean over classes of the share of a class's
  positions that are right. A class that was predicted but not asked for counts as 0. Then the mean over batches.

A line that is there is not computed again. The tables show means over seeds, and their mean over the six vocabularies:
the score. A folder `2048_start` is one with mad-lab's start of the weights (`--train study/mad_start.py`).
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
from rows import results, runs_in
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from trainings import last_checkpoint

from bsbr_pl.data.base import IGNORED
from bsbr_pl.evals.checkpoints import open_checkpoint
from bsbr_pl.report.plots import SETTINGS, drawn
from bsbr_pl.utils.files import write_whole

TASK = "memorization"
LADDER = [256, 512, 1024, 2048, 4096, 8192]  # vocabularies
PUBLISHED_RATE = 1e-3  # the largest of the published grid
MARKERS = "osv^Dx+*P"
SAMPLES = 256 * 16  # keys of the training set, drawn with repetition


@torch.no_grad()
def scores(checkpoint: Path) -> Line:
    """Both accuracies of a run on its test split, and what the run was."""
    subject = open_checkpoint(checkpoint, trusted=True).subject()
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
        for run in runs_in(results(folder, TASK).rows):
            if run.phase == "final":
                line = {"study": folder.name, "model": run.model, "rate": run.rate, "seed": run.seed}
                yield line, partial(scores, last_checkpoint(run.folder(folder)))


def table(lines: list[Line], value: str) -> str:
    """Means over seeds, and the score of each model and rate that has all vocabularies."""
    found = pd.DataFrame(lines)
    found["start"] = found["study"].map(lambda study: study.partition("_")[2] or "own")
    means = found.pivot_table(value, ["start", "model", "rate"], "vocab_size").reindex(columns=LADDER)
    means["score"] = means.mean(axis=1, skipna=False)
    return means.reset_index().to_markdown(index=False, floatfmt=["", "", "g", *[".3f"] * (len(LADDER) + 1)])


def figure(lines: list[Line]) -> bytes:
    """A PNG: accuracy against the vocabulary, mean over seeds, at the published rate and with this project's start.

    Dashed: models without the short convolution, or with taps that start as the identity. Dotted: the limit, the share
    of keys that the training set has.
    """
    found = pd.DataFrame(lines)
    found = found[(found["rate"] == PUBLISHED_RATE) & ~found["study"].str.contains("_")]
    means, bases = found.pivot_table("accuracy", "model", "vocab_size"), dict[str, int]()
    with rc_context(SETTINGS):
        picture = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = picture.subplots()
        for model, values in means.iterrows():
            base = str(model).removesuffix("_plain").removesuffix("_identity")
            number = bases.setdefault(base, len(bases))
            style = ("-" if model == base else "--") + MARKERS[number % len(MARKERS)]
            axes.plot(values.dropna(), style, color=f"C{number}", label=str(model), fillstyle="none")
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
