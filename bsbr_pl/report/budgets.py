"""Training budgets (steps, tokens, FLOPs, batch, data), and warnings about runs that are not comparable."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from bsbr_pl.results import Row

from .groups import Group, counted
from .rows import Checkpoint
from .studies import Findings, Study

NAMED = 5  # names in a sentence
PLANNED = (None, "", "max_steps", "max_epochs")  # planned ends of a run
STOPPED = "These runs did not finish, and are not averaged with others"
UNKNOWN = "It is not known whether these runs finished, and they are not averaged with others"
CHANGED = "Arguments were changed during these runs"
UNEQUAL = "These have unequal budgets, so the ranking does not compare architectures"
CONTEXTS = "These were read in contexts of unequal length, so the ranking does not compare architectures"


def warnings(rows: Iterable[Row]) -> list[str]:
    """Sentences that a reader must know before the ranking."""
    return warned(Findings(rows))


def warned(findings: Findings) -> list[str]:
    """Unequal budgets, other data, runs that did not finish or were changed."""
    found = list(dict.fromkeys(map(unequal, findings.studies)))
    data = dict.fromkeys(study.data for study in findings.studies if study.ranked)
    if len(data) > 1:
        found.append(f"Runs with different data or tokenizers are ranked separately: {'; '.join(data)}")
    doubtful: dict[str, list[str]] = {STOPPED: [], UNKNOWN: [], CHANGED: []}
    for c in findings.checkpoints.values():
        if not c.finished:
            doubtful[UNKNOWN if c.finished is None else STOPPED].append(f"{c.name} ({c.length})")
        if changes := c.get("run.changes"):
            doubtful[CHANGED].append(f"{c.name} ({', '.join(changes)})")
    found += [f"{words}: {named(names, ': see Problems')}" for words, names in doubtful.items() if names]
    return [f"{sentence}." for sentence in found if sentence]


def named(names: Sequence[str], where: str = "") -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f", and {more} more{where}" if more > 0 else "")


def sentence(study: Study) -> str:
    """The budget that all runs of a study share."""
    first = study.groups[0].checkpoint
    windows, tokens, weights = first.windows, first.get("run.tokens"), first.get("run.initial_weights")
    steps = f"{first.steps:,} optimiser steps" if first.finished else first.length
    words = [f"{steps} of {windows}" if windows else f"{steps}, batch not recorded"]
    words.append("training tokens not recorded" if tokens is None else f"{tokens:,} training tokens")
    words.append(_flops(study.groups))
    if weights:
        words.append(f"from the weights of {weights}")
    for group in study.groups:
        ended_by = group.checkpoint.get("run.ended_by")
        if group.checkpoint.finished and ended_by not in PLANNED:
            words.append(f"{group.label} ended by {ended_by}")
    words.append(study.data)
    return ("Equal budgets: " if len(study.groups) > 1 else "Budget: ") + "; ".join(words) + "."


def _flops(groups: Sequence[Group]) -> str:
    """The least and the most training FLOPs, as they are counted."""
    flops = counted(groups, "run.flops")
    if flops.empty:
        return "training FLOPs not counted"
    least, most = flops.idxmin(), flops.idxmax()
    shown = _power(flops[least])
    if flops[most] > flops[least]:
        shown += f" ({least}) to {_power(flops[most])} ({most})"
    return f"{shown} training FLOPs, counted as 3 forward passes"


def _power(number: float) -> str:
    """`2.44e9`."""
    digits, exponent = f"{number:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def unequal(study: Study) -> str:
    """A warning about runs on the same data with other budgets or contexts, and those of each; empty if there are
    none."""
    studies = [one for one in study.beside if one.ranked]
    if len(studies) < 2 or study not in studies:
        return ""
    budgets = pd.DataFrame([_budget(one.ranked[0].checkpoint) for one in studies], dtype=object)
    given, contexts = [], {group.members[0].context for one in studies for group in one.ranked}
    for one in studies:
        for group in one.ranked:
            words = f"{group.checkpoint.architecture} {_in_words(group.checkpoint, budgets)}"
            given.append(words + (f" read in contexts of {group.members[0].context}" if len(contexts) > 1 else ""))
    title = UNEQUAL if (budgets.nunique(dropna=False) > 1).any() else CONTEXTS
    return f"{title}: {', '.join(dict.fromkeys(given))}"


def _budget(c: Checkpoint) -> dict[str, Any]:
    facts = {name: c.get(f"run.{name}") for name in ("batch", "tokens", "initial_weights")}
    return {"steps": c.steps, "finished": c.finished, **facts}


def _in_words(c: Checkpoint, budgets: pd.DataFrame) -> str:
    """The length of a run, and the other parts of its budget that are not equal in all budgets."""
    words, own, differ = c.budget, _budget(c), budgets.nunique(dropna=False) > 1
    if differ["batch"]:
        words += f" of {c.windows}" if c.windows else " of batches not recorded"
    elif differ["tokens"] and budgets.duplicated(["steps", "finished"]).any():
        words += " of tokens not recorded" if own["tokens"] is None else f" of {own['tokens']:,} tokens"
    if differ["initial_weights"]:
        words += f" from {own['initial_weights'] or 'its own start'}"
    return words
