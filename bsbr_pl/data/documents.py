"""Documents in pieces: what every source of text yields, which split a document is in, and how a raw file is read."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

SPLITS = ("train", "val", "test")
BLOCK = 1 << 18  # bytes of a file held at once


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


class Source(Protocol):
    """Documents in a fixed order, and what decides their content."""

    total_bytes: int | None  # for the progress bar
    held_out: HeldOut

    def identity(self) -> dict[str, Any]: ...

    def pieces(self) -> Iterator[Piece]: ...


def read_pieces(file: Path, split: str, start: int, stop: int) -> Iterator[Piece]:
    """The bytes [start, stop) of a file as one document, cut after a line break about every BLOCK bytes.

    Raises:
        ValueError: bytes that are not UTF-8, by file and offset.
    """
    with file.open("rb") as stream:
        stream.seek(start)
        data = b""
        while start < stop:
            block = stream.read(min(BLOCK, stop - start - len(data)))
            if not block:
                raise OSError(f"{file} became shorter while it was read: {stop - start} bytes are missing")
            data += block
            end = len(data) >= stop - start
            cut = len(data) if end else data.rfind(b"\n") + 1 or len(data)
            try:
                text = data[:cut].decode()
            except UnicodeDecodeError as error:
                cut = error.start  # a character may go on in the next block, unless this is the last
                if end or error.end < len(data):
                    raise ValueError(
                        f"{file} is not UTF-8: byte {data[cut]:#04x} at offset {start + cut}; convert the file, or "
                        "leave it out of the source"
                    ) from error
                text = data[:cut].decode()
            yield Piece(split, text, end)
            start, data = start + cut, data[cut:]


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
