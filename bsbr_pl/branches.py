"""The residual branches of a language model: attentions and feed-forward networks, each after a norm."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .attention.base import Attention
from .feed_forward import FeedForward

#: Builds the attention of one layer from (hidden_dim, num_heads): an Attention class, or a `functools.partial` of one.
AttentionFactory = Callable[[int, int], Attention]

Norm = nn.LayerNorm | nn.RMSNorm
#: Name -> norm over the channels of a token.
NORMS: dict[str, Callable[[int], Norm]] = {"layer": nn.LayerNorm, "rms": partial(nn.RMSNorm, eps=1e-5)}


class Residual(nn.Module):
    """x + inner(norm(x)), where inner is an attention or a feed-forward network."""

    inner: Attention | FeedForward

    def __init__(self, inner: Attention | FeedForward, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.inner = inner
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.inner(self.norm(x)))

    @torch.no_grad()
    def init_weights(self, out_init: float, parts: int) -> None:
        """Linear maps start at N(0, 1 / fan_in), and `out` at N(0, out_init^2 / (fan_in parts)), as one of `parts`.

        An attention that `initializes_itself` stays as its constructor set it.
        """
        if isinstance(self.inner, Attention) and self.inner.initializes_itself:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        out = self.inner.out
        nn.init.normal_(out.weight, std=out_init * (out.in_features * parts) ** -0.5)
        if out.bias is not None:
            nn.init.zeros_(out.bias)


def one_per_layer(attention: AttentionFactory | Sequence[AttentionFactory], num_layers: int) -> list[AttentionFactory]:
    """One builder for each layer, from one for all layers or a list that is repeated.

    Raises:
        ValueError: if the length of the list does not divide `num_layers`, or an element cannot be called.
        TypeError: for the name of an architecture.
    """
    if isinstance(attention, str):
        raise TypeError(
            f"attention must build an Attention, not be its name: give bsbr_pl.spec.specs_of({attention!r})"
        )
    factories = list(attention) if isinstance(attention, Sequence) else [attention]
    if not factories or num_layers % len(factories):
        raise ValueError(
            f"attention must list one architecture per layer, or a pattern whose length divides num_layers, got "
            f"{len(factories)} for {num_layers} layers"
        )
    if not all(map(callable, factories)):
        raise ValueError(f"attention must be an Attention class or another builder of one, got {attention!r}")
    return factories * (num_layers // len(factories))
