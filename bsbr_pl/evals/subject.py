"""What is measured: a model, the data it was trained on, and what rows say about them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from bsbr_pl.attention.parts import ShortConvolution
from bsbr_pl.data import TokenData
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import SIZES
from bsbr_pl.spec import layers_of, plain_specs
from bsbr_pl.utils.code import foreign_code
from bsbr_pl.values import digest

SIZE_NAMES = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "ff_dim")


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Args:
        model: on any device; it is copied before it is measured.
        about: `about` of its rows.
        open_data: opens the data of its training, prepared, with some arguments changed; None where there is none.
        record: what RunRecorder kept of its training.
    """

    model: LanguageModel
    about: dict[str, Any]
    open_data: Callable[..., TokenData] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.about["checkpoint"]["name"]

    @property
    def digest(self) -> str:
        """The identity of measurements that depend on its weights."""
        return self.about["checkpoint"]["digest"]

    @property
    def architecture_digest(self) -> str:
        """The identity of its costs: architecture and sizes, without weights, so that seeds share it."""
        return self.about["checkpoint"]["body"]

    def can_read(self, length: int) -> bool:
        """Whether it has no learned positions, or at least this many."""
        return self.model.max_length is None or length <= self.model.max_length


def layer_names(attention: Any) -> list[str]:
    """`AttentionSpec.words` of each layer; one if all layers are alike."""
    names = [spec.words for spec in layers_of(attention)]
    return names if len(set(names)) > 1 else names[:1]


def in_order(layers: Sequence[str]) -> str:
    """The layers of a hybrid as one writes them: `3x gated_delta_net + standard`."""
    counted = [(name, len(list(alike))) for name, alike in groupby(layers)]
    if len(counted) == 1:
        return layers[0]
    return " + ".join(name if count == 1 else f"{count}x {name}" for name, count in counted)


def describe_model(name: str, weights: str, arguments: Mapping[str, Any], model: LanguageModel) -> dict[str, Any]:
    """`about` of a model's rows.

    Args:
        name: as a reader knows it.
        weights: digest of its weights.
        arguments: of `LanguageModel`, with any others.
        model: what was built from them.
    """
    built = {size.name: arguments.get(size.name, size.default) for size in SIZES if size.name != "dropout"}
    shape = digest([plain_specs(arguments["attention"]), built, *foreign_code(model)])
    return {
        "checkpoint": {"name": name, "digest": weights, "body": shape},
        "architecture": in_order(list(map(str, layers_of(arguments["attention"])))),
        "attention": list(dict.fromkeys(spec.key for spec in layers_of(arguments["attention"]))),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "conv_size": list(map(_taps, model.attentions)),
        "sizes": {size: built[size] for size in SIZE_NAMES},
    }


def _taps(attention: nn.Module) -> int:
    """The taps of an attention's short convolution; 1 if it has none."""
    convolutions = [part for part in attention.modules() if isinstance(part, ShortConvolution)]
    return max((part.weight.shape[-1] for part in convolutions), default=0) or 1
