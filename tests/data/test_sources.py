"""Where text comes from: every kind of source, and what is said when it cannot be read."""

import contextlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.data import TextData, files, rows, sources
from bsbr_pl.data.base import SPLITS
from bsbr_pl.data.files import SourceFile, read_pieces
from bsbr_pl.data.opening import Options, open_source
from bsbr_pl.data.sources import Files, HeldOut, Source

HELD_OUT = HeldOut(0.05, 0.05)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        with path.open("wb") as stream:  # some names would be taken for addresses
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def by_split(source: Source) -> dict[str, str]:
    pieces = list(source.pieces())
    return {split: "".join(piece.text for piece in pieces if piece.split == split) for split in SPLITS}


def test_stdlib_is_its_own_source_without_tests() -> None:
    source = open_source("stdlib", HELD_OUT)
    assert isinstance(source, Files)
    names = source.files
    assert {"functools.py", "json/decoder.py", "asyncio/tasks.py"} <= names.keys()
    assert not [n for n in names if {"site-packages", "test", "tests", "idle_test", "__pycache__"} & set(n.split("/"))]
    root = Path(sysconfig.get_path("stdlib"))
    pieces = list(source.pieces())
    assert sum(piece.end for piece in pieces) == len([n for n in names if (root / n).stat().st_size])
    assert sum(len(piece.text.encode()) for piece in pieces) == source.total_bytes
    shares = [sum(source.held_out.split_of(n.encode()) == split for n in names) / len(names) for split in SPLITS]
    assert 0.85 < shares[0] < 0.95
    assert 0.02 < shares[1] < 0.08
    assert 0.02 < shares[2] < 0.08


