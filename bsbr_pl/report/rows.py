"""Rows of results.jsonl by checkpoint, environment, data and command.

bsbr_pl.results describes a row and checks it. A fact that no row has stays absent.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from bsbr_pl.results import Row, on_own_data
from bsbr_pl.values import as_json

MEASURED = ("certificate", "text", "recall", "cost")  # kinds that were measured in an environment


class Checkpoint:
    """The facts of one checkpoint.

    Args:
        digest: of its weights.
        about: `about` of its rows.
    """

    def __init__(self, digest: str, about: Mapping[str, Any]) -> None:
        self.digest, self.about = digest, about
        self.name: str = self.get("checkpoint.name") or digest
        self.body: str = self.get("checkpoint.body") or ""  # of its architecture and sizes: its cost rows have the same
        self.architecture: str = self.get("architecture") or "unknown"
        self.fingerprint: str = self.get("data.fingerprint") or ""  # of its training data
        self.seed: int | None = self.get("seed")
        self.finished: bool | None = self.get("run.finished")
        self.steps: int = self.get("run.steps") or 0
        self.length: str = self.get("run.length") or "not known whether its run finished"  # of the run, in words
        self.budget: str = f"{self.steps:,} steps" if self.finished else self.length  # whatever ended it
        self.marks: list[str] = self.get("run.marks") or []  # warnings shown with its name
        stem = PurePosixPath(self.name).stem  # best and last of one run are not two seeds
        added = {"trainer.weight_averaging": None}  # which older rows do not say
        #: All that was chosen for the run but its seed; runs that agree in it are seeds.
        self.config = {"checkpoint": stem} | added | (self.get("config") or {}) | {"length": self.length}

    @property
    def windows(self) -> str | None:
        """`8 windows`, of a step; `at most 8 windows` where the steps at the ends of epochs took fewer."""
        batch, tokens, length = self.get("run.batch"), self.get("run.tokens"), self.get("data.trained_length")
        if not batch:
            return None
        one_length = length and len(self.get("data.train_lengths") or {}) == 1
        short = bool(one_length and tokens and tokens < self.steps * batch * length)
        return f"{'at most ' * short}{batch:,} windows"

    def get(self, path: str) -> Any:
        """A fact by its path in `about`, as `run.steps`; None if the rows do not say."""
        found: Any = self.about
        for name in path.split("."):
            found = (found or {}).get(name)
        return found


def _tasks(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """Fingerprint -> the least of those of the same recall task with other seeds, if each seed has one fingerprint."""
    found: dict[str, dict[Any, set[str]]] = {}
    for c in checkpoints:
        given = dict(c.get("data.arguments") or {})
        if c.get("data.kind") == "recall" and c.fingerprint and "seed" in given:
            seed, task = as_json(given.pop("seed")), as_json([c.get("data.class"), given])
            found.setdefault(task, {}).setdefault(seed, set()).add(c.fingerprint)
    same: dict[str, str] = {}
    for seeds in found.values():
        prints = set().union(*seeds.values())
        if len(prints) == len(seeds):
            same |= dict.fromkeys(prints, min(prints))
    return same


def shared_ends(paths: Iterable[str]) -> tuple[str, str]:
    """What all paths start with and end with, as `runs/` and `/last.ckpt`; at least one part of each path is left."""
    parts = [path.split("/") for path in paths]
    start = _common([of[:-1] for of in parts])
    end = _common([of[len(start) + 1 :][::-1] for of in parts])[::-1]
    return "".join(f"{part}/" for part in start), "".join(f"/{part}" for part in end)


def _common(lists: Sequence[Sequence[str]]) -> list[str]:
    """What all lists begin with."""
    equal = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*lists, strict=False))
    return [part for part, *_ in equal]


class Rows:
    """The valid rows and their checkpoints. The order of the rows does not matter.

    Left out: rows of an older version of a measurement, and accuracies on other data than that of the training.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.by_kind, self.shared = _by_kind(rows), ("", "")
        abouts: dict[str, Mapping[str, Any]] = {}
        for row in sorted(itertools.chain(*self.by_kind.values()), key=_told):
            if digest := _digest(row):
                abouts[digest] = row["about"]
        self.checkpoints = {digest: Checkpoint(digest, about) for digest, about in sorted(abouts.items())}
        self.seeds = _tasks(self.checkpoints.values())
        for checkpoint in self.checkpoints.values():
            checkpoint.fingerprint = self.data_of(checkpoint.fingerprint)
        paths = [c.name for c in self.checkpoints.values()] + [name for name, _ in self.problems(of_maps=False)]
        self.shared = shared_ends(paths)
        for checkpoint in self.checkpoints.values():
            checkpoint.name = self.short(checkpoint.name)
        self.measured: list[Row] = []
        for kind in MEASURED:
            known = [(row, self.checkpoints.get(_digest(row) or "")) for row in self.by_kind.get(kind, [])]
            self.by_kind[kind] = [row for row, of in known if of and on_own_data(row, of.about)]
            self.measured += self.by_kind[kind]
        self._places = numbered("E", map(environment, self.measured))
        self.environments: dict[str, dict[str, Any]] = {name: json.loads(text) for text, name in self._places.items()}
        self.commits = {(self.place(row), as_json(_commit(row))): _commit(row) for row in self.measured}
        self.commands = numbered("C", map(command, self.measured))
        measured_on = (self.data_of(row["identity"]["data"]) for row in self.measured if "data" in row["identity"])
        self.data = numbered("D", [*measured_on, *(c.fingerprint for c in self.checkpoints.values())])

    def of(self, kind: str, place: str = "") -> dict[str, Row]:
        """The row of a kind for each checkpoint that has one; of those measured in a place (E1), if one is given."""
        rows = self.by_kind.get(kind, [])
        return {row["identity"]["checkpoint"]: row for row in rows if not place or self.place(row) == place}

    def short(self, path: str) -> str:
        """A path without what all of them share."""
        return path.removeprefix(self.shared[0]).removesuffix(self.shared[1])

    def place(self, row: Row) -> str:
        """E1, E2, ... that a row was measured in."""
        return self._places[environment(row)]

    def data_of(self, fingerprint: str | None) -> str:
        """The fingerprint of data; one for all seeds of a recall task, whose samples depend on the seed."""
        return self.seeds.get(fingerprint or "", fingerprint or "")

    def problems(self, of_maps: bool) -> list[tuple[str, str]]:
        """Path of a checkpoint and the problem with it: of missing maps alone, or all others."""
        found = []
        for row in self.by_kind.get("problem", []):
            is_map = (row["identity"].get("of") or {}).get("kind") == "map"
            if row["values"]["problem"] and is_map == of_maps:
                name = Checkpoint(row["identity"]["checkpoint"], row["about"]).name
                found.append((self.short(name), row["values"]["problem"]))
        return sorted(found)

    def source(self, rows: Iterable[Row]) -> str:
        """The environments and commands of rows, for a caption."""
        rows = list(rows)
        places, commands = listed(map(self.place, rows)), listed(map(self.commands.__getitem__, map(command, rows)))
        return f"Environment {places}; command{'s' * (' ' in commands)} {commands}." if rows else ""

    def data_name(self, fingerprint: str) -> str:
        """For a heading: class, source, D1."""
        kind, source = "data", ""
        for c in reversed(self.checkpoints.values()):
            if c.fingerprint == fingerprint and c.get("data.class"):
                kind, source = c.get("data.class"), str(c.get("data.arguments.source") or "")
        name = source.rstrip("/").split("/")[-1] if source.startswith((".", "/")) else source
        return " ".join(filter(None, (kind, name, self.data[fingerprint])))


