"""Comparable runs.

A `Study` has runs with one budget, measured in one environment on one split of one data set: one table. A `Group` of a
study has finished runs that differ only in their seed, and averages them. A run that did not finish is its own group.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from bsbr_pl.results import Row
from bsbr_pl.values import FEW_DOCUMENTS, as_json

from .figures import OWN, cost_figure, difference, fitted_from, front, power, wide
from .groups import Group, Member
from .labels import body_names, labels
from .rows import Rows
from .tables import Measured

COST = ["environment", "body", "length", "cost", "figure", "samples", "row"]
UNITS = {"sample": "samples", "document": "documents", "part of the text": "parts of the text"}
QUALITY = {False: ("bits_per_byte", 1), True: ("accuracy", -1)}  # of text, of recall: the figure, the sign of worse


class DataSplit(NamedTuple):
    """The split of a data set. Accuracies on one split are comparable."""

    recall: bool
    data: str  # fingerprint
    split: str


@dataclass(eq=False)
class Study:
    """Groups that may be compared with each other.

    Attributes:
        name: for files.
        groups: the ranked, the best first; those that could not be ranked; the disqualified.
        data: data and tokenizer, in words.
        source: environments and commands of its numbers.
        beside: the studies of every budget on the same data, with this one.
    """

    name: str
    title: str
    data_split: DataSplit
    groups: list[Group]
    data: str
    source: str
    beside: "list[Study]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recall = self.data_split.recall
        self.quality, self.worse = QUALITY[self.recall]
        known: list[tuple[float, str, Group]] = []
        rest = []
        for group in self.groups:
            quality = group.quality(self.quality)
            if group.status == "passed" and quality:
                known.append((self.worse * quality.value, group.label, group))
            else:
                rest.append(group)
        self.ranked = [group for *_, group in sorted(known, key=lambda one: one[:2])]
        self.groups = self.ranked + sorted(rest, key=lambda group: (group.status == "disqualified", group.label))
        self.members = [(group, member) for group in self.groups for member in group.members]
        #: Context lengths that text was predicted at; the longest that costs were measured at, or 0.
        self.lengths = sorted(set().union(*(member.accuracies for _, member in self.members)))
        self.longest = max(self.costs["length"], default=0)

    @property
    def compressors(self) -> dict[str, float]:
        """Bits per byte of the same text by compressor, the best first; none if no row says."""
        found: dict[str, float] = {}
        for _, member in self.members:
            if member.own:
                found |= member.own["values"].get("compressed") or {}
        return dict(sorted(found.items(), key=lambda one: one[1]))

    @property
    def facts(self) -> dict[str, Any]:
        """The values of {names} in words.toml."""
        accuracy = "accuracy" if self.recall else "top-1 accuracy"
        return {"title": self.title, "source": self.source, "units": UNITS[self.unit], "accuracy": accuracy}

    @property
    def unit(self) -> str:
        """One of UNITS, which intervals are over."""
        if self.recall:
            return "sample"
        own = [member.own["values"] for _, member in self.members if member.own]
        few = any(values.get("documents", FEW_DOCUMENTS) < FEW_DOCUMENTS for values in own)
        return "part of the text" if few else "document"

    @cached_property
    def figures(self) -> pd.DataFrame:
        """The figures of all groups; the column `group` is their index in `groups`."""
        return pd.concat([group.figures.assign(group=i) for i, group in enumerate(self.groups)])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """The costs of all groups; the column `group` is their index in `groups`."""
        return pd.concat([group.costs.assign(group=i) for i, group in enumerate(self.groups)])

    def wide(self, columns: str, **where: Any) -> pd.DataFrame:
        """Figures: a row for each group, by its label, and a column for each value of `columns`."""
        frame = wide(self.figures, "group", columns, **where).reindex(range(len(self.groups)))
        return frame.set_axis(pd.Index([group.label for group in self.groups], name="architecture"))

    def lines(self, columns: str, **where: Any) -> pd.DataFrame:
        """`wide` without the disqualified, for a plot."""
        return self.wide(columns, **where)[[group.status != "disqualified" for group in self.groups]]

    @cached_property
    def overview(self) -> pd.DataFrame:
        """Everything about each group, in the columns of the verdict."""
        shortest = fitted_from(self.costs["length"])
        facts = [{**group.facts, "exponent": power(group.costs, "training", shortest)} for group in self.groups]
        costs = wide(self.costs, "group", "cost", length=self.longest).reindex(range(len(self.groups)))
        frames = [
            pd.DataFrame(facts, dtype=object),
            self.wide("name", length=OWN, part=""),
            self.wide("which", length=OWN, part="slices", name="accuracy").add_prefix("accuracy, "),
            self.wide("which", length=OWN, part="recall", name="loss"),
            costs.add_prefix("cost "),
        ]
        frame = pd.concat([part.reset_index(drop=True) for part in frames], axis=1)
        if len(self.lengths) > 1:
            bits = self.wide("length", part="", name="bits_per_byte").reindex(columns=self.lengths)
            frame["far"] = bits[self.lengths[-1]].array
        return frame.assign(above=pd.Series(self._above(), dtype=object), front=pd.Series(self._front(), dtype=object))

    def _above(self) -> list[Measured | None]:
        """Bits per byte above the best, of each ranked group."""
        if self.recall or len(self.ranked) < 2:
            return []
        best, *others = self.ranked
        return [Measured(0.0, note="best"), *(difference(group.own, best.own) for group in others)]

    def _front(self) -> list[str]:
        """`front` for each ranked group on the Pareto front of quality and training time."""
        points = {}
        for group in self.ranked:
            quality, seconds = group.quality(self.quality), group.cost(group.training_length, "training")
            if quality and seconds:
                points[group.label] = (seconds.value, self.worse * quality.value)
        best = front(points)
        return ["front" if group.label in best else "" for group in self.ranked]


class Findings(Rows):
    """Rows, sorted into comparable studies."""

    def __init__(self, rows: Iterable[Row]) -> None:
        super().__init__(rows)
        self.labels = labels(self.checkpoints.values())  # by digest
        every = sorted(self.checkpoints.values(), key=lambda c: (self.labels[c.digest], c.seed or 0, c.name))
        self.checkpoints = {c.digest: c for c in every}
        self.bodies = body_names(every)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Costs of bodies; of several of one length, that of most rounds. Sorted by body and length.

        Columns: environment (E1), body (its name), length, cost, figure (Measured), samples (every time, or the
        number), row.
        """
        found = []
        for row in sorted(self.by_kind["cost"], key=lambda row: -row["identity"].get("rounds", 0)):
            body = self.bodies[self.checkpoints[row["about"]["checkpoint"]["digest"]].body]
            length = row["identity"].get("length")
            for cost, value in row["values"].items():
                if length and cost != "uncounted":  # which names operators without a count
                    found.append((self.environment_name(row), body, length, cost, *cost_figure(value), row))
        frame = pd.DataFrame(found, columns=COST, dtype=object).dropna(subset="figure")
        return frame.drop_duplicates(COST[:4]).sort_values(["body", "length"], kind="stable")

    @cached_property
    def studies(self) -> list[Study]:
        """Every environment, data set, split, budget and length of contexts by itself."""
        found: list[Study] = []
        for environment in self.environments:
            for data_split, members in self._members(environment).items():
                budgets: dict[str, list[Member]] = defaultdict(list)
                for member in sorted(members, key=lambda member: -member.checkpoint.steps):
                    budgets[as_json([member.checkpoint.get("run.budget"), member.context])].append(member)
                beside: list[Study] = []
                for number, of_budget in enumerate(budgets.values(), 1):
                    study = self._study(environment, data_split, of_budget, number if len(budgets) > 1 else None)
                    study.beside = beside
                    beside.append(study)
                found += beside
        return found

    def _study(self, environment: str, data_split: DataSplit, members: Sequence[Member], number: int | None) -> Study:
        """The study of members with one budget, the `number`-th of several."""
        by_label: dict[tuple[str, str], list[Member]] = defaultdict(list)
        rows: list[Row] = []
        for member in members:
            label = self.labels[member.checkpoint.digest]
            if not member.checkpoint.fingerprint:
                label += " [not known what it was trained on]"
            by_label[label, member.status].append(member)
            rows += [member.certificate] if member.certificate else []
            rows += member.accuracies.values()
        groups, costs = [], self.costs[self.costs["environment"] == environment]
        for (label, _), seeds in by_label.items():
            groups.append(Group(label, seeds, costs[costs["body"] == self.bodies[seeds[0].checkpoint.body]]))
        first, data = members[0].checkpoint, self.data_name(data_split.data)
        name = f"{environment}_{self.data[data_split.data]}_{re.sub(r'[^A-Za-z0-9]+', '-', data_split.split)[:40]}"
        facts = {"device": "device unknown", "dtype": "dtype unknown"} | self.environments[environment]
        title = f"{data}, {data_split.split} split, on {environment} ({facts['device']}, {facts['dtype']})"
        if number:
            name += f"_B{number}"
            title += f": {first.budget}" + (f" of {first.windows}" if first.windows else "")
            title += f", read in contexts of {members[0].context:,} tokens" if members[0].context else ""
        tokenizer = first.get("data.tokenizer")
        words = f"data {data}, tokenizer {tokenizer}" if tokenizer else f"data {data}"
        return Study(name, title, data_split, groups, words, self.source(rows))

    def _members(self, environment: str) -> dict[DataSplit, list[Member]]:
        """The measured checkpoints of one environment, by data and split."""
        certificates = self.of("certificate", environment)
        own: dict[str, dict[DataSplit, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
        for row in self.by_kind["text"] + self.by_kind["recall"]:
            identity = row["identity"]
            if self.environment_name(row) == environment:
                data = self.data_of(identity.get("data"))
                data_split = DataSplit(identity["kind"] == "recall", data, identity["split"])
                own[identity["checkpoint"]][data_split][identity.get("length") or OWN] = row
        data_splits = sorted(set().union(*own.values()))
        found: dict[DataSplit, list[Member]] = {data_split: [] for data_split in data_splits}
        for digest, checkpoint in self.checkpoints.items():
            for data_split, accuracies in own[digest].items():
                found[data_split].append(Member(checkpoint, certificates.get(digest), accuracies))
            if not own[digest] and digest in certificates:
                # A checkpoint without accuracies, such as a disqualified one, is listed with those on the same data.
                same_data = [data_split for data_split in data_splits if data_split.data == checkpoint.fingerprint]
                if not same_data:
                    split = data_splits[0].split if data_splits else "val"
                    same_data = [DataSplit(checkpoint.get("data.kind") == "recall", checkpoint.fingerprint, split)]
                for data_split in same_data:
                    found.setdefault(data_split, []).append(Member(checkpoint, certificates[digest], {}))
        return found