def test_files_are_split_by_path_whatever_else_is_there(folder: Path) -> None:
    source = open_source(str(folder), HELD_OUT)
    assert isinstance(source, Files)
    assert [*source.files] == sorted(source.files)
    pieces = list(source.pieces())
    assert sum(piece.end for piece in pieces) == 59  # the empty one is left out
    # The rule, written out: where in [0, 1) does the sha256 of the path fall?
    for name, expected in (("functools.py", "test"), ("heapq.py", "train"), ("locale.py", "val")):
        assert HELD_OUT.split_of(name.encode()) == expected
    assert HeldOut(0.0, 0.0).split_of(b"anything") == "train"
    assert HeldOut(0.4, 0.599999999).split_of(b"anything") != "train"


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Read files in blocks of so many bytes. Not a fixture: hypothesis asks for a new size in every example."""
    old, files.BLOCK = files.BLOCK, size
    try:
        yield
    finally:
        files.BLOCK = old


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=100), block=st.integers(1, 40))
def test_pieces_of_a_file_are_its_bytes(tmp_path_factory: pytest.TempPathFactory, text: str, block: int) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with blocks_of(block):
        pieces = list(read_pieces(SourceFile(path), "val"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.end for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), bad=st.binary(min_size=1), block=st.integers(1, 40))
def test_the_first_byte_that_is_no_utf8_is_named(
    tmp_path_factory: pytest.TempPathFactory, text: str, bad: bytes, block: int
) -> None:
    content = text.encode() + bad + b"\xff" + text.encode()
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode()
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    path.write_bytes(content)
    match = f"bad.txt is not UTF-8: byte .* at offset {expected.value.start};"
    with blocks_of(block), pytest.raises(ValueError, match=match):
        list(read_pieces(SourceFile(path), "val"))


def test_one_file_is_cut_by_position_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_text("é" * 500 + "\r\n", newline="")
    texts = by_split(open_source(str(path), HELD_OUT))
    assert "".join(texts.values()) == "é" * 500 + "\r\n"
    assert [len(text.encode()) for text in texts.values()] == [902, 50, 50]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_documents_held_out_by_content(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [{"text": f"row {i % 150}\r\né", "other": i} for i in range(300)] + [
        {"text": "", "other": 1}
    ]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    source = open_source(str(path), HELD_OUT)
    pieces = list(source.pieces())
    assert sorted(piece.text for piece in pieces) == sorted(row["text"] for row in rows[:300])
    assert all(piece.end for piece in pieces)
    texts = {split: {piece.text for piece in pieces if piece.split == split} for split in SPLITS}
    assert all(texts.values())
    assert not texts["train"] & (texts["val"] | texts["test"])
    few = open_source(str(path), HELD_OUT, Options(max_rows=7))
    assert len(list(few.pieces())) == 7
    assert few.identity() != source.identity()


def test_a_long_row_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 10)
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * 25}])
    pieces = list(open_source(str(path), HeldOut(0, 0)).pieces())
    assert [(len(piece.text), piece.end) for piece in pieces] == [(10, False), (10, False), (5, True)]


@pytest.mark.parametrize("kind", ["raw", "folder", "folder of .jsonl", ".jsonl", ".parquet"])
def test_every_kind_of_source_gives_batches(tmp_path: Path, kind: str, some_text: Callable[..., str]) -> None:
    rows = [{"text": some_text(6, i)} for i in range(100)]
    path = tmp_path / "source"
    if kind.startswith("folder"):
        path.mkdir()
    if kind == "raw":
        path.write_text(some_text(300))
    elif kind == "folder":
        for i, row in enumerate(rows):
            (path / f"{i}.md").write_text(row["text"])
    elif kind == "folder of .jsonl":
        write_rows(path / "a.jsonl", rows[:50])
        write_rows(path / "b.jsonl", rows[50:])
    else:
        path = write_rows(tmp_path / f"rows{kind}", rows)
    data = TextData(
        str(path), bpe_vocab_size=300, context_length=16, batch_size=2, cache_dir=str(tmp_path / "c"), val_fraction=0.2
    )
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader))["input_ids"].shape == (2, 16)
    assert data.vocab_size == 300


NAMES = [
    *(
        "wiki[12]",
        "a*",
        "a?b",
        "{a,b}",
        "a b ",
        "日本 é",
        "s3::bucket",
        "zip:x::y",
        "a:b",
        "file:x",
        "%41#x",
        "~nobody",
    ),
    *("-x", "train", "validation[:10%]"),
]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_named_file_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    """Whatever its name looks like, and whatever lies beside it; the same for a folder."""
    monkeypatch.chdir(tmp_path)
    for other in ("wiki1", "wiki2", "a1", "b", "aXb", "A"):
        write_rows(tmp_path / f"{other}{suffix}", [{"text": "of another file"}])
    write_rows(tmp_path / f"{name}{suffix}", [{"text": "of this file"}])
    (tmp_path / name).mkdir()
    write_rows(tmp_path / name / f"{name}.jsonl", [{"text": "of the folder"}])
    texts = by_split(open_source(f"{name}{suffix}", HeldOut(0, 0)))
    assert texts == {"train": "of this file" if suffix != ".txt" else '{"text": "of this file"}', "val": "", "test": ""}
    folder = open_source(name, HeldOut(0, 0), Options(train_split="all"))
    assert by_split(folder) == {"train": "of the folder", "val": "", "test": ""}


def test_home_is_meant_where_no_file_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("at home")
    assert by_split(open_source("~/a.txt", HeldOut(0, 0)))["train"] == "at home"
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.txt").write_text("as written")
    assert by_split(open_source("~/a.txt", HeldOut(0, 0)))["train"] == "as written"


GIVEN: dict[str, Any] = {
    "text_column": "body",
    "join_rows": True,
    "max_rows": 3,
    "train_split": "training",
    "val_split": "validation",
    "test_split": "test",
    "subset": "en",
    "revision": "main",
    "streaming": True,
}
OF_ROWS, OF_SPLITS, OF_THE_HUB = [*GIVEN][:3], [*GIVEN][3:6], [*GIVEN][6:]


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("stdlib", [*GIVEN]),
        ("raw.txt", [*GIVEN]),
        ("texts", [*GIVEN]),
        ("own_texts", OF_ROWS + OF_THE_HUB),
        ("rows.jsonl", OF_SPLITS + OF_THE_HUB),
        ("rows", OF_SPLITS + OF_THE_HUB),
        ("own_rows", OF_THE_HUB),
        ("owner/name", []),
    ],
)
def test_an_option_that_does_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, refused: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.txt").write_text("a text")
    write_rows(tmp_path / "rows.jsonl", [{"text": "a row"}])
    for folder, names in (("texts", "ab"), ("own_texts", ("training", "validation", "test"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder.replace("texts", "rows")).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text(f"{name} is a text")
            write_rows(tmp_path / folder.replace("texts", "rows") / f"{name}.jsonl", [{"text": "a row"}])
    open_source(source, HELD_OUT, Options())
    for name, value in GIVEN.items():
        if name in refused:
            with pytest.raises(ValueError, match=rf"{name}={value!r} has no effect: .*{source}.* Remove it"):
                open_source(source, HELD_OUT, Options(**{name: value}))
        elif name == "join_rows" and source != "own_rows":
            with pytest.raises(ValueError, match="join_rows=True needs a separate split for val and test"):
                open_source(source, HELD_OUT, Options(join_rows=True))
        else:
            open_source(source, HELD_OUT, Options(**{name: value}))


class TestHub:
    """No network here: the calls are recorded and answered from memory."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def load_dataset(**arguments: Any) -> datasets.Dataset:
            calls.append(arguments)
            return datasets.Dataset.from_dict({"text": [f" line {i} of {arguments['split']}\n" for i in range(40)]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        return calls

    def test_named_splits_joined(self, calls: list[dict[str, Any]]) -> None:
        source = open_source(
            "Salesforce/wikitext",
            HELD_OUT,
            Options(subset="wikitext-2-raw-v1", val_split="validation", test_split="test", join_rows=True),
        )
        pieces = list(source.pieces())
        common = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "revision": None, "streaming": False}
        assert calls == [common | {"split": split} for split in ("test", "validation", "train")]
        assert sum(piece.end for piece in pieces) == 3
        assert by_split(source)["val"] == "".join(f" line {i} of validation\n" for i in range(40))

    def test_without_splits_of_its_own_some_is_held_out(self, calls: list[dict[str, Any]]) -> None:
        source = open_source("HuggingFaceFW/fineweb-edu", HeldOut(0.2, 0.2), Options("sample-10BT", streaming=True))
        texts = by_split(source)
        assert [call["split"] for call in calls] == ["train"]
        assert calls[0]["streaming"]
        assert all(texts.values())
        with pytest.raises(ValueError, match="max_rows=0 is too small"):
            open_source("Salesforce/wikitext", HELD_OUT, Options(max_rows=0))
        with pytest.raises(ValueError, match="join_rows=True needs a separate split for val and test"):
            open_source("Salesforce/wikitext", HELD_OUT, Options(join_rows=True))

    @pytest.mark.parametrize("offline", [True, False])
    def test_offline_a_name_fails_at_once_and_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
    ) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")  # nobody listens there
        monkeypatch.setattr(rows, "getproxies", dict)
        with pytest.raises(ValueError, match=r"source='no-such-owner/nothing'.*HF_HUB_OFFLINE=1.*source='packages'"):
            _ = TextData("no-such-owner/nothing", cache_dir=str(tmp_path)).vocab_size

    @pytest.mark.parametrize(("proxies", "refused"), [({"https": "http://proxy:1"}, False), ({"http": "x"}, True)])
    def test_behind_a_proxy_the_hub_is_not_asked_directly(
        self, monkeypatch: pytest.MonkeyPatch, proxies: dict[str, str], refused: bool
    ) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")  # nobody listens there
        monkeypatch.setattr(rows, "getproxies", lambda: proxies)
        with pytest.raises(ConnectionError) if refused else contextlib.nullcontext():
            rows._check_hub_answers()


