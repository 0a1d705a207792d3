"""The sums over chunks: a loop on a CPU, a scan on a GPU, the same numbers."""

import pytest
import torch

from bsbr_pl.attention.base import running_sum


class OnAGpu(torch.Tensor):
    """A tensor on a CPU that says it is not, so that the form for a GPU is tested where there is none."""

    is_cuda = True


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_loop_and_scan_are_one_sum(chunks):
    x = torch.randn(2, 3, chunks, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, total = running_sum(x, dim=2)
    scanned = running_sum(x.as_subclass(OnAGpu), dim=2)
    torch.testing.assert_close(scanned[0].as_subclass(torch.Tensor), before)
    torch.testing.assert_close(scanned[1].as_subclass(torch.Tensor), total)
    torch.testing.assert_close(before, torch.stack([x[:, :, :n].sum(2) for n in range(chunks)], 2))
    torch.testing.assert_close(total, x.sum(2))
