"""The leaderboard, a row for each model and a column for each task; and maps of needles by depth and length."""

import json
import re
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import pandas as pd

from bsbr_pl.results import Row
from bsbr_pl.values import as_json

from .plots import Picture, heat_maps
from .rows import Checkpoint
from .sources import HIDDEN
from .studies import Findings
from .study_runs import apart, runs
from .tables import Column, Measured, Table, table

TASK = ("task", "split", "budget", "data")  # runs that agree in these are compared
COLUMNS = [*TASK, "model", "variant", "rate", "seed", "text", "quality", "worse", "chosen", "learned"]
COLUMNS += ["digest", "checkpoint"]
DEPTH = re.compile(r"T\d+_N(\d+)_d([\d.]+)")  # names of slices: T256_N4_d0.25
NOT_LEARNED = "not learned yet"
ACCURACY: dict[str, Any] = {"unit": "%", "best": "high", "decimals": 1}  # of its columns
MIDDLE = 0.5  # rank from 0 (the best) to 1 of a task that was not run
TUNED = ("model.learning_rate", "model.weight_decay")  # of each model in a study
FREE = {*HIDDEN} - {"context_length"}  # arguments of data in which the runs of one task may differ


def tables(findings: Findings) -> list[Table | None]:
    """The matrix, and a folded table of every run in it; none if there are fewer than two tasks."""
    found = entries(findings)
    found["column"] = _names(found)
    if found["column"].nunique() < 2:
        return []
    found["model"] = _apart(found)
    found = _best_rates(found)
    columns = []
    for name, in_column in found.groupby("column"):
        unit: dict[str, Any] = {"unit": "bits per byte", "best": "low"} if in_column["text"].all() else ACCURACY
        columns.append(Column(str(name), ties=True, **unit))
    seeds = found.groupby(["model", "column"])
    ranks = seeds["worse"].mean().unstack().rank()
    ranks = ((ranks - 0.5) / ranks.count()).fillna(MIDDLE)
    best_first = ranks.mean(axis=1).sort_values(kind="stable").index
    matrix = seeds[list(found)].apply(_cell).unstack().loc[best_first].reset_index()
    every = found.assign(
        bits=found["quality"].where(found["text"]),
        right=found["quality"].mask(found["text"]),
        note=found["learned"].map({False: NOT_LEARNED}),
    )
    every = every.sort_values(["column", "model", "seed"], kind="stable")
    return [table("leaderboard", "", matrix, columns), table("runs", "", every)]


def needle_maps(findings: Findings) -> list[Picture]:
    """Accuracy by depth and length, a map for each model; a picture for each number of needles in a context."""
    found = []
    for run, row in _evaluated(findings):
        for one in row["values"].get("slices") or []:
            if match := DEPTH.fullmatch(one["slice"]):
                needles, depth = match.groups()
                where = {"needles": int(needles), "depth": float(depth), "length": one["length"]}
                found.append({**run, **where, "accuracy": one["accuracy"]})
    frame = pd.DataFrame(found, columns=[*COLUMNS, "needles", "depth", "length", "accuracy"])
    frame["column"] = _names(frame)
    pictures = []
    for number, ((task, needles), slices) in enumerate(frame.groupby(["column", "needles"]), 1):
        maps = {}
        for model, of_model in slices.groupby("model"):
            maps[str(model)] = of_model.pivot_table("accuracy", "depth", "length")
        pictures.append(heat_maps("needle", str(number), maps, task=task, needles=needles))
    return pictures


def entries(findings: Findings) -> pd.DataFrame:
    """Every finished run: those that count in a study, and all others that were evaluated.

    Columns: those of TASK (in words, but for `data`), model (of the study, or the label), rate, seed, text (whether its
    quality is bits per byte, otherwise an accuracy), quality, worse (quality, less is better), chosen (what chooses a
    rate, less is better: the quality on the validation split, if the row has it), learned (False if the row says so),
    digest and path of its checkpoint.
    """
    found = [run for run, row in _evaluated(findings) if "study" not in row["about"]]
    for row in findings.of("training").values():
        c, result = Checkpoint(row["identity"]["checkpoint"], row["about"]), row["values"].get("result") or {}
        certificate = findings.of("certificate").get(c.digest)
        counted = runs([row, certificate] if certificate else [row]).query("why == ''")
        for run in counted.to_dict("records"):
            run |= {"split": "val", "learned": result.get("learned"), "checkpoint": findings.short(c.name)}
            chosen = json.loads(run["setting"] or "{}")
            run["variant"] = as_json({name: value for name, value in chosen.items() if name not in TUNED})
            if result.get("test") is not None:
                run |= {"split": "test", "quality": result["test"]}
            found.append(_entry(c, run))
    return pd.DataFrame(found, columns=COLUMNS).drop_duplicates(["digest", "split"], ignore_index=True)