class TestBadInput:
    def expect(self, match: str, source: Path | str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            for _ in open_source(str(source), HELD_OUT, Options(**options)).pieces():
                pass

    @pytest.mark.parametrize("name", ["missing.txt", "enwik8", "a/b/c", "data/rows.parquet", ""])
    def test_missing(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        name = name or str(tmp_path / "nothing")
        self.expect(
            "does not exist: use 'packages', 'gcide', 'stdlib', a file or folder, or the name 'owner/name'", name
        )

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        self.expect("has no files", tmp_path / "folder")
        (tmp_path / "folder" / "rows.jsonl").touch()
        self.expect("has no text: every file in it is empty", tmp_path / "folder")
        (tmp_path / "empty.txt").touch()
        data = TextData(str(tmp_path / "empty.txt"), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=r"source='.*empty.txt' has no training text: it is empty"):
            _ = data.vocab_size

    @pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
    def test_invalid_utf8_is_named_by_file_and_offset(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
        self.expect(rf"{name} is not UTF-8: byte 0xe9 at offset 13", tmp_path / name)

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_missing_or_wrong_column(self, suffix: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / f"rows{suffix}", [{"body": "a", "size": 1}])
        self.expect(r"text_column='text' is not among the columns of .*rows.*: 'body', 'size'", path)
        self.expect(r"text_column='size' .*(has|has type) int.* use a column of strings", path, text_column="size")

    def test_broken_rows(self, tmp_path: Path) -> None:
        for name in ("rows.jsonl", "rows.parquet"):
            (tmp_path / name).write_text('{"text": \n')
            message = "is not JSON" if name == "rows.jsonl" else "cannot be read as .parquet"
            self.expect(f"{name}.*{message}", tmp_path / name)

    def test_mixed_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
        self.expect(r"mixes raw text \('a.txt'\) and rows \('b.jsonl'\)", tmp_path)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc")
    def test_unreadable_file_is_named(self, tmp_path: Path) -> None:
        os.symlink("/proc/self/mem", tmp_path / "memory.txt")  # reading its first byte is an I/O error, even for root
        with pytest.raises(OSError, match=r"memory\.txt"):
            open_source(str(tmp_path / "memory.txt"), HELD_OUT).identity()

    @pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.TGZ", "a.zip"])
    def test_archives(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"x")
        self.expect(f"{name} is an archive: unpack it, and use the folder as source", tmp_path / name)
        self.expect(f"{name} is an archive: unpack it, and use the folder as source", tmp_path)

    @pytest.mark.skipif(sys.platform == "win32", reason="needs pipes with names")
    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        self.expect(
            "is not a regular file or folder \\(it must be readable twice\\): copy it to a file", tmp_path / "pipe"
        )
        self.expect("has no files", tmp_path)

    @pytest.mark.parametrize("name", ["", "a" * 300, "a\0b", "~nobody-of-this-name/a.txt", "file:///etc/hosts"])
    def test_names_that_no_file_has(self, name: str) -> None:
        self.expect(
            "does not exist: use 'packages', 'gcide', 'stdlib', a file or folder, or the name 'owner/name'", name
        )

    def test_fractions(self) -> None:
        for val, test in ((-0.1, 0.1), (0.5, 0.5)):
            with pytest.raises(ValueError, match=f"val_fraction={val} and test_fraction={test}"):
                HeldOut(val, test)
