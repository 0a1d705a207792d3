"""A parsed configuration: registry keys in place of import paths, plain values, and the check of what it calls."""

import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch.callbacks import WeightAveraging

from .attention import ARCHITECTURES, Attention
from .foreign import ForeignAttention, find, import_path
from .spec import hybrid
from .steps import of_averaging
from .values import did_you_mean

ARGUMENTS = ("class_path", "init_args", "module", "options")  # of the choice of a ForeignAttention
BELOW = ("name", "version", "sub_dir", "filename")  # options of loggers and callbacks: paths below another folder


FOREIGN = import_path(ForeignAttention)


def by_key(value: Any, before: Any = None) -> Any:
    """A choice of attention as jsonargparse takes it: import paths in place of keys of `ARCHITECTURES` (`bsbr`, a list,
    or a hybrid), and a `ForeignAttention` in place of a module that is no Attention, whose package is trusted.

    Args:
        value: as given; for `--model.attention.KEY=VAL` jsonargparse's pair of `key` and `val`.
        before: the choice that such a pair changes.
    """
    if hasattr(value, "key") and hasattr(value, "val"):
        chosen = by_key(value.val) if value.key == "class_path" else None
        if isinstance(chosen, dict):
            return chosen
        is_foreign = isinstance(before, Namespace) and before.get("class_path") == FOREIGN
        return value._replace(key=f"options.{value.key}") if is_foreign and value.key not in ARGUMENTS else value
    value = hybrid(value)
    if isinstance(value, list):
        return [by_key(_known(one)) for one in value]
    given = {"class_path": value} if isinstance(value, str) else value
    path = given.get("class_path") if isinstance(given, dict | Namespace) else None
    if not isinstance(path, str):
        return value
    registered = ARCHITECTURES.get(path)
    if registered and issubclass(registered, Attention):
        changed = copy.copy(given)
        changed["class_path"] = import_path(registered)
        return changed["class_path"] if isinstance(value, str) else changed
    cls = registered or find(path)
    if cls is None or issubclass(cls, Attention):
        return value
    options = as_dicts(given.get("init_args") or {})
    return {"class_path": FOREIGN, "init_args": {"module": import_path(cls), "options": options}}


def _known(layer: Any) -> Any:
    """A layer of a list as it is. Raises a ValueError for a name that is no key, class name or import path."""
    known = [*ARCHITECTURES, *(cls.__name__ for cls in ARCHITECTURES.values())]
    if isinstance(layer, str) and "." not in layer and layer not in known:
        advice = did_you_mean(layer, list(ARCHITECTURES)) or f": use {', '.join(ARCHITECTURES)}, or an import path"
        raise ValueError(f"model.attention: no class is called {layer!r}{advice}")
    return layer


def _with_class_path(value: Any) -> Iterator[Namespace]:
    """Every part of a configuration that names a class to call."""
    if isinstance(value, Namespace):
        if "class_path" in value:
            yield value
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _with_class_path(part)


def as_dicts(value: Any) -> Any:
    """A configuration without Namespaces, those in lists included."""
    if isinstance(value, Namespace):
        return {name: as_dicts(part) for name, part in vars(value).items()}
    return [as_dicts(part) for part in value] if isinstance(value, list | tuple) else value


def weight_averaging(config: Namespace) -> dict[str, Any] | None:
    """`steps.weight_averaging` of the callbacks that a configuration names."""
    for part in _with_class_path(config):
        cls = _class(part)
        if isinstance(cls, type) and issubclass(cls, WeightAveraging):
            return of_averaging(cls, as_dicts(part.get("init_args") or {}))
    return None


def _class(part: Namespace) -> Any:
    """What the `class_path` of a parsed configuration names."""
    module, _, name = part["class_path"].rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def check_classes(config: Namespace) -> None:
    """Refuse a configuration that calls anything but a class, gives a class no value where it needs one, or has a name
    that leads out of its folder.

    Raises:
        ValueError: naming the class path, or the option and its value.
    """
    for part in _with_class_path(config):
        if not isinstance(cls := _class(part), type):
            raise ValueError(f"class_path {part['class_path']!r} names no class, and functions are not called")
        arguments = part.get("init_args") or {}
        check_values(cls, arguments)
        for key, value in arguments.items():
            if key in BELOW and isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                raise ValueError(f"{key}={value!r} of {cls.__name__} leads out of its folder: give a name without '..'")


def check_values(cls: type, arguments: Mapping[str, Any]) -> None:
    """Refuse None (`null` in YAML, which jsonargparse takes for every option) where a class needs a value.

    Raises:
        ValueError: naming the first such option.
    """
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:  # of a type that is imported for type checkers only
        return
    for name, value in arguments.items():
        hint = hints.get(name, Any)
        may_be_none = hint is Any or any(one in (None, type(None)) for one in get_args(hint))
        if value is None and not may_be_none:
            raise ValueError(f"{name}=null: {cls.__name__} needs a value, or leave the option out for its default")
