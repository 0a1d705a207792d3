"""The study, from its rows of kind `training`: a table of each task, and a figure with a dot for each run."""

import json
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
from .study_runs import RUNS, SEEDS, apart, best_points, runs, seed_means
from .tables import Column, Table, pipes, table

MOST_SEGMENTS = 8  # with more, a table would be too wide
SWEEP_SEED = 0  # of study/run.py: the choice of a rate has seen it
OF_TEST = "of the test split; validation, and each segment at the end, of the last validation"
OF_VALIDATION = "of the last validation"


def frame(found: pd.DataFrame) -> pd.DataFrame:
    """The `runs` of one task as a table of text: a row for each of `SEEDS`, the best first."""
    text = bool(found["text"].any())
    digits, name = (4, "bits per byte") if text else (3, "accuracy")
    tested, swept = bool(found["test"].notna().any()), bool(found["decay"].notna().any())
    best, every = best_points(found), []
    for (point, setting), seeds in found.groupby(SEEDS, sort=False):
        counted, first = seeds[seeds["why"] == ""], seeds.iloc[0]
        mean = pd.Series(seed_means(counted)).mean()
        least, largest = counted["quality"].min(), counted["quality"].max()
        row = {"quality": mean, "model": first["model"], "steps": f"{first['steps']:,}"}
        row["learning rate"] = f"{first['rate']:g}"
        if swept:
            row["weight decay"] = f"{first['decay']:g}" if pd.notna(first["decay"]) else "-"
        row["seeds"] = str(counted["seed"].nunique())
        row[name] = f"{mean:.{digits}f}" if len(counted) else "-"
        row["least to largest"] = f"{least:.{digits}f} to {largest:.{digits}f}" if len(counted) else "-"
        if tested:
            row |= _more(counted if len(counted) else seeds, digits)
        notes = [*_of_sweep(seeds, tested), *_left_out(seeds), *_of_rate(first, best)]
        arguments = apart(setting, found.loc[found["point"] == point, "setting"])
        notes.append(", ".join(f"{name}={value}" for name, value in arguments.items()))
        row["note"] = "; ".join(note for note in notes if note)
        segments = pd.DataFrame(list(counted["segments"])).mean()
        if 1 < len(segments) <= MOST_SEGMENTS:
            row |= segments.map("{:.2f}".format).to_dict()
        every.append(row)
    if not every:
        return pd.DataFrame()
    table = pd.DataFrame(every).sort_values("quality", ascending=text, kind="stable").drop(columns="quality")
    if not tested and not table["note"].any():
        table = table.drop(columns="note")
    return table.set_axis(table.columns.str.replace("_N", ", N").str.replace("_", " "), axis=1).fillna("-")


def _of_sweep(of: pd.DataFrame, tested: bool) -> list[str]:
    """What is known of runs with test results: whether they learned, and how their rate was chosen."""
    notes: list[str] = []
    if waiting := int((of["learned"] == False).sum()):  # noqa: E712 - it may be None
        notes.append("not learned yet" if waiting == len(of) else f"not learned yet: {waiting} of {len(of)} seeds")
    rates = {rate for tried in of["rates"] if tested and tried for rate in tried}
    if rates and not min(rates) < of["rate"].iloc[0] < max(rates):
        notes.append("rate at the edge of its sweep")
    if rates and SWEEP_SEED in set(of["seed"]):
        notes.append(f"seed {SWEEP_SEED} has chosen the rate")
    return notes


def _left_out(of: pd.DataFrame) -> list[str]:
    """The runs of one row that do not count, and those that count less."""
    notes = []
    for why, some in of[of["why"] != ""].groupby("why"):
        notes.append(f"{why}: {some['seed'].nunique()} of {of['seed'].nunique()} seeds")
    again = of.loc[of["why"] == "", "seed"].value_counts()
    notes += [f"seed {seed:g} has {count} runs" for seed, count in sorted(again[again > 1].items())]
    return notes


def _of_rate(run: Mapping[str, Any], best: Mapping[tuple[str, str], tuple[str, str]]) -> list[str]:
    """Another rate or weight decay of the model that the validation split chooses."""
    point, _ = best.get((run["model"], run["budget"]), (run["point"], ""))
    _, _, rate, decay, _ = json.loads(point)
    if point == run["point"]:
        return []
    return [f"validation chooses rate {rate:g}" + ("" if decay is None else f", weight decay {decay:g}")]


def _more(of: pd.DataFrame, digits: int) -> dict[str, str]:
    """The columns of runs with a `result`: validation and costs."""
    first = of.iloc[0]
    costs = {"parameters": first["parameters"], "FLOPs/token": first["flops_per_token"]}
    costs |= {"state bytes": first["state_bytes"], "tokens/s": of["tokens_per_second"].median()}
    shown = {name: "-" if pd.isna(value) else f"{value:,.0f}" for name, value in costs.items()}
    return {"validation": f"{of['val'].mean():.{digits}f}".replace("nan", "-"), **shown}


def differences(rows: Iterable[Row], against: str | None = None) -> pd.DataFrame:
    """Each model's difference in quality to one other model of the task, paired by seed.

    Args:
        against: the model to compare with; None for the best.

    Returns:
        model, pairs, difference, interval (95 %), p: two-sided, of Student's paired t-test, not corrected for the
        number of models. Of a model with several rates or weight decays, those count that are best on the validation
        split. Models without a seed in common with the other, or without runs of as many steps, with equal arguments of
        training and data, are left out.
    """
    found = runs(rows)
    worse = 1 if found["text"].any() else -1
    groups = dict(iter(found[found["why"] == ""].groupby(SEEDS, sort=False)))
    chosen = [(*of, groups[point]) for of, point in best_points(found).items()]
    chosen.sort(key=lambda one: worse * fmean(seed_means(one[2]).values()))
    compared = [one for one in chosen if against in (None, one[0])]
    if not compared:
        return pd.DataFrame()
    other, budget, theirs = compared[0]
    every = []
    for model, of_model, ours in chosen:
        test = paired_difference(seed_means(ours), seed_means(theirs))
        if model != other and of_model == budget and test["pairs"]:
            interval = "-" if test["interval"] is None else "{:+.4f} to {:+.4f}".format(*test["interval"])
            shown = {"model": model, "pairs": str(test["pairs"]), f"difference to {other}": f"{test['mean']:+.4f}"}
            every.append({**shown, "95 % interval": interval, "p": number(test["p"])})
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
        split = OF_TEST if of_task["test"].notna().any() else OF_VALIDATION
        made.append(table("study", str(task), shown, map(Column, shown.columns), task=task, split=split))
    return made


def figure(panels: Mapping[str, Iterable[Row]]) -> bytes:
    """A PNG: a dot for each run that counts, the best model of the first panel at the top.

    Args:
        panels: what is measured -> the rows of its task; on all but the first, shares from 0 to 1.
    """
    every_run = (runs(rows).sort_values(RUNS[:5]) for rows in panels.values())
    first, *_ = found = [of[of["why"] == ""] for of in every_run]
    models = list(first.groupby("model")["quality"].mean().sort_values(ascending=False).index)
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
