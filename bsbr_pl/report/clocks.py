"""Training curves by four clocks: steps, tokens, FLOPs, seconds."""

from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd

from bsbr_pl.results import Row

from .budgets import named
from .plots import Picture, courses
from .quality import VALIDATION
from .rows import Checkpoint
from .studies import Findings

CLOCKS = ("steps", "tokens", "training FLOPs", "measured seconds")


def plots(findings: Findings) -> list[Picture | str]:
    """Validation loss by each clock, for each data set and machine; and sentences about runs without a curve."""
    training, found, missing = findings.of("training"), [], defaultdict(list)
    for digest, checkpoint in findings.checkpoints.items():
        course = training[digest]["values"].get("metrics", {}).get(VALIDATION) if digest in training else None
        points = len(course["value"]) if course and len(course["value"]) == len(course["step"]) else 0
        if not course or points < 2:
            lacking = "more than one validation" if points else "any validation"
            missing[lacking].append(checkpoint.name)
            continue
        times = clock_values(checkpoint, training[digest])
        for clock in CLOCKS:
            missing[clock] += [checkpoint.name] if times[clock] is None else []
        values = pd.Series(course["value"], dtype=float)
        place = {"data": findings.data_name(checkpoint.fingerprint), "where": machine(training[digest])}
        found.append({**place, "label": findings.labels[digest], **times, "value": values})
    drawn: list[Picture | str] = []
    frame = pd.DataFrame(found, columns=["data", "where", "label", *CLOCKS, "value"], dtype=object)
    for number, ((data, where), of) in enumerate(frame.groupby(["data", "where"]), 1):
        for clock in CLOCKS:
            if of[clock].notna().any():
                name, facts = f"{number}_{clock.replace(' ', '_')}", {"clock": clock, "data": data, "where": where}
                drawn.append(courses("clocks", name, of.dropna(subset=clock), clock, **facts))
    return drawn + [f"Not recorded: {what} by {named(names)}." for what, names in missing.items() if names]


def clock_values(checkpoint: Checkpoint, training: Row) -> dict[str, Any]:
    """When each validation took place, by each of the clocks; None if the row does not say."""
    metrics, tokens = training["values"]["metrics"], checkpoint.get("run.tokens")
    course: dict[str, Any] = metrics[VALIDATION]
    steps = np.array(course["step"], float) + 1  # Lightning counts from 0
    seconds = course.get("seconds")
    flops = (metrics.get("flops/step_flops") or {}).get("value") or [None]
    return {
        "steps": steps,
        "tokens": tokens / checkpoint.steps * steps if tokens and checkpoint.steps else None,
        "training FLOPs": None if flops[-1] is None else flops[-1] * steps,
        "measured seconds": seconds if seconds and len(seconds) == len(steps) else None,
    }


def machine(training: Row) -> str:
    """The machine and settings on which a run's seconds depend."""
    values = training["values"]
    environment = values.get("environment") or {}
    parts = {"": environment.get("gpu") or environment.get("cpu"), " ": environment.get("device")}
    parts |= {"threads ": environment.get("threads"), "processes ": values.get("processes")}
    versions = environment.get("versions")
    torch = (versions if isinstance(versions, dict) else environment).get("torch")
    parts |= {"torch ": torch, "precision ": values.get("precision")}
    return ", ".join(f"{name.lstrip()}{value}" for name, value in parts.items() if value) or "an unknown machine"
