"""What the numbers rest on: certificates, environments, data, commands; and what could not be measured."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoints import Checkpoint
from .budgets import marks
from .findings import Findings, natural
from .numbers import Row, finite
from .table import ARCHITECTURE, Cell, Column, Columns, Table, tabulate


def problems(findings: Findings) -> Table | None:
    """What went wrong with which checkpoint, runs that did not finish or were changed among it."""
    columns: Columns = [(Column("checkpoint"), lambda one: one[0]), (Column("what went wrong"), lambda one: one[1])]
    caption = (
        "What could not be read or measured; the rest went on without it. And runs that did not finish, or whose "
        "arguments were changed: they are measured, and averaged only with their like."
    )
    return tabulate("problems", "Problems", caption, [*findings.problems.items(), *marks(findings)], columns)


def certificates(findings: Findings, place: str) -> Table | None:
    """What each checkpoint was certified by in one environment; of the suffix checks, the largest."""
    found = {
        row["identity"]["checkpoint"]: row
        for row in findings.rows
        if row["identity"]["kind"] == "certificate" and findings.environment(row) == place
    }
    certified = [checkpoint for checkpoint in findings.checkpoints if checkpoint.digest in found]

    def checks(one: Checkpoint, of: str) -> list[dict[str, Any]]:
        every = found[one.digest]["values"]["checks"]
        return [check for check in every if check["name"] == of or check["name"].startswith(f"{of}_")]

    def worst(of: str) -> Callable[[Checkpoint], Cell]:
        def cell(one: Checkpoint) -> Cell:
            numbers = [finite(check["measured"]) for check in checks(one, of)]
            known = [number for number in numbers if number is not None]
            return max(known, default=None) if len(known) == len(numbers) else "not finite"

        return cell

    kinds = ("suffix", "future_gradient", "random_tokens", "decode_step", "decode_prefill")
    limits = {of: check["limit"] for one in certified for of in kinds for check in checks(one, of)}
    columns: Columns = [
        (ARCHITECTURE, lambda one: findings.labels[one.digest]),
        (Column("checkpoint"), lambda one: one.name),
        (
            Column("outcome"),
            lambda one: "passed" if found[one.digest]["values"]["passed"] else f"failed: {failed(found[one.digest])}",
        ),
        *((Column(f"{of} (at most {limit:g})"), worst(of)) for of, limit in limits.items()),
    ]
    caption = (
        "suffix: the largest change of logits up to a token when all later tokens are others, for tokens around the "
        "edges of chunks and windows. future_gradient: gradient to later tokens. random_tokens: standard errors by "
        "which the loss on random tokens lies below chance. decode_step, decode_prefill: decoded logits against those "
        "of all tokens at once. Each check by itself is in results.jsonl. "
    )
    caption += findings.source(list(found.values()))
    return tabulate(f"certificates_{place}", f"Certificates in {place}", caption, certified, columns)


def failed(certificate: Row) -> str:
    """The first check that failed, with what was measured and its limit, and how many more did."""
    first, *others = [check for check in certificate["values"]["checks"] if not check["passed"]]
    measured, number = finite(first["measured"]), Column("").number
    text = f"{first['name']} {'not finite' if measured is None else number(measured)} above {number(first['limit'])}"
    return text + (f", and {len(others)} more check{'s' * (len(others) > 1)}" if others else "")


def environments(findings: Findings) -> Table | None:
    """What E1, E2, ... stand for."""
    facts = [(place, json.loads(text)) for text, place in findings.environments.items()]
    names = list(dict.fromkeys(name for _, of in facts for name in of))
    columns: Columns = [
        (Column("id"), lambda one: one[0]),
        *((Column(name), lambda one, name=name: _plain(one[1].get(name))) for name in names),
    ]
    caption = "Numbers from different environments are neither averaged nor ranked against each other."
    return tabulate("environments", "Environments", caption, facts, columns)


def _plain(value: Any) -> Cell:
    if isinstance(value, Mapping) and "commit" in value:
        return f"{str(value['commit'])[:10]}{' with changes' * bool(value.get('changed'))}"
    return None if value is None else str(value)


def data_sets(findings: Findings) -> Table | None:
    """What D1, D2, ... stand for."""
    hidden = ("batch_size", "eval_batch_size", "num_workers", "cache_dir", "seed", "context_length")

    def arguments(one: Any) -> str:
        chosen = {k: v for k, v in one[2].data_arguments.items() if k not in hidden and v is not None} if one[2] else {}
        return ", ".join(f"{name}={value}" for name, value in chosen.items())

    seen = {c.data_fingerprint or "": c for c in reversed(findings.checkpoints)}
    columns: Columns = [
        (Column("id"), lambda one: one[0]),
        (Column("class"), lambda one: one[2] and one[2].data_class),
        (Column("arguments"), arguments),
        (Column("fingerprint"), lambda one: one[1] or "unknown"),
    ]
    items = [(number, fingerprint, seen.get(fingerprint)) for fingerprint, number in findings.data.items()]
    return tabulate("data", "Data", "What checkpoints were trained and evaluated on.", items, columns)


def commands(findings: Findings) -> Table | None:
    """What C1, C2, ... stand for, and how much each measured."""
    by_command: dict[str, list[Row]] = defaultdict(list)
    for row in findings.rows:
        by_command[findings.command(row)].append(row)
    columns: Columns = [
        (Column("id"), lambda one: findings.commands[one[0]]),
        (Column("command"), lambda one: one[0]),
        (Column("environment"), lambda one: ", ".join(sorted({findings.environment(r) for r in one[1]}, key=natural))),
        (Column("rows"), lambda one: len(one[1])),
    ]
    caption = "What was run for the numbers in this report, and how many rows of results.jsonl it made of them."
    return tabulate("commands", "Commands", caption, sorted(by_command.items()), columns)
