"""The study, from its rows of kind `training`: a table of each task, and a figure with a dot for each run."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bsbr_pl.results import Row
from bsbr_pl.values import number, paired_difference

from .labels import look
from .plots import SETTINGS, drawn
from .rows import Checkpoint
from .tables import Column, Table, pipes, table

BITS, SEGMENT = "val/bits_per_byte", "val/accuracy_"  # of a text; of each segment of a recall task
RUNS = ["task", "model", "rate", "steps", "seed", "decay", "architecture", "quality", "text", "segments"]
POINT = ["task", "model", "rate", "decay", "steps"]  # runs that agree in it differ in their seeds
RESULT = ["val", "test", "learned", "flops_per_token", "state_bytes", "tokens_per_second"]
MOST_SEGMENTS = 8  # with more, a table would be too wide


def quality(metrics: Mapping[str, Any]) -> tuple[float | None, bool]:
    """The last bits per byte, or mean accuracy over the segments of a recall task; and whether it is bits per byte."""
    bits = metrics[BITS]["value"][-1] if BITS in metrics else None
    if bits is not None:
        return bits, True
    accuracies = list(segments_of(metrics).values())
    known = [value for value in accuracies if value is not None]
    return (fmean(known) if known and len(known) == len(accuracies) else None), False


def segments_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Segment of a recall task -> its last accuracy."""
    found = {}
    for name, course in metrics.items():
        if name.startswith(SEGMENT):
            found[name.removeprefix(SEGMENT)] = course["value"][-1]
    return found


def runs(rows: Iterable[Row]) -> pd.DataFrame:
    """The runs of the phase `final` that were validated; each once.

    Columns: task, model, rate, steps, seed, decay (None if it was not swept), architecture, quality (bits per byte, or
    the mean accuracy over the segments of a recall task, of the test split if the row has it), text (whether it is bits
    per byte), segments (name -> accuracy), parameters, rates (of the sweep) and `RESULT`.
    """
    found = {}
    for row in rows:
        run, metrics = Checkpoint("", row["about"]), row["values"].get("metrics") or {}
        value, text = quality(metrics)
        if run.get("study.phase") == "final" and value is not None:
            result = row["values"].get("result") or {}
            found[row["identity"]["checkpoint"]] = {
                **{name: run.get(f"study.{name}") for name in ("task", "model", "rate", "rates")},
                "steps": run.get("run.planned_steps") or run.steps,
                "seed": run.seed,
                "decay": run.get("study.weight_decay"),
                "architecture": run.get("architecture"),
                "parameters": run.get("parameters"),
                "quality": result.get("test", value),
                "text": text,
                "segments": segments_of(metrics),
                **{name: result.get(name) for name in RESULT},
            }
    return pd.DataFrame(list(found.values()), columns=[*RUNS, "parameters", "rates", *RESULT])


def frame(found: pd.DataFrame) -> pd.DataFrame:
    """The `runs` of one task as a table of text: a row for each `POINT`, the best first."""
    text = bool(found["text"].any())
    digits, name = (4, "bits per byte") if text else (3, "accuracy")
    tested, swept = bool(found["test"].notna().any()), bool(found["decay"].notna().any())
    every = []
    for (_, model, rate, decay, steps), seeds in found.groupby(POINT, sort=False, dropna=False):
        mean, least, largest = fmean(seeds["quality"]), seeds["quality"].min(), seeds["quality"].max()
        row = {"quality": mean, "model": model, "steps": f"{steps:,}", "learning rate": f"{rate:g}"}
        if swept:
            row["weight decay"] = f"{decay:g}" if pd.notna(decay) else "-"
        row["seeds"] = str(seeds["seed"].nunique())
        row[name] = f"{mean:.{digits}f}"
        row["least to largest"] = f"{least:.{digits}f} to {largest:.{digits}f}"
        if tested:
            row |= _more(seeds, digits)
        segments = pd.DataFrame(list(seeds["segments"])).agg(fmean)
        if 1 < len(segments) <= MOST_SEGMENTS:
            row |= segments.map("{:.2f}".format).to_dict()
        every.append(row)
    if not every:
        return pd.DataFrame()
    shown = pd.DataFrame(every).sort_values("quality", ascending=text, kind="stable").drop(columns="quality")
    return shown.set_axis(shown.columns.str.replace("_N", ", N").str.replace("_", " "), axis=1).fillna("-")


