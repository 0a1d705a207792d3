"""The runs of a study that count, from its rows of kind `training`; and what may be averaged as seeds."""

import json
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import pandas as pd

from bsbr_pl.results import Row
from bsbr_pl.values import as_json

from .rows import Checkpoint

BITS, SEGMENT = "val/bits_per_byte", "val/accuracy_"  # of a text; of each segment of a recall task
RUNS = ["task", "model", "rate", "steps", "seed", "decay", "architecture", "quality", "text", "segments"]
POINT = ["task", "model", "rate", "decay", "steps"]
SEEDS = ["point", "setting"]  # runs that agree in both are seeds
RESULT = ["val", "test", "learned", "flops_per_token", "state_bytes", "tokens_per_second"]


def quality(metrics: Mapping[str, Any]) -> tuple[float | None, bool]:
    """The last bits per byte, or mean accuracy over the segments of a recall task; and whether it is bits per byte."""
    if (bits := metrics.get(BITS, {"value": [None]})["value"][-1]) is not None:
        return bits, True
    segments = segments_of(metrics)
    accuracies = [value for value in segments.values() if value is not None]
    return (fmean(accuracies) if accuracies and len(accuracies) == len(segments) else None), False


def segments_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Segment of a recall task -> its last accuracy."""
    found = {}
    for name, course in metrics.items():
        if name.startswith(SEGMENT):
            found[name.removeprefix(SEGMENT)] = course["value"][-1]
    return found


def runs(rows: Iterable[Row]) -> pd.DataFrame:
    """The runs of the phase `final` that were validated or diverged; each once.

    Args:
        rows: of kind `training`; and of kind `certificate`, if no run should count whose certificate failed.

    Columns: task, model, rate, steps, seed, decay (None if it was not swept), architecture, quality (bits per byte, or
    the mean accuracy over the segments of a recall task, of the test split if the row has it; NaN if the run does not
    count), why (it does not count; empty if it does), text (whether quality is bits per byte), segments (name ->
    accuracy), parameters, rates (of the sweep), point (the values of `POINT`, as JSON), setting (all arguments and the
    text, as JSON), budget (steps, and the setting without the arguments of the model) and `RESULT`. If a run of a task
    has a test result, those without do not count.
    """
    rows = list(rows)
    failed, found = _failed(rows), {}
    for row in rows:
        if row["identity"]["kind"] != "training":
            continue
        run, metrics = Checkpoint("", row["about"]), row["values"].get("metrics") or {}
        value, text = quality(metrics)
        why = _why_not(row, value, failed)
        if run.get("study.phase") == "final" and (value is not None or why):
            result = row["values"].get("result") or {}
            facts = {name: run.get(f"study.{name}") for name in ("task", "model", "rate", "rates")}
            facts |= {"steps": run.get("run.planned_steps") or run.steps, "seed": run.seed, "text": text}
            facts |= {"decay": run.get("study.weight_decay"), "parameters": run.get("parameters"), "why": why}
            facts |= {"architecture": run.get("architecture"), "segments": segments_of(metrics)}
            facts |= {name: result.get(name) for name in RESULT} | {"quality": result.get("test", value)}
            facts["point"] = as_json([facts[name] for name in POINT])
            found[row["identity"]["checkpoint"]] = facts | _setting(run, facts["steps"], text)
    every = list(found.values())
    tested = {one["task"] for one in every if one["test"] is not None}
    for one in every:
        if not one["why"] and one["test"] is None and one["task"] in tested:
            one["why"] = "no test result"
        one["quality"] = float("nan") if one["why"] else one["quality"]
    _complete(every)
    return pd.DataFrame(every, columns=[*RUNS, "parameters", "rates", "why", *SEEDS, "budget", *RESULT])


def _failed(rows: Iterable[Row]) -> set[str]:
    """The checkpoints whose certificate of the newest version failed."""
    newest: dict[str, tuple[int, bool]] = {}
    for row in rows:
        if row["identity"]["kind"] == "certificate":
            checkpoint, version = row["identity"]["checkpoint"], row["identity"].get("version") or 0
            one = version, not row["values"]["passed"]
            newest[checkpoint] = max(one, newest.get(checkpoint, one))
    return {checkpoint for checkpoint, (_, failed) in newest.items() if failed}


def _why_not(row: Row, value: float | None, failed: set[str]) -> str:
    """Why a run does not count; empty if it does, and if it was not validated."""
    status = str((row["about"].get("run") or {}).get("status"))
    if row["identity"]["checkpoint"] in failed:
        return "certificate failed"
    if value is None:
        return "diverged" if status.startswith("diverged") else ""
    return "no test result" if row["values"].get("result", {"test": value}).get("test") is None else ""


def _setting(run: Checkpoint, steps: int, text: bool) -> dict[str, str]:
    """What seeds have in common; empty if the row does not say, as that of a run that diverged."""
    if not run.get("config"):
        return {"setting": "", "budget": str(steps)}
    config = run.config | {"batch": run.get("run.batch")} | ({"text": run.fingerprint} if text else {})
    del config["checkpoint"]  # a study reads last.ckpt alone; some published rows have another name
    shared = {name: value for name, value in config.items() if not name.startswith("model.")}
    return {"setting": as_json(config), "budget": as_json([steps, shared])}


def _complete(every: list[dict[str, Any]]) -> None:
    """Give runs that do not say their setting that of another run of their point, if there is one."""
    known = {run["point"]: {name: run[name] for name in ("setting", "budget")} for run in every if run["setting"]}
    for run in every:
        if not run["setting"]:
            run |= known.get(run["point"], {})


def apart(setting: str, settings: Iterable[str]) -> dict[str, Any]:
    """The arguments of a setting that another one, of the same point or model, does not have."""
    every = [json.loads(one) for one in {*settings} if one]
    own = json.loads(setting or "{}")
    return {name: own[name] for name in own if any(one.get(name) != own[name] for one in every)}


def best_points(found: pd.DataFrame) -> dict[tuple[str, str], tuple[str, str]]:
    """Model and budget -> `SEEDS` of its runs with the best mean on the validation split.

    Args:
        found: `runs` of one task.
    """
    counted = found[found["why"] == ""]
    score = counted["val"].astype(float).fillna(counted["quality"]) * (1 if found["text"].any() else -1)
    means = score.groupby([counted[name] for name in ("model", "budget", *SEEDS)]).mean()
    best: dict[tuple[str, str], tuple[str, str]] = {}
    for model, budget, point, setting in means.sort_values(kind="stable").index:
        best.setdefault((model, budget), (point, setting))
    return best


def seed_means(of: pd.DataFrame) -> dict[int | None, float]:
    """Seed -> quality, of runs that count; the mean of several runs of one seed."""
    return of.groupby("seed", dropna=False)["quality"].mean().to_dict()
