"""A board: a results.jsonl to which anyone may append models. Rows are checked before they are appended."""

import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bsbr_pl.report.rows import Checkpoint
from bsbr_pl.results import CLOSE, Results, Row, on_own_data, read_rows
from bsbr_pl.utils.files import write_whole
from bsbr_pl.values import as_json

from .evaluation import VERSIONS
from .saved_data import HERE, DataLocation, open_saved

SEEDS = 3  # that a model needs at least
KINDS = ("certificate", "text", "recall", "cost", "training")  # that a board holds
BUDGET = ("parameters", "run.steps", "run.tokens", "run.batch", "run.flops")


@dataclass
class Entry:
    """The seeds of one model: their accuracies, measured in one environment on one kind of data and one split."""

    name: str
    certificates: Mapping[str, Row]  # by checkpoint; also those of other models
    accuracies: list[Row] = field(default_factory=list)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        return {row["identity"]["checkpoint"]: _checkpoint(row) for row in self.accuracies}


def submit(paths: Sequence[str], board: str = "results/board.jsonl", data: DataLocation = HERE) -> int:
    """Check the rows of models, and append those of every model that passes to a board.

    A model passes if each of at least three seeds has a passed certificate, finished, states its budget, and was
    measured from a commit without changes; and if its bits per byte follow from the nats and bytes of its rows, and
    the bytes are those of the text. The text is opened, so that its bytes can be counted.

    Returns 1 if a model was refused; a sentence says why.

    Args:
        paths: results.jsonl files that evaluate.py wrote
        board: results.jsonl to append to
        data: present location of the training text, if its prepared tokens are not in the cache

    Raises:
        ValueError: a line is no row, or the files hold no accuracy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            rows = read_rows(paths)
        except UserWarning as warning:
            raise ValueError(f"nothing is appended, because a line is no row: {warning}") from None
    rows = [row for row in rows if row["identity"].get("version") == VERSIONS.get(row["identity"]["kind"])]
    found = entries(rows)
    if not found:
        raise ValueError(f"no accuracy that this version measured is in {', '.join(paths)}: give rows of evaluate.py")
    passed: set[str] = set()
    for entry in found:
        reasons = list(refusals(entry, data))
        if not reasons:
            passed |= entry.checkpoints.keys()
        for reason in reasons:
            print(f"refused: {entry.name}: {reason}", file=sys.stderr)
    wanted = [row for row in rows if row["identity"]["kind"] in KINDS and _checkpoint(row).digest in passed]
    print(f"{append(Path(board), wanted)} rows of {len(passed)} checkpoints appended to {board}")
    return int(any(entry.checkpoints.keys() - passed for entry in found))


def entries(rows: Iterable[Row]) -> list[Entry]:
    """Accuracies by model, environment, data and split. Samples of a recall task depend on the seed, so its
    fingerprint differs between seeds; its other arguments are in `config`."""
    found: dict[str, Entry] = {}
    certificates = {row["identity"]["checkpoint"]: row for row in rows if row["identity"]["kind"] == "certificate"}
    for row in rows:
        identity, checkpoint = row["identity"], _checkpoint(row)
        if identity["kind"] not in ("text", "recall") or not on_own_data(row, row["about"]):
            continue
        data = identity["data"] if identity["kind"] == "text" else None
        place = as_json([checkpoint.config, identity.get("environment"), identity["split"], data])
        name = f"{checkpoint.architecture}, {checkpoint.get('data.class')}, {identity['split']} split"
        found.setdefault(place, Entry(f"{name}, {checkpoint.length}", certificates)).accuracies.append(row)
    return list(found.values())


def refusals(entry: Entry, data: DataLocation) -> Iterator[str]:
    """Why a board does not take a model, a sentence each."""
    seeds = {checkpoint.seed for checkpoint in entry.checkpoints.values()} - {None}
    if len(seeds) < SEEDS:
        yield f"{len(seeds)} seeds, fewer than {SEEDS}: train it with other values of seed_everything"
    for digest, checkpoint in entry.checkpoints.items():
        reasons = [*_of_certificate(entry.certificates.get(digest)), *_of_budget(checkpoint)]
        yield from (f"seed {checkpoint.seed}: {reason}" for reason in reasons)
    for row in entry.accuracies:
        reasons = list(_of_commit(row))
        if row["identity"]["kind"] == "text":
            reasons += _of_bytes(row, data)
        yield from (f"seed {_checkpoint(row).seed}: {reason}" for reason in reasons)


def _of_certificate(row: Row | None) -> Iterator[str]:
    if row is None:
        yield f"it has no certificate of version {VERSIONS['certificate']}: evaluate its checkpoint with this release"
        return
    checks = row["values"]["checks"]
    failed = [one["name"] for one in checks if one["measured"] is None or not one["measured"] <= one["limit"]]
    if failed or not checks or not row["values"]["passed"]:
        yield f"its certificate failed ({', '.join(failed) or 'no check was measured'})"


def _of_budget(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.finished is not True:
        yield f"its run did not finish: {checkpoint.length}"
    if absent := [name for name in BUDGET if not checkpoint.get(name)]:
        yield f"its budget is not stated: {', '.join(absent)} is missing"


def _of_commit(row: Row) -> Iterator[str]:
    commit = (row["identity"].get("environment") or {}).get("commit") or {}
    if not commit.get("commit"):
        yield "the commit that measured it is not known: evaluate its checkpoint from a git checkout"
    elif commit.get("changed"):
        yield f"it was measured with changes to commit {commit['commit'][:8]}: commit them and evaluate again"


def _of_bytes(row: Row, data: DataLocation) -> Iterator[str]:
    """Nats and bytes must be those of the blocks, and the bytes those of the text."""
    values, nats = row["values"], row["values"]["loss"] * row["values"]["tokens"]
    blocks = values["blocks"]
    sums = [(sum(blocks["nats"]), nats), (sum(blocks["bytes"]), values["bytes"])]
    if not all(math.isclose(a, b, rel_tol=CLOSE) for a, b in sums):
        yield "its nats and bytes are not those of its blocks"
    try:
        counted = _bytes_of(as_json(row["about"]["data"]), row["identity"]["split"], data)
    except (ValueError, OSError) as error:
        yield f"the bytes of its text cannot be counted: {error}"
        return
    if counted != values["bytes"]:
        yield f"its text has {counted:,} bytes, not {values['bytes']:,}"


@cache
def _bytes_of(described: str, split: str, location: DataLocation) -> int:
    """The bytes of a split, counted in the text itself. `described` is `about.data` as JSON."""
    about: Mapping[str, Any] = json.loads(described)
    text = open_saved(about["class"], about["arguments"], about["fingerprint"], location, {}, False).text_data
    assert text is not None
    return len(text.text(split))


def append(board: Path, rows: Sequence[Row]) -> int:
    """Append the rows that a board does not have, all or none, under its lock. Returns how many these are."""
    results = Results(board)
    with results.claim({"kind": "board"}, wait=True):
        new = [row for row in rows if results.get(row["identity"]) is None]
        if new:
            old = board.read_bytes() if board.exists() else b""
            separator = b"\n" if old and not old.endswith(b"\n") else b""
            lines = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in new)
            write_whole(board, old + separator + lines)
    return len(new)


def _checkpoint(row: Row) -> Checkpoint:
    about = row["about"]
    return Checkpoint((about.get("checkpoint") or {}).get("digest") or row["identity"]["checkpoint"], about)
