"""What a folder holds: its files, and the splits that their names say, by the rules of Hugging Face's `datasets`.

A split is named by a word of a folder's or file's name (`test/`, `wiki.valid.txt`), by `data/NAME-00000-of-00001.*`,
or by the list of a data set that `save_to_disk` wrote.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .compressed import decompressed_name
from .documents import SPLITS

#: Which of our splits a word names.
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


def files_below(folder: Path) -> dict[str, Path]:
    """Every visible file of text below a folder by its relative name, sorted; links are followed.

    Empty files and those that describe a data set are left out.

    Raises:
        ValueError: there is none, or a link leads nowhere.
    """
    found = list(_walk(folder, ()))
    if not found:
        raise ValueError(f"source={str(folder)!r} is a folder without files")
    with_text = {file.relative_to(folder).as_posix(): file for file in found if file.stat().st_size}
    if not with_text:
        raise ValueError(f"source={str(folder)!r} holds no text: every file in it is empty")
    named = {name: with_text[name] for name in sorted(with_text) if PurePosixPath(name).name not in _METADATA}
    if not named:
        raise ValueError(f"source={str(folder)!r} holds no text: only {', '.join(with_text)}")
    return named


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files below a folder. `above` are the folders that it lies in: a link back to one of them is not followed."""
    real = folder.resolve()
    if real in above:
        return
    saved = _saved_files(folder)
    for entry in folder.iterdir():
        if entry.name.startswith(".") or (entry.suffix == ".arrow" and saved is not None and entry.name not in saved):
            continue
        if entry.is_dir():
            yield from _walk(entry, (*above, real))
        elif entry.is_file():
            yield entry
        elif entry.is_symlink():
            raise ValueError(f"{entry} is a link to a file that is not there: fetch the file, or remove the link")


def _saved_files(folder: Path) -> set[str] | None:
    """The files of a data set that `save_to_disk` wrote here: other .arrow files beside them are caches."""
    if not (folder / "dataset_info.json").is_file() or not (folder / "state.json").is_file():
        return None
    try:
        return {file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder / 'state.json'} does not list the files of a saved data set: save it again ({error!r})"
        ) from error


def is_about(name: str) -> bool:
    """Whether a file is about the data rather than data: README.md, LICENSE."""
    return PurePosixPath(name).name.split(".")[0].lower() in _ABOUT


def named_splits(folder: Path, names: list[str], rows: bool) -> dict[str, list[str]]:
    """The files of each split that the names tell of, by the split's own name; empty if they tell of none.

    Args:
        folder: what the names are relative to
        names: of the folder's files
        rows: whether the files hold rows, which are data sets whatever their names

    Raises:
        ValueError: only some of the files have such a name.
    """
    saved = _saved_splits(folder)
    if saved is not None:
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
            f"source={str(folder)!r}: {named!r} is named after a split, but {without[0]!r} is not: rename or remove "
            "it, or set train_split=all to hold validation and test out of all files"
        )
    return {split: [name for name in names if splits[name] == split] for split in sorted(found)}


def _saved_splits(folder: Path) -> list[str] | None:
    """The splits that `DatasetDict.save_to_disk` wrote, by the folders they lie in."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return None
    try:
        return [str(split) for split in json.loads(file.read_text())["splits"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} does not list the splits of a saved data set: save it again ({error!r})") from error


def _refuse_card_with_splits(folder: Path) -> None:
    """ValueError if the data set's card says which files are validation or test: their names do not."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front_matter = text.split("\n---", 1)[0] if text.startswith("---") else ""
    named = _CARD_SPLIT.findall(front_matter)
    if any(SPLIT_OF_WORD.get(split) != "train" for split in named):
        raise ValueError(
            f"{card} lists files of the splits {', '.join(named)}, but the files' names tell of none: rename the files "
            "after their splits, or set train_split=all to hold validation and test out of all files"
        )


def _split_name(name: str) -> str | None:
    """The split that a file's relative name tells of: folders first, then the file; None if it tells of none or two."""
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
    """Whether words in some of these names mean splits; in `test_json.py` beside `json.py`, in a folder of texts, not.

    They do where several splits are named, and where a folder, or a file but for its endings, is named by the word
    alone (`test/`, `wiki.valid.txt`).
    """
    parts = {_SHARD_NUMBER.sub("", part) for name in splits for part in re.split("[/.]", name.lower())}
    different = {SPLIT_OF_WORD.get(split) for split in splits.values() if split is not None}
    return rows or len(different) > 1 or bool(parts & SPLIT_OF_WORD.keys())


def choose_splits(found: dict[str, list[str]], asked: dict[str, str], source: str) -> dict[str, list[str]]:
    """The files of our splits: those of the name that was asked for, or of all names that are words for the split.

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
            f"source={source!r} has no training split, only {listed}: set train_split to the one to train on, or to "
            "'all' for all files"
        )
    return chosen
