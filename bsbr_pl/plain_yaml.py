"""YAML with limits on size and depth, checked before aliases are expanded or anything is built."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from jsonargparse import get_loader

LONGEST = 100_000  # characters of a text
DEEPEST = 24  # collections within collections, and parts of a key with dots
MOST = 2_000  # values and keys, with aliases expanded
LONG_NUMBER = re.compile(r"[-+]?(0[xb][0-9a-fA-F_]{30,}|[0-9_:]{30,})")  # in any notation of YAML 1.1
PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class LimitError(Exception):
    """A text exceeds a limit. Not a ValueError: jsonargparse would try another type for the value."""


@dataclass
class _Open:
    """A list or mapping that is being read."""

    anchor: str | None
    before: int  # values before it
    is_mapping: bool
    children: int = 0  # keys included
    keys: set[str] = field(default_factory=set)

    def add(self, event: yaml.NodeEvent) -> None:
        is_key = self.is_mapping and self.children % 2 == 0
        self.children += 1
        if is_key and isinstance(event, yaml.ScalarEvent):
            key = event.value
            if key.count(".") >= DEEPEST:
                raise LimitError(f"a key with {key.count('.') + 1} parts is nested more than {DEEPEST} levels deep")
            if key in self.keys:
                raise LimitError(f"duplicate key {key!r}: remove one of the two")
            self.keys.add(key)


def load(text: str) -> Any:
    """The plain values of a YAML text, as jsonargparse reads it.

    Raises:
        LimitError: if the text is too long or too deep, or has too many values or a duplicate key.
        yaml.YAMLError: if the text is not YAML.
    """
    try:
        if len(text) > LONGEST:
            raise LimitError(f"more than {LONGEST:,} characters, the limit for a configuration")
        _check(yaml.parse(text, Loader=PARSER))
    except LimitError as error:
        line = " ".join(text[:200].split())
        start = line if len(text) == len(line) <= 40 else line[:40] + " ..."
        raise LimitError(f"{start}: {error}") from None
    return get_loader("yaml")(text)


def _check(events: Iterable[yaml.Event]) -> None:
    """Count the values of a text from its parse events, without recursion and without expanding aliases."""
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
                raise LimitError(f"nested more than {DEEPEST} levels deep, the limit for a configuration")
            if values > MOST:
                raise LimitError(f"more than {MOST:,} values and keys (aliases expanded), the limit here")


def _size(event: yaml.NodeEvent, sizes: dict[str | None, int], within: list[_Open]) -> int:
    """How many values an event adds, with aliases expanded."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor in [collection.anchor for collection in within]:
            name = event.anchor
            raise LimitError(f"the alias *{name} is inside &{name}, to which it refers: write its values instead")
        return sizes.get(event.anchor, 1)
    if isinstance(event, yaml.ScalarEvent):
        sizes[event.anchor] = 1
        if event.implicit[0] and LONG_NUMBER.fullmatch(event.value):
            digits = len(event.value)
            raise LimitError(f"a whole number of {digits} digits is too long: put it in quotes if it is text")
    return 1
