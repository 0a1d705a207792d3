"""What each was trained with: steps, tokens, FLOPs, batch, data; and the warnings if runs are not comparable."""

from collections.abc import Callable, Iterable, Sequence

from .rows import Checkpoint, Row
from .studies import Findings, Group, Study

NAMED = 5  # checkpoints that a warning names
PLANNED = (None, "", "max_steps", "max_epochs")  # what ends a run as it was planned
UNEQUAL = "These have unequal budgets, so the ranking does not compare architectures"


def warnings(rows: Iterable[Row]) -> list[str]:
    """What a reader of these rows must know before the ranking, a sentence each."""
    return warned(Findings(rows))


def warned(findings: Findings) -> list[str]:
    """Unequal budgets, other data, runs that did not finish or were changed."""
    every = list(findings.checkpoints.values())
    found = [f"{words}." for words in dict.fromkeys(map(unequal, findings.studies)) if words]
    data = dict.fromkeys(study.data for study in findings.studies if study.ranked)
    if len(data) > 1:
        found.append(f"Runs on different data, or with different tokenizers, are ranked apart: {'; '.join(data)}.")
    if stopped := [c for c in every if c.finished is False]:
        found.append(f"These runs did not finish, and are averaged with no other: {_named(stopped, _length)}.")
    if unknown := [c for c in every if c.finished is None]:
        found.append(f"These are averaged with no other: {_named(unknown, _length)}.")
    if changed := [c for c in every if c.get("run.changes")]:
        found.append(f"Arguments were changed during these runs: {_named(changed, _changes)}.")
    return found


def _length(c: Checkpoint) -> str:
    return c.length


def _changes(c: Checkpoint) -> str:
    return ", ".join(c.get("run.changes"))


def _named(checkpoints: Sequence[Checkpoint], say: Callable[[Checkpoint], str]) -> str:
    shown = [f"{checkpoint.name} ({say(checkpoint)})" for checkpoint in checkpoints[:NAMED]]
    more = len(checkpoints) - NAMED
    return ", ".join(shown) + (f", and {more} more: see Problems" if more > 0 else "")


def sentence(study: Study) -> str:
    """The budget that all runs of a study share."""
    first = study.groups[0].checkpoint
    batch, tokens, weights = first.get("run.batch"), first.get("run.tokens"), first.get("run.initial_weights")
    steps = f"{first.steps:,} optimiser steps" if first.finished else first.length
    words = [f"{steps} of {batch:,} windows" if batch else f"{steps}, batch not recorded"]
    words.append("training tokens not recorded" if tokens is None else f"{tokens:,} training tokens")
    words.append(_flops(study.groups))
    words += [f"from the weights of {weights}"] if weights else []
    for group in study.groups:
        ended_by = group.checkpoint.get("run.ended_by")
        if group.checkpoint.finished and ended_by not in PLANNED:
            words.append(f"{group.label} ended by {ended_by}")
    return f"{'Equal budgets' if len(study.groups) > 1 else 'Budget'}: {'; '.join([*words, study.data])}."


def _flops(groups: Sequence[Group]) -> str:
    """Training FLOPs from the least to the most, as they are counted."""
    flops = {group.label: group.checkpoint.get("run.flops") for group in groups}
    counted = {label: number for label, number in flops.items() if number}
    if not counted:
        return "training FLOPs not counted"
    least, most = min(counted, key=counted.__getitem__), max(counted, key=counted.__getitem__)
    shown = _power(counted[least])
    if counted[most] > counted[least]:
        shown += f" ({least}) to {_power(counted[most])} ({most})"
    return f"{shown} training FLOPs, counted as 3 forward passes by the closed form"


def _power(number: float) -> str:
    """`2.44e9`."""
    digits, exponent = f"{number:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def unequal(study: Study) -> str:
    """That runs with other budgets stand in other tables, and what each was given; empty if there are none."""
    studies = [one for one in study.beside if one.ranked]
    if len(studies) < 2 or not any(one is study for one in studies):
        return ""
    firsts = [one.groups[0].checkpoint for one in studies]
    ranked = [group.checkpoint for one in studies for group in one.ranked]
    given = dict.fromkeys(f"{c.architecture} {_given(c, firsts)}" for c in ranked)
    return f"{UNEQUAL}: {', '.join(given)}"


def _given(c: Checkpoint, runs: Sequence[Checkpoint]) -> str:
    """The length of a run, and whatever else of its budget is not the same in all runs."""
    words, batch, tokens = c.budget, c.get("run.batch"), c.get("run.tokens")
    if _differ(runs, "run.batch"):
        words += " of batches not recorded" if batch is None else f" of {batch:,} windows"
    elif len({(one.steps, one.finished) for one in runs}) < len(runs) and _differ(runs, "run.tokens"):
        words += " of tokens not recorded" if tokens is None else f" of {tokens:,} tokens"
    if _differ(runs, "run.initial_weights"):
        words += f" from {c.get('run.initial_weights') or 'its own start'}"
    return words


def _differ(runs: Sequence[Checkpoint], path: str) -> bool:
    return len({run.get(path) for run in runs}) > 1
