"""The text column of rows: of data sets on the Hugging Face Hub, and of files, which may be compressed.

Files (.jsonl, .ndjson, .json, .csv, .tsv, .parquet and .arrow) are read from start to end, a line or a batch at a
time; only a .json file that is one array is read whole. Columns other than the text column may have any type,
and another type in each file.
"""

import codecs
import csv
import io
import json
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies

from .files import BLOCK, SourceFile, decompressed, read_pieces, seekable, suffix_of

_LARGEST_FIELD = 1 << 28  # characters of a .csv field: a quote that is never closed must not fill the memory
_BATCH_ROWS = 1024  # rows of a .parquet file held at once

Cells = Iterator[tuple[str, Any]]  # the place of a row, for messages, and the value in the text column


def is_table(name: str) -> bool:
    """Whether a file of this name holds rows."""
    return suffix_of(name) in _FORMATS


def read_rows(files: Iterable[SourceFile], column: str) -> Iterator[str | None]:
    """The texts of a column, file after file; None for a row without text.

    Raises:
        ValueError: a file is damaged, or the column is missing or holds no strings; by file and line or row.
    """
    for file in files:
        for place, value in _FORMATS[suffix_of(file.name)](file, column):
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


def read_hub(arguments: dict[str, Any], split: str, column: str) -> Iterator[str | None]:
    """The texts of a column of a data set's split; None for a row without text.

    Args:
        arguments: of `datasets.load_dataset`, without the split

    Raises:
        ValueError: the data set cannot be read, and what to do; or the column is missing or holds no strings.
    """
    for number, row in enumerate(_hub_rows(arguments, split), 1):
        if column not in row:
            raise missing_column(column, arguments["path"], row)
        yield check_text(row[column], column, f"{arguments['path']}, row {number} of {split!r}")


def _hub_rows(arguments: dict[str, Any], split: str) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            _check_hub_answers()
        yield from datasets.load_dataset(**arguments, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source={arguments['path']!r} (split {split!r}) cannot be read: {error}. If this machine is offline, set "
            "HF_HUB_OFFLINE=1 to use a data set that was downloaded before, or give the path of its .parquet, .jsonl "
            "or text files as source; source='packages' needs no download"
        ) from error


def _check_hub_answers() -> None:
    """ConnectionError at once; the Hub's own client would try again for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if "https" in getproxies():
        return  # only the proxy needs to be reachable from here
    host = urlsplit(ENDPOINT).hostname
    try:
        socket.create_connection((host, urlsplit(ENDPOINT).port or 443), timeout=5).close()
    except OSError as error:
        raise ConnectionError(f"{host} does not answer ({error})") from error


def _json_cells(file: SourceFile, column: str) -> Cells:
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


def _parse_json(text: bytes, file: SourceFile, place: str) -> Any:
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


def _csv_cells(file: SourceFile, column: str, delimiter: str) -> Cells:
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


def _raise_not_utf8(file: SourceFile, error: UnicodeDecodeError) -> NoReturn:
    deque(read_pieces(file, "train"), maxlen=0)  # its error gives the offset
    raise ValueError(f"{file} is not UTF-8 ({error})") from error


def _parquet_cells(file: SourceFile, column: str) -> Cells:
    import pyarrow.parquet

    with seekable(file) as stream, _arrow_errors(file):
        # By default pyarrow reads the whole file ahead.
        table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK)
        _check_type(table.schema_arrow, file, column)
        yield from _numbered(file, table.iter_batches(_BATCH_ROWS, columns=[column]))


def _arrow_cells(file: SourceFile, column: str) -> Cells:
    """A stream of batches, which `datasets` writes, or a file of batches."""
    from pyarrow import ipc

    with seekable(file) as stream, _arrow_errors(file):
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        open_ipc = ipc.open_file if is_file else ipc.open_stream
        schema = open_ipc(stream).schema
        _check_type(schema, file, column)
        stream.seek(0)
        table = open_ipc(stream, options=ipc.IpcReadOptions(included_fields=[schema.get_field_index(column)]))
        yield from _numbered(file, map(table.get_batch, range(table.num_record_batches)) if is_file else table)


def _numbered(file: SourceFile, batches: Iterable[Any]) -> Cells:
    values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
    return ((f"{file}, row {number}", value) for number, value in enumerate(values, 1))


def _check_type(schema: Any, file: SourceFile, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise missing_column(column, str(file), schema.names)
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise ValueError(f"text_column={column!r} of {file} has type {kind}: use a column of strings, or convert it")


@contextmanager
def _arrow_errors(file: SourceFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{file} cannot be read as {suffix_of(file.name)} ({error}): it is truncated or damaged. Download it again"
        ) from error


_FORMATS: dict[str, Callable[[SourceFile, str], Cells]] = {
    ".jsonl": _json_cells,
    ".ndjson": _json_cells,
    ".json": _json_cells,
    ".csv": partial(_csv_cells, delimiter=","),
    ".tsv": partial(_csv_cells, delimiter="\t"),
    ".parquet": _parquet_cells,
    ".arrow": _arrow_cells,
}
