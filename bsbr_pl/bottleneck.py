"""A bottleneck behind the layers: what follows a mark is decoded from the mark's activation alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Marked(NamedTuple):
    x: Tensor  # (B, D), the layers' output at the latest mark
    distance: Tensor  # (B,), tokens since then; -1 before the first mark


class Bottleneck(nn.Module):
    """Replace the layers' output x_t, from each mark on, by decoder(x_m + p_(t - m)), m being the latest mark.

    p are sinusoidal positions (Vaswani et al. 2017, arXiv 1706.03762), and the decoder is
    gelu(norm(gelu(norm(.) W_1 + b_1)) W_2 + b_2). It is the decoder of MAD's compression task (Poli et al. 2024, arXiv
    2403.17844, public code). There each position asks for its own token; here the answers stand after the mark, so that
    the model stays causal.

    Args:
        hidden_dim: width D.
        mark: the id of the mark.
        norm: makes a norm over D channels.
    """

    def __init__(self, hidden_dim: int, mark: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.hidden_dim, self.mark = hidden_dim, mark
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [norm(hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.GELU()]
        self.decoder = nn.Sequential(*layers)

    def forward(self, x: Tensor, input_ids: Tensor, state: Marked | None = None) -> tuple[Tensor, Marked]:
        """x (B, T, D) of ids (B, T), which continue those of `state` -> x (B, T, D), and the state after them."""
        before = self.init_state(x) if state is None else state
        t = torch.arange(x.shape[1], device=x.device)
        mark = torch.where(input_ids == self.mark, t, -1).cummax(1).values  # (B, T), -1: not among these ids
        since = torch.where(before.distance[:, None] < 0, -1, before.distance[:, None] + 1 + t)
        distance = torch.where(mark < 0, since, t - mark)
        marked = torch.cat([before.x[:, None], x], 1).gather(1, (mark + 1)[..., None].expand_as(x))
        decoded = self.decoder(marked + sinusoids(distance, x))
        return torch.where(distance[..., None] < 0, x, decoded), Marked(marked[:, -1], distance[:, -1])

    def init_state(self, like: Tensor) -> Marked:
        """The state before the first token of texts `like` (B, ..., D)."""
        first = like.flatten(1, -2)[:, 0] if like.dim() > 2 else like
        return Marked(torch.zeros_like(first), torch.full(like.shape[:1], -1, device=like.device))

    @property
    def state_size(self) -> int:
        return self.hidden_dim + 1

    def flops(self, num_tokens: int) -> int:
        return 2 * num_tokens * 2 * self.hidden_dim**2


def sinusoids(position: Tensor, like: Tensor) -> Tensor:
    """(B, T) -> (B, T, D): sin and cos of position / 10000^(j / (D/2 - 1)), the sines first."""
    half = like.shape[-1] // 2
    rate = 10_000.0 ** -(torch.arange(half, device=like.device) / max(1, half - 1))
    angle = position[..., None] * rate
    waves = torch.cat([angle.sin(), angle.cos()], -1)
    return nn.functional.pad(waves, (0, like.shape[-1] - 2 * half)).to(like.dtype)
