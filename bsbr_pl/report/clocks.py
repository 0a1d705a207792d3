"""The course of training by four clocks: steps, tokens, FLOPs, seconds."""

import math
from typing import Any

import pandas as pd

from .figures import Row, finite
from .plots import Plot, courses
from .rows import Checkpoint
from .studies import Findings

VALIDATION = "val/loss"
CLOCKS = ("steps", "tokens", "training FLOPs", "measured seconds")


def plots(findings: Findings) -> list[Plot | str]:
    """Validation loss by each clock, for each data set and machine; and in words, which runs have no course."""
    training, found, missing = findings.of("training"), [], {}
    for digest, checkpoint in findings.checkpoints.items():
        course = training[digest]["values"].get("metrics", {}).get(VALIDATION) if digest in training else None
        if not course or not course["value"]:
            missing.setdefault("any validation", []).append(checkpoint.name)
        elif len(course["value"]) == 1:
            missing.setdefault("more than one validation", []).append(checkpoint.name)
        else:
            times = clock_values(checkpoint, training[digest])
            for clock in CLOCKS:
                if times[clock] is None:
                    missing.setdefault(clock, []).append(checkpoint.name)
            values = [math.nan if finite(value) is None else value for value in course["value"]]
            place = {"data": findings.data_name(checkpoint.fingerprint), "where": machine(training[digest])}
            found.append({**place, "label": findings.labels[digest], **times, "value": values})
    drawn: list[Plot | str] = []
    frame = pd.DataFrame(found, columns=["data", "where", "label", *CLOCKS, "value"], dtype=object)
    for number, ((data, where), of) in enumerate(frame.groupby(["data", "where"]), 1):
        for clock in CLOCKS:
            lines = of.dropna(subset=clock)
            if len(lines):
                caption = f"{data}; a line for each checkpoint's run. Trained on {where}."
                file = f"clocks_{number}_{clock.replace(' ', '_')}"
                drawn.append(courses(file, f"Validation by {clock}", caption, lines, clock, VALIDATION))
    drawn += [f"Not recorded: {what} by {_named(names)}." for what, names in missing.items()]
    return drawn


def _named(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def clock_values(checkpoint: Checkpoint, training: Row) -> dict[str, list[float] | None]:
    """When each validation took place, by each of the clocks; None if the row does not say."""
    metrics = training["values"]["metrics"]
    course: dict[str, Any] = metrics[VALIDATION]
    steps = [float(step) + 1 for step in course["step"]]  # Lightning counts from 0
    per_step = checkpoint.tokens / checkpoint.steps if checkpoint.tokens and checkpoint.steps else None
    counted = metrics.get("flops/step_flops") or {}
    flops = finite(counted["value"][-1]) if counted.get("value") else None
    return {
        "steps": steps,
        "tokens": None if per_step is None else [per_step * step for step in steps],
        "training FLOPs": None if flops is None else [flops * step for step in steps],
        "measured seconds": course.get("seconds"),
    }


def machine(training: Row) -> str:
    """What the seconds of a run depend on."""
    values = training["values"]
    environment = values.get("environment") or {}
    versions = environment.get("versions") or environment
    parts = [environment.get("gpu") or environment.get("cpu"), environment.get("device")]
    named = {"threads": environment.get("threads"), "processes": values.get("processes"),
             "torch": versions.get("torch"), "precision": values.get("precision")}  # fmt: skip
    parts += [f"{name} {value}" for name, value in named.items() if value is not None]
    return ", ".join(str(part) for part in parts if part) or "an unknown machine"
