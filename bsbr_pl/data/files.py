"""What one file holds: its bytes, verified and decompressed if its name says so, and its text in pieces."""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 1 << 18  # bytes read at once
_VERIFIED = 1 << 18  # bytes of a file that are compared at once
_ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


class Piece(NamedTuple):
    """A stretch of one document; `end` marks the document's last."""

    split: str
    text: str
    end: bool


class SourceFile:
    """A file of a source. Reading it again gives the same bytes as the first time, or an error.

    So a fingerprint that is computed from the file is a fingerprint of the bytes that are tokenized afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.hashes: dict[int, int] = {}  # of each block that was read, and of the end; by number

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        """The bytes of the file.

        Raises:
            ValueError: while it is read, if a block is not what it was when it was first read.
        """
        return io.BufferedReader(_VerifiedStream(self, self.path.open("rb")), BLOCK)  # type: ignore[return-value]


class _VerifiedStream(io.RawIOBase):
    def __init__(self, file: SourceFile, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._position, self._number, self._block = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        self._position = offset + (start[whence] if whence in start else self._stream.seek(0, io.SEEK_END))
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._position, _VERIFIED)
        if number != self._number:
            self._stream.seek(number * _VERIFIED)
            self._block, self._number = self._stream.read(_VERIFIED), number
            if self._file.hashes.setdefault(number, hash(self._block)) != hash(self._block):
                raise ValueError(f"{self._file} changed during preparation: run again when it no longer changes")
        piece = self._block[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_zstd(stream: BinaryIO) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def is_compressed(name: str) -> bool:
    return _suffix(name) in _DECOMPRESSORS


def decompressed_name(name: str) -> str:
    """The name without .gz, .bz2, .xz or .zst."""
    return Path(name).stem if is_compressed(name) else name


def suffix_of(name: str) -> str:
    """The ending of a file's name that tells the format, without the ending of the compression."""
    return _suffix(decompressed_name(name))


def refuse_archives(files: Iterable[SourceFile]) -> None:
    for file in files:
        if suffix_of(file.name) in _ARCHIVES:
            raise ValueError(f"{file} is an archive: unpack it, and use the folder as source")


@contextmanager
def decompressed(file: SourceFile) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says that it is compressed.

    Raises:
        OSError: the file cannot be read; the error names the file.
        ValueError: the file is damaged, is not what its name says, or changed since it was first read.
    """
    try:
        with file.open() as raw, _DECOMPRESSORS.get(_suffix(file.name), lambda plain: plain)(raw) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno is None:  # an error of the decoder: errors of the system have an errno
            raise _damaged(file, error) from error
        raise OSError(error.errno, error.strerror, str(file)) from error  # a failed read does not name the file


@contextmanager
def seekable(file: SourceFile) -> Iterator[BinaryIO]:
    """As `decompressed`, but the stream can seek: compressed files go through a temporary file."""
    with decompressed(file) as stream:
        if not is_compressed(file.name):
            yield stream
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(stream, whole)
            whole.seek(0)
            yield whole  # type: ignore[misc]


def _damaged(file: SourceFile, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be decompressed ({error}): it is truncated, damaged or not a {_suffix(file.name)} file. "
        "Download it again"
    )


def sha256_of(file: SourceFile) -> str:
    """sha256 of a file's decompressed bytes, so that a text has the same hash whether it is compressed or not.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file cannot be decompressed.
    """
    with decompressed(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def read_text(file: SourceFile) -> str:
    """The whole text of a file.

    Raises:
        ValueError: bytes that are not UTF-8, by file and offset.
    """
    return "".join(piece.text for piece in read_pieces(file, ""))


def total_bytes(files: Iterable[SourceFile]) -> int | None:
    """The bytes of text in files; None if some are compressed, because they would have to be read for it."""
    files = list(files)
    return None if any(is_compressed(file.name) for file in files) else sum(file.path.stat().st_size for file in files)


def text_size(file: SourceFile) -> int:
    """The bytes of a file's text, counted by reading them: its size on the disk is not verified."""
    with decompressed(file) as stream:
        return sum(map(len, iter(partial(stream.read, BLOCK), b"")))


def character_start(file: SourceFile, offset: int) -> int:
    """The first byte of a file's text, from `offset` on, that does not continue a UTF-8 character."""
    with decompressed(file) as stream:
        if is_compressed(file.name):
            left = offset
            while block := stream.read(min(BLOCK, left)):
                left -= len(block)
        else:
            stream.seek(offset)
        following = stream.read(4)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def read_pieces(file: SourceFile, split: str) -> Iterator[Piece]:
    """A file as one document, cut after a line break about every BLOCK bytes; nothing if the file is empty.

    Raises:
        ValueError: bytes that are not UTF-8, by file and offset.
    """
    with decompressed(file) as stream:
        yield from read_stretch(stream, file, split, 0, None)


def read_stretch(stream: BinaryIO, file: SourceFile, split: str, start: int, stop: int | None) -> Iterator[Piece]:
    """The bytes of a stream from its position `start` up to `stop`, or to its end, as `read_pieces` reads a file."""

    def read(position: int) -> bytes:
        return stream.read(BLOCK if stop is None else min(BLOCK, stop - position))

    decoder = codecs.getincrementaldecoder("utf-8")()
    text, block = "", read(start)
    while block:
        following = read(start + len(block))  # one block ahead, to mark the last piece
        undecoded = len(decoder.getstate()[0])
        try:
            text += decoder.decode(block, final=not following)
        except UnicodeDecodeError as error:
            place = f"byte {error.object[error.start]:#04x} at offset {start - undecoded + error.start}"
            raise ValueError(f"{file} is not UTF-8: {place}; {_advice(file)}") from error
        cut = text.rfind("\n") + 1 if following else 0
        cut = cut or len(text)
        yield Piece(split, text[:cut], not following)
        text, start, block = text[cut:], start + len(block), following


def _advice(file: SourceFile) -> str:
    """What to do with a file that is not UTF-8."""
    with decompressed(file) as stream:
        start = stream.read(8)
    for magic, suffix in _MAGIC.items():
        if start.startswith(magic):
            return f"it is compressed: add {suffix} to its name"
    return "convert the file, or remove it from the source"


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of `text` (not empty) as `xz -9` and `gzip -9` compress it, headers included: a baseline."""
    sizes = {"xz -9": len(lzma.compress(text, preset=9)), "gzip -9": len(gzip.compress(text, compresslevel=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}
