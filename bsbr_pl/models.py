"""The models by name: `BSBRModel(vocab_size=1000, chunk_size=64)` is the one `LanguageModel` around `BSBRAttention`.

A name adds nothing but the choice of the attention; its options become arguments of the model, with the defaults of the
attention's own class. Parameters, state dict and methods are those of `LanguageModel`.
"""

import inspect
from functools import partial
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
from .model import AttentionFactory, LanguageModel

SIZES = tuple(inspect.signature(LanguageModel).parameters.values())[1:]  # vocab_size, hidden_dim, ..., ff_bias


class NamedModel(LanguageModel):
    """A `LanguageModel` whose layers all hold `architecture`; `help` of a subclass shows its options with defaults.

    Args:
        vocab_size, hidden_dim, num_layers, num_heads, ff_dim, dropout, positions, ff_activation, ff_bias: as in
            `LanguageModel`.
        options: of the architecture, as in its class: `chunk_size` (tokens), `window_size` (tokens), ...

    Raises:
        TypeError: an option that the architecture does not have; lists those it has.
        ValueError: names the argument, its value and what would do.
    """

    architecture: ClassVar[type[Attention]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in cls.__dict__:
            return  # it has arguments of its own
        own = [option.replace(kind=option.KEYWORD_ONLY) for option in cls.options().values()]
        cls.__signature__ = inspect.Signature([*SIZES, *own])  # type: ignore[attr-defined]

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        positions: int = 0,
        ff_activation: str = "relu2",
        ff_bias: bool = False,
        **options: Any,
    ) -> None:
        sizes = (vocab_size, hidden_dim, num_layers, num_heads, ff_dim, dropout, positions, ff_activation, ff_bias)
        super().__init__(self.factory(**options), *sizes)

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """What can be chosen of the architecture beside the model's sizes."""
        parameters = inspect.signature(cls.architecture).parameters
        return {name: parameters[name] for name in list(parameters)[2:]}  # behind hidden_dim and num_heads

    @classmethod
    def factory(cls, **options: Any) -> AttentionFactory:
        """The builder of attentions with these options, as `LanguageModel` and `LanguageModule` take it."""
        for name in options:
            if name not in cls.options():
                known = ", ".join([*(size.name for size in SIZES), *cls.options()])
                raise TypeError(f"{cls.__name__} has no argument {name!r}; it has {known}")
        return partial(cls.architecture, **options)


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
        ValueError: an unknown name; lists the known ones.
    """
    if name in MODELS:
        return MODELS[name]
    if name not in ARCHITECTURES:
        raise ValueError(f"no model is called {name!r}; there are {', '.join([*MODELS, *ARCHITECTURES])}")
    architecture = ARCHITECTURES[name]
    for known in MODELS.values():
        if known.architecture is architecture:
            return known
    return type(f"{architecture.__name__}Model", (NamedModel,), {"architecture": architecture})
