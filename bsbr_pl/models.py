"""The models by name: `BSBRModel(vocab_size=1000, chunk_size=64)` is the one `LanguageModel` around `BSBRAttention`.

A name adds nothing but the choice of the attention; its options become arguments of the model, with the defaults of the
attention's own class. Parameters, state dict and methods are those of `LanguageModel`.
"""

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

from .attention import (
    ARCHITECTURES,
    Attention,
    BSBRAttention,
    DeltaNetAttention,
    GAUAttention,
    HopfieldAttention,
    LinearAttention,
    SlidingWindowAttention,
    StandardAttention,
)
from .model import LanguageModel
from .spec import AttentionSpec, options_of
from .values import did_you_mean, plain

#: vocab_size, hidden_dim, ..., bottleneck: declared once, by LanguageModel.
SIZES = tuple(inspect.signature(LanguageModel).parameters.values())[1:]


def all_sizes(owner: str, **sizes: Any) -> dict[str, Any]:
    """The size arguments of `LanguageModel` with the defaults of those that are not given, as plain values.

    Raises:
        TypeError: a size that is unknown, listing the known ones for `owner`, or a required one that is missing.
    """
    signature = inspect.Signature(SIZES)
    _check_names(owner, sizes, signature.parameters)
    bound = signature.bind(**sizes)
    bound.apply_defaults()
    return {name: plain(value) for name, value in bound.arguments.items()}


def _check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no argument {name!r}; it has {', '.join(known)}")


class NamedModel(LanguageModel):
    """A `LanguageModel` whose layers all hold `architecture`; `help` of a subclass shows its options with defaults.

    Args:
        arguments: the sizes of `LanguageModel`, vocab_size first, and by name the options of the architecture:
            `chunk_size` (tokens), `window_size` (tokens), ...

    Raises:
        TypeError: an option that the architecture does not have; lists those it has.
        ValueError: names the argument, its value and what would do.
    """

    architecture: ClassVar[type[Attention]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" not in cls.__dict__:  # else it has arguments of its own
            own = [option.replace(kind=option.KEYWORD_ONLY) for option in options_of(cls.architecture).values()]
            cls.__signature__ = inspect.Signature([*SIZES, *own])  # type: ignore[attr-defined]

    def __init__(self, *sizes: Any, **arguments: Any) -> None:
        by_name = {size.name: arguments.pop(size.name) for size in SIZES if size.name in arguments}
        super().__init__(self.factory(**arguments), *sizes, **by_name)

    @classmethod
    def factory(cls, **options: Any) -> AttentionSpec:
        """The attention with these options, as `LanguageModel` and `LanguageModule` take it."""
        known = options_of(cls.architecture)
        _check_names(cls.__name__, options, [*(size.name for size in SIZES), *known])
        return AttentionSpec(cls.architecture, options)


class BSBRModel(NamedModel):
    """Block sparse attention with block retrieval; chunk_size and retrieval_top_k say what is exact, what retrieved."""

    architecture = BSBRAttention


class StandardTransformer(NamedModel):
    """Causal softmax attention over all of the past."""

    architecture = StandardAttention


class LinearTransformer(NamedModel):
    """Linear attention: the past in one matrix a head; chunk_size changes its speed, not its result."""

    architecture = LinearAttention


class DeltaNetTransformer(NamedModel):
    """Linear attention with the delta rule; chunk_size changes its speed, not its result."""

    architecture = DeltaNetAttention


class SlidingWindowTransformer(NamedModel):
    """Causal softmax attention over the last window_size tokens."""

    architecture = SlidingWindowAttention


class HopfieldTransformer(NamedModel):
    """A modern Hopfield network over all of the past, num_updates steps before it reads."""

    architecture = HopfieldAttention


class GAUTransformer(NamedModel):
    """Gated attention units: exact in the chunk of chunk_size tokens, linear before it; no feed-forward networks."""

    architecture = GAUAttention


MODELS: dict[str, type[NamedModel]] = {
    "BSBR": BSBRModel,
    "Linear": LinearTransformer,
    "DeltaNet": DeltaNetTransformer,
    "SlidingWindow": SlidingWindowTransformer,
    "Standard": StandardTransformer,
    "Hopfield": HopfieldTransformer,
    "GAU": GAUTransformer,
}


def model_class(name: str) -> type[NamedModel]:
    """The class by its name in `MODELS`, or by a key of `ARCHITECTURES`, those added to it later among them.

    Raises:
        ValueError: an unknown name; names the most similar one, or lists all.
    """
    if name in MODELS:
        return MODELS[name]
    if name not in ARCHITECTURES:
        names = [*MODELS, *ARCHITECTURES]
        advice = did_you_mean(name, names) or f"; there are {', '.join(names)}"
        raise ValueError(f"no model is called {name!r}{advice}")
    architecture = ARCHITECTURES[name]
    for known in MODELS.values():
        if known.architecture is architecture:
            return known
    return type(f"{architecture.__name__}Model", (NamedModel,), {"architecture": architecture})
