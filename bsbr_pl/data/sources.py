"""Where text comes from: the standard library, files and folders, raw or rows, and the Hugging Face Hub.

A source yields `Piece`s in a fixed order: every document belongs to one split ("train", "val" or "test") and comes in
one or more pieces, so that a file larger than memory can be read.
"""

import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from .compressed import ARCHIVES
from .documents import HeldOut, Source
from .folders import choose_splits, files_below, is_about, named_splits
from .hub import read_hub
from .raw import Files, OwnFiles, files_to_split, sha256_of, total_bytes
from .rows import Rows, Texts
from .tables import is_table, read_texts, suffix_of

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Options:
    """What may be asked of a source beside its name; see `TextData`. The defaults ask for nothing."""

    subset: str | None = None
    revision: str | None = None
    text_column: str = "text"
    train_split: str = "train"
    val_split: str | None = None
    test_split: str | None = None
    streaming: bool = False
    join_rows: bool = False
    max_rows: int | None = None

    def refuse(self, names: Iterable[str], because: str) -> None:
        """ValueError if one of these options was set."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name}={value!r} does nothing here: {because}; leave it out")

    def splits(self) -> dict[str, str]:
        """The names that were asked for, of our splits; that of training always.

        Raises:
            ValueError: there is none for training, or two of ours would hold the same texts.
        """
        if not self.train_split:
            raise ValueError(f"train_split={self.train_split!r} names no split to train on: leave it out for 'train'")
        names = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        given = {split: name for split, name in names.items() if name is not None}
        if len(set(given.values())) < len(given) or ("all" in given.values() and len(given) > 1):
            listed = ", ".join(f"{split}_split={name!r}" for split, name in given.items())
            raise ValueError(f"{listed} overlap: name each split once, and none beside 'all'")
        return given


_OF_ROWS = ("text_column", "join_rows", "max_rows")
_OF_SPLITS = ("train_split", "val_split", "test_split")
_OF_THE_HUB = ("subset", "revision", "streaming")


def open_source(source: str, held_out: HeldOut, options: Options | None = None) -> Source:
    """`stdlib`, an existing file or folder, or the name `owner/name` of a data set on the Hub.

    Raises:
        ValueError: the source is none of these, or holds no text, or an option does not apply to it.
    """
    options = options or Options()
    path = _existing(source)
    if source == "stdlib":
        options.refuse(_OF_ROWS + _OF_SPLITS + _OF_THE_HUB, "source='stdlib' is raw text without splits of its own")
        return stdlib(held_out)
    if path is None:
        return _hub(source, held_out, options)
    options.refuse(_OF_THE_HUB, f"source={source!r} is a path, not a data set on the Hub")
    if path.is_dir():
        return _folder(path, source, held_out, options)
    options.refuse(_OF_SPLITS, f"source={source!r} is one file, without splits of its own")
    if not path.is_file():
        raise ValueError(
            f"source={source!r} is neither file nor folder, and is read more than once: write it to a file"
        )
    _refuse_archives([path])
    if is_table(path):
        return _rows({"train": [path]}, source, held_out, options)
    options.refuse(_OF_ROWS, f"source={source!r} is raw text, not rows")
    return files_to_split({path.name: path}, held_out)


def stdlib(held_out: HeldOut) -> Files:
    """The Python standard library's own source code, without tests and without what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_THE_LIBRARY]  # os.walk reads it back
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    if not files:
        raise ValueError(f"source='stdlib' found no .py file in {root}: give a file or folder of text instead")
    return Files(files, held_out)


def _existing(source: str) -> Path | None:
    """The file or folder of this name as it is written, or with ~ for the home folder; None if there is neither."""
    path = Path(source)
    try:
        if not path.exists():
            path = path.expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # a name that no file can have, or ~ of nobody
        return None


def _folder(path: Path, source: str, held_out: HeldOut, options: Options) -> Source:
    files = files_below(path)
    _refuse_archives(files.values())
    tables = {name: file for name, file in files.items() if is_table(file)}
    if tables:
        raw = [name for name in files if name not in tables and not is_about(name)]
        if raw:
            raise ValueError(
                f"source={source!r} mixes raw text ({raw[0]!r}) and rows ({next(iter(tables))!r}): keep one kind in a "
                "folder"
            )
        files = tables
    else:
        options.refuse(_OF_ROWS, f"source={source!r} is raw text, not rows")
    splits = _splits_of_folder(path, source, files, bool(tables), options)
    if tables:
        return _rows({split: list(some.values()) for split, some in splits.items()}, source, held_out, options)
    held_out = held_out.beside(set(splits), source)
    if len(splits) == 1:
        return files_to_split(splits["train"], held_out)
    return OwnFiles(splits, held_out)


def _splits_of_folder(
    path: Path, source: str, files: dict[str, Path], rows: bool, options: Options
) -> dict[str, dict[str, Path]]:
    """The files of the folder's own splits; all are for training if it has none or if train_split is `all`."""
    asked = options.splits()
    if asked["train"] == "all":
        return {"train": files}
    found = named_splits(path, list(files), rows)
    if not found:
        options.refuse(_OF_SPLITS, f"no file of source={source!r} has a split in its name")
        return {"train": files}
    if asked["train"] == "train":
        del asked["train"]  # the default: any word for it will do
    chosen = choose_splits(found, asked, source)
    return {split: {name: files[name] for name in names} for split, names in chosen.items()}


def _rows(splits: dict[str, list[Path]], source: str, held_out: HeldOut, options: Options) -> Rows:
    own = set(splits) - {"train"}

    def content() -> dict[str, Any]:
        hashes = {split: [*sha256_of({str(file): file for file in files}).values()] for split, files in splits.items()}
        return {
            "rows": hashes if own else hashes["train"],
            "column": options.text_column,
            "splits": {split: split for split in splits},
        }

    texts: dict[str, Texts] = {
        split: partial(read_texts, files, options.text_column) for split, files in splits.items()
    }
    size = total_bytes([file for files in splits.values() for file in files])
    held_out = held_out.beside(own, source)
    return Rows(texts, content, held_out, options.join_rows, options.max_rows, size)


def _hub(source: str, held_out: HeldOut, options: Options) -> Rows:
    is_file_name = suffix_of(Path(source)) in (".txt", ".md") or is_table(Path(source))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or is_file_name:
        raise ValueError(
            f"source={source!r} is not there: give 'stdlib', an existing file or folder, "
            "or the name 'owner/name' of a data set on the Hugging Face Hub"
        )
    splits = options.splits()
    content = {
        "hub": source,
        "subset": options.subset,
        "revision": options.revision,
        "column": options.text_column,
        "splits": splits,
    }
    arguments = {
        "path": source,
        "name": options.subset,
        "revision": options.revision,
        "streaming": options.streaming,
    }
    texts: dict[str, Texts] = {
        split: partial(read_hub, arguments, name, options.text_column) for split, name in splits.items()
    }
    held_out = held_out.beside(set(splits), source)
    return Rows(texts, lambda: content, held_out, options.join_rows, options.max_rows)


def _refuse_archives(files: Iterable[Path]) -> None:
    for file in files:
        if suffix_of(file) in ARCHIVES:
            raise ValueError(f"{file} is an archive of files: unpack it, and give the folder as source")
