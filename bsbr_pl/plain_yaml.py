"""YAML within limits that no configuration needs to exceed, checked before anything is built or expanded."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from jsonargparse import get_loader

LONGEST = 100_000  # characters of a text
DEEPEST = 24  # collections within collections, and parts of a key with dots
MOST = 2_000  # values and keys, where each alias counts as all that it stands for
LONG_NUMBER = re.compile(r"[-+]?(0[xb][0-9a-fA-F_]{30,}|[0-9_:]{30,})")  # of any notation of YAML 1.1

EVENTS = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # whose parser gives them


class LimitError(Exception):
    """A text beyond the limits. No ValueError, which a parser would take for a value of another type."""


@dataclass
class _Open:
    """A list or mapping whose end has not been read yet."""

    anchor: str | None
    before: int  # values before it
    is_mapping: bool
    children: int = 0  # keys among them
    keys: set[str] = field(default_factory=set)

    def add(self, event: yaml.NodeEvent) -> None:
        is_key = self.is_mapping and self.children % 2 == 0
        self.children += 1
        if is_key and isinstance(event, yaml.ScalarEvent):
            key = event.value
            if key.count(".") >= DEEPEST:
                raise LimitError(f"a key of {key.count('.') + 1} parts is nested more than {DEEPEST} deep")
            if key in self.keys:
                raise LimitError(f"the key {key!r} stands twice in one section: leave one out")
            self.keys.add(key)


def load(text: str) -> Any:
    """The plain values of a YAML text, as jsonargparse reads it.

    Raises:
        LimitError: in one sentence, where the text is too long, too deep, holds too many values, or a key twice.
        yaml.YAMLError: where the text is no YAML.
    """
    if len(text) > LONGEST:
        raise LimitError(f"{_start(text)}: more than {LONGEST:,} characters, as no configuration has")
    try:
        _check(yaml.parse(text, Loader=EVENTS))
    except LimitError as error:
        raise LimitError(f"{_start(text)}: {error}") from None
    return get_loader("yaml")(text)


def _check(events: Iterable[yaml.Event]) -> None:
    """Read the events of a text, which take neither recursion nor room for what aliases stand for."""
    values = 0
    sizes: dict[str | None, int] = {}  # values by anchor
    within: list[_Open] = []
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            ended = within.pop()
            sizes[ended.anchor] = values - ended.before
        elif isinstance(event, yaml.NodeEvent):
            if within:
                within[-1].add(event)
            if isinstance(event, yaml.CollectionStartEvent):
                within.append(_Open(event.anchor, values, isinstance(event, yaml.MappingStartEvent)))
            values += _size(event, sizes, within)
            if len(within) > DEEPEST:
                raise LimitError(f"nested more than {DEEPEST} deep, as no option is")
            if values > MOST:
                raise LimitError(f"more than {MOST:,} values and keys, aliases written out, as no configuration has")


def _size(event: yaml.NodeEvent, sizes: dict[str | None, int], within: list[_Open]) -> int:
    """How many values an event begins, an alias written out."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor in [one.anchor for one in within]:
            raise LimitError(f"*{event.anchor} stands within &{event.anchor}, which has no end: write it out")
        return sizes.get(event.anchor, 1)
    if isinstance(event, yaml.ScalarEvent):
        sizes[event.anchor] = 1
        if event.implicit[0] and LONG_NUMBER.fullmatch(event.value):
            raise LimitError(
                f"a whole number of {len(event.value)} digits is too long: put quotes around it if it is text"
            )
    return 1


def _start(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[:200].split())
    return line if len(text) == len(line) <= 40 else line[:40] + " ..."
