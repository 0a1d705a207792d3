"""results.jsonl: one line for each thing measured, kept the moment it is measured, never measured twice.

Several processes may work on one file. Locks are the system's own, which die with the process that holds them; their
empty files lie in `.lock/` beside the results.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bsbr_pl.utils.files import write_whole
from bsbr_pl.values import digest, finite


class NotKeptError(OSError):
    """A row could not be written, so nothing more should be measured."""


class Results:
    """The rows of one results.jsonl. A row is a flat dict of what was measured (its identity) and what was found.

    Identity: everything that decides the values, among it checkpoint, kind, task, length, settings and environment.
    Two rows of equal identity are the same measurement; the later one counts.

    Args:
        path: the file; it is made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Take over what the file holds: rows that other processes have added."""
        if not self.path.exists():
            return
        with self._lock("file"):
            self._read()

    def _read(self) -> None:
        lines, damaged = self.path.read_bytes().decode(errors="replace").splitlines(), 0
        self._rows = {}
        for line in lines:
            try:
                row = {name: dict(part) for name, part in json.loads(line).items()}
                self._rows[digest(row["identity"])] = {name: row[name] for name in ("identity", "about", "values")}
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += 1
        if damaged:
            warnings.warn(f"{self.path}: {damaged} damaged lines are left out, and measured again", stacklevel=4)
            self._rewrite()

    def get(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values found for this identity, or None."""
        row = self._rows.get(digest(identity))
        return row["values"] if row else None

    def add(self, identity: Mapping[str, Any], values: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keep a row: `about` holds what one wants to know beside it (the command, the file's name).

        Raises:
            NotKeptError: naming the file.
        """
        row = finite({"identity": identity, "about": about, "values": values})
        self._rows[digest(identity)] = row
        try:
            with self._lock("file"), self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise NotKeptError(error.errno, error.strerror, str(self.path)) from error

    @contextmanager
    def claim(self, identity: Mapping[str, Any], wait: bool) -> Iterator[bool]:
        """Keep other processes from measuring this; False where one of them is at it, unless told to `wait` for it.

        Rows are read again, so that `get` says whether there is still something to measure.
        """
        try:
            lock = self._lock(digest(identity))
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise NotKeptError(error.errno, error.strerror, str(self.path)) from error
        try:
            self.read()
            yield True
        finally:
            lock.release()

    def _lock(self, name: str) -> FileLock:
        folder = self.path.parent / ".lock"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def _rewrite(self) -> None:
        """Without the damaged lines, so that the next one does not continue half a line."""
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self._rows.values()).encode())
