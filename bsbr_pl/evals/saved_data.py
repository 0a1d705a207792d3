"""Opens the data of a checkpoint and compares its fingerprint. Paths that only the checkpoint names are not read."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsbr_pl.data import DATA_SETS, TokenData
from bsbr_pl.data.corpora import BUILT_IN as SOURCES
from bsbr_pl.data.corpus import find_prepared
from bsbr_pl.utils.files import default_cache_dir
from bsbr_pl.values import one_line

BUILT_IN = {"source": tuple(SOURCES), "tokenizer": ("bpe", "bytes")}  # values that are no path
# Limits for checkpoints that are not trusted.
SAMPLE_TOKENS = 1 << 16
MAX_ITEMS = 1000  # of a list of lengths, segments or depths
BATCH_TOKENS = 1 << 14  # of an evaluation batch that is more than one sample
TASK_TOKENS = 1 << 25  # of all test samples of a recall task
REMEDY = "set --trust_data to evaluate it"


class DataChangedError(ValueError):
    """The data exists, but its fingerprint is not that of the checkpoint's training."""


@dataclass(frozen=True)
class DataLocation:
    """The present location of the text that checkpoints were trained on.

    Args:
        source: file or folder of the text; its fingerprint must be that of the training
        cache_dir: folder of prepared text
    """

    source: str | None = None
    cache_dir: str | None = None


HERE = DataLocation()  # in the user's cache


def open_saved(
    data_class: str,
    arguments: Mapping[str, Any],
    fingerprint: str | None,
    location: DataLocation,
    changes: Mapping[str, Any],
    trusted: bool,
) -> TokenData:
    """Open and prepare the data of a training, with its arguments except `changes`.

    Args:
        data_class: a key of `DATA_SETS`.
        arguments: of the training.
        fingerprint: of the training; if None, nothing is compared.
        location: where source and prepared text are now.
        changes: arguments for this evaluation, such as `eval_batch_size`.
        trusted: read the paths and Hub names in `arguments` too, with their number of workers and sizes of any kind.

    Raises:
        DataChangedError: the data is not that of the training.
        ValueError: the data does not exist, is too large, or is not to be read; the message names the option to set.
    """
    moved = {name: value for name, value in vars(location).items() if value and name in arguments}
    if not trusted:
        safe = {"cache_dir": None, "num_workers": 0}
        arguments = {name: safe.get(name, value) for name, value in arguments.items()}
    data = DATA_SETS[data_class](**{**arguments, **moved})
    if data.text_data is not None:
        _read_text(data, fingerprint, "source" in moved, trusted)
    if fingerprint and data.fingerprint != fingerprint:
        source = data.arguments.get("source")
        is_built_in = source in BUILT_IN["source"]
        remedy = ("cache_dir", "its prepared tokens") if is_built_in else ("source", "the unchanged text")
        raise DataChangedError(
            f"the data changed since training: {_in_words(data_class, source)} has the fingerprint "
            f"{data.fingerprint}, the checkpoint was trained on {fingerprint}. No accuracy is measured on it"
            + (f"; set --data.{remedy[0]}=PATH to the location of {remedy[1]}" if source else "")
        )
    if changes:
        whole, data = data, type(data)(**{**data.arguments, **changes})
        if whole.text_data and data.text_data:
            data.text_data.corpus = whole.text_data.corpus
    if not trusted:
        _check_size(data)
        data.eval_batch_size = min(data.eval_batch_size, max(1, BATCH_TOKENS // max(1, data.validation_length)))
    return data


def check_lengths(arguments: Mapping[str, Any]) -> None:
    """Reject arguments of data whose samples are too long, before anything is built from them.

    Raises:
        ValueError: naming the argument and the limit.
    """
    for name, value in arguments.items():
        items = value if isinstance(value, list) else [value]
        count = len(items)
        if name == "train_lengths" and all(isinstance(item, int) for item in items):  # all between the two
            count = max(items, default=0) - min(items, default=0)
        if count > MAX_ITEMS:
            raise ValueError(f"data.{name} has {count:,} items, more than {MAX_ITEMS:,}: {REMEDY}")
        if name.endswith(("context_length", "_lengths", "_segments", "_copied")):
            numbers: list[Any] = []
            for item in items:
                numbers += item[:2] if isinstance(item, list) else [item]  # a segment is [length, pairs, ...]
            _check_length(f"data.{name}", max((n for n in numbers if isinstance(n, int)), default=0))


def _check_length(what: str, length: int) -> None:
    if length > SAMPLE_TOKENS:
        raise ValueError(f"{what} is {length:,} tokens, more than {SAMPLE_TOKENS:,}: {REMEDY}")


def _check_size(data: TokenData) -> None:
    """Reject samples that are too long, and recall tasks of too many tokens."""
    _check_length("the length of its samples", data.validation_length)
    if data.kind == "recall":
        tokens = data.validation_length * sum(one.size for one in data.samples("test").segments)  # type: ignore[attr-defined]
        if tokens > TASK_TOKENS:
            raise ValueError(f"its test samples have {tokens:,} tokens, more than {TASK_TOKENS:,}: {REMEDY}")


def _read_text(data: TokenData, fingerprint: str | None, moved: bool, trusted: bool) -> None:
    """Find the prepared tokens of a text, or prepare it; a ValueError names the options if neither is possible.

    `moved`: the user gave the source. `trusted`: paths and Hub names that the user did not give are read too.
    """
    names = ("tokenizer",) if moved else tuple(BUILT_IN)
    named = {name: data.arguments[name] for name in names if data.arguments[name] not in BUILT_IN[name]}
    unread = {name: path for name, path in named.items() if not (trusted and Path(path).expanduser().exists())}
    # The standard library of another Python version cannot be prepared here, but its tokens may be there.
    if (unread or not (moved or "source" in named)) and _take_tokens(data, fingerprint):
        return
    try:
        if not unread or trusted:  # a name that is no path may be of the Hub
            data.prepare_data()
            return
        why = "is named by the checkpoint alone"
    except (ValueError, OSError) as error:
        if not unread:
            raise
        why = f"does not exist (looked in {Path.cwd()}: {one_line(error)})"
    what = " and ".join(f"{name}={path!r}" for name, path in unread.items())
    remedies = ["--data.cache_dir=PATH to the location of its prepared tokens"]
    if "source" in unread:
        remedies.insert(0, "--data.source=PATH to the present location of the text")
    if not trusted:
        remedies.append("--trust_data to read what the checkpoint names")
    raise ValueError(f"{what} {why}, and its prepared tokens were not found: set {', or '.join(remedies)}")


def _take_tokens(data: TokenData, fingerprint: str | None) -> bool:
    """Read the prepared tokens with which data has this fingerprint. False if no folder holds them."""
    text, given = data.text_data, data.arguments.get("cache_dir")
    if text is None or not fingerprint:
        return False
    folders = [Path(given).expanduser()] if given else []
    for folder in [*folders, default_cache_dir()]:
        if text is data:
            names = [fingerprint]
        else:  # a task on text has a fingerprint of its own: any prepared text may be its text
            names = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
        for name in names:
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
