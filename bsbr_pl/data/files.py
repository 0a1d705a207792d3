"""What one file holds: its text in pieces, or the text column of its rows, decompressed if its name says so.

Rows are those of .jsonl, .ndjson, .json, .csv, .tsv, .parquet and .arrow files. Files are read from start to end, a
block, a line or a batch at a time; only a .json file that is one array is read whole. Columns other than the text
column may have any type, and another type in each file.
"""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

BLOCK = 1 << 18  # bytes read at once
_LARGEST_FIELD = 1 << 28  # characters of a .csv field: a quote that is never closed must not fill the memory
_BATCH_ROWS = 1024  # rows of a .parquet file held at once
_ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}

Cells = Iterator[tuple[str, Any]]  # the place of a row, for messages, and the value in the text column


class Piece(NamedTuple):
    """A stretch of one document; `end` marks the document's last."""

    split: str
    text: str
    end: bool


def _open_zstd(file: Path) -> Any:
    import pyarrow

    # An open file, because pyarrow treats some names as URLs.
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
    """The name without .gz, .bz2, .xz or .zst."""
    path = Path(name)
    return path.stem if is_compressed(path) else name


def suffix_of(file: Path) -> str:
    """The ending that tells the format, without the ending of the compression."""
    return Path(decompressed_name(file.name)).suffix.lower()


def refuse_archives(files: Iterable[Path]) -> None:
    for file in files:
        if suffix_of(file) in _ARCHIVES:
            raise ValueError(f"{file} is an archive: unpack it, and use the folder as source")


