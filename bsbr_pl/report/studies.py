"""Comparable runs.

A `Study` has runs with one budget, measured in one environment on one split of one data set: one table. A `Group` of a
study has finished runs that differ only in their seed, and averages them. A run that did not finish is its own group.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import pandas as pd

from bsbr_pl.results import Row
from bsbr_pl.values import as_json

from .figures import OWN, cost_figure, difference, failed, fitted_from, front, nearest, only, pooled, power, wide
from .labels import body_names, labels
from .rows import Checkpoint, Rows
from .tables import Measured

COST = ["place", "body", "length", "cost", "figure", "samples", "row"]
GIVEN = ("parameters", "data.trained_length", "run.status", "run.steps", "run.batch", "run.tokens", "run.flops")
QUALITY = {False: ("bits_per_byte", 1), True: ("accuracy", -1)}  # of text, of recall: the figure, the sign of worse


@dataclass(eq=False)
class Member:
    """One checkpoint's rows in one environment on one split of its data."""

    checkpoint: Checkpoint
    certificate: Row | None
    accuracies: dict[int, Row]  # by length; OWN, of a recall task at its own lengths

    @property
    def status(self) -> str:
        if self.certificate is None:
            return "not measured"
        return "passed" if self.certificate["values"]["passed"] else "disqualified"

    @property
    def own(self) -> Row | None:
        """The row at the length of the training's validation, or at the shortest; of a recall task, the only row."""
        found, length = self.accuracies, self.checkpoint.get("data.validation_length")
        return found.get(OWN) or found.get(length) or found.get(min(found, default=0))

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """Accuracies by length, and that at its own length as OWN."""
        return list((self.accuracies | ({OWN: self.own} if self.own else {})).items())


@dataclass(eq=False)
class Group:
    """Finished runs that differ only in their seed, with one outcome of the certificate; or one unfinished run."""

    label: str
    members: list[Member]
    costs: pd.DataFrame  # of its body in its environment

    @property
    def checkpoint(self) -> Checkpoint:
        """Of the first seed; the others have the same budget."""
        return self.members[0].checkpoint

    @property
    def status(self) -> str:
        return self.members[0].status

    @property
    def own(self) -> list[Row]:
        """The seeds' rows at their own length; none unless every seed has one."""
        found = [member.own for member in self.members if member.own]
        return found if len(found) == len(self.members) else []

    @cached_property
    def figures(self) -> pd.DataFrame:
        """Means over its seeds."""
        return pooled(chain.from_iterable(member.rows for member in self.members), len(self.members))

    def quality(self, name: str) -> Measured | None:
        """A figure at the own length."""
        return only(self.figures, length=OWN, part="", name=name)

    @property
    def facts(self) -> dict[str, Any]:
        """Its other facts, by the keys of words.toml."""
        seeds, runs = {member.checkpoint.seed for member in self.members}, len(self.members)
        counted = Measured(len(seeds), note=f"{runs} runs" if len(seeds) < runs else "")
        return {
            **{path: self.checkpoint.get(path) for path in GIVEN},
            **{"architecture": self.label, "certificate": self.outcome, "runs": runs},
            "seeds": f"unknown, {runs} run{'s' * (runs > 1)}" if None in seeds else counted,
        }

    @property
    def outcome(self) -> str:
        """Of the certificate; why it is disqualified."""
        if self.status != "disqualified":
            return self.status
        why = dict.fromkeys(failed(member.certificate) for member in self.members if member.certificate)
        return f"disqualified: {' / '.join(why)}"

    def cost(self, length: int | None, cost: str) -> Measured | None:
        return only(self.costs, length=length, cost=cost)

    @property
    def training_length(self) -> int | None:
        """The length of those measured that is nearest to that of training."""
        return nearest(set(self.costs["length"]), self.checkpoint.get("data.trained_length"))


def counted(groups: Iterable[Group], path: str) -> pd.Series:
    """A number in the facts of groups, such as `run.flops`, by label, without those that do not say."""
    return pd.Series({group.label: group.checkpoint.get(path) for group in groups}, dtype=float).dropna()


