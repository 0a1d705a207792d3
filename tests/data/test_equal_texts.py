"""Equal texts never stand in two splits, and what decides the splits is in the fingerprint."""

import gzip
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.data import TextData, files
from bsbr_pl.data.base import SPLITS
from bsbr_pl.data.corpus import prepare
from bsbr_pl.data.files import Piece, SourceFile
from bsbr_pl.data.opening import Options, open_source
from bsbr_pl.data.sources import Files, HeldOut, Rows, Source

HALF = HeldOut(0.25, 0.25)
DEFAULT = HeldOut(0.05, 0.05)


def by_split(source: Source) -> dict[str, list[str]]:
    pieces = list(source.pieces())
    return {split: [piece.text for piece in pieces if piece.split == split] for split in SPLITS}


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_equal_files_are_in_the_split_of_the_first_by_name(tmp_path: Path) -> None:
    texts = {f"{i // 10}/{i}.txt": f"text {i % 30}\n" for i in range(90)} | {"z/alone.txt": "alone\n"}
    write(tmp_path, texts)
    (tmp_path / "9.txt.gz").write_bytes(gzip.compress(b"text 9\n"))  # compressed is the same text
    expected: dict[str, str] = {}
    for name in sorted([*texts, "9.txt.gz"]):
        expected.setdefault(texts.get(name, "text 9\n"), HALF.split_of(name.encode()))
    found = by_split(open_source(str(tmp_path), HALF))
    assert sorted(sum(found.values(), [])) == sorted([*texts.values(), "text 9\n"])  # noqa: RUF017
    for split in SPLITS:
        assert set(found[split]) == {text for text, own in expected.items() if own == split}


def test_a_folder_without_equal_files_is_as_it_was_before_they_were_looked_at(folder: Path) -> None:
    source = open_source(str(folder), HALF)
    assert source.identity().keys() == {"files"}
    for piece in source.pieces():
        name = next(
            name for name in source.identity()["files"] if (folder / name).read_text().startswith(piece.text[:20])
        )
        assert piece.split == HALF.split_of(name.encode())


def test_where_a_file_was_moved_to_is_in_the_fingerprint(tmp_path: Path) -> None:
    names = [f"{i}.txt" for i in range(9)]
    splits = {name: HALF.split_of(name.encode()) for name in names}
    first = names[0]
    other = next(name for name in names if splits[name] != splits[first])
    write(tmp_path, {first: "equal", other: "equal"})
    assert open_source(str(tmp_path), HALF).identity()["moved"] == {other: splits[first]}
    write(tmp_path, {other: "not equal"})
    assert "moved" not in open_source(str(tmp_path), HALF).identity()


TEXTS = st.lists(st.sampled_from("abcdefgh"), max_size=8)


@given(train=TEXTS, val=TEXTS, test=TEXTS)
def test_a_text_in_two_of_a_sources_splits_is_kept_in_one(train: list[str], val: list[str], test: list[str]) -> None:
    rows = {"train": train, "val": val, "test": test}
    source = Rows(
        {split: lambda texts=texts: iter(texts) for split, texts in rows.items()}, dict, HeldOut(0, 0), False, None
    )
    found = by_split(source)
    assert found["test"] == test
    assert found["val"] == [text for text in val if text not in test]
    assert found["train"] == [text for text in train if text not in test + val]
    assert source.left_out == {split: len(rows[split]) - len(found[split]) for split in SPLITS}
    assert by_split(source) == found  # and again
    joined = Rows(
        {split: lambda texts=texts: iter(texts) for split, texts in rows.items()}, dict, HeldOut(0, 0), True, None
    )
    assert {split: "".join(texts) for split, texts in by_split(joined).items()} == {
        split: "".join(texts) for split, texts in rows.items()
    }


