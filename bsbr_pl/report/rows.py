"""Rows of results.jsonl by checkpoint, environment, data and command.

bsbr_pl.results describes a row and checks it. A fact that no row has stays absent.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
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
        """`8 windows`, of a step; `at most 8 windows` if the steps at the ends of epochs took fewer."""
        batch, tokens, length = self.get("run.batch"), self.get("run.tokens"), self.get("data.trained_length")
        if not batch:
            return None
        one_length = length and len(self.get("data.train_lengths") or {}) == 1
        fewer = one_length and tokens and tokens < self.steps * batch * length
        return f"at most {batch:,} windows" if fewer else f"{batch:,} windows"

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
    """The start and the end that all paths share, `runs/` and `/last.ckpt`; at least one part of each is left."""
    every = [path.split("/") for path in paths]
    start = _common([parts[:-1] for parts in every])
    end = _common([parts[len(start) + 1 :][::-1] for parts in every])[::-1]
    return "".join(f"{part}/" for part in start), "".join(f"/{part}" for part in end)


def _common(lists: Iterable[list[str]]) -> list[str]:
    """What all lists begin with."""
    found = []
    for parts in zip(*lists, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return found


class Rows:
    """The valid rows and their checkpoints. The order of the rows does not matter.

    Left out: rows of an older version of a measurement, and accuracies on other data than that of the training.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.by_kind, self.older = _by_kind(rows)
        abouts: dict[str, Mapping[str, Any]] = {}
        for row in sorted(itertools.chain(*self.by_kind.values()), key=_progress):
            if digest := _digest(row):
                abouts[digest] = row["about"]
        self.checkpoints = {digest: Checkpoint(digest, about) for digest, about in sorted(abouts.items())}
        self.seeds = _tasks(self.checkpoints.values())
        for checkpoint in self.checkpoints.values():
            checkpoint.fingerprint = self.data_of(checkpoint.fingerprint)
        paths = [checkpoint.name for checkpoint in self.checkpoints.values()]
        self.shared = "", ""  # not known yet: `problems` gives whole paths
        self.shared = shared_ends([*paths, *(path for path, _ in self.problems(of_maps=False))])
        for checkpoint in self.checkpoints.values():
            checkpoint.name = self.short(checkpoint.name)
        self.measured: list[Row] = []
        for kind in MEASURED:
            self.by_kind[kind] = [row for row in self.by_kind.get(kind, []) if self._is_on_own_data(row)]
            self.measured += self.by_kind[kind]
        self._names = numbered("E", map(environment, self.measured))  # environment as text -> E1
        self.environments: dict[str, dict[str, Any]] = {name: json.loads(text) for text, name in self._names.items()}
        self.commits = {(self.environment_name(row), as_json(_commit(row))): _commit(row) for row in self.measured}
        self.commands = numbered("C", map(command, self.measured))
        measured_on = (self.data_of(row["identity"]["data"]) for row in self.measured if "data" in row["identity"])
        self.data = numbered("D", [*measured_on, *(c.fingerprint for c in self.checkpoints.values())])

    def of(self, kind: str, environment: str = "") -> dict[str, Row]:
        """The row of a kind for each checkpoint that has one; with `environment` (E1), only if measured there."""
        rows = self.by_kind.get(kind, [])
        if environment:
            rows = [row for row in rows if self.environment_name(row) == environment]
        return {row["identity"]["checkpoint"]: row for row in rows}

    def short(self, path: str) -> str:
        """A path without the start and the end that all paths share."""
        return path.removeprefix(self.shared[0]).removesuffix(self.shared[1])

    def environment_name(self, row: Row) -> str:
        """E1, E2, ... that a row was measured in."""
        return self._names[environment(row)]

    def data_of(self, fingerprint: str | None) -> str:
        """The fingerprint of data; one for all seeds of a recall task, whose samples depend on the seed."""
        return self.seeds.get(fingerprint or "", fingerprint or "")

    def problems(self, of_maps: bool) -> list[tuple[str, str]]:
        """Short path of a checkpoint and the problem with it: either missing maps, or all other problems."""
        found = []
        for row in self.by_kind.get("problem", []):
            is_map = (row["identity"].get("of") or {}).get("kind") == "map"
            if row["values"]["problem"] and is_map == of_maps:
                path = Checkpoint(row["identity"]["checkpoint"], row["about"]).name
                found.append((self.short(path), row["values"]["problem"]))
        return sorted(found)

    def _is_on_own_data(self, row: Row) -> bool:
        """Whether the row is of a known checkpoint, and not of other data than that of its training."""
        checkpoint = self.checkpoints.get(_digest(row) or "")
        return checkpoint is not None and on_own_data(row, checkpoint.about)

    def source(self, rows: Iterable[Row]) -> str:
        """The environments and commands of rows, for a caption."""
        rows = list(rows)
        if not rows:
            return ""
        environments = listed(self.environment_name(row) for row in rows)
        commands = listed(self.commands[command(row)] for row in rows)
        return f"Environment {environments}; {'commands' if ' ' in commands else 'command'} {commands}."

    def data_name(self, fingerprint: str) -> str:
        """For a heading: class, source, D1."""
        trained = (c for c in self.checkpoints.values() if c.fingerprint == fingerprint and c.get("data.class"))
        first = next(trained, Checkpoint("", {}))
        source = str(first.get("data.arguments.source") or "")
        if source.startswith((".", "/")):
            source = source.rstrip("/").split("/")[-1]
        words = (first.get("data.class") or "data", source, self.data[fingerprint])
        return " ".join(word for word in words if word)


def _by_kind(rows: Iterable[Row]) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """The rows of the newest version of each kind, each identity once, in the order of their identities; and, for each
    older version, how many rows it has and that they are left out.

    Of rows that differ in the commit alone, one counts: the first in this order.
    """
    by_identity, kept = {as_json(row["identity"]): row for row in rows}, dict[str, Row]()
    for _, row in sorted(by_identity.items()):
        kept.setdefault(as_json({**row["identity"], "environment": environment(row)}), row)
    found: dict[str, list[Row]] = {}
    for row in kept.values():
        found.setdefault(row["identity"]["kind"], []).append(row)
    older = []
    for kind, of_kind in found.items():
        count = Counter(map(_version, of_kind))
        *versions, newest = sorted(count)
        for version in versions:
            words = f"left out: of version {version}, and the newest here is {newest}; evaluate these checkpoints again"
            older.append((f"{count[version]} rows of kind {kind}", words))
        found[kind] = [row for row in of_kind if _version(row) == newest]
    return found, older


def _version(row: Row) -> int:
    return row["identity"].get("version") or 0


def _digest(row: Row) -> str | None:
    """The digest of a row's checkpoint; None for a file that could not be read, and for a run of a study."""
    of_study = row["identity"]["kind"] == "training" and "study" in row["about"]
    if of_study or "architecture" not in row["about"]:
        return None
    return (row["about"].get("checkpoint") or {}).get("digest")


def _progress(row: Row) -> tuple[int, bool, str]:
    """Sorts descriptions of one checkpoint; the last is used: most steps, or known to be finished."""
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
