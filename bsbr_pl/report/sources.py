"""What the numbers rest on: certificates, environments, data, commands; and what could not be measured."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .figures import Row, finite
from .quality import ARCHITECTURE
from .rows import Checkpoint, command, natural
from .studies import Findings
from .tables import Cell, Column, Table, tabulate

CHECKS = ("suffix", "future_gradient", "random_tokens", "decode_step", "decode_prefill")
HIDDEN = ("batch_size", "eval_batch_size", "num_workers", "cache_dir", "seed", "context_length")  # of data
CERTIFIED = (
    "suffix: the largest change of logits up to a token when all later tokens are others, for tokens around the edges of "
    "chunks and windows. future_gradient: gradient to later tokens. random_tokens: standard errors by which the loss on "
    "random tokens lies below chance. decode_step, decode_prefill: decoded logits against those of all tokens at once. "
    "Each check by itself is in results.jsonl. "
)
FAILED = (
    "What could not be read or measured; the rest went on without it. And runs that did not finish, or whose arguments "
    "were changed: they are measured, and averaged only with their like."
)
APART = "Numbers from different environments are neither averaged nor ranked against each other."
COUNTED = "What was run for the numbers in this report, and how many rows of results.jsonl it made of them."


def problems(findings: Findings) -> Table | None:
    """What went wrong with which checkpoint; and runs that did not finish or were changed."""
    found = [(subject(row), problem(row)) for row in findings.problems if not of_map(row)]
    columns = [Column("checkpoint"), Column("what went wrong")]
    frame = pd.DataFrame([*sorted(found), *marks(findings)], columns=[column.name for column in columns])
    return tabulate("problems", "Problems", FAILED, frame, columns)


def marks(findings: Findings) -> list[tuple[str, str]]:
    """Checkpoints whose run did not finish, or was changed, and the words for it."""
    return [(c.name, "; ".join(c.marks)) for c in findings.checkpoints.values() if c.marks]


def subject(row: Row) -> str:
    """The checkpoint that a row of kind `problem` is about."""
    return Checkpoint(str(row["identity"].get("checkpoint")), row["about"]).name


def problem(row: Row) -> str:
    return " ".join(str(row["values"].get("problem")).split())


def of_map(row: Row) -> bool:
    """Whether it is only the map that could not be had."""
    return (row["identity"].get("of") or {}).get("kind") == "map"


def certificates(findings: Findings, place: str) -> Table | None:
    """What each checkpoint was certified by in one environment; of the suffix checks, the largest."""
    rows = [row for row in findings.measured if row["identity"]["kind"] == "certificate"]
    certified = {row["identity"]["checkpoint"]: row for row in rows if findings.environment(row) == place}
    found, limits = [], {}
    for digest, checkpoint in findings.checkpoints.items():
        if row := certified.get(digest):
            checks = pd.DataFrame(row["values"]["checks"], columns=["name", "measured", "limit"], dtype=object)
            checks["kind"] = checks["name"].map(_kind)
            limits |= checks.groupby("kind")["limit"].last().to_dict()
            outcome = "passed" if row["values"]["passed"] else f"failed: {failed(row)}"
            facts = {"architecture": findings.labels[digest], "checkpoint": checkpoint.name, "outcome": outcome}
            found.append({**facts, **checks.groupby("kind")["measured"].apply(_worst).to_dict()})
    columns = [Column(f"{kind} (at most {limits[kind]:g})", key=kind) for kind in CHECKS if kind in limits]
    columns = [ARCHITECTURE, Column("checkpoint"), Column("outcome"), *columns]
    caption, frame = CERTIFIED + findings.source(certified.values()), pd.DataFrame(found, dtype=object)
    return tabulate(f"certificates_{place}", f"Certificates in {place}", caption, frame, columns)


def _kind(check: str) -> str:
    """`suffix` of `suffix_63`."""
    return next((kind for kind in CHECKS if check == kind or check.startswith(f"{kind}_")), check)


def _worst(measured: pd.Series) -> Cell:
    numbers = measured.map(finite)
    return numbers.max() if numbers.notna().all() else "not finite"


def failed(certificate: Row) -> str:
    """The first check that failed, with what was measured and its limit, and how many more did."""
    first, *others = [check for check in certificate["values"]["checks"] if not check["passed"]]
    measured, number = finite(first["measured"]), Column("").number
    text = f"{first['name']} {'not finite' if measured is None else number(measured)} above {number(first['limit'])}"
    return text + (f", and {len(others)} more check{'s' * (len(others) > 1)}" if others else "")


def environments(findings: Findings) -> Table | None:
    """What E1, E2, ... stand for."""
    found = [{"id": place, **(json.loads(text) or {})} for text, place in findings.environments.items()]
    frame = pd.DataFrame(found, dtype=object)
    frame = frame.map(_plain)
    return tabulate("environments", "Environments", APART, frame, [Column(str(name), key=name) for name in frame])


def _plain(value: Any) -> Cell:
    if isinstance(value, Mapping) and "commit" in value:
        return f"{str(value['commit'])[:10]}{' with changes' * bool(value.get('changed'))}"
    return None if value is None or value != value else str(value)


def data_sets(findings: Findings) -> Table | None:
    """What D1, D2, ... stand for."""
    seen = {c.fingerprint: c for c in reversed(findings.checkpoints.values())}
    found = []
    for fingerprint, number in findings.data.items():
        checkpoint = seen.get(fingerprint, Checkpoint("", {}))
        given = checkpoint.mapping("data.arguments").items()
        chosen = ", ".join(f"{name}={value}" for name, value in given if name not in HIDDEN and value is not None)
        facts = {"id": number, "class": checkpoint.get("data.class"), "arguments": chosen}
        found.append({**facts, "fingerprint": fingerprint or "unknown"})
    columns = [Column(name) for name in ("id", "class", "arguments", "fingerprint")]
    return tabulate("data", "Data", "What checkpoints were trained and evaluated on.", pd.DataFrame(found), columns)


def commands(findings: Findings) -> Table | None:
    """What C1, C2, ... stand for, and how much each measured."""
    made = [(command(row), findings.environment(row)) for row in findings.measured]
    rows = pd.DataFrame(made, columns=["command", "environment"])
    found = rows.groupby("command")["environment"].agg(environment=_listed, rows="size").reset_index()
    found.insert(0, "id", found["command"].map(findings.commands))
    columns = [Column(name) for name in ("id", "command", "environment", "rows")]
    return tabulate("commands", "Commands", COUNTED, found, columns)


def _listed(places: pd.Series) -> str:
    return ", ".join(sorted(set(places), key=natural))
