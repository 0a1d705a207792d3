"""AttentionSpec: an attention class with its options, in one form from YAML to checkpoint and back."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Union

from torch import nn

from . import foreign
from .attention import ARCHITECTURES, Attention
from .values import plain

#: What a model's `attention` may be: a class, a partial of one, a key, a dict with `class_path`, a spec, a list, or a
#: hybrid in one line, `3x gated_delta_net + standard`.
AttentionArgument = Union["AttentionSpec", Callable[[int, int], Attention], Mapping[str, Any], str, Sequence[Any]]


@dataclass(frozen=True)
class AttentionSpec:
    """Builds the attention of one layer from (hidden_dim, num_heads): an Attention class and its options.

    Args:
        cls: the architecture; any other `nn.Module` becomes a `ForeignAttention` around it.
        options: its arguments besides hidden_dim and num_heads; those left out keep their defaults.
    """

    cls: type[nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        cls, options = self.cls, self.options
        if cls is foreign.ForeignAttention:  # as command lines name it
            cls, options = _find(options["module"]), options.get("options") or {}
        if not issubclass(cls, Attention):
            foreign.remember(cls)
        object.__setattr__(self, "cls", cls)
        object.__setattr__(self, "options", {name: plain(value) for name, value in options.items()})

    @staticmethod
    def of(value: Any) -> "AttentionSpec":
        """The spec of an `nn.Module`, a `functools.partial` of one, a key of ARCHITECTURES, or what `plain` gives.

        A `class_path` names a registered class, an Attention whose module is imported, or any `nn.Module` of a package
        that is trusted: a checkpoint never imports code by itself.

        Raises:
            ValueError: naming the value, if it is none of these.
        """
        if isinstance(value, AttentionSpec):
            return value
        if isinstance(value, str):
            return AttentionSpec(_find(value))
        if isinstance(value, Mapping) and "class_path" in value:
            return AttentionSpec(_find(value["class_path"]), value.get("init_args") or {})
        candidates, options = [value], {}
        if isinstance(value, partial):  # jsonargparse binds the class as the first argument of its own function
            candidates, options = [value.func, *value.args], value.keywords
        for cls in candidates:
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                if isinstance(part := getattr(cls, "architecture", None), type):  # a NamedModel
                    raise ValueError(f"attention: {cls.__name__} is a whole model: give its {part.__name__}")
                return AttentionSpec(cls, options)
        got = f"an object of {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
        raise ValueError(f"attention must be an Attention class or a functools.partial of one, got {got}")

    def __call__(self, hidden_dim: int, num_heads: int) -> Attention:
        """Build it.

        Raises:
            ValueError: an option is out of range, or building it changes what all models of the process share.
        """
        with foreign.shared_state_kept(self.cls.__name__):
            if issubclass(self.cls, Attention):
                return self.cls(hidden_dim, num_heads, **self.options)
            return foreign.ForeignAttention(hidden_dim, num_heads, self.cls, dict(self.options))

    def __str__(self) -> str:
        """The key with the options that differ from their defaults: `bsbr(chunk_size=64)`."""
        return self.key.rpartition(".")[2] + self._chosen

    @property
    def words(self) -> str:
        """The same, but a class that is not registered has its whole import path: two packages may share a name."""
        return self.key + self._chosen

    @property
    def _chosen(self) -> str:
        defaults = AttentionSpec(self.cls).settings
        chosen = [f"{name}={value}" for name, value in self.options.items() if defaults.get(name) != value]
        return f"({', '.join(chosen)})" if chosen else ""

    @property
    def key(self) -> str:
        """The key in ARCHITECTURES; the import path of a class that is not registered."""
        return next((key for key, cls in ARCHITECTURES.items() if cls is self.cls), foreign.import_path(self.cls))

    @property
    def replaces_feed_forward(self) -> bool:
        return issubclass(self.cls, Attention) and self.cls.replaces_feed_forward

    @property
    def settings(self) -> dict[str, Any]:
        """All options, with the defaults of those that are not given; of a foreign module the given ones."""
        return {name: option.default for name, option in options_of(self.cls).items()} | dict(self.options)

    def plain(self) -> dict[str, Any]:
        """`{"class_path": ..., "init_args": {...}}`, as checkpoints and YAML hold it."""
        return {"class_path": foreign.import_path(self.cls), "init_args": dict(self.options)}


def hybrid(attention: Any) -> Any:
    """`3x gated_delta_net + standard` as the list of its four names, in order of depth; any other value as it is.

    `[gla, standard]` as text is the list of its names.

    Raises:
        ValueError: naming the part that is not a name or `N x name`, or the number of layers above 1024.
    """
    if not isinstance(attention, str):
        return attention
    if listed := re.fullmatch(r"\[([\w., ]+)\]", attention.strip()):
        return [name.strip() for name in listed[1].split(",")]
    if not re.search(r"\+|^\s*\d+ *x|^[\w. ]+,[\w., ]*$", attention):
        return attention
    names: list[str] = []
    for part in attention.split("+"):
        found = re.fullmatch(r"\s*(?:([1-9]\d{0,3})x\s+)?([^\W\d][\w.]*)\s*", part)
        if found is None:
            raise ValueError(f"attention: write a hybrid as '3x gated_delta_net + standard', got {part.strip()!r}")
        names += [found[2]] * int(found[1] or 1)
    if not 1 <= len(names) <= 1024:
        raise ValueError(f"attention: a hybrid has 1 to 1024 layers, got {len(names)} in {attention!r}")
    return names


def specs_of(attention: AttentionArgument) -> AttentionSpec | tuple[AttentionSpec, ...]:
    """The spec of all layers, or a tuple with one for each layer; a shorter tuple is repeated.

    Raises:
        ValueError: naming the value that is not an attention.
    """
    attention = hybrid(attention)
    return (
        tuple(map(AttentionSpec.of, attention)) if isinstance(attention, list | tuple) else AttentionSpec.of(attention)
    )


def layers_of(attention: AttentionArgument) -> tuple[AttentionSpec, ...]:
    """The specs of `specs_of` in order of depth; one if all layers are alike."""
    specs = specs_of(attention)
    return (specs,) if isinstance(specs, AttentionSpec) else specs


def plain_specs(attention: AttentionArgument) -> dict[str, Any] | list[dict[str, Any]]:
    """`AttentionSpec.plain` of all layers, or a list with one for each layer."""
    specs = specs_of(attention)
    return specs.plain() if isinstance(specs, AttentionSpec) else [spec.plain() for spec in specs]


def options_of(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The options of an architecture by name: its parameters besides hidden_dim and num_heads."""
    if not issubclass(cls, Attention):
        return {}
    named = [p for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {option.name: option for option in named[2:]}


def _find(name: str) -> type[nn.Module]:
    """The class by its key or import path."""
    registered = {foreign.import_path(cls): cls for cls in ARCHITECTURES.values()} | ARCHITECTURES
    module, _, attribute = str(name).rpartition(".")
    found: type[nn.Module] | None = registered.get(name)
    if found is None:
        found = getattr(sys.modules.get(module), attribute, None)
        if not (isinstance(found, type) and issubclass(found, Attention)):
            found = foreign.find(str(name))
    if found is None:
        raise ValueError(
            f"attention must be one of {', '.join(ARCHITECTURES)}, or a class of a package that is trusted "
            f"(--trust=PACKAGE), got {name!r}"
        )
    return found
