"""Causal and window attention of the last queries over more keys, against one softmax under an explicit mask."""

import pytest
import torch
import torch.nn.functional as F

from bsbr_pl.attention.parts import chunk_mask, window_mask
from bsbr_pl.attention.softmax import Sinks, causal_attention, sink_attention, window_attention


def inputs(T: int, past: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T + past)
    lengths = (T, past + T, past + T)
    return [torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in lengths]


def masked_attention(q, k, v, mask):
    """The definition: the queries are the last rows of the mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[-q.shape[2] :] if q.shape[2] else mask[:0])


def assert_same(own, expected, parts):
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, truth = (torch.autograd.grad((y * weights).sum(), parts) for y in (own, expected))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("past", [0, 1, 7, 63, 64, 99, 130])
@pytest.mark.parametrize("window", [1, 2, 7, 64, 65, 100, 129, 600])
def test_a_window_is_a_mask(window, past):
    """For windows of one block and of several, for a past shorter and longer than the window."""
    for T in (1, 2, 64, 65, 129, 200, 333):
        q, k, v = inputs(T, past)
        expected = masked_attention(q, k, v, window_mask(past + T, window, q.device))
        assert_same(window_attention(q, k, v, window), expected, (q, k, v))


@pytest.mark.parametrize("past", [0, 1, 5, 20])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_causal_attention_continues(past, scale):
    for T in (1, 2, 9):
        q, k, v = inputs(T, past)
        factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5
        expected = masked_attention(q * factor, k, v, window_mask(past + T, None, q.device))
        assert_same(causal_attention(q, k, v, scale), expected, (q, k, v))


@pytest.mark.parametrize("past", [0, 5, 99])
@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_sinks_are_columns_of_the_mask(window, past):
    """With the queries' own rows of scores for the sinks; the past is whole, or the last keys of a longer text."""
    for T in (1, 2, 65, 200):
        q, k, v = inputs(T, past)
        far_q = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        sink_k, sink_v = k[:, :, :3], v[:, :, :3]
        t, j = torch.arange(past, past + T)[:, None], torch.arange(past + T)
        near = t - j < window
        scores = torch.where(near, q @ k.mT, far_q @ k.mT) / 2
        seen = (j <= t) & (near | (j < 3))
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        kept = slice(max(0, past - window + 1), None)
        own = window_attention(q, k[:, :, kept], v[:, :, kept], window, Sinks(far_q, sink_k, sink_v, past))
        assert_same(own, expected, (q, k, v, far_q) if (~near & seen).any() else (q, k, v))


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_sink_is_one_more_score(groups, past):
    """Four heads, which share the keys of `groups` heads."""
    generator = torch.Generator().manual_seed(past)
    q, k, v = (
        torch.randn(2, n, T, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for n, T in ((4, 9), (groups, past + 9), (groups, past + 9))
    )
    sink = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    heads = []
    for h in range(4):
        exponentials = (q[:, h] @ k[:, h * groups // 4].mT / 6**0.5).exp().tril(past)
        heads.append(exponentials / (exponentials.sum(-1, keepdim=True) + sink[h].exp()) @ v[:, h * groups // 4])
    assert_same(sink_attention(q, k, v, sink), torch.stack(heads, 1), (q, k, v, sink))


def test_masks_by_hand():
    device = torch.device("cpu")
    assert window_mask(3, 2, device).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert window_mask(3, None, device).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert chunk_mask(4, 2, device).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert window_mask(0, 2, device).shape == chunk_mask(0, 2, device).shape == (0, 0)


@pytest.mark.parametrize("past", [0, 40])
def test_a_window_in_low_precision_is_computed_in_fp32(past):
    q, k, v = (part.detach().bfloat16() for part in inputs(200, past))
    expected = masked_attention(*(part.double() for part in (q, k, v)), window_mask(past + 200, 100, q.device))
    torch.testing.assert_close(window_attention(q, k, v, 100).double(), expected, rtol=1e-5, atol=1e-6)
