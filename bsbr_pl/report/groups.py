"""Runs of one study that differ only in their seeds, and their means."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import pandas as pd

from bsbr_pl.results import Row

from .figures import OWN, failed, nearest, only, pooled
from .rows import Checkpoint
from .tables import Measured

GIVEN = ("parameters", "data.trained_length", "run.status", "run.steps", "run.batch", "run.tokens", "run.flops")


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
    def context(self) -> int | None:
        """The tokens of a context in which its text was read; None for a recall task."""
        if self.own:
            return self.own["identity"].get("length")
        is_recall = self.checkpoint.get("data.kind") == "recall"
        return None if is_recall else self.checkpoint.get("data.validation_length")

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """Accuracies by length; the row at its own length also as OWN."""
        own = {OWN: self.own} if self.own else {}
        return list({**self.accuracies, **own}.items())


@dataclass(eq=False)
class Group:
    """Finished runs that differ only in their seed, with one outcome of the certificate; or one unfinished run."""

    label: str
    members: list[Member]
    costs: pd.DataFrame  # of its body in its environment

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the first seed; those of the others have the same budget."""
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
        words = "1 run" if runs == 1 else f"{runs} runs"
        shared = words if len(seeds) < runs else ""
        return {
            **{path: self.checkpoint.get(path) for path in GIVEN},
            "architecture": self.label,
            "certificate": self.outcome,
            "seeds": f"unknown, {words}" if None in seeds else Measured(len(seeds), note=shared),
        }

    @property
    def outcome(self) -> str:
        """The outcome of the certificate, with the reason if the group is disqualified."""
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
