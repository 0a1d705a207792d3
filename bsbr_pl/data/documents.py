"""Documents in pieces: what every source of text yields, which split a document is in, and how raw text is read."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from .compressed import advice, decompressed

SPLITS = ("train", "val", "test")
BLOCK = 1 << 18  # bytes of a file held at once
DEFAULT_FRACTION = 0.05  # held out for validation, and as much for test


class Piece(NamedTuple):
    """A stretch of one document; `end` marks the document's last."""

    split: str
    text: str
    end: bool


@dataclass(frozen=True)
class HeldOut:
    """Which documents are kept from training: by a hash that no other document and no order can change."""

    val: float
    test: float

    def __post_init__(self) -> None:
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            raise ValueError(
                f"val_fraction={self.val} and test_fraction={self.test} must not be negative and must leave "
                "something to train on: a sum below 1"
            )

    def split_of(self, name: bytes) -> str:
        """The split of a document by its name: training, test, validation from the low end of its hash to the high."""
        place = int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64
        return "train" if place < 1 - self.val - self.test else "test" if place < 1 - self.val else "val"

    def beside(self, own: set[str], source: str) -> "HeldOut":
        """What is held out of the training split of a source that has these splits of its own.

        Raises:
            ValueError: a fraction was asked for that would do nothing.
        """
        for split, fraction in (("val", self.val), ("test", self.test)):
            if split in own and fraction not in (0, DEFAULT_FRACTION):
                raise ValueError(
                    f"{split}_fraction={fraction} does nothing for source={source!r}, which has a {split} split of its "
                    f"own: leave {split}_fraction out"
                )
        return HeldOut(0.0 if "val" in own else self.val, 0.0 if "test" in own else self.test)


class Source(Protocol):
    """Documents in a fixed order, and what decides their content.

    Attributes:
        total_bytes: for the progress bar; None where it is not known
        held_out: the fractions that are held out of the training documents
        left_out: after `pieces()`, how many documents of a split were left out because another split has them
    """

    total_bytes: int | None
    held_out: HeldOut
    left_out: dict[str, int]

    def identity(self) -> dict[str, Any]: ...

    def pieces(self) -> Iterator[Piece]: ...


def read_pieces(file: Path, split: str) -> Iterator[Piece]:
    """A file as one document, decompressed and cut after a line break about every BLOCK bytes; none if it is empty.

    Raises:
        ValueError: bytes that are not UTF-8, by file and offset.
    """
    with decompressed(file) as stream:
        yield from read_stretch(stream, file, split, 0, None)


def read_stretch(stream: BinaryIO, file: Path, split: str, start: int, stop: int | None) -> Iterator[Piece]:
    """The next bytes of a stream, from offset start up to stop or to its end, as one document; see `read_pieces`."""
    data = b""
    block = stream.read(_next_size(start, stop))
    unread = start + len(block)
    while block:
        data += block
        block = stream.read(_next_size(unread, stop))  # one ahead: the last piece must know that it is the last
        unread += len(block)
        cut = len(data) if not block else data.rfind(b"\n") + 1 or len(data)
        try:
            text = data[:cut].decode()
        except UnicodeDecodeError as error:
            cut = error.start  # a character may go on in the next block, unless this is the last
            if not block or error.end < len(data):
                raise ValueError(
                    f"{file} is not UTF-8: byte {data[cut]:#04x} at offset {start + cut}; {advice(file)}"
                ) from error
            text = data[:cut].decode()
        yield Piece(split, text, not block)
        start, data = start + cut, data[cut:]


def _next_size(offset: int, stop: int | None) -> int:
    return BLOCK if stop is None else min(BLOCK, stop - offset)


def text_sha256(file: Path) -> str:
    """sha256 of a file's bytes when decompressed: a compressed text is the text.

    Raises:
        OSError: the file is unreadable.
        ValueError: the file cannot be decompressed.
    """
    digest = hashlib.sha256()
    with decompressed(file) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        OSError: the file is unreadable.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a failed read does not say of what