def _more(seeds: pd.DataFrame, digits: int) -> dict[str, str]:
    """The columns of runs with a `result`: validation, costs, and what to know before comparing."""
    first, notes = seeds.iloc[0], []
    if seeds["test"].isna().any():
        notes.append("validation split: no test result")
    if late := int((seeds["learned"] == False).sum()):  # noqa: E712 - None is not known
        notes.append("not learned yet" if late == len(seeds) else f"not learned yet: {late} of {len(seeds)} seeds")
    if first["rates"] and not min(first["rates"]) < first["rate"] < max(first["rates"]):
        notes.append("rate at the edge of its sweep")
    costs = {"parameters": first["parameters"], "FLOPs/token": first["flops_per_token"]}
    costs |= {"state bytes": first["state_bytes"], "tokens/s": seeds["tokens_per_second"].median()}
    return {
        "validation": f"{seeds['val'].mean():.{digits}f}",
        **{name: "-" if pd.isna(value) else f"{value:,.0f}" for name, value in costs.items()},
        "note": "; ".join(notes),
    }


def differences(rows: Iterable[Row], against: str | None = None) -> pd.DataFrame:
    """Each model's difference in quality to one other model of the task, paired by seed.

    Args:
        against: the model to compare with; None for the best.

    Returns:
        model, pairs, difference, interval (95 %), p: two-sided, of Student's paired t-test, not corrected for the
        number of models. Of a model with several rates or weight decays, only the best counts. Models without a seed in
        common with the other, or without runs of as many steps, are left out.
    """
    found = runs(rows)
    worse = 1 if found["text"].any() else -1
    points = [point for _, point in found.groupby(POINT, sort=False, dropna=False)]
    points.sort(key=lambda point: worse * point["quality"].mean())
    firsts = [point.iloc[0] for point in points]
    others = [first for first in firsts if against in (None, first["model"])]
    if not others:
        return pd.DataFrame()
    other, steps = others[0]["model"], others[0]["steps"]
    by_seed: dict[str, dict[int, float]] = {}  # of the best point of each model
    for first, point in zip(firsts, points, strict=True):
        if first["steps"] == steps:
            by_seed.setdefault(first["model"], dict(zip(point["seed"], point["quality"], strict=True)))
    every = []
    for model, values in by_seed.items():
        test = paired_difference(values, by_seed[other])
        if model != other and test["pairs"]:
            row = {"model": model, "pairs": str(test["pairs"]), f"difference to {other}": f"{test['mean']:+.4f}"}
            row["95 % interval"] = "-" if test["interval"] is None else "{:+.4f} to {:+.4f}".format(*test["interval"])
            row["p"] = number(test["p"])
            every.append(row)
    return pd.DataFrame(every)


def as_markdown(rows: Iterable[Row]) -> str:
    """The table of one task in Markdown."""
    found = frame(runs(rows))
    return "No run counts yet.\n" if found.empty else pipes(found)


def summary(rows: Sequence[Row]) -> str:
    """The table of one task, and the paired differences to the best model, in Markdown."""
    found = differences(rows)
    if found.empty:
        return as_markdown(rows)
    words = "Paired by seed; p of a t-test, not corrected for the number of models."
    return f"{as_markdown(rows)}\n{words}\n\n{pipes(found)}"


def tables(rows: Iterable[Row]) -> list[Table | None]:
    """A table for each task."""
    made = []
    for task, of_task in runs(rows).groupby("task"):
        shown = frame(of_task)
        made.append(table("study", str(task), shown, map(Column, shown.columns), task=task))
    return made


def figure(panels: Mapping[str, Iterable[Row]]) -> bytes:
    """A PNG: a dot for each run that counts, the best model of the first panel at the top.

    Args:
        panels: what is measured -> the rows of its task; on all but the first, shares from 0 to 1.
    """
    found = [runs(rows).sort_values(RUNS[:5]) for rows in panels.values()]
    models = list(found[0].groupby("model")["quality"].agg(fmean).sort_values(ascending=False).index)
    with rc_context(SETTINGS):
        picture = Figure(figsize=(8.6, 0.34 * len(models) + 0.9), layout="constrained")
        every = picture.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, label, of_panel in zip(every, panels, found, strict=True):
            shown = of_panel[of_panel["model"].isin(models)]
            for run in shown.to_dict("records"):
                color, marker = look(run["architecture"] or run["model"])
                y = models.index(run["model"])
                axes.plot(run["quality"], y, marker, color=color, fillstyle="none", markersize=6)
            axes.set(xlabel=label, ylim=(-0.6, len(models) - 0.4))
            axes.set_yticks(range(len(models)), pd.Index(models).str.replace("_", " "))
        for axes in every[1:]:
            axes.set_xlim(-0.03, 1.03)
    return drawn(picture, "png")
