"""Builders of attentions as plain data and back: how a checkpoint says what architecture it is of."""

import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .attention.base import Attention
from .model import AttentionFactory


def plain(value: Any) -> Any:
    """A float for the subclass of float that numpy calculates with, which `load` would refuse; the rest as it is."""
    return float(value) if isinstance(value, float) else value


def describe(factory: AttentionFactory | dict[str, Any]) -> dict[str, Any]:
    """A builder of attentions as plain data, `{"class_path": ..., "init_args": {...}}`, for a checkpoint to hold.

    Raises:
        ValueError: where it is neither an Attention class nor a `functools.partial` of one.
    """
    if isinstance(factory, dict) and "class_path" in factory:
        class_path, options = factory["class_path"], factory.get("init_args", {})
        return {"class_path": class_path, "init_args": {name: plain(value) for name, value in options.items()}}
    parts = [factory.func, *factory.args] if isinstance(factory, functools.partial) else [factory]
    for part in parts:
        if isinstance(part, type) and issubclass(part, Attention):
            options = factory.keywords if isinstance(factory, functools.partial) else {}
            return describe({"class_path": f"{part.__module__}.{part.__qualname__}", "init_args": options})
    raise ValueError(f"attention must be an Attention class or a functools.partial of one, got {factory!r}")


def build(description: dict[str, Any]) -> AttentionFactory:
    """The builder that `describe` described.

    Raises:
        ValueError: where the class path does not name an Attention of this package or of a module already imported.
    """
    module_name, _, name = description["class_path"].rpartition(".")
    if module_name.split(".")[0] == "bsbr_pl":
        importlib.import_module(module_name)
    found = getattr(sys.modules.get(module_name), name, None)  # a checkpoint must not choose what code is run
    if not (isinstance(found, type) and issubclass(found, Attention)):
        raise ValueError(f"{description['class_path']!r} is no Attention that is imported: import its module first")
    return functools.partial(found, **description["init_args"])


def describe_layers(
    attention: AttentionFactory | dict[str, Any] | Sequence[AttentionFactory | dict[str, Any]],
) -> dict[str, Any] | list[dict[str, Any]]:
    """`describe` of the attention of all layers, or of each in a list."""
    return [describe(one) for one in attention] if isinstance(attention, list | tuple) else describe(attention)  # type: ignore[arg-type]


def build_layers(described: dict[str, Any] | list[dict[str, Any]]) -> AttentionFactory | list[AttentionFactory]:
    """The builders that `describe_layers` described."""
    return [build(one) for one in described] if isinstance(described, list) else build(described)
