"""What may be compared with what.

Nothing is averaged but seeds: a `Study` holds what may stand in one table, trained with one budget, measured in one
environment on one split of one data set; a `Group` of it, finished runs that differ in their seed alone. A run that did
not finish is a group by itself.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from .figures import OWN, Row, finite, nearest, pooled, timing, wide
from .labels import labels, sized
from .rows import Checkpoint, Rows, natural
from .tables import Measured


@dataclass(eq=False)
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
    def length(self) -> int | None:
        """Tokens of the contexts that training validated in."""
        return self.checkpoint.count("data.validation_length")

    @property
    def own(self) -> Row | None:
        """What was found at the length that training validated at; on a recall task, all that was found."""
        return self.recall or self.text.get(self.length or 0) or self.text.get(min(self.text, default=0))

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """Accuracies by length, and that at the member's own length once more."""
        return [*self.text.items(), *([(OWN, self.own)] if self.own else [])]

    @cached_property
    def figures(self) -> pd.DataFrame:
        return pooled(self.rows, 1)


@dataclass(eq=False)
class Group:
    """Finished runs that differ in their seed alone and share their certificate's outcome; or one unfinished run."""

    label: str
    members: list[Member]
    costs: pd.DataFrame  # of its body: length, cost, figure

    @property
    def checkpoint(self) -> Checkpoint:
        """Of the first seed; the others have the same budget."""
        return self.members[0].checkpoint

    @property
    def status(self) -> str:
        return self.members[0].status

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def own(self) -> list[Row]:
        """At the own length; none unless every seed has one."""
        found = [member.own for member in self.members if member.own]
        return found if len(found) == len(self.members) else []

    @cached_property
    def figures(self) -> pd.DataFrame:
        """What its seeds have together."""
        return pooled([row for member in self.members for row in member.rows], len(self.members))

    def quality(self, name: str) -> Measured | None:
        """A figure at the own length."""
        found = self.figures[(self.figures["length"] == OWN) & (self.figures["part"] == "") & (self.figures["name"] == name)]
        return None if found.empty else found["figure"].iloc[0]

    @property
    def trained_length(self) -> int | None:
        """Tokens of the contexts that it was trained on, or of the longest of them."""
        return self.checkpoint.count("data.trained_length")

    @property
    def training_flops(self) -> float | None:
        """Counted, not measured."""
        return finite(self.checkpoint.get("run.flops"))

    @property
    def cost_lengths(self) -> set[int]:
        return set(self.costs["length"])

    def cost(self, length: int | None, name: str) -> Measured | None:
        found = self.costs[(self.costs["length"] == length) & (self.costs["cost"] == name)]
        return None if found.empty else found["figure"].iloc[0]

    @property
    def training_seconds(self) -> Measured | None:
        """Of a training pass at the length of training, or the nearest measured."""
        return self.cost(nearest(self.cost_lengths, self.trained_length), "training")


class Place(NamedTuple):
    """Where accuracies may be compared."""

    data: str  # fingerprint
    split: str
    recall: bool


@dataclass
class Study:
    """Groups that may be compared with each other."""

    name: str  # for files
    title: str
    split: str
    recall: bool
    groups: list[Group]  # those ranked, the best first; those that could not be ranked; the disqualified
    ranked: list[Group]
    data: str  # which data and which tokenizer, in words
    source: str  # where its numbers are from
    beside: "list[Study]" = field(default_factory=list, repr=False, compare=False)  # of every budget on the same data

    @property
    def quality(self) -> str:
        """The figure that groups are ranked by."""
        return QUALITY[self.recall][0]

    @property
    def units(self) -> str:
        """What intervals are drawn over."""
        return "samples" if self.recall else "documents"

    @property
    def members(self) -> list[tuple[Group, Member]]:
        return [(group, member) for group in self.groups for member in group.members]

    @property
    def lengths(self) -> list[int]:
        """Context lengths that text was predicted at."""
        return sorted({length for _, member in self.members for length in member.text})

    @property
    def cost_length(self) -> int:
        """The longest that costs were measured at; 0 without any."""
        return max((length for group in self.groups for length in group.cost_lengths), default=0)

    def wide(self, columns: str, **where: Any) -> pd.DataFrame:
        """Figures: a row for each group, by its place, and a column for each value of `columns`."""
        every = pd.concat([group.figures.assign(group=i) for i, group in enumerate(self.groups)])
        return wide(every, "group", columns, **where).reindex(range(len(self.groups)))

    def lines(self, columns: str, **where: Any) -> pd.DataFrame:
        """`wide` without the disqualified, by label, for a plot."""
        certified = [group.status != "disqualified" for group in self.groups]
        return self.wide(columns, **where).set_axis([group.label for group in self.groups])[certified]


QUALITY = {False: ("bits_per_byte", 1), True: ("accuracy", -1)}  # of text and recall tasks: the figure, the sign of worse


def ranking(groups: Sequence[Group], recall: bool) -> list[Group]:
    """The certified groups that have a quality, the best first."""
    name, worse = QUALITY[recall]
    found = [(worse * value.value, g.label, i) for i, g in enumerate(groups) if g.passed and (value := g.quality(name))]
    return [groups[i] for *_, i in sorted(found)]


