"""Rows of every format, compressed or not: the text column as it was written, and a sentence for any other file."""

import bz2
import csv
import datetime
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.data import TextData
from bsbr_pl.data.files import SourceFile, read_pieces, sha256_of
from bsbr_pl.data.rows import read_rows

Texts = list[str | None]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.compress(raw, codec="zstd", asbytes=True),
}


def rows_of(*paths: Path, column: str = "text") -> Iterator[str | None]:
    return read_rows(map(SourceFile, paths), column)


def write_jsonl(path: Path, texts: Texts) -> None:
    path.write_bytes(b"".join(json.dumps({"n": 1, "text": text}).encode() + b"\r\n" for text in texts))


def write_array(path: Path, texts: Texts) -> None:
    path.write_text("\n " + json.dumps([{"text": text, "n": {"deep": [1]}} for text in texts], indent=2))


def write_csv(path: Path, texts: Texts, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["n", "text"])
        writer.writerows([i, text] for i, text in enumerate(texts))


def write_tsv(path: Path, texts: Texts) -> None:
    write_csv(path, texts, "\t")


def arrow_table(texts: Texts) -> pa.Table:
    return pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string()), "z": pa.nulls(len(texts))})


def write_parquet(path: Path, texts: Texts) -> None:
    pq.write_table(arrow_table(texts), path, row_group_size=3)


