"""The data that a checkpoint was trained on, found again wherever it is now, and compared with what it was."""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bsbr_pl.data
from bsbr_pl.data import NeedleData, TextData, TokenData
from bsbr_pl.data.corpus import default_cache_dir, find_prepared
from bsbr_pl.values import one_line

BUILT_IN = {"source": ("stdlib",), "tokenizer": ("bpe", "bytes")}  # values that are no path


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


_REMEDIES = {
    "source": "; --data.source=PATH says where the unchanged text is",
    "stdlib": "; --data.cache_dir=PATH says where its prepared tokens are",
}
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
        data_class: of bsbr_pl.data.
        arguments: of the training.
        fingerprint: of the training; None where it is not known, and then nothing is compared.
        location: where source and prepared text are now.
        changes: arguments for this evaluation, such as `eval_batch_size`.

    Raises:
        DataChangedError: the data is not that of the training.
        ValueError: the data is not there; the message names the option that says where it is.
    """
    if location.cache_dir and "cache_dir" in arguments:
        arguments = {**arguments, "cache_dir": location.cache_dir}
    data = _prepared(data_class, {**arguments, **changes}, fingerprint, location.source)
    unchanged = data
    if changes and not isinstance(data, TextData):  # the fingerprint of a task covers what `changes` may change
        unchanged = _prepared(data_class, {**arguments}, fingerprint, location.source)
    if fingerprint and unchanged.fingerprint != fingerprint:
        source = location.source or arguments.get("source")
        raise DataChangedError(
            f"the data changed since training: {_in_words(data_class, source)} has the fingerprint "
            f"{unchanged.fingerprint}, the checkpoint was trained on {fingerprint}. No accuracy is measured on it"
            f"{_REMEDIES['stdlib' if source == 'stdlib' else 'source'] if source else ''}"
        )
    return data


def _prepared(data_class: str, arguments: dict[str, Any], fingerprint: str | None, moved_to: str | None) -> TokenData:
    """The data from its source; if the source has gone, from a folder that holds its prepared tokens."""
    if data_class == "TextData" and moved_to:
        arguments = {**arguments, "source": moved_to}
    data = getattr(bsbr_pl.data, data_class)(**arguments)
    if isinstance(data, NeedleData) and moved_to:  # its fingerprint covers the name of its source, which stays
        text = {name: data.hparams[name] for name in ("tokenizer", "bpe_vocab_size", "context_length", "cache_dir")}
        data.text_data = TextData(moved_to, **text)
    sought = ("tokenizer",) if moved_to else tuple(BUILT_IN)
    missing = [name for name in sought if _is_missing(name, arguments.get(name))]
    # A standard library of another Python version is not on this machine either, but its tokens may be.
    replaceable = missing or (arguments.get("source") == "stdlib" and not moved_to)
    if fingerprint and replaceable and _take_tokens(data, fingerprint, arguments):
        return data
    try:
        data.prepare_data()
    except (ValueError, OSError) as error:
        if not missing:
            raise
        gone = " and ".join(f"{name}={arguments[name]!r}" for name in missing)
        where = "--data.source=PATH says where the text is now, " * ("source" in missing)
        raise ValueError(
            f"{gone} is not there (looked in {Path.cwd()}), nor are its prepared tokens: {where}--data.cache_dir=PATH "
            f"says where its prepared tokens are ({one_line(error)})"
        ) from error
    return data


def _is_missing(name: str, value: Any) -> bool:
    return isinstance(value, str) and value not in BUILT_IN[name] and not Path(value).expanduser().exists()


def _take_tokens(data: TokenData, fingerprint: str, arguments: Mapping[str, Any]) -> bool:
    """Give data the prepared tokens that make its fingerprint this one; False where no folder holds them."""
    own = arguments.get("cache_dir")
    folders = [*([Path(own).expanduser()] if own else []), default_cache_dir()]
    text = data if isinstance(data, TextData) else getattr(data, "text_data", None)
    if text is None:
        return False
    for folder in folders:
        for name in [fingerprint] if text is data else _names(folder):
            if corpus := find_prepared(name, folder):
                text.corpus = corpus
                if data.fingerprint == fingerprint:
                    return True
                del text.corpus
    return False


def _names(folder: Path) -> Iterator[str]:
    """Of the folders in a folder."""
    return (path.name for path in sorted(folder.iterdir())) if folder.is_dir() else iter(())


def _in_words(data_class: str, source: Any) -> str:
    if not isinstance(source, str):
        return data_class
    if source == "stdlib":
        return f"the standard library of Python {platform.python_version()}"
    path = Path(source).expanduser()
    return f"source={source!r}" + (f" ({path.resolve()})" if path.exists() else "")
