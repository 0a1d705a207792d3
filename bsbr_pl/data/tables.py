"""Rows of files: the text column of .jsonl, .json, .csv, .tsv, .parquet and .arrow, and of nothing else in them.

Files are read from start to end, a line or a batch at a time; only a .json file that is one array is read whole. The
other columns may be of any type, and of another one in each file.
"""

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from .compressed import decompressed, decompressed_name, decompressed_to_seek
from .documents import BLOCK, read_pieces

_LARGEST_FIELD = 1 << 28  # characters of a .csv field: a quote that is never closed must not fill the memory
_BATCH_ROWS = 1024  # rows of a .parquet file held at once

Cells = Iterator[tuple[str, Any]]  # where a row is, and what the column holds there


def read_texts(files: Iterable[Path], column: str) -> Iterator[str | None]:
    """The texts of a column, file after file; None for a row without one.

    Raises:
        ValueError: a file is damaged, the column is missing or holds no strings; by file and line or row.
    """
    for file in files:
        for place, value in _FORMATS[suffix_of(file)](file, column):
            yield check_text(value, column, place)


def is_table(file: Path) -> bool:
    return suffix_of(file) in _FORMATS


def suffix_of(file: Path) -> str:
    """The ending that tells the format, without that of a compressed file."""
    return Path(decompressed_name(file.name)).suffix.lower()


def check_text(value: Any, column: str, place: str) -> str | None:
    """The value, if it is a text that can be written as UTF-8, or None.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str | None):
        raise ValueError(
            f"text_column={column!r} holds {type(value).__name__} in {place}: give a column of strings, or convert it"
        )
    if value and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise ValueError(
                f"text_column={column!r} holds half a character, {half}, in {place}: remove it, or write the other half"
            ) from error
    return value


def missing_column(column: str, place: str, columns: Iterable[str]) -> ValueError:
    names = ", ".join(map(repr, columns))
    return ValueError(f"text_column={column!r} is not among the columns of {place}: {names}")


def _json_cells(file: Path, column: str) -> Cells:
    """An object a line, or one array of objects."""
    with decompressed(file) as stream:
        blank = True
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
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
        _say_where_it_is_not_utf8(file, error)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place}: not JSON ({error}); each line must be one object, or the file one array of objects"
        ) from error


def _json_cell(row: Any, column: str, place: str) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds {type(row).__name__}: a row must be an object such as {{{column!r}: '...'}}")
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
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{file}, line {reader.line_num} has {len(row)} fields, but the first line {len(header)}: put "
                        "texts with a delimiter or a line break in quotes"
                    )
                if row:
                    yield f"{file}, line {reader.line_num}", row[index]
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}; write a quote in a text as two") from error
        except UnicodeDecodeError as error:
            _say_where_it_is_not_utf8(file, error)


def _parquet_cells(file: Path, column: str) -> Cells:
    import pyarrow.parquet

    with decompressed_to_seek(file) as stream, _arrow_errors(file):
        # By default pyarrow reads the whole file ahead.
        table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK)
        _check_type(table.schema_arrow, file, column)
        yield from _numbered(file, table.iter_batches(_BATCH_ROWS, columns=[column]))


def _arrow_cells(file: Path, column: str) -> Cells:
    """A stream of batches, which `datasets` writes, or a file of them."""
    from pyarrow import ipc

    with decompressed_to_seek(file) as stream, _arrow_errors(file):
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
    import pyarrow

    if column not in schema.names:
        raise missing_column(column, str(file), schema.names)
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
        raise ValueError(f"text_column={column!r} of {file} holds {kind}: give a column of strings, or convert it")


@contextmanager
def _arrow_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{file} cannot be read as {suffix_of(file)} ({error}): it was cut short or altered; fetch it again"
        ) from error


def _say_where_it_is_not_utf8(file: Path, error: UnicodeDecodeError) -> NoReturn:
    deque(read_pieces(file, "train"), maxlen=0)  # its error says where
    raise ValueError(f"{file} is not UTF-8 ({error})") from error


_FORMATS: dict[str, Callable[[Path, str], Cells]] = {
    ".jsonl": _json_cells,
    ".ndjson": _json_cells,
    ".json": _json_cells,
    ".csv": partial(_csv_cells, delimiter=","),
    ".tsv": partial(_csv_cells, delimiter="\t"),
    ".parquet": _parquet_cells,
    ".arrow": _arrow_cells,
}
