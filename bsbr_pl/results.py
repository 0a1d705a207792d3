"""Rows of results: what they hold, how they are checked, and how several processes share one results.jsonl.

A row is one JSON object on one line: `{"schema": 3, "identity": {...}, "about": {...}, "values": {...}}`. It is
appended as soon as it is measured. A report needs nothing but rows.

- `identity` is everything that decides the values: `IDENTITY`. Of two rows with the same one, the later counts.
- `about` tells what a reader needs to place the values: `ABOUT`. It is the same in all rows of a checkpoint.
- `values` by kind: `KINDS`. A number that is not finite is null; what was not measured is absent.

A line that does not pass `check` is left out with a warning, and stays in the file.
"""

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from bsbr_pl import schema
from bsbr_pl.schema import METRICS, NUMBER
from bsbr_pl.utils.files import own_folder
from bsbr_pl.values import digest, finite, one_line

SCHEMA = 3
MAX_LINE = 16 << 20  # bytes
CLOSE = 1e-6  # relative, of numbers that must agree
Row = dict[str, Any]

# Forms of `bsbr_pl.schema`.
PAIR = [NUMBER]  # low and high, 95 %
TIMING = {"seconds": NUMBER, "interval": PAIR, "samples": [NUMBER]}
IDENTITY = {
    "kind": str,  # a key of `KINDS`
    "checkpoint": str,  # digest of the weights and of what built them; in `cost` rows of architecture and sizes
    "split?": str,
    "data?": (NoneType, str),  # fingerprint of the data that was read
    "length?": int,  # tokens of a sequence
    "rounds?": int,  # samples of each time
    "environment?": {"*": object},  # cpu, instructions, threads, device, gpu, cuda, torch, python, dtype, commit, ...
    "version?": int,  # of the meaning of the measurement
    "of?": {"kind": str, "*": object},  # in `problem` rows: kind, length, ... of the row that could not be had
}
#: What the identity of a kind must have.
OF_KIND: dict[str, Any] = {
    "text": {"split": str, "data": (NoneType, str), "length": int, "*": object},
    "recall": {"split": str, "data": (NoneType, str), "*": object},
    "cost": {"length": int, "*": object},
}
ABOUT = {
    "checkpoint?": {
        "name": str,  # its path as it was given, or the name of a model
        "digest?": str,  # of its weights and of what built them
        "body?": str,  # of its architecture and sizes: the `checkpoint` of its cost rows
    },
    "architecture?": str,  # bsbr(chunk_size=64)
    "attention?": [str],  # registry keys, each once
    "parameters?": (NoneType, int),
    "conv_size?": [int],  # taps of the short convolution of each attention; 1 for none
    "sizes?": {"*": (NoneType, int)},  # vocab_size, hidden_dim, num_layers, num_heads, ff_dim
    "seed?": (NoneType, int),
    "step?": int,
    "command?": str,
    "timed_with?": [str],  # in cost rows: what was timed in the same rounds
    "data?": (
        NoneType,
        {
            "class": str,
            "kind?": str,  # text or recall
            "arguments?": {"*": object},
            "fingerprint?": (NoneType, str),
            "tokenizer?": (NoneType, str),
            "train_lengths?": {"*": int},  # tokens -> share or count of the samples
            "validation_length?": (NoneType, int),
            "trained_length?": (NoneType, int),  # the longest of train_lengths
        },
    ),
    "run?": (
        NoneType,
        {
            "length?": str,  # in words: 600 steps
            "status?": str,  # finished, or how it ended
            "marks?": [str],  # warnings shown with its name
            "finished?": (NoneType, bool),
            "steps?": int,
            "planned_steps?": (NoneType, int),
            "tokens?": (NoneType, int),
            "batch?": (NoneType, int),
            "changes?": [str],
            "ended_by?": str,
            "initial_weights?": (NoneType, str),
            "flops?": NUMBER,
            "budget?": [object],  # length, tokens, batch, initial_weights: runs with equal ones were given the same
        },
    ),
    "config?": {"*": object},  # all that was chosen but the seed: rows whose config agrees are seeds
    "study?": {
        "task": str,
        "model": str,
        "phase": str,  # sweep, or final: a run that counts
        "rate": NUMBER,
        "weight_decay?": NUMBER,  # if it was swept
        "rates?": [NUMBER],  # all that were tried for the model; `rate` should be inside
    },
}
KINDS: dict[str, Any] = {
    "certificate": {
        "passed": bool,
        "length": int,
        "noise?": NUMBER,  # standard deviation of what was added to the weights for a second measurement
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
        "uncounted?": [str],  # forward_flops are no closed form but counted: operators without a formula
    },
    "training": {  # the course of a run, at most 1,000 points of each metric
        "metrics": METRICS,
        "seconds?": NUMBER,
        "environment?": {"*": object},
        "precision?": (NoneType, str),
        "processes?": (NoneType, int),
        "result?": {  # of a run of the study that counts
            "val": NUMBER,  # bits per byte; of a recall task, the mean accuracy of the slices
            "test?": NUMBER,  # the same of the test split
            "plateau?": NUMBER,  # `TokenData.plateau`
            "learned?": bool,  # whether `test` is better than the plateau; False: not learned yet
            "flops_per_token?": NUMBER,  # of a forward pass over the longest training sample, closed form
            "state_bytes?": int,  # of the decode state after it, fp32
            "tokens_per_second?": NUMBER,  # of training, the median
        },
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
    schema.check(row, {"schema": int, "identity": IDENTITY, "about": ABOUT, "values": {"*": object}}, "row")
    kind = row["identity"]["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; there are {', '.join(KINDS)}")
    schema.check_form(row["identity"], OF_KIND.get(kind, {}), "row.identity")
    schema.check_form(row["values"], KINDS[kind], "values")
    _check_agreement(kind, row["values"])


def _check_agreement(kind: str, values: Mapping[str, Any]) -> None:
    """Whether the values that decide a rank follow from the others.

    Raises:
        ValueError: naming the field that does not, and what follows.
    """
    if kind == "certificate" and values["passed"]:
        for one in values["checks"]:
            if not (one["passed"] and one["measured"] is not None and one["measured"] <= one["limit"]):
                raise ValueError(f"values.passed=true, but {one['name']} is {one['measured']}, above {one['limit']}")
    if kind == "text" and values["bits_per_byte"] is not None:
        nats, count = (sum(one or 0 for one in values["blocks"][name]) for name in ("nats", "bytes"))
        bits = nats / math.log(2) / count if count else math.nan
        if not math.isclose(values["bits_per_byte"], bits, rel_tol=CLOSE):
            raise ValueError(f"values.bits_per_byte={values['bits_per_byte']}, but {bits:.4f} follows from its blocks")


def check_about(about: Any) -> None:
    """`check` of the part that rows of one checkpoint share."""
    schema.check({"about": about}, {"about": ABOUT}, "row")


class Results:
    """The rows of one results.jsonl, shared by all processes that open it.

    The system releases locks when a process ends. Their empty files are in `.lock/` next to the results, a folder that
    only this user can read. If this folder cannot be had, a warning says so, and nothing is locked.

    Args:
        path: the file, made with the first row; None to keep rows in memory alone.

    Raises:
        OSError: `path` is no file, or cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        self._bytes = self._lines = self._inode = 0  # how far which file was read
        self._warned = False
        self.read()

    def read(self) -> None:
        """Add the rows that were appended to the file since it was read."""
        if self.path is None or not self.path.exists():
            return
        with self._locked("file"), _open(self.path) as stream:
            status = os.fstat(stream.fileno())
            if status.st_size < self._bytes or status.st_ino != self._inode:  # another file has taken its place
                self._rows, self._bytes, self._lines, self._inode = {}, 0, 0, status.st_ino
            stream.seek(self._bytes)
            rows, self._lines = _parse(stream, self.path, self._lines)
            self._rows |= rows
            self._bytes = stream.tell()

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
            ValueError: it is not of the schema, or too long to be read again.
        """
        row = finite({"schema": SCHEMA, "identity": identity, "about": about, "values": values})
        check(row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"a row of {len(line):,} bytes is longer than {MAX_LINE:,}: measure fewer values")
        self._rows[digest(identity)] = row
        if self.path is not None:
            self._make_folder(self.path)
            try:
                self._append(self.path, line)
            except OSError as error:
                raise NotKeptError(error.errno, error.strerror, str(self.path)) from error

    @contextmanager
    def claim(self, identity: Mapping[str, Any], wait: bool) -> Iterator[bool]:
        """Lock this measurement. Yields False if another process holds the lock and `wait` is False.

        The file is read again, so that `get` tells whether there is still something to measure.
        """
        if self.path is not None:
            self._make_folder(self.path)
        with self._locked(digest(identity), wait) as claimed:
            if claimed:
                self.read()
            yield claimed

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

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock. Yields False if another process holds it and `wait` is False."""
        if self.path is None:  # nothing is shared
            yield True
            return
        folder, lock = self.path.parent / ".lock", None
        try:
            lock = FileLock(own_folder(folder) / name)
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        except OSError as error:
            lock = None
            if not self._warned:
                self._warned = True
                words = "another process with these results may measure the same"
                warnings.warn(f"{folder} cannot be used for locks ({error.strerror}): {words}", stacklevel=4)
        try:
            yield True
        finally:
            if lock:
                lock.release()

    def _make_folder(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotKeptError(error.errno, error.strerror, str(path)) from error

    def _append(self, path: Path, line: bytes) -> None:
        with self._locked("file"), path.open("a+b") as stream:
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
        with _open(path) as stream:
            found |= _parse(stream, path)[0]
    return list(found.values())


def _open(path: Path) -> BinaryIO:
    """Open a file to read it. A pipe, which could block forever, is refused."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file: rename it, or choose another folder for the results", str(path))
    return path.open("rb")


def on_own_data(row: Row, about: Mapping[str, Any]) -> bool:
    """Whether a row is no accuracy, or one on the data that its checkpoint was trained on, as `about` says."""
    identity = row["identity"]
    trained_on = (about.get("data") or {}).get("fingerprint")
    return identity["kind"] not in ("text", "recall") or not trained_on or trained_on == identity.get("data")


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


def _parse(stream: BinaryIO, path: Path, number: int = 0) -> tuple[dict[str, Row], int]:
    """The rows after line `number`, by digest of their identity, and the number of the last line.

    Warns of lines that are left out.
    """
    rows: dict[str, Row] = {}
    problems = []
    for line in _lines(stream):
        number += 1
        if not line.strip():
            continue
        try:
            row = schema.parse(line)
            check(row)
            rows[digest(row["identity"])] = row
        except ValueError as error:
            problems.append(f"line {number}: {one_line(error, 200)}")
    if problems:
        what = f"{len(problems)} lines that are no rows of schema {SCHEMA}"
        warnings.warn(f"{path}: {what} are left out; they stay in the file ({problems[0]})", stacklevel=4)
    return rows, number


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Every line; of one beyond `MAX_LINE`, the start."""
    while line := stream.readline(MAX_LINE):
        end = line
        while not end.endswith(b"\n") and (end := stream.readline(MAX_LINE)):
            pass
        yield line
