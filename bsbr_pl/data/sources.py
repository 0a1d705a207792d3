"""Sources of text: documents in a fixed order, and the rules that put each document into one split.

A source yields `Piece`s: a document comes in one or more pieces, so that a file larger than memory can be read.

A folder's own splits are found by the rules of Hugging Face's `datasets`: by a word in the name of a folder or file
(`test/`, `wiki.valid.txt`), by `data/NAME-00000-of-00001.*`, or by the list that `save_to_disk` wrote.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from .base import SPLITS
from .files import (
    BLOCK,
    Piece,
    character_start,
    decompressed,
    decompressed_name,
    read_pieces,
    read_stretch,
    sha256_of,
    text_size,
    total_bytes,
)

DEFAULT_FRACTION = 0.05  # held out for validation, and as much for test
Texts = Callable[[], Iterator[str | None]]  # returns a new iterator over the rows of a split
Named = dict[str, Path]  # files by relative path

#: The split that a word in a name means.
SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_BETWEEN_WORDS = re.compile(r"[-._ \d]+")
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
_SHARD_NUMBER = re.compile(r"[-_ ]?\d+(-of-\d+)?$")
_CARD_SPLIT = re.compile(r"^[ -]*split: *['\"]?(\w+)", re.MULTILINE)
_METADATA = {
    *("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "config.json"),
    *("_metadata", "_common_metadata"),
}
_ABOUT = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "datasheet", "dataset_card"}


@dataclass(frozen=True)
class HeldOut:
    """Chooses the held-out documents by a hash of each document, independent of other documents and their order."""

    val: float
    test: float

    def __post_init__(self) -> None:
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            raise ValueError(
                f"val_fraction={self.val} and test_fraction={self.test} must be at least 0 and sum to less than 1"
            )

    def split_of(self, name: bytes) -> str:
        """The split of a document by its name: training, test, validation from the low end of its hash to the high."""
        place = int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64
        return "train" if place < 1 - self.val - self.test else "test" if place < 1 - self.val else "val"

    def without_own_splits(self, own: set[str], source: str) -> "HeldOut":
        """The shares to hold out of the training split of a source that has the splits `own`.

        Raises:
            ValueError: a fraction was set that would have no effect.
        """
        for split, fraction in (("val", self.val), ("test", self.test)):
            if split in own and fraction not in (0, DEFAULT_FRACTION):
                raise ValueError(
                    f"{split}_fraction={fraction} has no effect: source={source!r} has its own {split} split. Remove "
                    f"{split}_fraction"
                )
        return HeldOut(0.0 if "val" in own else self.val, 0.0 if "test" in own else self.test)


class Source(Protocol):
    """Documents in a fixed order.

    Attributes:
        total_bytes: for the progress bar; None if it is not known
        held_out: the fractions that are held out of the training documents
        left_out: after `pieces()`, how many documents of each split were left out because another split has them
    """

    total_bytes: int | None
    held_out: HeldOut
    left_out: dict[str, int]

    def identity(self) -> dict[str, Any]:
        """What decides the documents and their splits, except for `held_out`."""

    def pieces(self) -> Iterator[Piece]: ...


class Files:
    """Files of raw text, one document each, split by the hash of their relative path.

    Equal files are in one split: that of the first of them, by path.
    """

    def __init__(self, files: Named, held_out: HeldOut) -> None:
        self.files = dict(sorted(files.items()))
        self.held_out, self.total_bytes = held_out, total_bytes(files.values())
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        hashes = hashes_of(self.files)
        moved = {name: split for name, split in self._splits(hashes).items() if split != self._split_of(name)}
        return {"files": hashes, "moved": moved} if moved else {"files": hashes}

    def pieces(self) -> Iterator[Piece]:
        splits = self._splits(hashes_of(self.files))
        for name, file in self.files.items():
            yield from read_pieces(file, splits[name])

    def _split_of(self, name: str) -> str:
        return self.held_out.split_of(name.encode("utf-8", "surrogateescape"))

    def _splits(self, hashes: dict[str, str]) -> dict[str, str]:
        first: dict[str, str] = {}
        return {name: first.setdefault(content, self._split_of(name)) for name, content in hashes.items()}


class OneFile:
    """One file of raw text, cut by position into a document to train on, one for validation and one for test."""

    def __init__(self, file: Path, held_out: HeldOut) -> None:
        self.file, self.held_out, self.total_bytes = file, held_out, total_bytes([file])
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        return {"file": sha256_of(self.file)}

    def pieces(self) -> Iterator[Piece]:
        size = text_size(self.file)
        test = character_start(self.file, round(size * (1 - self.held_out.test)))
        val = character_start(self.file, round(size * (1 - self.held_out.test - self.held_out.val)))
        with decompressed(self.file) as stream:
            for split, start, stop in (("train", 0, val), ("val", val, test), ("test", test, size)):
                yield from read_stretch(stream, self.file, split, start, stop)


class OwnFiles:
    """Files of raw text, one document each, in splits of their own.

    A text in two splits is kept in one: test before validation before training. A missing split is held out of the
    training files.

    Args:
        splits: the files of `train` and of `val`, `test` or both
        held_out: the shares that are held out of the training files
    """

    def __init__(self, splits: dict[str, Named], held_out: HeldOut) -> None:
        self.splits = {split: dict(sorted(files.items())) for split, files in splits.items()}
        self.held_out = held_out
        self.total_bytes = total_bytes(file for files in splits.values() for file in files.values())
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        return {"own_files": {split: hashes_of(files) for split, files in self.splits.items()}}

    def pieces(self) -> Iterator[Piece]:
        seen: set[str] = set()
        for split in ("test", "val", "train"):
            if split not in self.splits:
                continue
            hashes = hashes_of(self.splits[split])
            files = {name: file for name, file in self.splits[split].items() if hashes[name] not in seen}
            self.left_out[split] = len(hashes) - len(files)
            seen |= set(hashes.values())
            if split == "train":
                yield from files_to_split(files, self.held_out).pieces()
            else:
                for file in files.values():
                    yield from read_pieces(file, split)


def files_to_split(files: Named, held_out: HeldOut) -> Files | OneFile:
    """Files that validation and test are held out of: several by their paths, a single one by position."""
    return OneFile(next(iter(files.values())), held_out) if len(files) == 1 else Files(files, held_out)


def hashes_of(files: Named) -> dict[str, str]:
    return {name: sha256_of(file) for name, file in files.items()}


class Rows:
    """Rows of a text column.

    A row is a document; with `join_rows` the rows of a split are one running text (the rows of wikitext are lines). A
    split without rows of its own is held out of the training rows by the hash of the row's text, so that equal rows
    are in the same split. A document in two splits is kept in one: test before validation before training.

    Args:
        texts: the rows of `train`, and of `val` and `test` if the source has these splits
        content: returns what decides the rows, for the fingerprint
        held_out: the shares that are held out of the training rows
        join_rows: whether rows are lines of one text
        max_rows: read no more rows of each split
        total_bytes: of all rows, if it is known
    """

    def __init__(
        self,
        texts: dict[str, Texts],
        content: Callable[[], dict[str, Any]],
        held_out: HeldOut,
        join_rows: bool,
        max_rows: int | None,
        total_bytes: int | None = None,
    ) -> None:
        missing = [split for split in SPLITS if split not in texts]
        if join_rows and missing:
            raise ValueError(
                f"join_rows=True needs a separate split for {' and '.join(missing)}, because lines of one text cannot "
                "be held out: use a folder with splits, or set val_split and test_split of a Hub data set"
            )
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows} is too small: at least 1, or null for all")
        self.texts, self.content, self.held_out = texts, content, held_out
        self.join_rows, self.max_rows, self.total_bytes = join_rows, max_rows, total_bytes
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        several = len(self.texts) > 1 and not self.join_rows
        rule = {"equal_rows": "in one split"} if several else {}
        return {**self.content(), "join": self.join_rows, "max_rows": self.max_rows, **rule}

    def pieces(self) -> Iterator[Piece]:
        # Training is the last and the longest: a misspelt name of another split is noticed before it is read.
        seen: set[bytes] = set()
        for split in ("test", "val", "train"):
            if split not in self.texts:
                continue
            if self.join_rows:
                for text in self._first_texts(split):
                    yield from _pieces(split, text, False)
                yield Piece(split, "", True)
            else:
                yield from self._documents(split, seen)

    def _documents(self, split: str, seen: set[bytes]) -> Iterator[Piece]:
        """The documents of a split that were not seen in another split; adds those of validation and test to them."""
        here: set[bytes] = set()
        self.left_out[split] = 0
        for text in self._first_texts(split):
            content = hashlib.sha256(text.encode()).digest()[:16]
            if content in seen:
                self.left_out[split] += 1
                continue
            if split != "train":
                here.add(content)
            yield from _pieces(self.held_out.split_of(text.encode()) if split == "train" else split, text, True)
        seen |= here

    def _first_texts(self, split: str) -> Iterator[str]:
        """The texts of the first `max_rows` rows, without the empty ones."""
        for i, text in enumerate(self.texts[split]()):
            if i == self.max_rows:
                return
            if text:
                yield text


def _pieces(split: str, text: str, end: bool) -> Iterator[Piece]:
    for start in range(0, len(text), BLOCK):
        yield Piece(split, text[start : start + BLOCK], end and start + BLOCK >= len(text))


def files_below(folder: Path) -> Named:
    """All visible files below a folder by relative path, sorted; links are followed.

    Empty files and metadata files are skipped.

    Raises:
        ValueError: there is no text, or a link leads nowhere.
    """
    found = list(_walk(folder, ()))
    if not found:
        raise ValueError(f"source={str(folder)!r} has no files")
    with_text = {file.relative_to(folder).as_posix(): file for file in found if file.stat().st_size}
    if not with_text:
        raise ValueError(f"source={str(folder)!r} has no text: every file in it is empty")
    named = {name: with_text[name] for name in sorted(with_text) if PurePosixPath(name).name not in _METADATA}
    if not named:
        raise ValueError(f"source={str(folder)!r} has no text, only {', '.join(with_text)}")
    return named


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files below a folder. Links to one of the parent folders (`above`) are not followed."""
    real = folder.resolve()
    if real in above:
        return
    # Other .arrow files beside those of a data set that `save_to_disk` wrote are caches.
    is_saved = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    saved = _saved_list(folder / "state.json", "files", _saved_files) if is_saved else None
    for entry in folder.iterdir():
        if entry.name.startswith(".") or (entry.suffix == ".arrow" and saved is not None and entry.name not in saved):
            continue
        if entry.is_dir():
            yield from _walk(entry, (*above, real))
        elif entry.is_file():
            yield entry
        elif entry.is_symlink():
            raise ValueError(f"{entry} is a broken link: restore the file, or remove the link")


