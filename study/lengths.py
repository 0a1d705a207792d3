"""What a user can do with a text longer than the context of training: bits per byte of the test text, in four ways.

    python study/lengths.py runs/study --length 4096 --out results/text/lengths.jsonl

- `truncated`: in windows of the training length, side by side;
- `overlapping`: in windows of the training length that start every half of it, of which the second half counts: every
  token but those of the first window has at least half the training length as its context, and is read twice;
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
import torch
from lines import Line, add_missing
from rows import Run, line_of, subject_of, tested_runs

from bsbr_pl.data import TextData
from bsbr_pl.evals.accuracy import text_accuracy
from bsbr_pl.metrics import IGNORED, TokenMetrics
from bsbr_pl.model import LanguageModel
from bsbr_pl.report.tables import pipes
from bsbr_pl.results import Row

TASK = "text"
POINT = ("model", "rate", "steps", "decay", "length")
WAYS = ("truncated", "overlapping", "as it is", "stretched")
BATCH = 8  # windows that overlap


def stretch(model: LanguageModel, times: float) -> bool:
    """Stretch the rotary base of layers that see the whole context. Returns whether there are any."""
    layers: list[Any] = [one for one in model.attentions if getattr(one, "rope_base", None) and one.reach is None]
    for attention in layers:
        width = attention.head_dim * attention.rope_fraction
        attention.rope_base *= times ** (width / (width - 2))
    return bool(layers)


@torch.no_grad()
def overlapping(model: LanguageModel, data: TextData) -> float:
    """Bits per byte of the test text in windows that start every half window; the first one counts as a whole."""
    windows = data.samples("test")
    step = windows.context_length // 2
    overlap = windows.context_length - step
    starts = torch.arange(0, max(1, windows.length - 1 - overlap), step)
    token_bytes, metrics = torch.as_tensor(data.tokenizer.token_bytes), TokenMetrics()
    for some in starts.split(BATCH):
        batch = windows[some.numpy()]
        targets = batch["targets"]
        targets[some > 0, :overlap] = IGNORED
        counted = targets != IGNORED
        metrics.update(model(batch["input_ids"]), targets, token_bytes[targets[counted]])
    assert metrics.tokens == windows.length - 1, "every token is counted once"
    return float(metrics.compute()["bits_per_byte"])


def wanted(output: Path, length: int) -> Iterator[tuple[Line, Callable[[], Line]]]:
    """Every run that counts, in each way: what identifies its line, and a function for the rest of the line."""
    for run, row in tested_runs(output, TASK).items():
        for way in WAYS:
            line = line_of(run, row) | {"length": length, "way": way}
            yield line, partial(read, run, row, output, length, way)


def read(run: Run, row: Row, output: Path, length: int, way: str) -> Line:
    """Bits per byte of one run read in one way; None if nothing can be stretched."""
    subject = subject_of(run, row, output)
    assert subject.open_data is not None
    data, model = subject.open_data(), subject.model.eval()
    assert isinstance(data, TextData)
    trained = max(data.train_lengths)
    if way in ("truncated", "overlapping") and trained != data.validation_length:
        data = subject.open_data(**data.at_length(trained))
        assert isinstance(data, TextData)
    if way == "overlapping":
        return {"bits_per_byte": round(overlapping(model, data), 6)}
    if way == "stretched" and not stretch(model, length / trained):
        return {"bits_per_byte": None}
    if way != "truncated":
        data = subject.open_data(**data.at_length(length), eval_batch_size=1)
    return {"bits_per_byte": round(text_accuracy(model, data, "test")["bits_per_byte"], 6)}


def table(lines: list[Line]) -> str:
    """Means over seeds. Models with several rates, steps or weight decays have a row for each."""
    frame = pd.DataFrame(lines, columns=[*POINT, "seed", "way", "bits_per_byte"])
    frame = frame.dropna(subset="bits_per_byte").fillna("-")
    index = [name for name in POINT if name == "model" or frame.groupby("model")[name].nunique().max() > 1]
    means = frame.pivot_table(index=index, columns="way", values="bits_per_byte", sort=False).reindex(columns=WAYS)
    shown = means.map("{:.4f}".format).replace("nan", "-")
    seeds = frame.groupby(index)["seed"].nunique()
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
