"""What the configuration files and options of a run say, as far as a study must know it before train.py reads them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from trainings import ROOT

from bsbr_pl.data import TokenData
from bsbr_pl.plain_yaml import LimitError, load
from bsbr_pl.values import digest

BASE = ROOT / "configs" / "base.yaml"
NO_RESULT = ("--trainer.logger", "--trainer.callbacks")  # which decide no result


def read(path: Path) -> dict[str, Any]:
    """What a file says, as train.py reads it: `1e-2` is a number.

    Raises:
        ValueError: naming the file, if it is no YAML mapping.
    """
    try:
        found = load(path.read_text()) or {}
    except (LimitError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold sections such as model, data and trainer, got {found!r}")
    return found


def fingerprint(paths: Iterable[Path], without: Iterable[str]) -> str:
    """A digest of what files say, without loggers, callbacks and some options, such as `--trainer.max_steps`."""
    found = list(map(read, paths))
    for option in (*without, *NO_RESULT):
        section, _, name = option.removeprefix("--").partition(".")
        for one in found:
            (one.get(section) or {}).pop(name, None)
    return digest(found)


def given(options: list[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each option: of `--model.norm=rms`, and of `--model.norm rms`."""
    for option, following in zip(options, [*options, ""][1:], strict=True):
        name, equals, value = option.partition("=")
        if name.startswith("--"):
            yield name, value if equals or following.startswith("--") else following


def merged(paths: Iterable[Path], options: list[str]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The arguments of the model, the class of the data, and its arguments.

    Later files override earlier ones, and options override all files. Data of another class has none of the arguments
    of the class before, as in train.py. Options of the attention are left out.
    """
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    data_class = ""
    for found in map(read, paths):
        model |= found.get("model") or {}
        section = found.get("data") or {}
        own_class = section.get("class_path", data_class).rpartition(".")[2]
        data = (data if own_class == data_class else {}) | (section.get("init_args") or {})
        data_class = own_class
    for name, value in given(options):
        section, _, argument = name.removeprefix("--").replace("data.init_args.", "data.").partition(".")
        if section in ("model", "data") and "." not in argument:
            (model if section == "model" else data)[argument] = load(value)
    return model, data_class, data


def vocabulary(data: TokenData) -> int:
    """The ids of a data set; of byte pairs, as many as are asked for, without training the tokenizer."""
    asked = {"tokenizer": "", "bpe_vocab_size": None} | data.arguments
    if asked["tokenizer"] == "bpe" and asked["bpe_vocab_size"]:
        return asked["bpe_vocab_size"]
    data.prepare_data()
    return data.vocab_size
