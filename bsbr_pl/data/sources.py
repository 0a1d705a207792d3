"""Sources of text: documents in a fixed order, and the rules that put each document into one split.

A source yields `Piece`s: a document comes in one or more pieces, so that a file larger than memory can be read.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .base import SPLITS
from .files import (
    BLOCK,
    Piece,
    SourceFile,
    character_start,
    decompressed,
    read_pieces,
    read_stretch,
    sha256_of,
    text_size,
    total_bytes,
)

DEFAULT_FRACTION = 0.05  # held out for validation, and as much for test
Texts = Callable[[], Iterator[str | None]]  # returns a new iterator over the rows of a split
Named = dict[str, SourceFile]  # files by relative path


@dataclass(frozen=True)
class HeldOut:
    """Chooses the held-out documents by a hash of each document, independent of other documents and their order."""

    val: float
    test: float

    def __post_init__(self) -> None:
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            raise ValueError(
                f"val_fraction={self.val} and test_fraction={self.test} must be at least 0 and sum to less than 1"
            )

    def split_of(self, name: bytes) -> str:
        """The split of a document by its name: training, test, validation from the low end of its hash to the high."""
        place = int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64
        return "train" if place < 1 - self.val - self.test else "test" if place < 1 - self.val else "val"

    def without_own_splits(self, own: set[str], source: str) -> "HeldOut":
        """The shares to hold out of the training split of a source that has the splits `own`.

        Raises:
            ValueError: a fraction was set that would have no effect.
        """
        for split, fraction in (("val", self.val), ("test", self.test)):
            if split in own and fraction not in (0, DEFAULT_FRACTION):
                raise ValueError(
                    f"{split}_fraction={fraction} has no effect: source={source!r} has its own {split} split. Remove "
                    f"{split}_fraction"
                )
        return HeldOut(0.0 if "val" in own else self.val, 0.0 if "test" in own else self.test)


class Source(ABC):
    """Documents in a fixed order.

    Args:
        held_out: the fractions that are held out of the training documents
        total_bytes: for the progress bar; None if it is not known

    Attributes:
        left_out: after `pieces()`, how many documents of each split were left out because another split has them
    """

    def __init__(self, held_out: HeldOut, total_bytes: int | None = None) -> None:
        self.held_out, self.total_bytes = held_out, total_bytes
        self.left_out: dict[str, int] = {}

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the documents and their splits, except for `held_out`."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The documents; they are read anew by each call."""


class Files(Source):
    """Files of raw text, one document each, split by the hash of their relative path.

    Equal files are in one split: that of the first of them, by path.
    """

    def __init__(self, files: Named, held_out: HeldOut) -> None:
        super().__init__(held_out, total_bytes(files.values()))
        self.files = dict(sorted(files.items()))

    def identity(self) -> dict[str, Any]:
        hashes = hashes_of(self.files)
        moved = {name: split for name, split in self._splits(hashes).items() if split != self._split_of(name)}
        return {"files": hashes, "moved": moved} if moved else {"files": hashes}

    def pieces(self) -> Iterator[Piece]:
        splits = self._splits(hashes_of(self.files))
        for name, file in self.files.items():
            yield from read_pieces(file, splits[name])

    def _split_of(self, name: str) -> str:
        return self.held_out.split_of(name.encode("utf-8", "surrogateescape"))

    def _splits(self, hashes: dict[str, str]) -> dict[str, str]:
        first: dict[str, str] = {}
        return {name: first.setdefault(content, self._split_of(name)) for name, content in hashes.items()}


class OneFile(Source):
    """One file of raw text, cut by position into a document to train on, one for validation and one for test."""

    def __init__(self, file: SourceFile, held_out: HeldOut) -> None:
        super().__init__(held_out, total_bytes([file]))
        self.file = file

    def identity(self) -> dict[str, Any]:
        return {"file": sha256_of(self.file)}

    def pieces(self) -> Iterator[Piece]:
        size = text_size(self.file)
        test = character_start(self.file, round(size * (1 - self.held_out.test)))
        val = character_start(self.file, round(size * (1 - self.held_out.test - self.held_out.val)))
        with decompressed(self.file) as stream:
            for split, start, stop in (("train", 0, val), ("val", val, test), ("test", test, size)):
                yield from read_stretch(stream, self.file, split, start, stop)


