"""Names, colours and markers. All follow from the architecture's key: there is no list of architectures."""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib import colors

from bsbr_pl.values import as_json

from .rows import Checkpoint

COLOURS = ("#d55e00", "#222222", "#e69f00", "#56b4e9", "#0072b2", "#7a5fb5", "#cc79a7", "#009e73", "#8c6d46", "#a6a300",
           "#b03a48", "#5f7d8c")  # fmt: skip
MARKERS = "osD^v*PX<>hp"
LINES = ("-", "--", ":", "-.")
SALT = "349"  # of the digests: with this one, no two architectures look alike, and common ones differ in both


def labels(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """A short name for each checkpoint, by digest; only seeds of one configuration share it.

    A label is the architecture with its options. Brackets have the differences to other runs on the same data:
    arguments of the model, if they differ between runs of one architecture; everything else (windows, budget,
    precision, ...) if it differs between any two runs; whether a run did not finish; its changed arguments. Runs that
    did not finish share no label, because they are not seeds of any other run.
    """
    usable = sorted(checkpoints, key=lambda c: (c.name, c.digest))
    values: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for c in usable:
        for name, value in c.config.items():
            values[_among(c, name)].add(as_json(value))
    names: dict[str, str] = {}
    for c in usable:
        varied = [name for name in c.config if len(values[_among(c, name)]) > 1]
        words = [f"{name.rpartition('.')[2]}={c.config[name]}" for name in varied if name != "length"]
        words += [c.length] if "length" in varied and c.finished else []
        names[c.digest] = _bracketed(c.architecture, words + c.marks)
    return names | _told_apart([c for c in usable if not c.finished], names)


def _among(c: Checkpoint, name: str) -> tuple[str, str, str]:
    """The runs among which an argument is compared: those of the architecture, or all on the same data."""
    return c.fingerprint, c.architecture if name.startswith("model.") else "", name


def _bracketed(name: str, words: Sequence[str]) -> str:
    return name + (f" [{', '.join(words)}]" if words else "")


def _told_apart(unfinished: Sequence[Checkpoint], names: Mapping[str, str]) -> dict[str, str]:
    """Different labels for unfinished runs: with their seeds, and with numbers if seeds are equal."""
    found: dict[str, str] = {}
    for c in unfinished:
        name = names[c.digest]
        if sum(names[other.digest] == name for other in unfinished) > 1:
            name = f"{name.removesuffix(']')}, seed={c.seed}]"
            if number := sum(taken.startswith(name) for taken in found.values()):
                name += f" ({number + 1})"
        found[c.digest] = name
    return found


def body_names(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """A name for each body (architecture and sizes): the architecture, and the sizes that differ between its bodies."""
    sizes: dict[str, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    first: dict[str, Checkpoint] = {}
    for c in sorted(checkpoints, key=lambda c: (c.body, c.digest)):
        first.setdefault(c.body, c)
        for name, size in (c.get("sizes") or {}).items():
            sizes[c.architecture][name].add(size)
    names: dict[str, str] = {}
    for body, c in first.items():
        words = []
        for name, size in (c.get("sizes") or {}).items():
            if len(sizes[c.architecture][name]) > 1:
                words.append(f"{name}={size}")
        label = _bracketed(c.architecture, words)
        names[body] = f"{label} ({len(names) + 1})" if label in names.values() else label
    return names


def kind(label: str) -> str:
    """The first architecture's key of a label, without options: `bsbr` of `3x bsbr(chunk_size=64) + standard`."""
    return re.split(r"[( \[]", re.sub(r"^\d+x ", "", label))[0]


def look(label: str) -> tuple[str, str]:
    """The colour and the marker of a label's architecture, the same in every report."""
    digest = zlib.crc32(f"{SALT}{kind(label)}".encode())
    return COLOURS[digest % len(COLOURS)], MARKERS[digest // len(COLOURS) % len(MARKERS)]


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The style of each label. Labels of one colour have different lines, and markers that differ in fill or shade."""
    seen: Counter[str] = Counter()
    found = {}
    for name in sorted(set(names)):
        color, marker = look(name)
        number = seen[color]  # of labels with this colour
        seen[color] += 1
        paler = 0.7 ** (number // 2)
        red, green, blue = colors.to_rgb(color)
        mixed = colors.to_hex((1 - paler * (1 - red), 1 - paler * (1 - green), 1 - paler * (1 - blue)))
        fill = "none" if number % 2 else "full"
        found[name] = {"color": mixed, "marker": marker, "linestyle": LINES[number % len(LINES)], "fillstyle": fill}
    return found
