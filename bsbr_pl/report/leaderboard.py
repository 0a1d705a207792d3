"""The leaderboard, a row for each model and a column for each task; and maps of needles by depth and length."""

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
from .study_runs import runs
from .tables import Column, Measured, Table, table

TASK = ["task", "split", "budget", "data"]  # runs that agree in these are compared
COLUMNS = [*TASK, "model", "rate", "seed", "text", "quality", "worse", "chosen", "learned", "digest", "checkpoint"]
DEPTH = re.compile(r"T\d+_N(\d+)_d([\d.]+)")  # names of slices: T256_N4_d0.25
NOT_LEARNED = "not learned yet"
ACCURACY: dict[str, Any] = {"unit": "%", "best": "high", "decimals": 1}  # of its columns
MIDDLE = 0.5  # rank of a task that was not run, as a share of the ranks
APART = {*HIDDEN} - {"context_length"}  # arguments of data in which the runs of one task may differ


def tables(findings: Findings) -> list[Table | None]:
    """The matrix, and a folded table of every run in it; none if there are fewer than two tasks."""
    found = entries(findings)
    found["column"] = _names(found)
    if found["column"].nunique() < 2:
        return []
    found = _best_rates(found)
    matrix = found.groupby(["model", "column"])[list(found)].apply(_cell).unstack()
    columns = []
    for name, of in found.groupby("column"):
        unit: dict[str, Any] = {"unit": "bits per byte", "best": "low"} if of["text"].all() else ACCURACY
        columns.append(Column(str(name), ties=True, **unit))
    ranks = found.groupby(["model", "column"])["worse"].mean().unstack().rank(pct=True).fillna(MIDDLE).mean(axis=1)
    matrix = matrix.loc[ranks.sort_values(kind="stable").index].reset_index()
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
            if at := DEPTH.fullmatch(one["slice"]):
                place = {"needles": int(at[1]), "depth": float(at[2]), "length": one["length"]}
                found.append(run | place | {"accuracy": one["accuracy"]})
    frame, made = pd.DataFrame(found, columns=[*COLUMNS, "needles", "depth", "length", "accuracy"]), []
    frame["column"] = _names(frame)
    for number, ((task, needles), of) in enumerate(frame.groupby(["column", "needles"]), 1):
        by_model = {str(m): runs.pivot_table("accuracy", "depth", "length") for m, runs in of.groupby("model")}
        made.append(heat_maps("needle", str(number), by_model, task=task, needles=needles))
    return made


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
        on_test = {"split": "test", "quality": result["test"]} if result.get("test") is not None else {}
        certificate = findings.of("certificate").get(c.digest)
        counted = runs([row, certificate] if certificate else [row]).query("why == ''")
        for run in counted.to_dict("records"):
            about = {"split": "val", "learned": result.get("learned"), "checkpoint": findings.short(c.name)}
            found.append(_entry(c, run | about | on_test))
    return pd.DataFrame(found, columns=COLUMNS).drop_duplicates(["digest", "split"], ignore_index=True)


def _evaluated(findings: Findings) -> Iterator[tuple[dict[str, Any], Row]]:
    """Every finished run of a certified model that was evaluated, with its row at its own length."""
    for study in findings.studies:
        for group, member in study.members:
            c, own = member.checkpoint, member.own
            if own and group in study.ranked and c.finished:
                source = str(c.get("data.arguments.source") or "").rstrip("/").split("/")[-1]
                task = c.get("study.task") or f"{c.get('data.class') or 'data'} {source}".strip()
                run = {"task": task, "split": study.place.split, "model": c.get("study.model") or group.label}
                rate = c.get("config").get("model.learning_rate")
                run |= {"rate": rate if isinstance(rate, int | float) else None, "seed": c.seed, "checkpoint": c.name}
                yield _entry(c, run | {"text": not study.recall, "quality": own["values"][study.quality]}), own


def _entry(c: Checkpoint, run: dict[str, Any]) -> dict[str, Any]:
    """A run with what decides its column. Samples of a recall task depend on the seed, so its fingerprint does not."""
    given = (c.get("data.arguments") or {}).items()
    chosen = {name: value for name, value in given if name not in APART}
    data = c.fingerprint if run["text"] else as_json([c.get("data.class"), chosen])
    sign, quality = (1 if run["text"] else -1), run["quality"]
    val = quality if pd.isna(run.get("val")) else run["val"]
    worse = {"worse": sign * quality, "chosen": sign * val}
    return run | worse | {"digest": c.digest, "budget": c.budget, "data": as_json([data, c.get("run.budget")])}


def _names(found: pd.DataFrame) -> pd.Series:
    """The column of each run: the task, and what columns of one task differ in (split, budget, data as a number)."""
    name, several = found["task"].astype(str), found.groupby("task")[TASK[1:]].nunique() > 1
    for part in ("split", "budget"):
        name = name.where(~found["task"].map(several[part]).astype(bool), name + ", " + found[part].astype(str))
    number = found.groupby(name)["data"].transform(lambda data: pd.factorize(data)[0])
    return name.where(number == 0, name + " (" + (number + 1).astype(str) + ")")


def _best_rates(found: pd.DataFrame) -> pd.DataFrame:
    """The runs of each model and task at the learning rate whose mean of `chosen` is best."""
    of = ["column", "model"]
    mean = found.groupby([*of, "rate"], dropna=False)["chosen"].transform("mean")
    best = found[mean == mean.groupby([found[name] for name in of]).transform("min")]
    return best.sort_values("rate", kind="stable").drop_duplicates([*of, "seed"])  # the smallest of rates that are tied


def _cell(of: pd.DataFrame) -> Measured:
    """The mean over seeds, with the least and the largest."""
    quality, late = of["quality"], int((of["learned"] == False).sum())  # noqa: E712 - None is not known
    words = [f"{late} of {len(of)} {NOT_LEARNED}" if late < len(of) else NOT_LEARNED] * (late > 0)
    words += ["1 seed"] * (len(of) == 1)
    number = Column("", **({} if of["text"].all() else ACCURACY)).number
    lines = []
    for run in of.sort_values("seed").to_dict("records"):
        rate = "" if pd.isna(run["rate"]) else f", rate {run['rate']:g}"
        lines.append(f"seed {run['seed']}: {number(run['quality'])}{rate}, {run['budget']}")
    return Measured(fmean(quality), quality.min(), quality.max(), "; ".join(words), tuple(lines))