def _by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of the newest version of each kind, each identity once, in the order of their identities.

    Of rows that differ in the commit alone, one counts: the first in this order.
    """
    found: dict[str, list[Row]] = {}
    every, kept = sorted({as_json(row["identity"]): row for row in rows}.items()), dict[str, Row]()
    for _, row in every:
        kept.setdefault(as_json({**row["identity"], "environment": environment(row)}), row)
    for row in kept.values():
        of = found.setdefault(row["identity"]["kind"], [])
        if of and _version(of[0]) < _version(row):
            of.clear()
        if not of or _version(of[0]) == _version(row):
            of.append(row)
    return found


def _version(row: Row) -> int:
    return row["identity"].get("version") or 0


def _digest(row: Row) -> str | None:
    """The checkpoint that a row is of; None for a file that could not be read, and for a run of a study by itself."""
    by_itself = row["identity"]["kind"] == "training" and "study" in row["about"]
    known = "architecture" in row["about"] and not by_itself
    return (row["about"].get("checkpoint") or {}).get("digest") if known else None


def _told(row: Row) -> tuple[int, bool, str]:
    """Sorts descriptions of one checkpoint; the last counts: most steps, or known to be finished."""
    run = row["about"].get("run") or {}
    return run.get("steps") or 0, bool(run.get("finished")), as_json(row["about"])


def environment(row: Row) -> str:
    """The environment of a row, as text. The commit is no part of it: versions say when a measurement has changed."""
    facts = dict(row["identity"].get("environment") or {})
    facts.pop("commit", None)
    return as_json(facts)


def _commit(row: Row) -> Any:
    return (row["identity"].get("environment") or {}).get("commit")


def command(row: Row) -> str:
    """The command that wrote a row."""
    return row["about"].get("command") or "not recorded"


def numbered(letter: str, texts: Iterable[str]) -> dict[str, str]:
    """E1, E2, ... for different texts in their order."""
    return {text: f"{letter}{i}" for i, text in enumerate(sorted(set(texts)), 1)}


def listed(names: Iterable[str]) -> str:
    """Different names, E2 before E10; three or more that follow each other as `E2 to E10`."""
    found: list[list[str]] = []
    for name in sorted(set(names), key=lambda name: (len(name), name)):
        if found and name == _next(found[-1][-1]):
            found[-1].append(name)
        else:
            found.append([name])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in found)


def _next(name: str) -> str:
    """E3 for E2; empty for a name that is no letter and a number."""
    return f"{name[0]}{int(name[1:]) + 1}" if name[1:].isdecimal() else ""
