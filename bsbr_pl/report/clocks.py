"""Training curves by four clocks: steps, tokens, FLOPs, seconds."""

from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd

from bsbr_pl.results import Row

from .budgets import named
from .plots import Picture, courses
from .quality import validations
from .rows import Checkpoint
from .studies import Findings

CLOCKS = ("steps", "tokens", "training FLOPs", "measured seconds")


def plots(findings: Findings) -> list[Picture | str]:
    """Validation loss by each clock, for each data set and machine; and sentences about runs without a curve."""
    training, found, missing = findings.of("training"), [], defaultdict(list)
    for digest, checkpoint in findings.checkpoints.items():
        row = training.get(digest)
        course = validations(row)
        points = len(course["value"]) if course and len(course["value"]) == len(course["step"]) else 0
        if row is None or points < 2:
            lacking = "more than one validation" if points else "any validation"
            missing[lacking].append(checkpoint.name)
            continue
        times = clock_values(checkpoint, row)
        for clock in CLOCKS:
            missing[clock] += [checkpoint.name] if times[clock] is None else []
        values = pd.Series(course["value"], dtype=float)
        of_curve = {"data": findings.data_name(checkpoint.fingerprint), "where": machine(row)}
        found.append({**of_curve, "label": findings.labels[digest], **times, "value": values})
    drawn: list[Picture | str] = []
    frame = pd.DataFrame(found, columns=["data", "where", "label", *CLOCKS, "value"], dtype=object)
    for number, ((data, where), runs) in enumerate(frame.groupby(["data", "where"]), 1):
        for clock in CLOCKS:
            timed = runs.dropna(subset=clock)
            if not timed.empty:
                name = f"{number}_{clock.replace(' ', '_')}"
                drawn.append(courses("clocks", name, timed, clock, clock=clock, data=data, where=where))
    return drawn + [f"Not recorded: {what} by {named(names)}." for what, names in missing.items() if names]


def clock_values(checkpoint: Checkpoint, training: Row) -> dict[str, Any]:
    """When each validation took place, by each of the clocks; None if the row does not say."""
    course, tokens = validations(training), checkpoint.get("run.tokens")
    steps = np.array(course["step"], float) + 1  # Lightning counts from 0
    seconds = course.get("seconds")
    flops_of_steps = (training["values"]["metrics"].get("flops/step_flops") or {}).get("value") or [None]
    flops = flops_of_steps[-1]
    return {
        "steps": steps,
        "tokens": tokens / checkpoint.steps * steps if tokens and checkpoint.steps else None,
        "training FLOPs": None if flops is None else flops * steps,
        "measured seconds": seconds if seconds and len(seconds) == len(steps) else None,
    }


def machine(training: Row) -> str:
    """The machine and settings on which a run's seconds depend."""
    values = training["values"]
    environment = values.get("environment") or {}
    versions = environment.get("versions")
    parts = (
        ("", environment.get("gpu") or environment.get("cpu")),
        ("", environment.get("device")),
        ("threads ", environment.get("threads")),
        ("processes ", values.get("processes")),
        ("torch ", (versions if isinstance(versions, dict) else environment).get("torch")),
        ("precision ", values.get("precision")),
    )
    return ", ".join(f"{name}{value}" for name, value in parts if value) or "an unknown machine"
