"""The course of training by four clocks: steps, tokens, FLOPs, seconds."""

import math
from collections import defaultdict
from typing import Any

import pandas as pd

from .figures import Row
from .plots import Picture, courses
from .quality import VALIDATION
from .rows import Checkpoint
from .studies import Findings

CLOCKS = ("steps", "tokens", "training FLOPs", "measured seconds")
NAMED = 5  # checkpoints that a sentence names


def plots(findings: Findings) -> list[Picture | str]:
    """Validation loss by each clock, for each data set and machine; and in words, which runs have no course."""
    training, found, missing = findings.of("training"), [], defaultdict(list)
    for digest, checkpoint in findings.checkpoints.items():
        course = training[digest]["values"].get("metrics", {}).get(VALIDATION) if digest in training else None
        if not course or len(course["value"]) < 2:
            missing["more than one validation" if course and course["value"] else "any validation"].append(checkpoint.name)
            continue
        times = clock_values(checkpoint, training[digest])
        for clock in (clock for clock in CLOCKS if times[clock] is None):
            missing[clock].append(checkpoint.name)
        values = [math.nan if value is None else value for value in course["value"]]
        place = {"data": findings.data_name(checkpoint.fingerprint), "where": machine(training[digest])}
        found.append({**place, "label": findings.labels[digest], **times, "value": values})
    drawn: list[Picture | str] = []
    frame = pd.DataFrame(found, columns=["data", "where", "label", *CLOCKS, "value"], dtype=object)
    for number, ((data, where), of) in enumerate(frame.groupby(["data", "where"]), 1):
        for clock in CLOCKS:
            if of[clock].notna().any():
                name, facts = f"{number}_{clock.replace(' ', '_')}", {"clock": clock, "data": data, "where": where}
                drawn.append(courses("clocks", name, of.dropna(subset=clock), clock, **facts))
    return drawn + [f"Not recorded: {what} by {_named(names)}." for what, names in missing.items()]


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f", and {len(names) - NAMED} more" if len(names) > NAMED else "")


def clock_values(checkpoint: Checkpoint, training: Row) -> dict[str, list[float] | None]:
    """When each validation took place, by each of the clocks; None if the row does not say."""
    metrics, tokens = training["values"]["metrics"], checkpoint.get("run.tokens")
    course: dict[str, Any] = metrics[VALIDATION]
    steps = [float(step) + 1 for step in course["step"]]  # Lightning counts from 0
    per_step = tokens / checkpoint.steps if tokens and checkpoint.steps else None
    flops = (metrics.get("flops/step_flops") or {}).get("value") or [None]
    return {
        "steps": steps,
        "tokens": None if per_step is None else [per_step * step for step in steps],
        "training FLOPs": None if flops[-1] is None else [flops[-1] * step for step in steps],
        "measured seconds": course.get("seconds"),
    }


def machine(training: Row) -> str:
    """What the seconds of a run depend on."""
    values = training["values"]
    environment = values.get("environment") or {}
    parts = [environment.get("gpu") or environment.get("cpu"), environment.get("device")]
    named = {"threads": environment.get("threads"), "processes": values.get("processes")}
    named |= {"torch": (environment.get("versions") or environment).get("torch"), "precision": values.get("precision")}
    parts += [f"{name} {value}" for name, value in named.items() if value is not None]
    return ", ".join(str(part) for part in parts if part) or "an unknown machine"