def _evaluated(findings: Findings) -> Iterator[tuple[dict[str, Any], Row]]:
    """Every finished run of a certified model that was evaluated, with its row at its own length."""
    for study in findings.studies:
        for group, member in study.members:
            c, own = member.checkpoint, member.own
            if own and group in study.ranked and c.finished:
                source = str(c.get("data.arguments.source") or "").rstrip("/").split("/")[-1]
                rate = c.get("config").get("model.learning_rate")
                run = {"task": c.get("study.task") or f"{c.get('data.class') or 'data'} {source}".strip()}
                run |= {"model": c.get("study.model") or group.label, "checkpoint": c.name, "seed": c.seed}
                run |= {"rate": rate if isinstance(rate, int | float) else None, "split": study.data_split.split}
                run |= {"text": not study.recall, "quality": own["values"][study.quality], "variant": ""}
                run["context"] = member.context
                yield _entry(c, run), own


def _entry(c: Checkpoint, run: dict[str, Any]) -> dict[str, Any]:
    """A run with what decides its column. Samples of a recall task depend on the seed, so its fingerprint does not."""
    given = (c.get("data.arguments") or {}).items()
    chosen = {name: value for name, value in given if name not in FREE}
    data = c.fingerprint if run["text"] else as_json([c.get("data.class"), chosen])
    sign, quality = (1 if run["text"] else -1), run["quality"]
    val = quality if pd.isna(run.get("val")) else run["val"]
    worse = {"worse": sign * quality, "chosen": sign * val}
    context = run.get("context", c.get("data.validation_length")) if run["text"] else None
    data = as_json([data, c.get("run.budget"), context])
    return run | worse | {"digest": c.digest, "budget": c.budget, "data": data}


def _names(found: pd.DataFrame) -> pd.Series:
    """The column of each run: the task; the split, if it is not the test split; budget and data (as a number), if they
    differ within a task."""
    name = found["task"].astype(str)
    name = name.mask(found["split"] != "test", name + ", " + found["split"].astype(str))
    differs = found.groupby("task")["budget"].transform("nunique") > 1
    name = name.mask(differs, name + ", " + found["budget"].astype(str))
    number = found.groupby(name)["data"].transform(lambda data: pd.factorize(data)[0])
    return name.mask(number != 0, name + " (" + (number + 1).astype(str) + ")")


def _apart(found: pd.DataFrame) -> pd.Series:
    """The model of each run; where runs of one model in one column differ in more than their rate and seed, with the
    arguments in which they differ."""
    names = found["model"].astype(str)
    for _, some in found.groupby(["column", "model"]):
        for variant, of_variant in some.groupby("variant"):
            if arguments := apart(str(variant), some["variant"]):
                words = ", ".join(f"{name.partition('.')[2]}={value}" for name, value in arguments.items())
                names[of_variant.index] += f" [{words}]"
    return names


def _best_rates(found: pd.DataFrame) -> pd.DataFrame:
    """The runs of each model and task at the learning rate whose mean of `chosen` is best."""
    of_rate = found.groupby(["column", "model", "rate"], dropna=False)["chosen"].transform("mean")
    of_best_rate = of_rate.groupby([found["column"], found["model"]]).transform("min")
    best = found[of_rate == of_best_rate].sort_values("rate", kind="stable")
    return best.drop_duplicates(["column", "model", "seed"])  # the smallest of rates that are tied


def _cell(runs: pd.DataFrame) -> Measured:
    """The mean over seeds, with the least and the largest."""
    quality, late = runs["quality"], int((runs["learned"] == False).sum())  # noqa: E712 - None is not known
    words = []
    if late:
        words.append(NOT_LEARNED if late == len(runs) else f"{late} of {len(runs)} {NOT_LEARNED}")
    if len(runs) == 1:
        words.append("1 seed")
    number = (Column("") if runs["text"].all() else Column("", **ACCURACY)).number
    lines = []
    for run in runs.sort_values("seed").to_dict("records"):
        rate = "" if pd.isna(run["rate"]) else f", rate {run['rate']:g}"
        lines.append(f"seed {run['seed']}: {number(run['quality'])}{rate}, {run['budget']}")
    return Measured(fmean(quality), quality.min(), quality.max(), "; ".join(words), tuple(lines))
