"""Opens the data of a checkpoint at its present location, and compares its fingerprint."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsbr_pl.data import DATA_SETS, TokenData
from bsbr_pl.data.corpora import BUILT_IN as SOURCES
from bsbr_pl.data.corpus import default_cache_dir, find_prepared
from bsbr_pl.values import one_line

BUILT_IN = {"source": tuple(SOURCES), "tokenizer": ("bpe", "bytes")}  # values that are no path


class DataChangedError(ValueError):
    """The data is there, but it is not what the checkpoint was trained on."""


@dataclass(frozen=True)
class DataLocation:
    """Where the text that checkpoints were trained on is now, if it has moved.

    Args:
        source: file or folder of the text; its fingerprint must be that of the training
        cache_dir: folder of prepared text
    """

    source: str | None = None
    cache_dir: str | None = None


HERE = DataLocation()  # where it was in training


def open_saved(
    data_class: str,
    arguments: Mapping[str, Any],
    fingerprint: str | None,
    location: DataLocation,
    changes: Mapping[str, Any],
) -> TokenData:
    """The data of a training, by the arguments of the training but for `changes`, prepared.

    Args:
        data_class: a key of `DATA_SETS`.
        arguments: of the training.
        fingerprint: of the training; None where it is not known, and then nothing is compared.
        location: where source and prepared text are now.
        changes: arguments for this evaluation, such as `eval_batch_size`.

    Raises:
        DataChangedError: the data is not that of the training.
        ValueError: the data does not exist; the message names the option that sets its location.
    """
    moved = {name: value for name, value in vars(location).items() if value and name in arguments}
    data = DATA_SETS[data_class](**{**arguments, **moved})
    if not _take_tokens(data, fingerprint, "source" in moved):
        _prepare(data, "source" in moved)
    if fingerprint and data.fingerprint != fingerprint:
        source = data.arguments.get("source")
        remedy = ("cache_dir", "its prepared tokens") if source in SOURCES else ("source", "the unchanged text")
        raise DataChangedError(
            f"the data changed since training: {_in_words(data_class, source)} has the fingerprint "
            f"{data.fingerprint}, the checkpoint was trained on {fingerprint}. No accuracy is measured on it"
            + (f"; set --data.{remedy[0]}=PATH to the location of {remedy[1]}" if source else "")
        )
    if not changes:
        return data
    changed = type(data)(**{**data.arguments, **changes})
    if data.text_data and changed.text_data:
        changed.text_data.corpus = data.text_data.corpus
    return changed


def _missing(data: TokenData, moved: bool) -> list[str]:
    """The arguments that name a file or folder which is not there."""

    def is_missing(name: str, value: Any) -> bool:
        return isinstance(value, str) and value not in BUILT_IN[name] and not Path(value).expanduser().exists()

    names = ("tokenizer",) if moved else tuple(BUILT_IN)
    return [name for name in names if is_missing(name, data.arguments.get(name))]


def _prepare(data: TokenData, moved: bool) -> None:
    try:
        data.prepare_data()
    except (ValueError, OSError) as error:
        missing = _missing(data, moved)
        if not missing:
            raise
        gone = " and ".join(f"{name}={data.arguments[name]!r}" for name in missing)
        where = "set --data.source=PATH to the present location of the text, or " * ("source" in missing)
        raise ValueError(
            f"{gone} does not exist (looked in {Path.cwd()}), and its prepared tokens were not found: {where}set "
            f"--data.cache_dir=PATH to the location of its prepared tokens ({one_line(error)})"
        ) from error


def _take_tokens(data: TokenData, fingerprint: str | None, moved: bool) -> bool:
    """Read the prepared tokens with which data has this fingerprint, if the text itself cannot be had.

    A built-in text of another version cannot: its tokens may be there. False where no folder holds them.
    """
    text, own = data.text_data, data.arguments.get("cache_dir")
    gone = _missing(data, moved) or (data.arguments.get("source") in SOURCES and not moved)
    if text is None or not fingerprint or not gone:
        return False
    for folder in [*([Path(own).expanduser()] if own else []), default_cache_dir()]:
        prepared = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
        for name in [fingerprint] if text is data else prepared:
            if corpus := find_prepared(name, folder):
                text.corpus = corpus
                if data.fingerprint == fingerprint:
                    return True
                del text.corpus
    return False


def _in_words(data_class: str, source: Any) -> str:
    if not isinstance(source, str):
        return data_class
    if source == "stdlib":
        return f"the standard library of Python {platform.python_version()}"
    if source in SOURCES:
        return f"source={source!r}"
    path = Path(source).expanduser()
    return f"source={source!r}" + (f" ({path.resolve()})" if path.exists() else "")