class Findings(Rows):
    """What rows say, sorted into what may be compared."""

    def __init__(self, rows: Iterable[Row]) -> None:
        super().__init__(rows)
        self.labels = labels(self.checkpoints.values())  # by digest
        every = sorted(self.checkpoints.values(), key=lambda c: (self.labels[c.digest], c.seed or 0, c.name))
        self.checkpoints = {c.digest: c for c in every}
        self.bodies = sized(self.checkpoints.values())

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Costs of bodies: of several of one length, that of most rounds. Sorted by place, body, and length.

        Columns: place (E1), body (its name), length, cost, figure (Measured), samples (every time, or the number), row.
        """
        found = []
        for row in sorted(self.by_kind.get("cost", []), key=lambda row: -row["identity"].get("rounds", 0)):
            if row in self.measured:
                name, length = self.bodies[row["identity"]["checkpoint"]], row["identity"]["length"]
                place = {"place": self.environment(row), "body": name, "length": length, "row": row}
                found += [{**place, "cost": cost, **of} for cost, value in row["values"].items() if (of := timing(value))]
        frame = pd.DataFrame(found, columns=["place", "body", "length", "row", "cost", "figure", "samples"], dtype=object)
        return frame.drop_duplicates(["place", "body", "length", "cost"]).sort_values(["body", "length"], kind="stable")

    @cached_property
    def studies(self) -> list[Study]:
        """Every environment, data set, split and budget by itself."""
        found = []
        for place in self.environments.values():
            for where, members in self._members(place).items():
                budgets: dict[str, list[Member]] = defaultdict(list)
                for member in sorted(members, key=lambda member: -member.checkpoint.steps):
                    budgets[member.checkpoint.budget].append(member)
                beside: list[Study] = []
                for number, of in enumerate(budgets.values(), 1):
                    beside.append(self._study(place, where, of, number if len(budgets) > 1 else 0, beside))
                found += beside
        return found

    def _study(self, place: str, where: Place, members: list[Member], number: int, beside: list[Study]) -> Study:
        """The study of members with one budget, the `number`-th of several."""
        by_label: dict[tuple[str, str], list[Member]] = defaultdict(list)
        for member in members:
            elsewhere = "" if member.checkpoint.fingerprint else " [not known what it was trained on]"
            by_label[self.labels[member.checkpoint.digest] + elsewhere, member.status].append(member)
        groups = [Group(label, of, self._costs_of(place, of[0].checkpoint)) for (label, _), of in by_label.items()]
        ranked = ranking(groups, where.recall)
        rest = sorted((g for g in groups if g not in ranked), key=lambda g: (g.status == "disqualified", g.label))
        first, data = members[0].checkpoint, self.data_name(where.data)
        facts = next(json.loads(text) or {} for text, one in self.environments.items() if one == place)
        title = f"{data}, {where.split} split, on {place} "
        title += f"({facts.get('device', 'device unknown')}, {facts.get('dtype', 'dtype unknown')})"
        if number:
            batch = first.count("run.batch")
            title += f": {first.length}" + (f" of {batch:,} windows" if batch else "")
        name = f"{place}_{self.data[where.data]}_{_slug(where.split)}" + (f"_B{number}" if number else "")
        words = f"data {data}" + (f", tokenizer {first.text('data.tokenizer')}" if first.get("data.tokenizer") else "")
        rows = [row for m in members for row in (m.certificate, m.recall, *m.text.values()) if row is not None]
        return Study(name, title, where.split, where.recall, ranked + rest, ranked, words, self.source(rows), beside)

    def _costs_of(self, place: str, checkpoint: Checkpoint) -> pd.DataFrame:
        name = self.bodies[checkpoint.text("checkpoint.body")]
        return self.costs[(self.costs["place"] == place) & (self.costs["body"] == name)]

    def _members(self, place: str) -> dict[Place, list[Member]]:
        """What was measured in one environment, by data and split."""
        rows = [row for row in self.measured if self.environment(row) == place]
        certificates = {row["identity"]["checkpoint"]: row for row in rows if row["identity"]["kind"] == "certificate"}
        own: dict[str, dict[Place, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["identity"]["kind"] in ("text", "recall"):
                own[row["identity"]["checkpoint"]][_place(row)].append(row)
        places = sorted({where for of in own.values() for where in of}, key=lambda where: (where.recall, where))
        found: dict[Place, list[Member]] = {where: [] for where in places}
        for digest, checkpoint in self.checkpoints.items():
            certificate = certificates.get(digest)
            for where, of in own[digest].items():
                text = {} if where.recall else {row["identity"]["length"]: row for row in of}
                found[where].append(Member(checkpoint, certificate, text, of[0] if where.recall else None))
            if not own[digest] and certificate is not None:
                # One without accuracies, as the disqualified are, stands beside those that saw the same data.
                beside = [where for where in places if where.data == checkpoint.fingerprint]
                for where in beside or [Place(checkpoint.fingerprint, self._split(), checkpoint.recall)]:
                    found.setdefault(where, []).append(Member(checkpoint, certificate))
        return found

    def _split(self) -> str:
        """The split that was asked for, as far as rows say."""
        return next((row["identity"]["split"] for row in self.measured if "split" in row["identity"]), "val")


def _place(row: Row) -> Place:
    identity = row["identity"]
    return Place(identity.get("data") or "", identity["split"], identity["kind"] == "recall")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text)[:40]
