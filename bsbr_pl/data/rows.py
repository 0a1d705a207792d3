"""Rows as documents: what the splits of a table become, wherever its texts come from."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from .documents import BLOCK, SPLITS, HeldOut, Piece

Texts = Callable[[], Iterator[str | None]]  # reads the rows of a split anew


class Rows:
    """Rows of a text column.

    A row is a document; with `join_rows` the rows of a split are one running text (wikitext's rows are lines). A split
    that has no rows of its own is held out of the training rows by the hash of the row's text, so that equal rows
    land on the same side. A document that stands in two splits is kept in one: test before validation before training.

    Args:
        texts: the rows of `train`, and of `val` and `test` where there are such
        content: gives what decides the rows, for the fingerprint
        held_out: what is held out of the training rows
        join_rows: whether rows are lines of one text
        max_rows: read no more rows of each split
        total_bytes: of all rows, where it is known
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
                f"join_rows=True needs a split of its own for {' and '.join(missing)}: rows that are lines of one text "
                "cannot be held out one by one; give a folder with such splits, or name those of a Hub data set with "
                "val_split and test_split"
            )
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows} is too small: at least 1, or null for all")
        self.texts, self.content, self.held_out = texts, content, held_out
        self.join_rows, self.max_rows, self.total_bytes = join_rows, max_rows, total_bytes
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        several = len(self.texts) > 1 and not self.join_rows
        rule = {"equal_rows": "in one split"} if several else {}
        return {**self.content(), "join": self.join_rows, "max_rows": self.max_rows, **rule}

    def pieces(self) -> Iterator[Piece]:
        # Training comes last: a misspelt name of another split is noticed before the long one is read.
        elsewhere: set[bytes] = set()
        for split in ("test", "val", "train"):
            if split not in self.texts:
                continue
            if self.join_rows:
                for text in self._first_texts(split):
                    yield from _pieces(split, text, False)
                yield Piece(split, "", True)
            else:
                yield from self._documents(split, elsewhere)

    def _documents(self, split: str, elsewhere: set[bytes]) -> Iterator[Piece]:
        """The documents of a split that are not elsewhere; those of validation and test are elsewhere afterwards."""
        here: set[bytes] = set()
        self.left_out[split] = 0
        for text in self._first_texts(split):
            content = hashlib.sha256(text.encode()).digest()[:16]
            if content in elsewhere:
                self.left_out[split] += 1
                continue
            if split != "train":
                here.add(content)
            yield from _pieces(self.held_out.split_of(text.encode()) if split == "train" else split, text, True)
        elsewhere |= here

    def _first_texts(self, split: str) -> Iterator[str]:
        """The texts of the first `max_rows` rows, empty ones left out."""
        for i, text in enumerate(self.texts[split]()):
            if i == self.max_rows:
                return
            if text:
                yield text


def _pieces(split: str, text: str, end: bool) -> Iterator[Piece]:
    for start in range(0, len(text), BLOCK):
        yield Piece(split, text[start : start + BLOCK], end and start + BLOCK >= len(text))
