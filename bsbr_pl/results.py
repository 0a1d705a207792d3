"""Rows of results: what they hold, how they are checked, and how several processes share one results.jsonl.

A row is one JSON object on one line: `{"schema": 3, "identity": {...}, "about": {...}, "values": {...}}`. It is
appended as soon as it is measured. A report needs nothing but rows.

**identity** is everything that decides the values. Two rows of equal identity are one measurement; the later counts.

| field | meaning |
|---|---|
| `kind` | one of the kinds below |
| `checkpoint` | digest of the weights and of what built them; in `cost` rows the digest of architecture and sizes |
| `split`, `data` | of the data that was read, and its fingerprint |
| `length` | tokens of a sequence |
| `rounds` | samples of each time |
| `environment` | cpu, instructions, threads, device, gpu, cuda, torch, bsbr_pl, python, dtype, commit |
| `version` | of the meaning of the measurement |
| `of` | in `problem` rows: kind, length, ... of the row that could not be had |

**about** tells what a reader needs to place the values: `ABOUT`. It is the same in all rows of a checkpoint.

**values** by kind: `KINDS`. A number that is not finite is null; what was not measured is absent.

A line that does not pass `check` is left out and counted, and stays in the file.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from bsbr_pl.values import digest, finite

SCHEMA = 3
MAX_DEPTH = 8  # levels of lists and objects in a row
MAX_LINE = 16 << 20  # bytes
Row = dict[str, Any]

# A form is a type; [form], a list; {name: form}, an object with these names, `name?` where it may be missing and `*`
# for all others; or a tuple of forms, of which one must fit.
NUMBER = (int, float, NoneType)
PAIR = [NUMBER]  # low and high, 95 %
TIMING = {"seconds": NUMBER, "interval": PAIR, "samples": [NUMBER]}
IDENTITY = {
    "kind": str,
    "checkpoint": str,
    "split?": str,
    "data?": (str, NoneType),
    "length?": int,
    "rounds?": int,
    "environment?": {"*": object},
    "version?": int,
    "of?": {"kind": str, "*": object},
}
ABOUT = {
    "checkpoint?": {
        "name": str,  # its path as it was given, or the name of a model
        "digest?": str,  # of its weights and of what built them
        "body?": str,  # of its architecture and sizes: the `checkpoint` of its cost rows
    },
    "architecture?": str,  # bsbr(chunk_size=64)
    "attention?": [str],  # registry keys, each once
    "parameters?": (int, NoneType),
    "conv_size?": [int],  # taps of the short convolution of each attention; 1 for none
    "sizes?": {"*": (int, NoneType)},  # vocab_size, hidden_dim, num_layers, num_heads, ff_dim
    "seed?": (int, NoneType),
    "step?": int,
    "command?": str,
    "timed_with?": [str],  # in cost rows: what was timed in the same rounds
    "data?": (
        NoneType,
        {
            "class": str,
            "kind?": str,  # text or recall
            "arguments?": {"*": object},
            "fingerprint?": (str, NoneType),
            "tokenizer?": (str, NoneType),
            "train_lengths?": {"*": int},  # tokens -> share or count of the samples
            "validation_length?": (int, NoneType),
            "trained_length?": (int, NoneType),  # the longest of train_lengths
        },
    ),
    "run?": (
        NoneType,
        {
            "length?": str,  # in words: 600 steps
            "status?": str,  # finished, or how it ended
            "marks?": [str],  # warnings shown with its name
            "finished?": (bool, NoneType),
            "steps?": int,
            "planned_steps?": (int, NoneType),
            "tokens?": (int, NoneType),
            "batch?": (int, NoneType),
            "changes?": [str],
            "ended_by?": str,
            "initial_weights?": (str, NoneType),
            "flops?": NUMBER,
            "budget?": [object],  # length, tokens, batch, initial_weights: runs with equal ones were given the same
        },
    ),
    "config?": {"*": object},  # all that was chosen but the seed: rows whose config agrees are seeds
    "study?": {"task": str, "model": str, "phase": str, "rate": NUMBER},
}
KINDS: dict[str, Any] = {
    "certificate": {
        "passed": bool,
        "length": int,
        "checks": [{"name": str, "measured": NUMBER, "limit": NUMBER, "passed": bool}],
    },
    "text": {
        **{name: NUMBER for name in ("loss", "perplexity", "accuracy", "bits_per_byte")},
        **{name: int for name in ("tokens", "bytes", "documents")},
        "interval": {"loss": PAIR, "accuracy": PAIR, "bits_per_byte": PAIR},
        "blocks": {"nats": [NUMBER], "bytes": [NUMBER]},  # of documents, or of groups of neighbouring ones
        "compressed?": {"*": NUMBER},  # bits per byte of the same text: xz -9, gzip -9
        "by_position": [{"start": int, "stop": int, "loss": NUMBER}],
        "recall": [{"slice": str, "tokens": int, "loss": NUMBER, "accuracy": NUMBER}],
    },
    "recall": {
        "loss": NUMBER,
        "accuracy": NUMBER,
        "samples": int,
        "interval": {"accuracy": PAIR},
        "slices": [{"slice": str, "length": int, "accuracy": NUMBER, "interval": PAIR}],
        "retrieval?": {"*": object},  # evals.retrieval
    },
    "cost": {
        **{f"{name}?": TIMING for name in ("forward", "training", "decode")},
        **{f"{name}?": NUMBER for name in ("forward_bytes", "training_bytes", "forward_flops", "state_bytes")},
    },
    "training": {  # the course of a run, at most 1,000 points of each metric
        "metrics": {"*": {"step": [NUMBER], "value": [NUMBER], "seconds?": [NUMBER]}},
        "seconds?": NUMBER,
        "environment?": {"*": object},
        "precision?": (str, NoneType),
        "processes?": (int, NoneType),
    },
    "map": {"png": str, "caption": str},  # base64: layers x heads, white is exactly 0
    "problem": {"problem": str},  # one line; empty once it is solved
    "experiment": {"*": object},  # utils.research
}


class NotKeptError(OSError):
    """A row could not be written, so nothing more should be measured."""


class Job(NamedTuple):
    """A row to be measured: its identity, and its `about`."""

    identity: dict[str, Any]
    about: dict[str, Any]
    measure: Callable[[], Mapping[str, Any]]


def check(row: Any) -> None:
    """Whether a row is of this schema.

    Raises:
        ValueError: naming the field and what it must be.
    """
    if not isinstance(row, dict) or row.get("schema") != SCHEMA:
        raise ValueError(f"a row must be an object with schema {SCHEMA}")
    _check_depth(row, MAX_DEPTH)
    _check_form(row, {"schema": int, "identity": IDENTITY, "about": ABOUT, "values": {"*": object}}, "row")
    kind = row["identity"]["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; there are {', '.join(KINDS)}")
    _check_form(row["values"], KINDS[kind], "values")


def check_about(about: Any) -> None:
    """`check` of the part that rows of one checkpoint share."""
    check({"schema": SCHEMA, "identity": {"kind": "problem", "checkpoint": ""}, "about": about,
           "values": {"problem": ""}})  # fmt: skip


def _check_depth(value: Any, levels: int) -> None:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        return
    if not levels:
        raise ValueError(f"a row must be at most {MAX_DEPTH} levels deep")
    for part in parts:
        _check_depth(part, levels - 1)


def _check_form(value: Any, form: Any, where: str) -> None:
    if isinstance(form, tuple):
        _check_any(value, form, where)
    elif isinstance(form, list):
        _check_form(value, list, where)
        for item in value:
            _check_form(item, form[0], f"{where}[]")
    elif isinstance(form, dict):
        _check_form(value, dict, where)
        _check_names(value, form, where)
    elif not isinstance(value, form) or (form is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {form.__name__}")


def _check_any(value: Any, forms: tuple[Any, ...], where: str) -> None:
    for form in forms:
        try:
            return _check_form(value, form, where)
        except ValueError as error:
            problem = error
    raise problem


def _check_names(value: Mapping[str, Any], form: Mapping[str, Any], where: str) -> None:
    for name, part in form.items():
        key = name.removesuffix("?")
        if name != "*" and (key in value or key == name):
            if key not in value:
                raise ValueError(f"{where} lacks {key}")
            _check_form(value[key], part, f"{where}.{key}")
    others = [key for key in value if key not in form and f"{key}?" not in form] if "*" in form else []
    for key in others:
        _check_form(value[key], form["*"], f"{where}.{key}")


class Results:
    """The rows of one results.jsonl, shared by all processes that open it.

    The system releases locks when a process ends. Their empty files are in `.lock/` next to the results.

    Args:
        path: the file, made with the first row; None to keep rows in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        self._read_to = 0  # bytes
        self.read()

    def read(self) -> None:
        """Add the rows that were appended to the file since it was read."""
        if self.path is None or not self.path.exists():
            return
        with self._lock("file"):
            if self.path.stat().st_size < self._read_to:
                self._rows, self._read_to = {}, 0  # another file has taken its place
            with self.path.open("rb") as stream:
                stream.seek(self._read_to)
                self._rows |= _parse(stream, self.path)
                self._read_to = stream.tell()

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def get(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values found for this identity, or None."""
        row = self._rows.get(digest(identity))
        return row["values"] if row else None

    def add(self, identity: Mapping[str, Any], values: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keep a row.

        Raises:
            NotKeptError: it could not be written; names the file.
            ValueError: it is not of the schema.
        """
        row = finite({"schema": SCHEMA, "identity": identity, "about": about, "values": values})
        check(row)
        if self.path is not None:
            try:
                self._append(self.path, json.dumps(row, allow_nan=False).encode() + b"\n")
            except OSError as error:
                raise NotKeptError(error.errno, error.strerror, str(self.path)) from error
        self._rows[digest(identity)] = row

    @contextmanager
    def claim(self, identity: Mapping[str, Any], wait: bool) -> Iterator[bool]:
        """Lock this measurement. Yields False if another process holds the lock and `wait` is False.

        The file is read again, so that `get` tells whether there is still something to measure.
        """
        if self.path is None:
            yield True
            return
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

    def share(self, jobs: Sequence[Job], run: Callable[[Job], None]) -> None:
        """Call `run` for each job without a row, while this process holds its lock.

        First come those that no other process has locked; then those that were locked, in case they were abandoned.
        """
        for wait in (False, True):
            locked = []
            for job in jobs:
                if self.get(job.identity) is None:
                    with self.claim(job.identity, wait) as claimed:
                        if not claimed:
                            locked.append(job)
                        elif self.get(job.identity) is None:
                            run(job)
            jobs = locked

    def _lock(self, name: str) -> FileLock:
        assert self.path is not None
        folder = self.path.parent / ".lock"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name)

    def _append(self, path: Path, line: bytes) -> None:
        with self._lock("file"), path.open("a+b") as stream:
            if stream.seek(0, 2):
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":  # half a line, of a process that was killed
                    line = b"\n" + line
            stream.write(line)


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of several files, merged: of equal identities, the last one counts.

    Raises:
        OSError: naming a file that cannot be read.
    """
    found: dict[str, Row] = {}
    for path in map(Path, paths):
        with path.open("rb") as stream:
            found |= _parse(stream, path)
    return list(found.values())


def open_problems(rows: Sequence[Row]) -> list[Row]:
    """The problems that are not solved: no row of that checkpoint has the facts `of`, and no such file was read."""
    others = [row for row in rows if row["identity"]["kind"] != "problem"]
    by_checkpoint: dict[str, list[dict[str, Any]]] = {}
    for row in others:
        by_checkpoint.setdefault(row["identity"]["checkpoint"], []).append(row["identity"])
    names = {row["about"].get("checkpoint", {}).get("name") for row in others}

    def solved(identity: Mapping[str, Any]) -> bool:
        of, checkpoint = identity.get("of", {}), identity["checkpoint"]
        if of.get("kind") == "checkpoint":
            return checkpoint in names
        return any(of.items() <= one.items() for one in by_checkpoint.get(checkpoint, []))

    problems = [row for row in rows if row["identity"]["kind"] == "problem" and row["values"]["problem"]]
    return [row for row in problems if not solved(row["identity"])]


def _parse(stream: BinaryIO, path: Path) -> dict[str, Row]:
    """The rows of the lines from here on, by digest of their identity. Warns of lines that are left out."""
    rows: dict[str, Row] = {}
    older = damaged = 0
    for line in _lines(stream):
        row = None
        try:
            row = finite(json.loads(line))
            check(row)
            rows[digest(row["identity"])] = row
        except (ValueError, RecursionError):
            older += isinstance(row, dict) and "identity" in row and "schema" not in row
            damaged += 1
    if damaged:
        what = f"{older} rows of schema 2" if older == damaged else f"{damaged} lines that are no rows of this version"
        warnings.warn(f"{path}: {what} are left out; they stay in the file", stacklevel=4)
    return rows


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines that are not empty; of one beyond `MAX_LINE`, the start."""
    while line := stream.readline(MAX_LINE):
        end = line
        while not end.endswith(b"\n") and (end := stream.readline(MAX_LINE)):
            pass
        if line.strip():
            yield line
