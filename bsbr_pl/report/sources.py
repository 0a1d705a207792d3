"""Certificates, environments, data, commands, attention maps and problems."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pandas as pd
from PIL import Image

from .figures import failed
from .plots import Picture
from .rows import Checkpoint, command, listed
from .studies import Findings
from .tables import Cell, Column, Table, table

CHECKS = ("suffix", "future_gradient", "random_tokens", "decode_step", "decode_prefill")  # kinds with a column
HIDDEN = ("batch_size", "eval_batch_size", "num_workers", "cache_dir", "seed", "context_length")  # of data
THUMBNAIL, QUALITY = 360, 15  # pixels, of 100: of maps in the page; plots/ has them in full
MOST_PIXELS = 4_000_000  # of a map


def problems(findings: Findings) -> Table | None:
    """Rows of older versions; each checkpoint's problem; also runs that did not finish or were changed."""
    found = [*findings.older, *findings.problems(of_maps=False), *marks(findings)]
    return table("problems", "", pd.DataFrame(found, columns=["checkpoint", "what went wrong"]))


def marks(findings: Findings) -> list[tuple[str, str]]:
    """Checkpoints whose run did not finish or was changed, and the words for it."""
    return [(c.name, "; ".join(c.marks)) for c in findings.checkpoints.values() if c.marks]


def certificates(findings: Findings, environment: str) -> Table | None:
    """The checks in one environment; of the suffix checks, the largest. Equal models that passed share a row."""
    certified = findings.of("certificate", environment)
    found: list[dict[str, Any]] = []
    limits = defaultdict[str, set[float]](set)
    for digest, checkpoint in findings.checkpoints.items():
        if row := certified.get(digest):
            checks = pd.DataFrame(row["values"]["checks"], columns=["name", "measured", "limit"], dtype=object)
            by_kind = checks.groupby(checks["name"].map(_kind))
            for kind, limit in by_kind["limit"].last().items():
                limits[str(kind)].add(limit)
            outcome = "passed" if row["values"]["passed"] else f"failed: {failed(row)}"
            facts = {"architecture": findings.labels[digest], "checkpoint": checkpoint.name, "outcome": outcome}
            found.append({**facts, **by_kind["measured"].apply(_worst).to_dict()})
    columns = []
    for kind in CHECKS:
        if kind in limits:  # it is larger for modules that compute in float32
            words = " or ".join(f"{limit:g}" for limit in sorted(limits[kind]))
            columns.append(Column(f"{kind} (at most {words})", key=kind))
    frame = _together(pd.DataFrame(found, dtype=object))
    source = findings.source(certified.values())
    return table("certificates", environment, frame, columns, environment=environment, source=source)


def _together(found: pd.DataFrame) -> pd.DataFrame:
    """One row for all checkpoints of an architecture that passed, with the largest value of each check."""
    if found.empty:
        return found
    rows = []
    for (_, outcome), group in found.groupby(["architecture", "outcome"], sort=False):
        if outcome == "passed" and len(group) > 1:
            largest = {kind: group[kind].max() for kind in CHECKS if kind in group}
            group = group.head(1).assign(checkpoint=f"{len(group)} checkpoints", **largest)
        rows.append(group)
    return pd.concat(rows)


def _kind(check: str) -> str:
    """`suffix` of `suffix_63`."""
    for kind in CHECKS:
        if check == kind or check.startswith(f"{kind}_"):
            return kind
    return check


def _worst(measured: pd.Series) -> Cell:
    return measured.max() if measured.notna().all() else "not finite"


def environments(findings: Findings) -> Table | None:
    """The environments E1, E2, ..., and the commits that measured there."""
    found = []
    for name, facts in findings.environments.items():
        commits = [_plain(commit) for (of, _), commit in findings.commits.items() if of == name and commit]
        found.append({"id": name, **facts, "commits": ", ".join(sorted(map(str, commits))) or None})
    frame = pd.DataFrame(found, dtype=object).map(_plain)
    return table("environments", "", frame, map(Column, frame))


def _plain(value: Any) -> Cell:
    if isinstance(value, Mapping) and "commit" in value:
        commit = str(value["commit"])[:10]
        return f"{commit} with changes" if value.get("changed") else commit
    return None if value is None or value != value else str(value)  # NaN is a fact that is missing


def data_sets(findings: Findings) -> Table | None:
    """The data sets D1, D2, ..."""
    seen = {c.fingerprint: c for c in reversed(findings.checkpoints.values())}
    found = []
    for fingerprint, number in findings.data.items():
        checkpoint = seen.get(fingerprint, Checkpoint("", {}))
        given = (checkpoint.get("data.arguments") or {}).items()
        chosen = ", ".join(f"{name}={value}" for name, value in given if name not in HIDDEN and value is not None)
        seeds = sum(of == fingerprint for of in findings.seeds.values())
        shown = f"{fingerprint or 'unknown'}{f' and of {seeds - 1} other seeds' * (seeds > 1)}"
        found.append((number, checkpoint.get("data.class"), chosen, shown))
    return table("data", "", pd.DataFrame(found, columns=["id", "class", "arguments", "fingerprint"]))


def commands(findings: Findings) -> Table | None:
    """The commands C1, C2, ..., and how many rows each measured."""
    measured = [(command(row), findings.environment_name(row)) for row in findings.measured]
    rows = pd.DataFrame(measured, columns=["command", "environment"])
    found = rows.groupby("command")["environment"].agg(environment=listed, rows="size").reset_index()
    return table("commands", "", found.assign(id=found["command"].map(findings.commands)))


def _thumbnail(png: bytes) -> str:
    """A PNG as a small picture within the page.

    Raises:
        ValueError: it is too large.
        OSError: it is no PNG.
    """
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"a map must have at most {MOST_PIXELS:,} pixels, got {image.size}")
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(stream, "webp", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def maps(findings: Findings) -> list[Picture | str]:
    """The attention map of one checkpoint of each label and data set; and sentences about those without a map."""
    rows, found = findings.of("map"), dict[tuple[str, str], Picture]()
    for digest, checkpoint in findings.checkpoints.items():
        label, name = findings.labels[digest], f"attention_{len(found) + 1}"
        if digest in rows and (checkpoint.fingerprint, label) not in found:
            values = rows[digest]["values"]
            with suppress(ValueError, OSError, SyntaxError, Image.DecompressionBombError):  # no picture
                png, caption = base64.b64decode(values["png"]), f"{checkpoint.name}. {values['caption']}"
                shown = Picture(name, f"Attention of {label}", caption, "png", png, other=_thumbnail(png))
                found[checkpoint.fingerprint, label] = shown
    missing = [f"No map of {name}: {problem}" for name, problem in findings.problems(of_maps=True)]
    return [*found.values(), *missing]
