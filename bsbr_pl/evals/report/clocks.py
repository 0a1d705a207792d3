"""The course of training by four clocks: steps, tokens, FLOPs, seconds."""

import math

from ..checkpoints import Checkpoint
from .findings import MALFORMED, Findings
from .numbers import finite
from .plot import Course, Plot, courses


def plots(findings: Findings) -> tuple[list[Plot], str]:
    """Validation loss against steps, tokens, training FLOPs and seconds, by data and machine; and what is missing."""
    panels: dict[tuple[str, str, str], dict[str, list[Course]]] = {}
    missing: dict[str, list[str]] = {}
    for checkpoint in findings.checkpoints:
        try:
            metrics = checkpoint.record["metrics"]
            name = next(name for name in ("val/loss", "val/bits_per_byte") if metrics.get(name))
            values = [math.nan if (value := finite(one)) is None else value for one in metrics[name]["value"]]
            times = clock_values(checkpoint, name)
            place = findings.data_name(checkpoint.data_fingerprint or ""), machine(checkpoint), name
        except (*MALFORMED, StopIteration):
            missing.setdefault("any validation", []).append(checkpoint.name)
            continue
        for clock, at in times.items():
            if at is None:
                missing.setdefault(clock, []).append(checkpoint.name)
            else:
                panel = panels.setdefault(place, {}).setdefault(clock, [])
                panel.append((findings.labels[checkpoint.digest], at, values))
    drawn = []
    for number, ((data, where, name), of) in enumerate(sorted(panels.items()), 1):
        for clock, lines in of.items():
            caption = f"{data}; a line for each checkpoint's run. Trained on {where}."
            file = f"clocks_{number}_{clock.replace(' ', '_')}"
            drawn.append(courses(file, f"Validation by {clock}", caption, lines, clock, name))
    return drawn, "; ".join(f"{what} by {', '.join(names)}" for what, names in missing.items())


def clock_values(checkpoint: Checkpoint, name: str) -> dict[str, list[float] | None]:
    """When each validation took place, by each of the clocks; None where the record does not say."""
    record, run = checkpoint.record, checkpoint.run
    column = record["metrics"][name]
    steps = [float(step) + 1 for step in column["step"]]  # Lightning counts from 0
    per_step = run.tokens / run.steps if run.tokens and run.steps else None
    flops = (record["metrics"].get("flops/step_flops") or {}).get("value") or [None]
    return {
        "steps": steps,
        "tokens": None if per_step is None else [per_step * step for step in steps],
        "training FLOPs": None if flops[-1] is None else [flops[-1] * step for step in steps],
        "measured seconds": column.get("seconds"),
    }


def machine(checkpoint: Checkpoint) -> str:
    """What the seconds of a run depend on."""
    environment, training = checkpoint.record.get("environment", {}), checkpoint.record.get("training", {})
    versions = environment.get("versions", {})
    parts = [environment.get("gpu") or environment.get("cpu"), environment.get("device")]
    for name, value in (("threads", environment.get("threads")), ("processes", environment.get("processes")),
                        ("torch", versions.get("torch")), ("precision", training.get("precision"))):  # fmt: skip
        parts.append(None if value is None else f"{name} {value}")
    return ", ".join(str(part) for part in parts if part) or "an unknown machine"
