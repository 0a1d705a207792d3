"""What each was trained with: steps, tokens, FLOPs, batch, data; and the warnings where runs are not comparable."""

from collections.abc import Callable, Sequence

from ..checkpoints import Checkpoint, architecture
from ..runs import Run
from .findings import Findings, Group, Study

NAMED = 5  # checkpoints that a warning names
UNEQUAL = "These have unequal budgets, so the ranking does not compare architectures"


def sentence(study: Study) -> str:
    """The budget that all runs of a study share."""
    run = study.groups[0].run
    steps = f"{run.steps:,} optimiser steps" if run.finished else run.length
    words = [f"{steps} of {run.batch:,} windows" if run.batch else f"{steps}, batch not recorded"]
    words.append("training tokens not recorded" if run.tokens is None else f"{run.tokens:,} training tokens")
    words.append(_flops(study.groups))
    if run.initial_weights:
        words.append(f"from the weights of {run.initial_weights}")
    for group in study.groups:
        if group.run.finished and group.run.ended_by not in ("", "max_steps", "max_epochs"):
            words.append(f"{group.label} ended by {group.run.ended_by}")
    return f"{'Equal budgets' if len(study.groups) > 1 else 'Budget'}: {'; '.join([*words, study.data])}."


def _flops(groups: Sequence[Group]) -> str:
    """Training FLOPs from the least to the most, as they are counted."""
    counted = {group.label: flops for group in groups if (flops := group.training_flops)}
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
    """That runs with other budgets stand in other tables, and what each was given; empty where there are none."""
    studies = [one for one in study.beside if one.ranked()]
    if len(studies) < 2 or not any(one is study for one in studies):
        return ""
    runs = [one.groups[0].run for one in studies]
    given = [
        f"{architecture(group.members[0].checkpoint)} {_given(group.run, runs)}"
        for one in studies
        for group in one.ranked()
    ]
    return f"{UNEQUAL}: {', '.join(dict.fromkeys(given))}"


def _given(run: Run, runs: Sequence[Run]) -> str:
    """The length of a run, and whatever else of its budget is not the same in all runs."""
    words = f"{run.steps:,} steps" if run.finished else run.length
    if len({one.batch for one in runs}) > 1:
        words += " of batches not recorded" if run.batch is None else f" of {run.batch:,} windows"
    elif len({(one.steps, one.finished) for one in runs}) < len(runs) and len({one.tokens for one in runs}) > 1:
        words += " of tokens not recorded" if run.tokens is None else f" of {run.tokens:,} tokens"
    if len({one.initial_weights for one in runs}) > 1:
        words += f" from {'its own start' if run.initial_weights is None else run.initial_weights}"
    return words


def warnings(findings: Findings) -> list[str]:
    """What a reader must know before the ranking: unequal budgets, other data, runs that did not finish or changed."""
    sentences = dict.fromkeys(sentence for study in findings.studies if (sentence := unequal(study)))
    stopped = [c for c in findings.checkpoints if c.run.finished is False]
    unknown = [c for c in findings.checkpoints if c.run.finished is None]
    changed = [c for c in findings.checkpoints if c.run.changes]
    found = [f"{sentence}." for sentence in sentences]
    data = dict.fromkeys(study.data for study in findings.studies if study.ranked())
    if len(data) > 1:
        found.append(f"Runs on different data, or with different tokenizers, are ranked apart: {'; '.join(data)}.")
    if stopped:
        found.append(f"These runs did not finish, and are averaged with no other: {_named(stopped, _length)}.")
    if unknown:
        found.append(f"These are averaged with no other: {_named(unknown, _length)}.")
    if changed:
        found.append(f"Arguments were changed during these runs: {_named(changed, _changes)}.")
    return found


def marks(findings: Findings) -> list[tuple[str, str]]:
    """Checkpoints whose run did not finish, or was changed, and the words for it."""
    return [(c.name, "; ".join(c.run.marks)) for c in findings.checkpoints if c.run.marks]


def _length(checkpoint: Checkpoint) -> str:
    return checkpoint.run.length


def _changes(checkpoint: Checkpoint) -> str:
    return ", ".join(checkpoint.run.changes)


def _named(checkpoints: Sequence[Checkpoint], say: Callable[[Checkpoint], str]) -> str:
    shown = [f"{checkpoint.name} ({say(checkpoint)})" for checkpoint in checkpoints[:NAMED]]
    more = len(checkpoints) - NAMED
    return ", ".join(shown) + (f", and {more} more: see Problems" if more > 0 else "")
