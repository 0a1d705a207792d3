"""The files of a folder, and its own splits.

Splits are found by the rules of Hugging Face's `datasets`: by a word in the name of a folder or file (`test/`,
`wiki.valid.txt`), by `data/NAME-00000-of-00001.*`, or by the list that `save_to_disk` wrote.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .base import SPLITS
from .files import SourceFile, decompressed_name
from .sources import Named

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
    names = [name for name in sorted(with_text) if PurePosixPath(name).name not in _METADATA]
    named = {name: SourceFile(with_text[name]) for name in names}
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
    saved = _saved_list(folder / "state.json", "files") if is_saved else None
    for entry in folder.iterdir():
        if entry.name.startswith(".") or (entry.suffix == ".arrow" and saved is not None and entry.name not in saved):
            continue
        if entry.is_dir():
            yield from _walk(entry, (*above, real))
        elif entry.is_file():
            yield entry
        elif entry.is_symlink():
            raise ValueError(f"{entry} is a broken link: restore the file, or remove the link")


def _saved_list(file: Path, what: str) -> list[str]:
    """The `files` or `splits` that a JSON file of `save_to_disk` lists."""
    try:
        saved = json.loads(file.read_text())
        if what == "files":
            return [one["filename"] for one in saved["_data_files"]]
        return [str(split) for split in saved["splits"]]
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
        saved = _saved_list(list_of_splits, "splits")
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
