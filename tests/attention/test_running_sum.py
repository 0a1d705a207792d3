"""Sums over the chunks: a loop on a CPU and a scan on a GPU give the same numbers."""

import pytest
import torch

from bsbr_pl.attention.parts import running_sum


class OnAGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU, so that the form for a GPU is tested without one."""

    is_cuda = True


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_loop_and_scan_are_one_sum(chunks, started):
    x = torch.randn(2, 3, chunks, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if started else None
    before, total = running_sum(x, dim=2, start=start)
    scanned = running_sum(x.as_subclass(OnAGpu), dim=2, start=start)
    torch.testing.assert_close(scanned[0].as_subclass(torch.Tensor), before)
    torch.testing.assert_close(scanned[1].as_subclass(torch.Tensor), total)
    first = start if started else torch.zeros(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(before, torch.stack([first + x[:, :, :n].sum(2) for n in range(chunks)], 2))
    torch.testing.assert_close(total, first + x.sum(2))