@pytest.mark.parametrize("kind", ["files", "rows"])
def test_what_is_left_out_is_said_once_and_kept(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "train": ["in validation", "in test", "in train", "again", "again"],
        "valid": ["in validation", "in both", "in valid"],
        "test": ["in test", "in both", "not elsewhere"],
    }
    source = tmp_path / "source"
    for split, some in texts.items():
        if kind == "files":
            write(source / split, {str(i): text for i, text in enumerate(some)})
        else:
            write(source, {f"{split}.jsonl": "\n".join(json.dumps({"text": text}) for text in some)})
    data = TextData(str(source), "bytes", cache_dir=str(tmp_path))
    assert data.text("train") == b"in trainagainagain"
    assert data.text("val") == b"in validationin valid"
    assert data.text("test") == b"in testin bothnot elsewhere"
    assert data.corpus.meta["left_out"] == {"train": 2, "val": 1, "test": 0}
    said = capsys.readouterr().err
    assert f"source='{source}': removed 2 documents from train: the same text is in another split" in said
    assert f"source='{source}': removed 1 document from val: the same text is in another split" in said
    again = TextData(str(source), "bytes", cache_dir=str(tmp_path))
    assert again.corpus.meta["left_out"] == {"train": 2, "val": 1, "test": 0}
    assert capsys.readouterr().err == ""


def test_nothing_is_left_to_train_on(tmp_path: Path) -> None:
    write(tmp_path / "source", {name: "the same" for name in ("train.txt", "valid.txt", "test.txt")})
    match = "has no training text: all of it is also in validation or test"
    with pytest.raises(ValueError, match=match):
        _ = TextData(str(tmp_path / "source"), "bytes", cache_dir=str(tmp_path / "cache")).vocab_size


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    for i in range(3):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff%d.txt" % i)).write_text(f"text {i}")
    source = open_source(str(tmp_path), HeldOut(0, 0))
    assert by_split(source)["train"] == ["text 0", "text 1", "text 2"]
    assert TextData(str(tmp_path), "bytes", cache_dir=str(tmp_path / ".cache")).text("train") == b"text 0text 1text 2"


def test_hub_splits_that_share_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prepared text of such data sets is another one than before, so its identity is, too; otherwise it stays."""
    tables = {"train": ["a", "b", "c"], "validation": ["a", "d"], "test": ["b", "d"]}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda split, **_: datasets.Dataset.from_dict({"text": tables[split]})
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    options = Options(val_split="validation", test_split="test")
    source = open_source("owner/name", DEFAULT, options)
    assert by_split(source) == {"train": ["c"], "val": ["a"], "test": ["b", "d"]}
    assert source.left_out == {"test": 0, "val": 1, "train": 2}
    old = {"hub": "owner/name", "subset": None, "revision": None, "column": "text", "max_rows": None}
    names = {"train": "train", "val": "validation", "test": "test"}
    assert source.identity() == old | {"join": False, "splits": names, "equal_rows": "in one split"}
    joined = Options(val_split="validation", test_split="test", join_rows=True)
    assert open_source("owner/name", DEFAULT, joined).identity() == old | {"join": True, "splits": names}
    assert open_source("owner/name", HALF).identity() == old | {"join": False, "splits": {"train": "train"}}


def fingerprint(source: Path, cache: Path) -> str:
    return TextData(str(source), "bytes", cache_dir=str(cache)).fingerprint


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_fingerprint_is_of_content_and_splits_not_of_the_place(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "source"
    texts = {name: json.dumps({"text": f"the text of {name}"}) for name in ("train/a", "train/b", "val/a", "test/a")}
    write(source, {name + suffix: text for name, text in texts.items()})
    plain = fingerprint(source, tmp_path / "cache")
    shutil.copytree(source, tmp_path / "another [place]" / "deep")
    assert fingerprint(tmp_path / "another [place]" / "deep", tmp_path / "cache") == plain
    (source / "val").rename(source / "x")
    (source / "test").rename(source / "val")
    (source / "x").rename(source / "test")
    swapped = fingerprint(source, tmp_path / "cache")
    write(source, {f"train/a{suffix}": texts["train/a"].replace("the", "one")})
    assert len({plain, swapped, fingerprint(source, tmp_path / "cache")}) == 3


class Swapped(Files):
    """Files of which the last holds another text of the same size whenever it is read for its text."""

    def pieces(self) -> Iterator[Piece]:
        last = list(self.files.values())[-1].path
        old = last.read_bytes()
        write_again(last, old[::-1])
        try:
            yield from super().pieces()
        finally:
            write_again(last, old)


def write_again(file: Path, content: bytes) -> None:
    """Other bytes under the old modification time."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_source_that_changes_while_it_is_prepared_is_not_kept(tmp_path: Path) -> None:
    """Otherwise the new text would be handed out under the old text's fingerprint for ever."""
    names = [f"{i}.txt" for i in range(20)]
    write(tmp_path / "source", {name: f"text of {name}" for name in names})

    def open_files() -> dict[str, SourceFile]:
        return {name: SourceFile(tmp_path / "source" / name) for name in names}

    with pytest.raises(ValueError, match=r"9\.txt changed during preparation: run again when it no longer changes"):
        prepare(Swapped(open_files(), HeldOut(0, 0)), "texts", "bytes", 0, tmp_path / "cache")
    assert [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == []
    corpus = prepare(Files(open_files(), HeldOut(0, 0)), "texts", "bytes", 0, tmp_path / "cache")
    assert corpus.text("train") == b"".join((tmp_path / "source" / name).read_bytes() for name in sorted(names))


ROWS = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(200))


def parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(200)]}), stream)
    return stream.getvalue()


KINDS: dict[str, bytes] = {
    "a.txt": ROWS.encode(),
    "a.txt.gz": gzip.compress(ROWS.encode()),
    "a.jsonl": ROWS.encode(),
    "a.csv": b"text\n" + b"text of a line\n" * 200,
    "a.parquet": parquet(),
}


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\n")


def link(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[::-1])
    file.unlink()
    file.symlink_to(other)


CHANGES: dict[str, Callable[[Path], None]] = {
    "same size and time": lambda file: write_again(file, file.read_bytes()[::-1]),
    "grows": grow,
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "another file": link,
}


@pytest.mark.parametrize("verified", [1 << 18, 64])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_tokenized_is_what_the_fingerprint_is_of(
    tmp_path: Path, name: str, change: str, verified: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_VERIFIED", verified)
    file = tmp_path / name
    file.write_bytes(KINDS[name])
    source = open_source(str(file), DEFAULT)
    before, texts = source.identity(), list(source.pieces())
    CHANGES[change](file)
    for read in (source.identity, lambda: list(source.pieces())):
        with pytest.raises(ValueError, match=rf"{name} changed during preparation"):
            read()
    file.unlink()
    file.write_bytes(KINDS[name])
    assert list(source.pieces()) == texts
    assert source.identity() == before == open_source(str(file), DEFAULT).identity()


@pytest.mark.parametrize("kind", ["one file", "rows", "own files"])
def test_every_kind_of_source_notices_a_change(tmp_path: Path, kind: str) -> None:
    row = json.dumps({"text": "old"})
    names: dict[str, Any] = {
        "one file": {"a.txt": row},
        "rows": {"train.jsonl": row, "test.jsonl": row},
        "own files": {"train.txt": row, "test.txt": row + "."},
    }[kind]
    path = write(tmp_path, names)
    file, place = path / next(iter(names)), str(path / "a.txt") if kind == "one file" else str(path)
    before = open_source(place, DEFAULT).identity()
    file.write_text(row.replace("old", "new"))
    assert open_source(place, DEFAULT).identity() != before
    file.write_text(row)
    assert open_source(place, DEFAULT).identity() == before


@pytest.mark.parametrize(
    ("splits", "join", "named"), [(1, False, False), (2, False, True), (3, False, True), (3, True, False)]
)
def test_the_rule_for_equal_texts_is_part_of_the_identity(splits: int, join: bool, named: bool) -> None:
    texts = {split: lambda: iter(()) for split in ("train", "val", "test")[:splits]}
    held_out = HeldOut(0.0, 0.0)
    assert ("equal_rows" in Rows(texts, dict, held_out, join, None).identity()) is named
