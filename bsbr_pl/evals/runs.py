"""How a checkpoint was trained: planned and completed steps, and whether the run finished.

Only this file reads run records: `run` in a checkpoint and in record.json. Files may be damaged or hostile: a
checkpoint whose record is not of the form `RECORD` has a problem, and a record.json that is not counts as missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from bsbr_pl.schema import COUNT, METRICS, NUMBER, check_columns, check_form, check_plain, parse
from bsbr_pl.values import as_json

RECORD_BYTES = 64 << 20  # of the largest record.json that is read
CHANGES = 5  # of arguments by resumes, that are shown
RUN = {
    "arguments": {"*": object},
    "changes?": [{"argument": str, "step": COUNT, "*": object}],
    "planned_steps?": (NoneType, COUNT),
    "step?": COUNT,
    "tokens?": (NoneType, COUNT),
    "*": object,
}
RECORD = {
    "metrics?": METRICS,
    "seconds?": NUMBER,
    "status?": str,
    "ended_by?": (NoneType, str),
    "steps?": COUNT,
    "run?": RUN,
    "environment?": {"processes?": (NoneType, COUNT), "*": object},
    "*": object,
}


@dataclass(frozen=True)
class Run:
    """A run, as far as it is recorded; None where it is not.

    Steps and tokens are those of the whole run if its record.json is known, else those up to the checkpoint: best.ckpt
    of a finished run represents the whole run, from which it was chosen.
    """

    arguments: dict[str, Any]  # what was asked: `model.hidden_dim`, `data.source`, `trainer.precision`, `seed`, ...
    steps: int  # optimiser steps done
    planned_steps: int | None  # optimiser steps asked for; None also where only time bounded the run
    tokens: int | None  # input tokens trained on
    batch: int | None  # windows, or samples, of an optimiser step, over all processes
    initial_weights: str | None  # that training started from, instead of random ones
    changes: tuple[str, ...]  # in words, the arguments that a resume changed
    finished: bool | None
    ended_by: str = ""  # what ended a finished run
    running: bool = False  # the record is incomplete: the run was killed or is still running

    @property
    def length(self) -> str:
        """The steps that were completed, of those planned: `600 steps`, `stopped at 50 of 600 steps`."""
        done = f"{self.steps:,} steps"
        if self.planned_steps and self.planned_steps > self.steps:
            done = f"{self.steps:,} of {self.planned_steps:,} steps"
        if self.finished:
            reached = self.planned_steps and self.planned_steps <= self.steps
            return f"{done}, ended by {self.ended_by}" if self.ended_by and not reached else done
        if self.finished is None:
            return f"at {done}, not known whether its run finished"
        return f"stopped at {done}, or still running" if self.running else f"stopped at {done}"

    @property
    def status(self) -> str:
        """`finished`, or the length of a run that ended before its last planned step."""
        return "finished" if self.finished and self.length == f"{self.steps:,} steps" else self.length

    @property
    def marks(self) -> tuple[str, ...]:
        """Warnings that are shown with the name of the run: it did not finish, or an argument was changed."""
        return (() if self.finished else (self.length,)) + self.changes

    @property
    def budget(self) -> tuple[str, int | None, int | None, str | None]:
        """Length, tokens, batch and initial weights: only runs with equal budgets are ranked together.

        The length of a finished run is its number of steps, whatever ended it. A run that did not finish has another
        length than every finished run.
        """
        length = f"{self.steps:,} steps" if self.finished else self.length
        return length, self.tokens, self.batch, self.initial_weights

    @property
    def about(self) -> dict[str, Any]:
        """`about.run` of its rows."""
        names = ("length", "status", "marks", "finished", "steps", "planned_steps", "tokens", "batch", "changes")
        return {name: getattr(self, name) for name in (*names, "ended_by", "initial_weights", "budget")}


def read_record(checkpoint: Path) -> dict[str, Any]:
    """record.json of the run in whose folder, or in whose folder `checkpoints`, a checkpoint lies; {} without one."""
    folder = checkpoint.resolve().parent
    for path in (folder.parent / "record.json", folder / "record.json"):
        try:
            if path.is_file() and path.stat().st_size <= RECORD_BYTES:
                record = parse(path.read_bytes())
                check_plain(record, "the record")
                check_record(record)
                return record
        except (OSError, ValueError):
            continue
    return {}


def check_record(record: Mapping[str, Any]) -> None:
    """Check that a record has the form `RECORD`, and columns of equal lengths.

    Raises:
        ValueError: naming the field.
    """
    check_form(record, RECORD, "the record")
    check_columns(record.get("metrics", {}), "the record")


def read_run(
    own: Mapping[str, Any], record: Mapping[str, Any], step: int, built: Mapping[str, Any], length: int | None
) -> Run:
    """The run of a checkpoint, as far as it is known.

    Args:
        own: what the checkpoint holds.
        record: the record.json beside it, which may be that of another run.
        step: the optimiser steps that the checkpoint has seen.
        built: arguments that the checkpoint's model and data were made with, `model.hidden_dim` and so on.
        length: tokens of a training window, where all have the same.
    """
    mine, beside = own.get("run", {}), record.get("run", {})
    arguments = {**built, **mine.get("arguments", {})}
    if not _same_run(arguments, beside.get("arguments", {}), [*mine.get("changes", []), *beside.get("changes", [])]):
        record, beside = {}, {}
    planned = beside.get("planned_steps") or mine.get("planned_steps") or None
    finished = _ending(record, beside.get("step"), step, planned)
    steps, tokens = step, mine.get("tokens")
    if finished is not None and (beside.get("step") or 0) > step:
        steps, tokens = beside["step"], beside.get("tokens")
    if planned and steps >= planned:
        finished = True
    batch = _batch(mine) or _batch(beside)
    if tokens is None and batch and length:
        tokens = steps * batch * length
    weights = built.get("initial_weights") or arguments.get("initial_weights")
    return Run(
        arguments=arguments,
        steps=steps,
        planned_steps=planned,
        tokens=tokens,
        batch=batch,
        initial_weights=weights if isinstance(weights, str) else None,
        changes=_changes(beside.get("changes") or mine.get("changes") or []),
        finished=finished,
        ended_by=_text(record.get("ended_by") or ""),
        running=record.get("status") == "running",
    )


def _ending(record: Mapping[str, Any], recorded: int | None, step: int, planned: int | None) -> bool | None:
    """Whether a run finished, by its record and its recorded steps.

    None where there is no record, or it contradicts itself, the steps of the checkpoint or the planned steps.
    """
    status = record.get("status", "")
    if status == "running" or status.startswith("stopped"):
        return False
    if status != "finished" or recorded is None or recorded < step:
        return None
    missing = planned is not None and recorded < planned
    return None if missing and record.get("ended_by") == "max_steps" else True


def _batch(run: Mapping[str, Any]) -> int | None:
    """Windows, or samples, of an optimiser step; None unless the arguments of the run say both factors."""
    arguments = run.get("arguments", {})
    size, accumulated = arguments.get("data.batch_size"), arguments.get("trainer.accumulate_grad_batches")
    if type(size) is not int or type(accumulated) is not int or min(size, accumulated) < 1:
        return None
    return size * accumulated


def _same_run(arguments: Mapping[str, Any], others: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two records can be of one run: arguments that both have are equal, unless they may differ within a run
    (kind `free`), or a resume may change them (`applied`) and `changes` says that it did."""
    from bsbr_pl.run import ATTENTION, differences, kind  # with torch, which a job of a study can do without

    changed = {one["argument"] for one in changes}
    mine = {name: as_json(value) for name, value in arguments.items()}
    theirs = {name: as_json(value) for name, value in others.items()}
    if not any(name.startswith(ATTENTION) for name in mine.keys() & theirs.keys()):
        return False
    for argument, *_ in differences(mine, theirs):
        allowed = kind(argument) == "free" or (kind(argument) == "applied" and argument in changed)
        if not allowed:
            return False
    return True


def _changes(found: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The first changes of arguments in words, and how many more there are."""
    words = []
    for one in found[:CHANGES]:
        name = _text(one["argument"]).rpartition(".")[2]
        values = f"{_text(one.get('before'))} to {_text(one.get('after'))}"
        words.append(f"{name} changed at step {one['step']:,} ({values})")
    if len(found) > CHANGES:
        words.append(f"{len(found) - CHANGES} more changes")
    return tuple(words)


def _text(value: Any) -> str:
    """A value as text on one line, cut to 60 characters."""
    return "none" if value is None else " ".join(str(value).split())[:60]