class Place(NamedTuple):
    """Accuracies of one place are comparable."""

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
    place: Place
    groups: list[Group]
    data: str
    source: str
    beside: "list[Study]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recall = self.place.recall
        self.quality, self.worse = QUALITY[self.recall]
        found = []
        for i, group in enumerate(self.groups):
            quality = group.quality(self.quality) if group.status == "passed" else None
            found += [(self.worse * quality.value, group.label, i)] if quality else []
        self.ranked = [self.groups[i] for *_, i in sorted(found)]
        rest = [group for group in self.groups if group not in self.ranked]
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
            found |= (member.own or {"values": {}})["values"].get("compressed") or {}
        return dict(sorted(found.items(), key=lambda one: one[1]))

    @property
    def facts(self) -> dict[str, Any]:
        """The values of {names} in words.toml."""
        units, accuracy = ("samples", "accuracy") if self.recall else ("documents", "top-1 accuracy")
        return {"title": self.title, "source": self.source, "units": units, "accuracy": accuracy}

    @cached_property
    def figures(self) -> pd.DataFrame:
        """Of all groups, by their place: `group`."""
        return pd.concat([group.figures.assign(group=i) for i, group in enumerate(self.groups)])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Of all groups, by their place: `group`."""
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
        shortest, length = fitted_from(self.costs["length"]), self.lengths[-1:] if len(self.lengths) > 1 else []
        rows = [{**group.facts, "exponent": power(group.costs, "training", shortest)} for group in self.groups]
        frames = [
            self.wide("name", length=OWN, part=""),
            self.wide("which", length=OWN, part="slices", name="accuracy").add_prefix("accuracy, "),
            self.wide("which", length=OWN, part="recall", name="loss"),
            self.wide("length", part="", name="bits_per_byte").reindex(columns=length).rename(columns=lambda _: "far"),
            wide(self.costs, "group", "cost", length=self.longest).add_prefix("cost ").reindex(range(len(self.groups))),
        ]
        own = pd.DataFrame(rows, dtype=object)
        frame = pd.concat([own, *(of.reset_index(drop=True) for of in frames)], axis=1)
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
        return ["front" * (group.label in front(points)) for group in self.ranked]


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

        Columns: place (E1), body (its name), length, cost, figure (Measured), samples (every time, or the number), row.
        """
        found = []
        for row in sorted(self.by_kind["cost"], key=lambda row: -row["identity"].get("rounds", 0)):
            checkpoint, length = self.checkpoints[row["about"]["checkpoint"]["digest"]], row["identity"].get("length")
            for cost, value in row["values"].items() if length else ():
                if cost == "uncounted":  # no cost, but what one of them lacks
                    continue
                found.append((self.place(row), self.bodies[checkpoint.body], length, cost, *cost_figure(value), row))
        frame = pd.DataFrame(found, columns=COST, dtype=object).dropna(subset="figure")
        return frame.drop_duplicates(COST[:4]).sort_values(["body", "length"], kind="stable")

    @cached_property
    def studies(self) -> list[Study]:
        """Every environment, data set, split and budget by itself."""
        found: list[Study] = []
        for environment in self.environments:
            for place, members in self._members(environment).items():
                budgets: dict[str, list[Member]] = defaultdict(list)
                for member in sorted(members, key=lambda member: -member.checkpoint.steps):
                    budgets[as_json(member.checkpoint.get("run.budget"))].append(member)
                beside: list[Study] = []
                for number, of in enumerate(budgets.values(), 1):
                    beside.append(self._study(environment, place, of, number * (len(budgets) > 1)))
                    beside[-1].beside = beside
                found += beside
        return found

    def _study(self, environment: str, place: Place, members: Sequence[Member], number: int) -> Study:
        """The study of members with one budget, the `number`-th of several."""
        by_label: dict[tuple[str, str], list[Member]] = defaultdict(list)
        rows: list[Row] = []
        for member in members:
            unknown = "" if member.checkpoint.fingerprint else " [not known what it was trained on]"
            by_label[self.labels[member.checkpoint.digest] + unknown, member.status].append(member)
            rows += filter(None, (member.certificate, *member.accuracies.values()))
        groups, costs = [], self.costs[self.costs["place"] == environment]
        for (label, _), of in by_label.items():
            groups.append(Group(label, of, costs[costs["body"] == self.bodies[of[0].checkpoint.body]]))
        first, data = members[0].checkpoint, self.data_name(place.data)
        name = f"{environment}_{self.data[place.data]}_{re.sub(r'[^A-Za-z0-9]+', '-', place.split)[:40]}"
        device, dtype = (self.environments[environment].get(fact, f"{fact} unknown") for fact in ("device", "dtype"))
        title = f"{data}, {place.split} split, on {environment} ({device}, {dtype})"
        if number:
            name += f"_B{number}"
            title += f": {first.budget}" + (f" of {first.windows}" if first.windows else "")
        tokenizer = first.get("data.tokenizer")
        words = f"data {data}" + (f", tokenizer {tokenizer}" if tokenizer else "")
        return Study(name, title, place, groups, words, self.source(rows))

    def _members(self, environment: str) -> dict[Place, list[Member]]:
        """The measured checkpoints of one environment, by data and split."""
        certificates = self.of("certificate", environment)
        own: dict[str, dict[Place, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
        for row in self.by_kind["text"] + self.by_kind["recall"]:
            identity = row["identity"]
            if self.place(row) == environment:
                place = Place(identity["kind"] == "recall", self.data_of(identity.get("data")), identity["split"])
                own[identity["checkpoint"]][place][identity.get("length") or OWN] = row
        places = sorted(set().union(*own.values()))
        found: dict[Place, list[Member]] = {place: [] for place in places}
        for digest, checkpoint in self.checkpoints.items():
            for place, accuracies in own[digest].items():
                found[place].append(Member(checkpoint, certificates.get(digest), accuracies))
            if not own[digest] and digest in certificates:
                # One without accuracies, as the disqualified are, stands beside those that saw the same data.
                split = places[0].split if places else "val"
                alone = Place(checkpoint.get("data.kind") == "recall", checkpoint.fingerprint, split)
                for place in [place for place in places if place.data == checkpoint.fingerprint] or [alone]:
                    found.setdefault(place, []).append(Member(checkpoint, certificates[digest], {}))
        return found