class OwnFiles(Source):
    """Files of raw text, one document each, in splits of their own.

    A text in two splits is kept in one: test before validation before training. A missing split is held out of the
    training files.

    Args:
        splits: the files of `train` and of `val`, `test` or both
        held_out: the shares that are held out of the training files
    """

    def __init__(self, splits: dict[str, Named], held_out: HeldOut) -> None:
        super().__init__(held_out, total_bytes(file for files in splits.values() for file in files.values()))
        self.splits = {split: dict(sorted(files.items())) for split, files in splits.items()}

    def identity(self) -> dict[str, Any]:
        return {"own_files": {split: hashes_of(files) for split, files in self.splits.items()}}

    def pieces(self) -> Iterator[Piece]:
        seen: set[str] = set()
        for split in ("test", "val", "train"):
            if split not in self.splits:
                continue
            hashes = hashes_of(self.splits[split])
            files = {name: file for name, file in self.splits[split].items() if hashes[name] not in seen}
            self.left_out[split] = len(hashes) - len(files)
            seen |= set(hashes.values())
            if split == "train":
                yield from files_to_split(files, self.held_out).pieces()
            else:
                for file in files.values():
                    yield from read_pieces(file, split)


def files_to_split(files: Named, held_out: HeldOut) -> Files | OneFile:
    """Files that validation and test are held out of: several by their paths, a single one by position."""
    return OneFile(next(iter(files.values())), held_out) if len(files) == 1 else Files(files, held_out)


def hashes_of(files: Named) -> dict[str, str]:
    return {name: sha256_of(file) for name, file in files.items()}


class Rows(Source):
    """Rows of a text column.

    A row is a document; with `join_rows` the rows of a split are one running text (the rows of wikitext are lines). A
    split without rows of its own is held out of the training rows by the hash of the row's text, so that equal rows
    are in the same split. A document in two splits is kept in one: test before validation before training.

    Args:
        texts: the rows of `train`, and of `val` and `test` if the source has these splits
        content: returns what decides the rows, for the fingerprint
        held_out: the shares that are held out of the training rows
        join_rows: whether rows are lines of one text
        max_rows: read no more rows of each split
        total_bytes: of all rows, if it is known
    """

    def __init__(
        self,
        texts: dict[str, Texts],
        content: Callable[[], dict[str, Any]],
        held_out: HeldOut,
        join_rows: bool,
        max_rows: int | None,
        total_bytes: int | None = None,
    ) -> None:
        missing = [split for split in SPLITS if split not in texts]
        if join_rows and missing:
            raise ValueError(
                f"join_rows=True needs a separate split for {' and '.join(missing)}, because lines of one text cannot "
                "be held out: use a folder with splits, or set val_split and test_split of a Hub data set"
            )
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows} is too small: at least 1, or null for all")
        super().__init__(held_out, total_bytes)
        self.texts, self.content, self.join_rows, self.max_rows = texts, content, join_rows, max_rows

    def identity(self) -> dict[str, Any]:
        several = len(self.texts) > 1 and not self.join_rows
        rule = {"equal_rows": "in one split"} if several else {}
        return {**self.content(), "join": self.join_rows, "max_rows": self.max_rows, **rule}

    def pieces(self) -> Iterator[Piece]:
        # Training is the last and the longest: a misspelt name of another split is noticed before it is read.
        seen: set[bytes] = set()
        for split in ("test", "val", "train"):
            if split not in self.texts:
                continue
            if self.join_rows:
                for text in self._first_texts(split):
                    yield from _pieces(split, text, False)
                yield Piece(split, "", True)
            else:
                yield from self._documents(split, seen)

    def _documents(self, split: str, seen: set[bytes]) -> Iterator[Piece]:
        """The documents of a split that were not seen in another split; adds those of validation and test to them."""
        here: set[bytes] = set()
        self.left_out[split] = 0
        for text in self._first_texts(split):
            content = hashlib.sha256(text.encode()).digest()[:16]
            if content in seen:
                self.left_out[split] += 1
                continue
            if split != "train":
                here.add(content)
            yield from _pieces(self.held_out.split_of(text.encode()) if split == "train" else split, text, True)
        seen |= here

    def _first_texts(self, split: str) -> Iterator[str]:
        """The texts of the first `max_rows` rows, without the empty ones."""
        for i, text in enumerate(self.texts[split]()):
            if i == self.max_rows:
                return
            if text:
                yield text


def _pieces(split: str, text: str, end: bool) -> Iterator[Piece]:
    for start in range(0, len(text), BLOCK):
        yield Piece(split, text[start : start + BLOCK], end and start + BLOCK >= len(text))
