"""A parsed configuration: registry keys in place of import paths, plain values, and the check of what it calls."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from .attention import ARCHITECTURES
from .spec import hybrid

BELOW = ("name", "version", "sub_dir", "filename")  # options of loggers and callbacks: paths below another folder


def by_key(value: Any) -> Any:
    """A choice of attention with import paths in place of keys of `ARCHITECTURES`: `bsbr`, a list, or a hybrid."""
    value = hybrid(value)
    if isinstance(value, str) and value in ARCHITECTURES:
        cls = ARCHITECTURES[value]
        return f"{cls.__module__}.{cls.__name__}"
    if isinstance(value, list):
        return [by_key(one) for one in value]
    if isinstance(value, dict | Namespace) and "class_path" in value:
        changed = copy.copy(value)
        changed["class_path"] = by_key(value["class_path"])
        return changed
    return value


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


def check_classes(config: Namespace) -> None:
    """Refuse a configuration that calls anything but a class, or has a name that leads out of its folder.

    Raises:
        ValueError: naming the class path, or the option and its value.
    """
    for part in _with_class_path(config):
        module, _, name = part["class_path"].rpartition(".")
        if not isinstance(getattr(sys.modules.get(module), name, None), type):
            raise ValueError(f"class_path {part['class_path']!r} names no class, and functions are not called")
        for key, value in (part.get("init_args") or {}).items():
            if key in BELOW and isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                raise ValueError(f"{key}={value!r} of {name} leads out of its folder: give a name without '..'")
