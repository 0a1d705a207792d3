"""The start of decays and of the token shift, by the numbers that the files name."""

import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES


@pytest.mark.parametrize("name", ["gated_delta_net", "gated_delta_product"])
def test_heads_start_with_memories_of_10_to_1000_tokens(name):
    log_alpha = ARCHITECTURES[name](48, 3).project(torch.zeros(1, 4, 48))[4]  # (B, H, T, 1), without an input
    memory = (-1 / log_alpha[0, :, 0, 0]).detach()
    torch.testing.assert_close(memory, torch.tensor([10.0, 100.0, 1000.0]), rtol=1e-4, atol=0)


def test_rwkv7_starts_as_published():
    """Weights of the input against the token before, and log w = -e^(-1/2) sigmoid(b), for r, w, k, v, a and g."""
    rwkv7 = ARCHITECTURES["rwkv7"](4, 1)
    share = [0, 0.25, 0.5, 0.75]  # of the channels before this one
    expected = [[1 - c**power for c in share] for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]
    torch.testing.assert_close(rwkv7.mu.detach(), torch.tensor(expected))
    log_w = rwkv7.project(torch.zeros(1, 1, 4))[1][0, 0, 0].detach()
    b = torch.tensor([5 * c**0.85 - 6.5 for c in share])
    torch.testing.assert_close(log_w, -(b.sigmoid() * 0.6065306597))
