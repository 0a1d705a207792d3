"""What results hold, sorted into what may be compared.

Nothing is averaged but seeds: a `Study` holds what may stand in one table, trained with one budget, measured in one
environment on one split of one data set; a `Group` of it, finished runs that differ in their seed alone. A run that did
not finish is a group by itself.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..checkpoints import SIZES, Checkpoint, architecture, labels
from ..evaluation import VERSION, Evaluation, body
from ..runs import Run
from .numbers import Row, cost, nearest, pooled
from .table import Measured

MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # of reading what a checkpoint recorded


@dataclass
class Member:
    """One checkpoint's rows in one environment on one split of its data."""

    checkpoint: Checkpoint
    certificate: Row | None
    text: dict[int, Row] = field(default_factory=dict)  # by length
    recall: Row | None = None

    @property
    def status(self) -> str:
        if self.certificate is None:
            return "not measured"
        return "passed" if self.certificate["values"]["passed"] else "disqualified"

    @property
    def own(self) -> Row | None:
        """What was found at the length that training validated at; on a recall task, all that was found."""
        return self.recall or self.text.get(self.length or 0) or self.text.get(min(self.text, default=0))

    @property
    def length(self) -> int | None:
        """Tokens of the contexts that training validated in."""
        arguments = self.checkpoint.data_arguments
        return arguments.get("eval_context_length") or arguments.get("context_length")


@dataclass
class Group:
    """Finished runs that differ in their seed alone and share their certificate's outcome; or one unfinished run."""

    label: str
    members: list[Member]
    costs: dict[int, Row]  # by length

    @property
    def status(self) -> str:
        return self.members[0].status

    @property
    def run(self) -> Run:
        """Of the first seed; those of the others have the same budget."""
        return self.members[0].checkpoint.run

    @property
    def training_flops(self) -> float | None:
        return self.members[0].checkpoint.training_flops

    @property
    def own(self) -> list[Row]:
        return self._all([member.own for member in self.members])

    def at(self, length: int) -> list[Row]:
        """Accuracies at a context length; none unless every seed has one."""
        return self._all([member.text.get(length) for member in self.members])

    def cost(self, length: int | None, name: str) -> Measured | None:
        return cost(self.costs.get(length or 0), name)

    @property
    def trained_length(self) -> int | None:
        """Tokens of the contexts that it was trained on, or of the longest of them."""
        arguments = self.members[0].checkpoint.data_arguments
        try:
            return int(arguments.get("context_length") or max(length for length, *_ in arguments["train_segments"]))
        except MALFORMED:
            return None

    @property
    def training_seconds(self) -> Measured | None:
        """Of a training pass at the length of training, or the nearest measured."""
        return self.cost(nearest(self.costs, self.trained_length), "training")

    @staticmethod
    def _all(rows: list[Row | None]) -> list[Row]:
        found = [row for row in rows if row is not None]
        return found if len(found) == len(rows) else []


@dataclass
class Study:
    """Groups that may be compared with each other."""

    name: str  # for files
    title: str
    split: str
    recall: bool
    groups: list[Group]
    data: str  # which data and which tokenizer, in words
    beside: "list[Study]" = field(default_factory=list, repr=False, compare=False)  # of every budget on the same data

    @property
    def units(self) -> str:
        """What intervals are drawn over."""
        return "samples" if self.recall else "documents"

    def ranked(self) -> list[Group]:
        """The certified groups, best first: by bits per byte, or by accuracy on a recall task."""
        name, sign = ("accuracy", -1) if self.recall else ("bits_per_byte", 1)
        found = [(pooled(group.own, name), group) for group in self.groups if group.status == "passed"]
        known = [(sign * value.value, group.label, group) for value, group in found if value]
        return [group for _, _, group in sorted(known, key=lambda one: one[:2])]

    def ordered(self) -> tuple[list[Group], int]:
        """Every group: the ranked, those that could not be ranked, the disqualified; and how many are ranked."""
        ranked = self.ranked()
        rest = [group for group in self.groups if group not in ranked]
        return ranked + sorted(rest, key=lambda group: (group.status == "disqualified", group.label)), len(ranked)

    @property
    def lengths(self) -> list[int]:
        """Context lengths that text was predicted at."""
        return sorted({length for group in self.groups for member in group.members for length in member.text})

    @property
    def rows(self) -> list[Row]:
        """Of its accuracies and certificates."""
        members = [member for group in self.groups for member in group.members]
        return [row for m in members for row in (m.certificate, m.recall, *m.text.values()) if row is not None]