@contextmanager
def decompressed(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says that it is compressed.

    Raises:
        OSError: the file cannot be read; the error names the file.
        ValueError: the file is damaged, or is not what its name says.
    """
    try:
        with _OPENERS.get(file.suffix.lower(), lambda plain: plain.open("rb"))(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno is None:  # an error of the decoder: errors of the system have an errno
            raise _damaged(file, error) from error
        raise OSError(error.errno, error.strerror, str(file)) from error  # a failed read does not name the file


@contextmanager
def _seekable(file: Path) -> Iterator[BinaryIO]:
    """As `decompressed`, but the stream can seek: compressed files go through a temporary file."""
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
        f"{file} cannot be decompressed ({error}): it is truncated, damaged or not a {file.suffix} file. "
        "Download it again"
    )


def sha256_of(file: Path) -> str:
    """sha256 of a file's decompressed bytes, so that a text has the same hash whether it is compressed or not.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file cannot be decompressed.
    """
    with decompressed(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def total_bytes(files: Iterable[Path]) -> int | None:
    """The bytes of text in files; None if some are compressed, because they would have to be read for it."""
    files = list(files)
    return None if any(map(is_compressed, files)) else sum(file.stat().st_size for file in files)


def text_size(file: Path) -> int:
    """The bytes of a file's text; a compressed file is read for them."""
    if not is_compressed(file):
        return file.stat().st_size
    with decompressed(file) as stream:
        return sum(map(len, iter(partial(stream.read, BLOCK), b"")))


def character_start(file: Path, offset: int) -> int:
    """The first byte of a file's text, from `offset` on, that does not continue a UTF-8 character."""
    with decompressed(file) as stream:
        if is_compressed(file):
            left = offset
            while block := stream.read(min(BLOCK, left)):
                left -= len(block)
        else:
            stream.seek(offset)
        following = stream.read(4)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def read_pieces(file: Path, split: str) -> Iterator[Piece]:
    """A file as one document, cut after a line break about every BLOCK bytes; nothing if the file is empty.

    Raises:
        ValueError: bytes that are not UTF-8, by file and offset.
    """
    with decompressed(file) as stream:
        yield from read_stretch(stream, file, split, 0, None)


def read_stretch(stream: BinaryIO, file: Path, split: str, start: int, stop: int | None) -> Iterator[Piece]:
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


def _advice(file: Path) -> str:
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


def is_table(file: Path) -> bool:
    return suffix_of(file) in _FORMATS


def read_rows(files: Iterable[Path], column: str) -> Iterator[str | None]:
    """The texts of a column, file after file; None for a row without text.

    Raises:
        ValueError: a file is damaged, or the column is missing or holds no strings; by file and line or row.
    """
    for file in files:
        for place, value in _FORMATS[suffix_of(file)](file, column):
            yield check_text(value, column, place)


def check_text(value: Any, column: str, place: str) -> str | None:
    """The value, if it is None or a text that can be written as UTF-8.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str | None):
        raise ValueError(
            f"text_column={column!r} has {type(value).__name__} in {place}: use a column of strings, or convert it"
        )
    if value and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise ValueError(
                f"text_column={column!r} has an unpaired surrogate {half} in {place}: remove or complete it"
            ) from error
    return value


def missing_column(column: str, place: str, columns: Iterable[str]) -> ValueError:
    names = ", ".join(map(repr, columns))
    return ValueError(f"text_column={column!r} is not among the columns of {place}: {names}")


def _json_cells(file: Path, column: str) -> Cells:
    """An object in each line, or one array of objects."""
    with decompressed(file) as stream:
        blank = True
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if blank and line.lstrip().startswith(b"["):
                rows = _parse_json(line + stream.read(), file, str(file))
                for row_number, row in enumerate(rows, 1):
                    yield _json_cell(row, column, f"{file}, row {row_number}")
                return
            if line.strip():
                blank = False
                place = f"{file}, line {number}"
                yield _json_cell(_parse_json(line, file, place), column, place)


def _parse_json(text: bytes, file: Path, place: str) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        _raise_not_utf8(file, error)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): use one object per line, or one array of objects") from error


def _json_cell(row: Any, column: str, place: str) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} has {type(row).__name__}: a row must be an object such as {{{column!r}: '...'}}")
    if column not in row:
        raise missing_column(column, place, row)
    return place, row[column]


def _csv_cells(file: Path, column: str, delimiter: str) -> Cells:
    """The first line names the columns."""
    csv.field_size_limit(_LARGEST_FIELD)
    with decompressed(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(filter(None, reader), [])
            if column not in header:
                raise missing_column(column, str(file), header)
            index = header.index(column)
            for row in filter(None, reader):
                place = f"{file}, line {reader.line_num}"
                if len(row) != len(header):
                    raise ValueError(
                        f"{place} has {len(row)} fields, but the first line has {len(header)}: put texts with a "
                        "delimiter or a line break in quotes"
                    )
                yield place, row[index]
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}; double the quotes inside a text") from error
        except UnicodeDecodeError as error:
            _raise_not_utf8(file, error)


def _raise_not_utf8(file: Path, error: UnicodeDecodeError) -> NoReturn:
    deque(read_pieces(file, "train"), maxlen=0)  # its error gives the offset
    raise ValueError(f"{file} is not UTF-8 ({error})") from error


def _parquet_cells(file: Path, column: str) -> Cells:
    import pyarrow.parquet

    with _seekable(file) as stream, _arrow_errors(file):
        # By default pyarrow reads the whole file ahead.
        table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK)
        _check_type(table.schema_arrow, file, column)
        yield from _numbered(file, table.iter_batches(_BATCH_ROWS, columns=[column]))


def _arrow_cells(file: Path, column: str) -> Cells:
    """A stream of batches, which `datasets` writes, or a file of batches."""
    from pyarrow import ipc

    with _seekable(file) as stream, _arrow_errors(file):
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        open_ipc = ipc.open_file if is_file else ipc.open_stream
        schema = open_ipc(stream).schema
        _check_type(schema, file, column)
        stream.seek(0)
        table = open_ipc(stream, options=ipc.IpcReadOptions(included_fields=[schema.get_field_index(column)]))
        yield from _numbered(file, map(table.get_batch, range(table.num_record_batches)) if is_file else table)


def _numbered(file: Path, batches: Iterable[Any]) -> Cells:
    values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
    return ((f"{file}, row {number}", value) for number, value in enumerate(values, 1))


def _check_type(schema: Any, file: Path, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise missing_column(column, str(file), schema.names)
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise ValueError(f"text_column={column!r} of {file} has type {kind}: use a column of strings, or convert it")


@contextmanager
def _arrow_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{file} cannot be read as {suffix_of(file)} ({error}): it is truncated or damaged. Download it again"
        ) from error


_FORMATS: dict[str, Callable[[Path, str], Cells]] = {
    ".jsonl": _json_cells,
    ".ndjson": _json_cells,
    ".json": _json_cells,
    ".csv": partial(_csv_cells, delimiter=","),
    ".tsv": partial(_csv_cells, delimiter="\t"),
    ".parquet": _parquet_cells,
    ".arrow": _arrow_cells,
}