def _saved_files(state: Any) -> list[str]:
    return [file["filename"] for file in state["_data_files"]]


def _saved_splits(info: Any) -> list[str]:
    return [str(split) for split in info["splits"]]


def _saved_list(file: Path, what: str, read: Callable[[Any], list[str]]) -> list[str]:
    """What a JSON file of `save_to_disk` lists."""
    try:
        return read(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} does not list the {what} of a saved data set: save it again ({error!r})") from error


def is_about(name: str) -> bool:
    """Whether a file describes the data (README.md, LICENSE) instead of being data."""
    return PurePosixPath(name).name.split(".")[0].lower() in _ABOUT


def named_splits(folder: Path, names: list[str], rows: bool) -> dict[str, list[str]]:
    """The files of each split that their names tell, by the split's own name; empty if the names tell of none.

    Args:
        folder: what the names are relative to
        names: of the folder's files
        rows: whether the files hold rows: such a file always belongs to a split, whatever its name

    Raises:
        ValueError: only some of the files have a split in their name.
    """
    list_of_splits = folder / "dataset_dict.json"
    if list_of_splits.is_file():
        saved = _saved_list(list_of_splits, "splits", _saved_splits)
        return {split: [name for name in names if name.startswith(f"{split}/")] for split in saved}
    splits = {name: _split_name(name) for name in names}
    found = {split for split in splits.values() if split is not None}
    without = [name for name in names if splits[name] is None and (rows or not is_about(name))]
    if not found or (without and not _words_mean_splits(splits, rows)):
        _refuse_card_with_splits(folder)
        return {}
    if without:
        named = next(name for name in names if splits[name] is not None)
        raise ValueError(
            f"source={str(folder)!r}: {named!r} has a split in its name, but {without[0]!r} has none: rename or "
            "remove one, or set train_split=all to split all files by hash"
        )
    return {split: [name for name in names if splits[name] == split] for split in sorted(found)}