class Findings:
    """What the results say about the given checkpoints, and about no others."""

    def __init__(self, evaluation: Evaluation) -> None:
        usable = [c for c in evaluation.checkpoints if c.module is not None]
        self.labels = labels(usable)  # by digest
        self.checkpoints = sorted(usable, key=lambda c: (self.labels[c.digest], c.seed or 0, c.name))
        self.problems = dict(sorted(evaluation.problems.items()))
        self.bodies = {c.digest: body(c) for c in self.checkpoints}
        self._trained_on = {c.digest: c.data_fingerprint for c in usable}
        known, bodies = {c.digest for c in self.checkpoints}, set(self.bodies.values())
        self.rows = [
            row
            for row in sorted(evaluation.results.rows, key=lambda row: key(row["identity"]))
            if row["identity"].get("version") == VERSION
            and row["identity"].get("checkpoint") in (bodies if row["identity"].get("kind") == "cost" else known)
            and self._is_of_its_data(row["identity"], evaluation)
        ]
        self.environments = _numbered("E", (key(row["identity"]["environment"]) for row in self.rows))
        self.commands = _numbered("C", map(self.command, self.rows))
        prints = [row["identity"]["data"] or "" for row in self.rows if "data" in row["identity"]]
        self.data = _numbered("D", [*prints, *(c.data_fingerprint or "" for c in self.checkpoints)])
        self._split = evaluation.split

    def _is_of_its_data(self, identity: dict[str, Any], evaluation: Evaluation) -> bool:
        """Whether a row is no accuracy, or one on the data of the training, which has not changed since."""
        if identity.get("kind") not in ("text", "recall"):
            return True
        trained_on = self._trained_on[identity["checkpoint"]]
        return identity["checkpoint"] not in evaluation.changed and trained_on in (None, identity.get("data"))

    @cached_property
    def names(self) -> dict[str, str]:
        """A name for each body: its architecture, and the sizes in which those of one architecture differ."""
        first = {self.bodies[c.digest]: c for c in reversed(self.checkpoints)}
        own = {one: architecture(c) for one, c in first.items()}
        names: dict[str, str] = {}
        for one, c in sorted(first.items()):
            assert c.module is not None
            alike = [o.module.hparams for b, o in first.items() if own[b] == own[one] and o.module is not None]
            varied = [f"{s}={c.module.hparams[s]}" for s in SIZES if len({hparams[s] for hparams in alike}) > 1]
            name = own[one] + (f" [{', '.join(varied)}]" if varied else "")
            names[one] = name if name not in names.values() else f"{name} ({len(names) + 1})"
        return names

    def environment(self, row: Row) -> str:
        """E1, E2, ... that a row was measured in."""
        return self.environments[key(row["identity"]["environment"])]

    @staticmethod
    def command(row: Row) -> str:
        """What made a row."""
        return row["about"].get("command") or "not recorded"

    def cost_source(self, place: str) -> str:
        """`source` of an environment's costs, and whether all of a length were timed against each other."""
        rows = [row for rows in self.costs[place].values() for row in rows.values()]
        rounds = {(row["identity"]["length"], key(row["about"].get("timed_with"))) for row in rows}
        apart = len(rounds) > len({length for length, _ in rounds})
        return "Not all of a length were timed in the same rounds. " * apart + self.source(rows)

    def source(self, rows: Sequence[Row]) -> str:
        """Where numbers are from, for a caption."""
        places = sorted({self.environment(row) for row in rows}, key=natural)
        commands = {self.commands[self.command(row)] for row in rows}
        asked = ", ".join(sorted(commands, key=natural))
        return f"Environment {', '.join(places)}; command{'s' * (len(commands) > 1)} {asked}." if rows else ""

    @cached_property
    def costs(self) -> dict[str, dict[str, dict[int, Row]]]:
        """By environment, name of the body, and length; of several, the one of most rounds."""
        found: dict[str, dict[str, dict[int, Row]]] = {}
        for row in self.rows:
            identity = row["identity"]
            if identity["kind"] == "cost":
                where = found.setdefault(self.environment(row), {}).setdefault(self.names[identity["checkpoint"]], {})
                before = where.get(identity["length"])
                if before is None or before["identity"].get("rounds", 0) < identity.get("rounds", 0):
                    where[identity["length"]] = row
        return {place: dict(sorted(found[place].items())) for place in sorted(found, key=natural)}

    @cached_property
    def studies(self) -> list[Study]:
        """Every environment, data set, split and budget by itself."""
        found = []
        for place in self.environments.values():
            rows = [row for row in self.rows if self.environment(row) == place]
            for where, members in self._members(rows).items():
                budgets: dict[Any, list[Member]] = defaultdict(list)
                for member in sorted(members, key=lambda member: -member.checkpoint.run.steps):
                    budgets[member.checkpoint.run.budget].append(member)
                beside = [self._study(place, where, of) for of in budgets.values()]
                for number, study in enumerate(beside, 1):
                    study.beside = beside
                    if len(beside) > 1:
                        study.name += f"_B{number}"
                        length, _, batch, _ = study.groups[0].run.budget
                        study.title += f": {length}" + (f" of {batch:,} windows" if batch else "")
                found += beside
        return found

    def _study(self, place: str, where: tuple[str, str, bool], members: list[Member]) -> Study:
        """The study of members with one budget."""
        data, split, recall = where
        by_label: dict[tuple[str, str], list[Member]] = defaultdict(list)
        for member in members:
            elsewhere = "" if member.checkpoint.data_fingerprint else " [not known what it was trained on]"
            by_label[self.labels[member.checkpoint.digest] + elsewhere, member.status].append(member)
        costs = self.costs.get(place, {})
        groups = [
            Group(label, of, costs.get(self.names[self.bodies[of[0].checkpoint.digest]], {}))
            for (label, _), of in by_label.items()
        ]
        facts = next(json.loads(text) for text, number in self.environments.items() if number == place)
        device = f"{place} ({facts.get('device', 'device unknown')}, {facts.get('dtype', 'dtype unknown')})"
        title = f"{self.data_name(data)}, {split} split, on {device}"
        tokenizer = members[0].checkpoint.tokenizer
        words = f"data {self.data_name(data)}" + (f", tokenizer {tokenizer}" if tokenizer else "")
        return Study(f"{place}_{self.data[data]}_{_slug(split)}", title, split, recall, groups, words)

    def _members(self, rows: Sequence[Row]) -> dict[tuple[str, str, bool], list[Member]]:
        """The rows of one environment by (data fingerprint, split, whether a recall task), and checkpoint."""
        certificates = {row["identity"]["checkpoint"]: row for row in rows if row["identity"]["kind"] == "certificate"}
        measured = [row for row in rows if row["identity"]["kind"] in ("text", "recall")]

        def where(row: Row) -> tuple[str, str, bool]:
            identity = row["identity"]
            return identity.get("data") or "", identity["split"], identity["kind"] == "recall"

        places = sorted(map(where, measured), key=lambda place: (place[2], place))
        found: dict[tuple[str, str, bool], list[Member]] = {place: [] for place in places}
        for checkpoint in self.checkpoints:
            own = [row for row in measured if row["identity"]["checkpoint"] == checkpoint.digest]
            certificate = certificates.get(checkpoint.digest)
            if not own and certificate is None:
                continue
            data = checkpoint.data_fingerprint or ""
            # One without accuracies, as the disqualified are, stands beside those that saw the same data.
            beside = sorted(set(map(where, own))) or [place for place in found if place[0] == data]
            for place in beside or [(data, self._split, checkpoint.data_class not in (None, "TextData"))]:
                here = [row for row in own if where(row) == place]
                text = {row["identity"]["length"]: row for row in here if not place[2]}
                recall = here[0] if here and place[2] else None
                found.setdefault(place, []).append(Member(checkpoint, certificate, text, recall))
        return found

    def data_name(self, fingerprint: str) -> str:
        """For a heading: class, source, D1."""
        seen = [c for c in self.checkpoints if (c.data_fingerprint or "") == fingerprint and c.data_class]
        source = str(seen[0].data_arguments.get("source", "")) if seen else ""
        name = source.rstrip("/").split("/")[-1] if source.startswith((".", "/")) else source
        return " ".join(filter(None, (seen[0].data_class if seen else "data", name, self.data[fingerprint])))


def key(identity: Any) -> str:
    """Plain values as text, the same whatever the order of their keys."""
    return json.dumps(identity, sort_keys=True, default=str)


def _numbered(letter: str, texts: Any) -> dict[str, str]:
    """E1, E2, ... for different texts in their order."""
    return {text: f"{letter}{i}" for i, text in enumerate(sorted(set(texts)), 1)}


def natural(name: str) -> tuple[int, str]:
    return len(name), name


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text)[:40]
