"""Rows of results.jsonl, as the report reads them: of which checkpoint, environment, data and command each is.

bsbr_pl.results describes a row. A row is enough: nothing but rows is read. What a row does not say stays absent.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from .figures import Row

MEASURED = ("certificate", "text", "recall", "cost")  # kinds that were measured in an environment


class Checkpoint:
    """What rows say of one checkpoint.

    Args:
        digest: of its weights.
        about: `about` of its rows.
    """

    def __init__(self, digest: str, about: Mapping[str, Any]) -> None:
        self.digest, self.about = digest, about

    def get(self, path: str) -> Any:
        """A fact by its path in `about`, `run.steps` say; None if the rows do not say."""
        found: Any = self.about
        for name in path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def text(self, path: str) -> str:
        found = self.get(path)
        return "" if found is None else str(found)

    def count(self, path: str) -> int | None:
        found = self.get(path)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def mapping(self, path: str) -> dict[str, Any]:
        found = self.get(path)
        return dict(found) if isinstance(found, Mapping) else {}

    def words(self, path: str) -> list[str]:
        found = self.get(path)
        return list(map(str, found)) if isinstance(found, list | tuple) else []

    @property
    def name(self) -> str:
        return self.text("checkpoint.name") or self.digest

    @property
    def architecture(self) -> str:
        return self.text("architecture") or "unknown"

    @property
    def fingerprint(self) -> str:
        """Of the data that it was trained on; empty if that is not known."""
        return self.text("data.fingerprint")

    @property
    def recall(self) -> bool:
        return self.get("data.kind") == "recall"

    @property
    def seed(self) -> int | None:
        return self.count("seed")

    @property
    def finished(self) -> bool | None:
        return self.get("run.finished")

    @property
    def marks(self) -> list[str]:
        """What a reader must know of the run wherever it is named: that it did not finish, what was changed."""
        return self.words("run.marks")

    @property
    def steps(self) -> int:
        return self.count("run.steps") or 0

    @property
    def tokens(self) -> int | None:
        """Input tokens that the run trained on."""
        return self.count("run.tokens")

    @property
    def length(self) -> str:
        """How long the run was, in words."""
        return f"{self.steps:,} steps" if self.finished else self.text("run.length") or "length not recorded"

    @property
    def budget(self) -> str:
        """Equal for runs that were given the same: length, tokens, batch, and weights to start from."""
        return key(self.get("run.budget"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that was chosen for the run but its seed; runs that agree in it are seeds of one configuration."""
        stem = PurePosixPath(self.name).stem  # best and last of one run are no seeds
        return {"checkpoint": stem, **self.mapping("config"), "length": self.text("run.length")}


class Rows:
    """The rows that count, and the checkpoints they are of. The same for every order of the rows.

    Rows of an older version of a measurement, and accuracies on other data than that of the training, are left out.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        every = _newest({key(row["identity"]): row for row in rows})
        self.by_kind: dict[str, list[Row]] = {}
        abouts: dict[str, list[Mapping[str, Any]]] = {}
        for row in every:
            self.by_kind.setdefault(row["identity"]["kind"], []).append(row)
            if digest := _digest(row):
                abouts.setdefault(digest, []).append(row["about"])
        self.checkpoints = {digest: Checkpoint(digest, max(of, key=_told)) for digest, of in sorted(abouts.items())}
        bodies = {c.text("checkpoint.body") for c in self.checkpoints.values()}
        known = self.checkpoints.keys() | bodies
        self.measured = [row for row in every if row["identity"]["kind"] in MEASURED and self._counts(row, known)]
        self.problems = [row for row in self.by_kind.get("problem", []) if not _solved(row, every)]
        self.environments = numbered("E", (key(row["identity"].get("environment")) for row in self.measured))
        self.commands = numbered("C", map(command, self.measured))
        used = [row["identity"]["data"] or "" for row in self.measured if "data" in row["identity"]]
        self.data = numbered("D", [*used, *(c.fingerprint for c in self.checkpoints.values())])

    def _counts(self, row: Row, known: Collection[str]) -> bool:
        """Whether a row is of a known checkpoint, and an accuracy is one on the data of the training."""
        identity = row["identity"]
        if identity["checkpoint"] not in known or identity["kind"] not in ("text", "recall"):
            return identity["checkpoint"] in known
        return self.checkpoints[identity["checkpoint"]].fingerprint in ("", identity.get("data"))

    def of(self, kind: str) -> dict[str, Row]:
        """The row of a kind for each checkpoint that has one."""
        return {row["identity"]["checkpoint"]: row for row in self.by_kind.get(kind, [])}

    def environment(self, row: Row) -> str:
        """E1, E2, ... that a row was measured in."""
        return self.environments[key(row["identity"].get("environment"))]

    def source(self, rows: Iterable[Row]) -> str:
        """Where numbers are from, for a caption."""
        rows = list(rows)
        places = sorted({self.environment(row) for row in rows}, key=natural)
        commands = sorted({self.commands[command(row)] for row in rows}, key=natural)
        plural = "s" * (len(commands) > 1)
        return f"Environment {', '.join(places)}; command{plural} {', '.join(commands)}." if rows else ""

    def data_name(self, fingerprint: str) -> str:
        """For a heading: class, source, D1."""
        seen = next((c for c in self.checkpoints.values() if c.fingerprint == fingerprint and c.get("data.class")), None)
        source = seen.text("data.arguments.source") if seen else ""
        name = source.rstrip("/").split("/")[-1] if source.startswith((".", "/")) else source
        return " ".join(filter(None, (seen.text("data.class") if seen else "data", name, self.data[fingerprint])))


def _newest(rows: Mapping[str, Row]) -> list[Row]:
    """The rows of the newest version of each kind of measurement, in the order of their identities."""
    newest: dict[str, int] = {}
    for row in rows.values():
        kind = row["identity"]["kind"]
        newest[kind] = max(newest.get(kind, 0), _version(row))
    ordered = [rows[text] for text in sorted(rows)]
    return [row for row in ordered if _version(row) == newest[row["identity"]["kind"]]]


def _version(row: Row) -> int:
    return row["identity"].get("version") or 0


def _digest(row: Row) -> str | None:
    """The checkpoint that a row is of; None for a file that could not be read, and for a run of a study by itself."""
    about = row["about"]
    by_itself = row["identity"]["kind"] == "training" and about.get("study")
    return Checkpoint("", about).get("checkpoint.digest") if about.get("architecture") and not by_itself else None


def _told(about: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Of several descriptions of a checkpoint, which is used: the one whose run went on longest, or is known to end."""
    c = Checkpoint("", about)
    return c.steps, bool(c.finished), key(about)


def _solved(problem: Row, rows: Iterable[Row]) -> bool:
    """Whether what failed has been measured since."""
    wanted = problem["identity"].get("of") or {}
    place = {problem["identity"].get("checkpoint"), Checkpoint("", problem["about"]).get("checkpoint.body")}
    found = (row["identity"] for row in rows if row["identity"].get("checkpoint") in place)
    return any(wanted.items() <= identity.items() for identity in found)


def command(row: Row) -> str:
    """What made a row."""
    return str(row["about"].get("command") or "not recorded")


def key(value: Any) -> str:
    """Plain values as text, the same whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, default=str)


def numbered(letter: str, texts: Iterable[str]) -> dict[str, str]:
    """E1, E2, ... for different texts in their order."""
    return {text: f"{letter}{i}" for i, text in enumerate(sorted(set(texts)), 1)}


def natural(name: str) -> tuple[int, str]:
    """A key that sorts E2 before E10."""
    return len(name), name
