"""What a user can do with a context longer than that of training: bits per byte of the test text, in three ways.

    python study/lengths.py runs/study --length 4096 --out results/text/lengths.jsonl

- `truncated`: in windows of the training length, so that no context is longer;
- `as it is`: in windows of `--length`;
- `stretched`: the same, where layers that see the whole context get the rotary base b s^(K / (K - 2)), s = length /
  training length, K the width of a head ("NTK-aware" scaling, arXiv 2309.00071, equation 16). No training follows.

The models are the runs that count of `study/run.py`. A line of `--out` is one run read in one way, and is not measured
again. The table has means over seeds.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from lines import Line, add_missing
from rows import Run, results, runs_in
from trainings import last_checkpoint

from bsbr_pl.evals.accuracy import text_accuracy
from bsbr_pl.evals.checkpoints import open_checkpoint
from bsbr_pl.model import LanguageModel
from bsbr_pl.report.tables import pipes

TASK = "text"
WAYS = ("truncated", "as it is", "stretched")


def stretch(model: LanguageModel, times: float) -> bool:
    """Stretch the rotary base of layers that see the whole context. Returns whether there are any."""
    layers: list[Any] = [one for one in model.attentions if getattr(one, "rope_base", None) and one.reach is None]
    for attention in layers:
        width = attention.head_dim * attention.rope_fraction
        attention.rope_base *= times ** (width / (width - 2))
    return bool(layers)


def wanted(output: Path, length: int) -> Iterator[tuple[Line, Callable[[], Line]]]:
    """Every run that counts, in each way: what identifies its line, and a function for the rest of the line."""
    for run in runs_in(results(output, TASK).rows):
        if run.phase == "final":
            for way in WAYS:
                line = {"model": run.model, "rate": run.rate, "seed": run.seed, "length": length, "way": way}
                yield line, partial(read, run, output, length, way)


def read(run: Run, output: Path, length: int, way: str) -> Line:
    """Bits per byte of one run read in one way; None if nothing can be stretched."""
    subject = open_checkpoint(last_checkpoint(run.folder(output)), trusted=True).subject()
    assert subject.open_data is not None
    data, model = subject.open_data(), subject.model.eval()
    trained = data.validation_length
    if way == "stretched" and not stretch(model, length / trained):
        return {"bits_per_byte": None}
    if way != "truncated":
        data = subject.open_data(**data.at_length(length), eval_batch_size=1)
    return {"bits_per_byte": round(text_accuracy(model, data, "test")["bits_per_byte"], 6)}  # type: ignore[arg-type]


def table(lines: list[Line]) -> str:
    """Means over seeds: a row for each model, a column for each way."""
    frame = pd.DataFrame(lines).dropna()
    means = frame.pivot_table(index="model", columns="way", values="bits_per_byte", sort=False).reindex(columns=WAYS)
    shown = means.map("{:.4f}".format).replace("nan", "-")
    seeds = frame.groupby("model")["seed"].nunique()
    return pipes(shown.assign(seeds=seeds)[["seeds", *WAYS]].reset_index().astype(str))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of study/run.py")
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--out", type=Path, default=Path("results/text/lengths.jsonl"))
    chosen = parser.parse_args()
    print(table(add_missing(chosen.out, wanted(chosen.study, chosen.length))))


if __name__ == "__main__":
    main()
