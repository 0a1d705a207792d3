"""Where text comes from: the standard library, files and folders, rows of .jsonl and .parquet, the Hugging Face Hub.

A source yields `Piece`s in a fixed order: every document belongs to one split ("train", "val" or "test") and comes in
one or more pieces, so that a file larger than memory can be read. Raw files are read as they are, because text loaders
rewrite line ends and the bytes counted must be the file's own.
"""

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .documents import HeldOut, Piece, Source, file_sha256, read_pieces
from .rows import Rows

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_ROW_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Files:
    """Raw text files, one document each, split by the hash of their relative path."""

    def __init__(self, root: Path, files: list[Path], held_out: HeldOut) -> None:
        self.files = {file.relative_to(root).as_posix(): file for file in files}
        self.held_out = held_out
        self.total_bytes: int | None = sum(file.stat().st_size for file in files)

    def identity(self) -> dict[str, Any]:
        return {"files": {name: file_sha256(self.files[name]) for name in sorted(self.files)}}

    def pieces(self) -> Iterator[Piece]:
        for name in sorted(self.files):
            file = self.files[name]
            yield from read_pieces(file, self.held_out.split_of(name.encode()), 0, file.stat().st_size)


class OneFile:
    """One raw file, cut by position: the start to train on, then validation, then test, a document each."""

    def __init__(self, file: Path, held_out: HeldOut) -> None:
        self.file = file
        self.held_out = held_out
        self.total_bytes: int | None = file.stat().st_size

    def identity(self) -> dict[str, Any]:
        return {"file": file_sha256(self.file)}

    def pieces(self) -> Iterator[Piece]:
        size = self.file.stat().st_size
        test = self._character_start(round(size * (1 - self.held_out.test)))
        val = self._character_start(round(size * (1 - self.held_out.test - self.held_out.val)))
        for split, start, stop in (("train", 0, val), ("val", val, test), ("test", test, size)):
            yield from read_pieces(self.file, split, start, stop)

    def _character_start(self, offset: int) -> int:
        """The first byte from offset on that does not continue a UTF-8 character."""
        with self.file.open("rb") as stream:
            stream.seek(offset)
            after = stream.read(4)
        return offset + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)


def open_source(
    source: str,
    held_out: HeldOut,
    *,
    subset: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
    train_split: str = "train",
    val_split: str | None = None,
    test_split: str | None = None,
    streaming: bool = False,
    join_rows: bool = False,
    max_rows: int | None = None,
) -> Source:
    """`stdlib`, an existing file or folder, or the name `owner/name` of a data set on the Hub.

    Raises:
        ValueError: the source is none of these, or holds no text.
    """
    if source == "stdlib":
        return stdlib(held_out)
    arguments: dict[str, Any]
    content: dict[str, Any]
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in _ROW_LOADERS:
        return OneFile(path, held_out)
    if path.exists():
        files = [file for file in ([path] if path.is_file() else _files_below(path)) if file.stat().st_size]
        if not files:
            raise ValueError(f"source={source!r} holds no text: every file in it is empty")
        loaders = {_ROW_LOADERS.get(file.suffix) for file in files}
        if len(loaders) > 1:
            raise ValueError(f"source={source!r} mixes raw text, .jsonl and .parquet files: keep one kind in a folder")
        loader = loaders.pop()
        if loader is None:
            return Files(path, files, held_out)
        # Local files are always streamed: a copy of them as a cache of `datasets` would serve nobody.
        arguments = {"path": loader, "data_files": [str(file) for file in files], "streaming": True}
        content = {"rows": [file_sha256(file) for file in files]}
        size = sum(file.stat().st_size for file in files)
        return Rows(arguments, {"train": "train"}, content, held_out, text_column, join_rows, max_rows, size)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or path.suffix in (".txt", *_ROW_LOADERS):
        raise ValueError(
            f"source={source!r} is not there: give 'stdlib', an existing file or folder, "
            "or the name 'owner/name' of a data set on the Hugging Face Hub"
        )
    arguments = {"path": source, "name": subset, "revision": revision, "streaming": streaming}
    names = {"train": train_split, "val": val_split, "test": test_split}
    given = {split: name for split, name in names.items() if name is not None}
    content = {"hub": source, "subset": subset, "revision": revision}
    return Rows(arguments, given, content, held_out, text_column, join_rows, max_rows)


def stdlib(held_out: HeldOut) -> Files:
    """The Python standard library's own source code, without tests and without what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_THE_LIBRARY]  # os.walk reads it back
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"source='stdlib' found no .py file in {root}: give a file or folder of text instead")
    return Files(root, files, held_out)


def _files_below(folder: Path) -> list[Path]:
    """Every file below a folder but hidden ones, sorted."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in found if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    if not visible:
        raise ValueError(f"source={str(folder)!r} is a folder without files")
    return sorted(visible)