def _refuse_card_with_splits(folder: Path) -> None:
    """ValueError if the data set's card names files for validation or test, because the files' names do not."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front_matter = text.split("\n---", 1)[0] if text.startswith("---") else ""
    named = _CARD_SPLIT.findall(front_matter)
    if any(SPLIT_OF_WORD.get(split) != "train" for split in named):
        raise ValueError(
            f"{card} lists files of the splits {', '.join(named)}, but no file name contains a split: rename the files "
            "after their splits, or set train_split=all to split all files by hash"
        )


def _split_name(name: str) -> str | None:
    """The split in a file's relative path, folders first; None if there is none or more than one."""
    shard = _SHARD.fullmatch(name)
    if shard:
        return shard[1]
    path = PurePosixPath(name)
    words = _split_words(str(path.parent)) or _split_words(decompressed_name(path.name))
    return min(words) if len({SPLIT_OF_WORD[word] for word in words}) == 1 else None


def _split_words(name: str) -> set[str]:
    words = {word for part in name.lower().split("/") for word in _BETWEEN_WORDS.split(part)}
    return words & SPLIT_OF_WORD.keys()


def _words_mean_splits(splits: dict[str, str | None], rows: bool) -> bool:
    """Whether the split words in these names mark splits. In `test_json.py` beside `json.py` they do not.

    They do if several splits are named, or if a folder, or a file without its endings, is named by the word alone
    (`test/`, `wiki.valid.txt`).
    """
    parts = {_SHARD_NUMBER.sub("", part) for name in splits for part in re.split("[/.]", name.lower())}
    different = {SPLIT_OF_WORD.get(split) for split in splits.values() if split is not None}
    return rows or len(different) > 1 or bool(parts & SPLIT_OF_WORD.keys())


def choose_splits(found: dict[str, list[str]], asked: dict[str, str], source: str) -> dict[str, list[str]]:
    """The files of `train`, `val` and `test`: of the split that was asked for, else of all names that mean the split.

    Raises:
        ValueError: a split that was asked for is not there, or there is none to train on.
    """
    listed = ", ".join(map(repr, found))
    for split, name in asked.items():
        if name not in found:
            raise ValueError(f"{split}_split={name!r} is no split of source={source!r}: its own are {listed}")
    chosen = {}
    for split in SPLITS:
        words = [name for name in found if SPLIT_OF_WORD.get(name.lower()) == split and name not in asked.values()]
        names = [asked[split]] if split in asked else words
        if names:
            chosen[split] = [file for name in names for file in found[name]]
    if "train" not in chosen:
        raise ValueError(
            f"source={source!r} has no training split, only {listed}: set train_split to one of them, or to 'all'"
        )
    return chosen
