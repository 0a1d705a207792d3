"""Compressed files: .gz, .bz2, .xz and .zst are read as what they hold."""

import bz2
import gzip
import io
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def _open_zstd(file: Path) -> Any:
    import pyarrow

    # pyarrow gets an open file: it would take some names for addresses.
    return io.BufferedReader(pyarrow.input_stream(file.open("rb"), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in _OPENERS


def decompressed_name(name: str) -> str:
    """The name without .gz, .bz2, .xz or .zst: that of what the file holds."""
    path = Path(name)
    return path.stem if is_compressed(path) else name


@contextmanager
def decompressed(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says that it is compressed.

    Raises:
        OSError: the file cannot be read, by its name.
        ValueError: the file is damaged, or is not what its name says.
    """
    suffix = file.suffix.lower()
    try:
        with _OPENERS.get(suffix, lambda plain: plain.open("rb"))(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno is None:  # the decoders' own: the system's errors have a number
            raise _damaged(file, error) from error
        raise OSError(error.errno, error.strerror, str(file)) from error  # a failed read does not say of what


@contextmanager
def decompressed_to_seek(file: Path) -> Iterator[BinaryIO]:
    """As `decompressed`, for formats that are not read from start to end: the bytes go through a temporary file."""
    with decompressed(file) as stream:
        if not is_compressed(file):
            yield stream
            return
        with tempfile.TemporaryFile() as whole:
            while block := stream.read(1 << 20):
                whole.write(block)
            whole.seek(0)
            yield whole  # type: ignore[misc]


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be decompressed ({error}): it is cut short, altered or no {file.suffix} file; fetch it again"
    )


def advice(file: Path) -> str:
    """What to do with a file that is not UTF-8."""
    with decompressed(file) as stream:
        start = stream.read(8)
    for magic, suffix in _MAGIC.items():
        if start.startswith(magic):
            return f"it is compressed: add {suffix} to its name"
    return "convert the file, or leave it out of the source"
