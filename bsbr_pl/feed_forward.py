"""The feed-forward network of a layer, and its activations."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the halves of x = (a, b): (..., 2 F) -> (..., F)."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


#: Name -> activation: relu(x)^2 (So et al. 2021, arXiv 2109.08668, section 4), GELU in the tanh form of GPT-2, and
#: SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: x.relu().square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": swiglu,
}
GATED = ("swiglu",)  # have two input matrices, side by side in `into`


def default_ff_dim(hidden_dim: int, activation: str) -> int:
    """4 D; with three matrices 8/3 D, rounded up to a multiple of 8: about as many parameters."""
    return 8 * -(-hidden_dim // 3) if activation in GATED else 4 * hidden_dim


class FeedForward(nn.Module):
    """activation(x W_in) W_out, D -> `ff_dim` -> D; with `swiglu` (silu(x W_gate) * x W_in) W_out.

    Args:
        hidden_dim: width D.
        ff_dim: width of what `out` reads.
        activation: a key of ACTIVATIONS.
        bias: give the linear maps a bias.
    """

    def __init__(self, hidden_dim: int, ff_dim: int, activation: str = "relu2", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.into = nn.Linear(hidden_dim, 2 * ff_dim if activation in GATED else ff_dim, bias=bias)
        self.out = nn.Linear(ff_dim, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(ACTIVATIONS[self.activation](self.into(x)))

    def flops(self, num_tokens: int) -> int:
        return 2 * num_tokens * (self.into.weight.numel() + self.out.weight.numel())
