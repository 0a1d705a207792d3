"""Recall hits on real text, against the definition written as a loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bsbr_pl.data import associative_recall_hits


def by_loop(input_ids: Tensor, targets: Tensor) -> Tensor:
    distance = torch.zeros_like(input_ids)
    for row in range(len(input_ids)):
        last: dict[tuple[int, int], int] = {}
        for t, bigram in enumerate(zip(input_ids[row].tolist(), targets[row].tolist(), strict=True)):
            if bigram[1] == -100:
                continue
            if bigram in last:
                distance[row, t] = t - last[bigram]
            last[bigram] = t
    return distance


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), length=st.integers(1, 40), symbols=st.integers(1, 60_000))
def test_equals_the_loop(seed: int, rows: int, length: int, symbols: int) -> None:
    random = torch.Generator().manual_seed(seed)
    symbols = min(symbols, 2 + seed % 5) if seed % 2 else symbols
    stream = torch.randint(symbols, (rows, length + 1), generator=random)
    input_ids, targets = stream[:, :-1].clone(), stream[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=random) < 0.2] = -100
    torch.testing.assert_close(associative_recall_hits(input_ids, targets), by_loop(input_ids, targets))


def test_by_hand() -> None:
    stream = torch.tensor([[5, 6, 7, 5, 6, 5, 6, 7]])
    assert associative_recall_hits(stream[:, :-1], stream[:, 1:]).tolist() == [[0, 0, 0, 3, 0, 2, 5]]
    ignored = torch.full((1, 3), -100)
    assert associative_recall_hits(torch.zeros_like(ignored), ignored).tolist() == [[0, 0, 0]]
