"""The study, from its rows of kind `training`: a table of each task, and a figure with a dot for each run."""

from collections.abc import Iterable, Mapping
from statistics import fmean

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from .labels import look
from .plots import SETTINGS, drawn
from .rows import Checkpoint, Row
from .tables import Column, Table, pipes, table

BITS, SEGMENT = "val/bits_per_byte", "val/accuracy_"  # of a text; of each segment of a recall task
RUNS = ["task", "model", "rate", "steps", "seed", "architecture", "quality", "text", "segments"]


def runs(rows: Iterable[Row]) -> pd.DataFrame:
    """The runs of the phase `final` that were validated; each once.

    Columns: task, model, rate, steps, seed, architecture, quality (bits per byte, or the mean accuracy over the
    segments of a recall task), text (whether it is bits per byte), segments (name -> accuracy).
    """
    found = {}
    for row in rows:
        run, metrics = Checkpoint("", row["about"]), row["values"].get("metrics") or {}
        bits, segments = metrics.get(BITS, {"value": [None]})["value"][-1], {}
        for name, course in metrics.items():
            if name.startswith(SEGMENT):
                segments[name.removeprefix(SEGMENT)] = course["value"][-1]
        accuracy = fmean(segments.values()) if segments and None not in segments.values() else None
        quality = accuracy if bits is None else bits
        if run.get("study.phase") == "final" and quality is not None:
            facts = {name: run.get(f"study.{name}") for name in ("task", "model", "rate")}
            facts |= {"steps": run.get("run.planned_steps") or run.steps, "seed": run.seed, "quality": quality}
            facts |= {"architecture": run.get("architecture"), "text": bits is not None, "segments": segments}
            found[row["identity"]["checkpoint"]] = facts
    return pd.DataFrame(list(found.values()), columns=RUNS)


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The table of one task as text: a row for each model, the best first."""
    return _shown(runs(rows))


def _shown(found: pd.DataFrame) -> pd.DataFrame:
    text = bool(found["text"].any())
    digits, name = (4, "bits per byte") if text else (3, "accuracy")
    every = []
    for (_, model, rate, steps), of in found.groupby(RUNS[:4], sort=False):
        mean, least, largest = fmean(of["quality"]), of["quality"].min(), of["quality"].max()
        segments = pd.DataFrame(list(of["segments"])).agg(fmean).map("{:.2f}".format)
        facts = {"quality": mean, "model": model, "steps": f"{steps:,}", "learning rate": f"{rate:g}"}
        facts["seeds"] = str(len(of))
        figures = {name: f"{mean:.{digits}f}", "least to largest": f"{least:.{digits}f} to {largest:.{digits}f}"}
        every.append({**facts, **figures, **(segments if len(segments) > 1 else {})})
    if not every:
        return pd.DataFrame()
    shown = pd.DataFrame(every).sort_values("quality", ascending=text, kind="stable").drop(columns="quality")
    return shown.set_axis(shown.columns.str.replace("_N", ", N").str.replace("_", " "), axis=1)


def as_markdown(rows: Iterable[Row]) -> str:
    """The table of one task in Markdown."""
    found = frame(rows)
    return "No run counts yet.\n" if found.empty else pipes(found)


def tables(rows: Iterable[Row]) -> list[Table | None]:
    """A table for each task."""
    made = []
    for task, of in runs(rows).groupby("task"):
        shown = _shown(of)
        made.append(table("study", str(task), shown, map(Column, shown.columns), task=task))
    return made


def figure(panels: Mapping[str, Iterable[Row]]) -> bytes:
    """A PNG: a dot for each run that counts, the best model of the first panel at the top.

    Args:
        panels: what is measured -> the rows of its task; on all but the first, shares from 0 to 1.
    """
    first, *_ = found = [runs(rows).sort_values(RUNS[:5]) for rows in panels.values()]
    models = list(first.groupby("model")["quality"].agg(fmean).sort_values(ascending=False).index)
    with rc_context(SETTINGS):
        picture = Figure(figsize=(8.6, 0.34 * len(models) + 0.9), layout="constrained")
        every = picture.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, label, of in zip(every, panels, found, strict=True):
            shown = of[of["model"].isin(models)]
            for model, architecture, quality in zip(
                shown["model"], shown["architecture"], shown["quality"], strict=True
            ):
                color, marker = look(architecture or model)
                axes.plot([quality], [models.index(model)], marker, color=color, fillstyle="none", markersize=6)
            axes.set(xlabel=label, ylim=(-0.6, len(models) - 0.4))
            axes.set_yticks(range(len(models)), pd.Index(models).str.replace("_", " "))
        for axes in every[1:]:
            axes.set_xlim(-0.03, 1.03)
    return drawn(picture, "png")
