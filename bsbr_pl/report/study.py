"""The study, from its rows of kind `training`: a table of each task, and a figure with a dot for each run."""

from collections.abc import Iterable, Mapping
from statistics import fmean

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from .figures import finite
from .labels import kind, look
from .plots import SETTINGS, Plot
from .rows import Checkpoint, Row
from .tables import Column, Table, pipes, tabulate

BITS, SEGMENT = "val/bits_per_byte", "val/accuracy_"  # of a text; of each segment of a recall task
RUN = ["task", "model", "steps", "rate"]  # what seeds have in common


def runs(rows: Iterable[Row]) -> pd.DataFrame:
    """The runs that count, those of the phase `final` that were validated; each once.

    Columns: task, model, steps, rate, seed, architecture, text, quality (bits per byte, or the mean accuracy over the
    segments of a recall task), segments (name -> accuracy).
    """
    found = {}
    for row in rows:
        run = Checkpoint("", row["about"])
        if row["identity"]["kind"] == "training" and run.get("study.phase") == "final":
            metrics = row["values"].get("metrics") or {}
            last = {name: number for name, course in metrics.items() if (number := finite(course["value"][-1])) is not None}
            segments = {n.removeprefix(SEGMENT): value for n, value in last.items() if n.startswith(SEGMENT)}
            quality = last.get(BITS, fmean(segments.values()) if segments else None)
            if quality is not None:
                found[row["identity"]["checkpoint"]] = {
                    **{name: run.get(f"study.{name}") for name in ("task", "model", "rate")},
                    **{"steps": run.steps, "seed": run.seed, "architecture": run.architecture, "text": BITS in last},
                    **{"quality": quality, "segments": segments},
                }
    return pd.DataFrame(list(found.values()), columns=[*RUN, "seed", "architecture", "text", "quality", "segments"])


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The table of one task as text: a row for each model, the best first."""
    found = runs(rows)
    text = bool(found["text"].any())
    digits, name = (4, "bits per byte") if text else (3, "accuracy")
    segments = list(dict.fromkeys(segment for of in found["segments"] for segment in of))
    table = []
    for (_, model, steps, rate), of in found.groupby(RUN, sort=False):
        mean, least, largest = fmean(of["quality"]), of["quality"].min(), of["quality"].max()
        numbers = {name: f"{mean:.{digits}f}", "least to largest": f"{least:.{digits}f} to {largest:.{digits}f}"}
        by_segment = pd.DataFrame(list(of["segments"]), columns=segments).agg(fmean).map("{:.2f}".format)
        facts = {"quality": mean, "model": model, "steps": f"{steps:,}", "learning rate": f"{rate:g}", "seeds": str(len(of))}
        table.append({**facts, **numbers, **(by_segment if len(segments) > 1 else {})})
    shown = pd.DataFrame(table).sort_values("quality", ascending=text, kind="stable").drop(columns="quality")
    return shown.rename(columns=lambda segment: segment.replace("_N", ", N").replace("_", " "))


def as_markdown(rows: Iterable[Row]) -> str:
    """The table of one task in Markdown."""
    return pipes(frame(rows))


def tables(rows: Iterable[Row]) -> list[Table | None]:
    """A table for each task."""
    rows = list(rows)
    made = []
    for task in sorted(set(runs(rows)["task"])):
        of = frame(row for row in rows if Checkpoint("", row["about"]).get("study.task") == task)
        columns = [Column(name) for name in of]
        caption = "The study's runs that count, at the learning rate that the sweep found; by the runs' own validation."
        made.append(tabulate(f"study_{task}", f"The study: {task}", caption, of, columns))
    return made


def figure(panels: Mapping[str, Iterable[Row]]) -> Plot:
    """A dot for each run that counts, the best model of the first panel at the top.

    Args:
        panels: what is measured -> the rows of its task; on all but the first, shares from 0 to 1.
    """
    found = {label: runs(rows) for label, rows in panels.items()}
    first = next(iter(found.values()))
    models = list(first.groupby("model")["quality"].agg(fmean).sort_values(ascending=False).index)
    with rc_context(SETTINGS):
        drawn = Figure(figsize=(8.6, 0.34 * len(models) + 0.9), layout="constrained")
        for axes, (label, of) in zip(drawn.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True):
            for model, architecture, quality in zip(of["model"], of["architecture"], of["quality"], strict=True):
                if model in models:
                    color, marker = look(kind(architecture))
                    axes.plot([quality], [models.index(model)], marker, color=color, fillstyle="none", markersize=6)
            axes.set(xlabel=label, ylim=(-0.6, len(models) - 0.4), **({} if of is first else {"xlim": (-0.03, 1.03)}))
            axes.set_yticks(range(len(models)), [model.replace("_", " ") for model in models])
    return Plot("study", "The study", "A dot for each run that counts.", drawn)