def write_arrow_stream(path: Path, texts: Texts) -> None:
    table = arrow_table(texts)
    with path.open("wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_arrow_file(path: Path, texts: Texts) -> None:
    table = arrow_table(texts)
    with path.open("wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


FORMATS = [
    (".jsonl", write_jsonl),
    (".ndjson", write_jsonl),
    (".json", write_jsonl),
    (".json", write_array),
    (".csv", write_csv),
    (".tsv", write_tsv),
    (".parquet", write_parquet),
    (".arrow", write_arrow_stream),
    (".arrow", write_arrow_file),
]


@pytest.mark.parametrize(("suffix", "write"), FORMATS)
@given(texts=st.lists(TEXT | st.none(), max_size=8))
def test_texts_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, write: Callable[[Path, Texts], None], texts: Texts
) -> None:
    if write in (write_csv, write_tsv):
        texts = [text.replace("\0", "") if text else "" for text in texts]  # a field that is not there is an empty one
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    write(path, texts)
    assert list(rows_of(path, path)) == texts * 2


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize(("suffix", "write"), FORMATS)
def test_compressed_rows(tmp_path: Path, suffix: str, write: Callable[[Path, Texts], None], ending: str) -> None:
    texts: Texts = ['a, "b"\nc\t', "", "日本"]
    write(tmp_path / "plain", texts)
    path = tmp_path / f"ROWS{suffix}{ending}".upper()
    path.write_bytes(COMPRESSIONS[ending]((tmp_path / "plain").read_bytes()))
    assert list(rows_of(path)) == texts
    assert sha256_of(SourceFile(path)) == sha256_of(SourceFile(tmp_path / "plain"))


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_texts_have_the_tokens_of_the_text(tmp_path: Path, ending: str) -> None:
    raw = "é日本 text\r\n".encode() * 40_008  # more than a block; the first cut falls into a character
    (tmp_path / "plain.txt").write_bytes(raw)
    compressed = tmp_path / f"compressed.txt{ending}"
    compressed.write_bytes(COMPRESSIONS[ending](raw))
    plain, decompressed = (
        TextData(str(path), "bytes", cache_dir=str(tmp_path)) for path in (tmp_path / "plain.txt", compressed)
    )
    assert decompressed.fingerprint == plain.fingerprint
    assert b"".join(decompressed.text(split) for split in ("train", "val", "test")) == raw
    other = TextData(str(compressed), "bytes", cache_dir=str(tmp_path / "other"))  # not the tokens of the plain one
    for split in ("train", "val", "test"):
        assert other.text(split) == plain.text(split)


@pytest.mark.parametrize("ending", sorted(set(COMPRESSIONS) - {""}))
def test_several_compressed_parts_one_after_another(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(COMPRESSIONS[ending](json.dumps({"text": text}).encode() + b"\n") for text in "abc"))
    assert list(rows_of(path)) == ["a", "b", "c"]


@pytest.mark.parametrize("ending", sorted(set(COMPRESSIONS) - {""}))
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_damaged_compressed_files(tmp_path: Path, name: str, ending: str) -> None:
    def read(path: Path) -> None:
        if name == "a.txt":
            list(read_pieces(SourceFile(path), "train"))
        else:
            list(rows_of(path))

    path = tmp_path / (name + ending)
    text = os.urandom(20_000).hex()
    whole = COMPRESSIONS[ending](json.dumps({"text": text}).encode() if name == "a.jsonl" else f"text\n{text}".encode())
    for damaged in (whole[: len(whole) // 2], whole[:-5], b"not compressed at all\n"):
        path.write_bytes(damaged)
        match = rf"{name}{ending} cannot be decompressed \(.*\): it is truncated, damaged or not a {ending} file"
        with pytest.raises(ValueError, match=match):
            read(path)
    (tmp_path / name).write_bytes(COMPRESSIONS[ending](b"text\n" * 100))
    if name != "a.parquet":
        with pytest.raises(
            ValueError, match=rf"{name} is not UTF-8: byte .* it is compressed: add {ending} to its name"
        ):
            read(tmp_path / name)


def test_only_the_text_column_must_agree(tmp_path: Path) -> None:
    """Other columns may be null first and something else later, hold dates, or be different in each file."""
    (tmp_path / "a.jsonl").write_text(
        '{"meta": null, "text": "2020-01-01"}\n' * 3 + '{"text": "2021-01-01T00:00:00", "meta": "m"}\n{"text": null}\n'
    )
    (tmp_path / "b.jsonl").write_text('{"text": "b", "meta": {"a": [1]}, "date": "2020-01-01"}')
    pq.write_table(pa.table({"meta": [datetime.date(2020, 1, 1)], "text": ["p"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["q"], "other": [b"x"]}), tmp_path / "d.parquet")
    files = sorted(tmp_path.iterdir())
    dates: Texts = ["2020-01-01"] * 3 + ["2021-01-01T00:00:00", None]
    assert list(rows_of(*files)) == [*dates, "b", "p", "q"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", None], pa.large_string()),
        pa.array(["a", "b", None]).dictionary_encode(),
        pa.array(["a", "b", None], pa.large_string()).dictionary_encode(),
        pa.array(["a", "b", None], pa.string_view()),
        pa.nulls(3),
        pa.array([], pa.string()),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_strings_of_other_types(tmp_path: Path, column: pa.Array, suffix: str) -> None:
    table = pa.table({"a.b": column, "rest": pa.nulls(len(column))})
    path = tmp_path / f"a{suffix}"
    if suffix == ".arrow":
        with path.open("wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
    elif column.type == pa.string_view():
        return  # this version of .parquet cannot be written with it
    else:
        pq.write_table(table, path)
    assert list(rows_of(path, column="a.b")) == column.to_pylist()


@pytest.mark.parametrize(
    ("column", "kind"),
    [([1], "int64"), ([b"x"], "binary"), ([datetime.date(2020, 1, 1)], "date32"), ([["a"]], "list<"), ([True], "bool")],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_no_strings(tmp_path: Path, column: list[Any], kind: str, suffix: str) -> None:
    table = pa.table({"text": column})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with path.open("wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(
        ValueError, match=f"text_column='text' of .*a{suffix} has type {kind}.*: use a column of strings"
    ):
        list(rows_of(path))


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": \n', r"a.jsonl, line 2 is not JSON \("),
        ("a.jsonl", GOOD + b"\n[1]\n", r"a.jsonl, line 3 has list: a row must be an object"),
        ("a.jsonl", GOOD + b'"text"\n', r"a.jsonl, line 2 has str: a row must be an object"),
        (
            "a.jsonl",
            GOOD + b'{"text": 3}',
            r"text_column='text' has int in .*a.jsonl, line 2: use a column of strings",
        ),
        (
            "a.jsonl",
            GOOD + b'{"body": "b", "c": 1}',
            r"'text' is not among the columns of .*a.jsonl, line 2: 'body', 'c'",
        ),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', r"has an unpaired surrogate '\\ud800' in .*a.jsonl, line 2"),
        ("a.jsonl", GOOD + b"[" * 100_000, r"a.jsonl, line 2 is not JSON \(.*recursion"),
        ("a.jsonl", GOOD + b'{"text": "caf\xe9"}', r"a.jsonl is not UTF-8: byte 0xe9 at offset 27; convert the file"),
        ("a.json", b'[{"text": "a"}, 3]', r"a.json, row 2 has int"),
        ("a.json", b'[{"text": "a"}', r"a.json is not JSON \("),
        (
            "a.json",
            b'{\n "text": "a"\n}',
            r"a.json, line 1 is not JSON \(.*use one object per line, or one array of objects",
        ),
        ("a.csv", b'text,n\na,1\n"b,2\n', r"a.csv, line 3: unexpected end of data; double the quotes inside a text"),
        ("a.csv", b'text,n\n"a" b,1\n', r"a.csv, line 2: .*; double the quotes inside a text"),
        (
            "a.csv",
            b"text,n\na,1\n\nb,c,2\n",
            r"a.csv, line 4 has 3 fields, but the first line has 2: put texts with a delim",
        ),
        ("a.csv", b"text,n\na\n", r"a.csv, line 2 has 1 fields, but the first line has 2"),
        ("a.csv", b"body;n\na;1\n", r"'text' is not among the columns of .*a.csv: 'body;n'"),
        ("a.csv", b"text\na\n\xe9\n", r"a.csv is not UTF-8: byte 0xe9 at offset 7"),
        ("a.tsv", "text\na\n".encode("utf-16"), r"a.tsv is not UTF-8: byte 0xff at offset 0"),
        ("a.parquet", b"PAR1 nothing PAR1", r"a.parquet cannot be read as .parquet \(.*Download it again"),
        ("a.arrow", b"text", r"a.arrow cannot be read as .arrow \(.*Download it again"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(rows_of(tmp_path / name))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_file_that_was_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    (write_parquet if suffix == ".parquet" else write_arrow_stream)(path, ["text"] * 1000)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"a{suffix} cannot be read as {suffix}"):
            list(rows_of(path))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "a"}'), ("b.json", '[{"text": "a"}]'), ("c.csv", "text,n\r\na,1\r\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig", newline="")
        assert list(rows_of(tmp_path / name)) == ["a"]


def test_a_large_field_of_a_csv(tmp_path: Path) -> None:
    text = "word, " * 100_000
    write_csv(tmp_path / "a.csv", ["small", text])
    assert list(rows_of(tmp_path / "a.csv")) == ["small", text]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.zst", "a.parquet"])
def test_memory_is_bounded(tmp_path: Path, name: str) -> None:
    texts: Texts = [f"{i} " + "x" * 4000 for i in range(5_000)]  # 20 MB
    plain = tmp_path / "plain"
    if name == "a.parquet":
        pq.write_table(arrow_table(texts), plain, compression="none", use_dictionary=False)  # one group of rows
    else:
        (write_jsonl if name.startswith("a.jsonl") else write_csv)(plain, texts)
    (tmp_path / name).write_bytes(COMPRESSIONS.get(Path(name).suffix, bytes)(plain.read_bytes()))
    list(rows_of(tmp_path / name))  # what is imported is not counted
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    count = largest = 0
    for text in rows_of(tmp_path / name):
        count += text is not None
        largest = max(largest, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5_000
    assert peak + largest < 15e6
