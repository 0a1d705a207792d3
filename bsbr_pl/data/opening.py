"""From the name of a source and its options to the source."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from .corpora import BUILT_IN
from .files import SourceFile, refuse_archives, sha256_of, suffix_of, total_bytes
from .folders import choose_splits, files_below, is_about, named_splits
from .rows import is_table, read_hub, read_rows
from .sources import HeldOut, Named, OwnFiles, Rows, Source, Texts, files_to_split

_OF_ROWS = ("text_column", "join_rows", "max_rows")
_OF_SPLITS = ("train_split", "val_split", "test_split")
_OF_THE_HUB = ("subset", "revision", "streaming")


@dataclass(frozen=True)
class Options:
    """The options of a source; see `TextData`. The defaults request nothing."""

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
                raise ValueError(f"{field.name}={value!r} has no effect: {because}. Remove it")

    def splits(self) -> dict[str, str]:
        """The names that were asked for `train`, and for `val` and `test` if they were set.

        Raises:
            ValueError: there is none for training, or two splits would hold the same texts.
        """
        if not self.train_split:
            raise ValueError(f"train_split={self.train_split!r} is empty: remove it to use 'train'")
        names = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        given = {split: name for split, name in names.items() if name is not None}
        if len(set(given.values())) < len(given) or ("all" in given.values() and len(given) > 1):
            listed = ", ".join(f"{split}_split={name!r}" for split, name in given.items())
            raise ValueError(f"{listed} overlap: use each split once, and nothing else with 'all'")
        return given


def open_source(source: str, held_out: HeldOut, options: Options | None = None) -> Source:
    """A built-in source, an existing file or folder, or the name `owner/name` of a data set on the Hub.

    Raises:
        ValueError: the source is none of these, or holds no text, or an option does not apply to it.
    """
    options = options or Options()
    path = _existing(source)
    if source in BUILT_IN:
        options.refuse(_OF_ROWS + _OF_SPLITS + _OF_THE_HUB, f"source={source!r} is raw text without splits")
        return BUILT_IN[source](held_out)
    if path is None:
        return _hub(source, held_out, options)
    options.refuse(_OF_THE_HUB, f"source={source!r} is a path, not a data set on the Hub")
    if path.is_dir():
        return _folder(path, source, held_out, options)
    options.refuse(_OF_SPLITS, f"source={source!r} is one file without splits")
    if not path.is_file():
        raise ValueError(
            f"source={source!r} is not a regular file or folder (it must be readable twice): copy it to a file"
        )
    file = SourceFile(path)
    refuse_archives([file])
    if is_table(file.name):
        return _rows({"train": [file]}, source, held_out, options)
    options.refuse(_OF_ROWS, f"source={source!r} is raw text, not rows")
    return files_to_split({file.name: file}, held_out)


def _existing(source: str) -> Path | None:
    """The file or folder of this name as it is written, else with ~ as the home folder; None if there is neither."""
    path = Path(source)
    try:
        if not path.exists():
            path = path.expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # no file can have this name, or ~name is no user
        return None


def _folder(path: Path, source: str, held_out: HeldOut, options: Options) -> Source:
    files = files_below(path)
    refuse_archives(files.values())
    tables = {name: file for name, file in files.items() if is_table(name)}
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
    held_out = held_out.without_own_splits(set(splits), source)
    if len(splits) == 1:
        return files_to_split(splits["train"], held_out)
    return OwnFiles(splits, held_out)


def _splits_of_folder(path: Path, source: str, files: Named, rows: bool, options: Options) -> dict[str, Named]:
    """The files of the folder's own splits; all are for training if it has none, or if train_split is `all`."""
    asked = options.splits()
    if asked["train"] == "all":
        return {"train": files}
    found = named_splits(path, list(files), rows)
    if not found:
        options.refuse(_OF_SPLITS, f"no file of source={source!r} has a split in its name")
        return {"train": files}
    if asked["train"] == "train":
        del asked["train"]  # the default: any word that means training
    chosen = choose_splits(found, asked, source)
    return {split: {name: files[name] for name in names} for split, names in chosen.items()}


def _rows(splits: dict[str, list[SourceFile]], source: str, held_out: HeldOut, options: Options) -> Rows:
    def content() -> dict[str, Any]:
        hashes = {split: [sha256_of(file) for file in files] for split, files in splits.items()}
        return {
            "rows": hashes if len(splits) > 1 else hashes["train"],
            "column": options.text_column,
            "splits": {split: split for split in splits},
        }

    texts: dict[str, Texts] = {split: partial(read_rows, files, options.text_column) for split, files in splits.items()}
    size = total_bytes(file for files in splits.values() for file in files)
    held_out = held_out.without_own_splits(set(splits), source)
    return Rows(texts, content, held_out, options.join_rows, options.max_rows, size)


def _hub(source: str, held_out: HeldOut, options: Options) -> Rows:
    is_file_name = suffix_of(source) in (".txt", ".md") or is_table(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or is_file_name:
        raise ValueError(
            f"source={source!r} does not exist: use {', '.join(map(repr, BUILT_IN))}, a file or folder, or the name "
            "'owner/name' of a data set on the Hugging Face Hub"
        )
    splits = options.splits()
    content = {
        "hub": source,
        "subset": options.subset,
        "revision": options.revision,
        "column": options.text_column,
        "splits": splits,
    }
    arguments = {"path": source, "name": options.subset, "revision": options.revision, "streaming": options.streaming}
    texts: dict[str, Texts] = {
        split: partial(read_hub, arguments, name, options.text_column) for split, name in splits.items()
    }
    held_out = held_out.without_own_splits(set(splits), source)
    return Rows(texts, lambda: content, held_out, options.join_rows, options.max_rows)
