"""State tracking: each task read back by an independent rule, the published lengths, and the truth that it tests.

A recurrence with eigenvalues in [0, 1] cannot track parity beyond the lengths it was trained on; with [-1, 1] it can.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import StateTrackingData, state_tracking
from bsbr_pl.data.base import IGNORED
from bsbr_pl.data.tasks import Random
from bsbr_pl.model import LanguageModel

TASKS = ("parity", "modular_addition", "s3", "s5", "parity_recall")
LENGTHS: dict[str, Any] = {"train_lengths": (14, 17), "test_lengths": (16, 32, 64), "num_train": 400, "num_test": 50}


# Readers: each gets one sample and says what every position must answer.


def read_sum(x: list[int], modulus: int) -> list[int]:
    total, answers = 0, []
    for token in x:
        total += token
        while total >= modulus:
            total -= modulus
        answers.append(total)
    return answers


def read_words(x: list[int], elements: int) -> list[int]:
    """By permutation matrices, the first token rightmost; permutations are numbered by counting in base n."""
    digits = [[code // elements**i % elements for i in reversed(range(elements))] for code in range(elements**elements)]
    numbered = [row for row in digits if sorted(row) == list(range(elements))]
    state, answers = np.eye(elements, dtype=int), []
    for token in x:
        state = np.eye(elements, dtype=int)[:, numbered[token]] @ state  # column e has its 1 in row p(e)
        answers.append(numbered.index(state.argmax(0).tolist()))
    return answers


def read_parity_recall(x: list[int], pairs: int, symbols: int) -> list[int]:
    values = {}
    for i in range(0, 3 * pairs, 3):
        key, first, second = x[i : i + 3]
        assert 2 <= key < 2 + symbols <= min(first, second)
        assert max(first, second) < 2 + 2 * symbols
        assert first != second
        values[key] = (first, second)
    assert len(values) == pairs
    answers, odd = [IGNORED] * 3 * pairs, False
    for place in range(3 * pairs, len(x)):
        if (place - 3 * pairs) % 2 == 0:
            assert x[place] in (0, 1)
            odd ^= x[place] == 1
            answers.append(IGNORED)
        else:
            answers.append(values[x[place]][odd])
    return answers


READERS: dict[str, Any] = {
    "parity": partial(read_sum, modulus=2),
    "modular_addition": partial(read_sum, modulus=5),
    "s3": partial(read_words, elements=3),
    "s5": partial(read_words, elements=5),
    "parity_recall": partial(read_parity_recall, pairs=4, symbols=8),
}


@pytest.mark.parametrize("ask", ["every", "last"])
@pytest.mark.parametrize("task", TASKS)
def test_every_answer(task: str, ask: str) -> None:
    length_parity = {"train_lengths": (16, 18), "test_lengths": (16, 32)} if ask == "last" else {}
    data = StateTrackingData(task, **{**LENGTHS, **length_parity}, ask=ask, batch_size=20)
    seen = set()
    for split in ("train", "test"):
        for batch in data.loader(split):
            length = batch["input_ids"].shape[1]
            seen.add((split, length))
            first = length - 1 if ask == "last" else length // 2 if split == "test" else 0
            for x, y in zip(batch["input_ids"][:2].tolist(), batch["targets"][:2].tolist(), strict=True):
                assert y == [IGNORED] * first + READERS[task](x)[first:]
    low, high = data.hparams["train_lengths"]
    assert {length for split, length in seen if split == "train"} == set(range(low, high + 1))


@given(st.integers(1, 4), st.integers(4, 7), st.integers(2, 20), st.integers(0, 2**32))
def test_parity_recall(pairs: int, symbols: int, more: int, seed: int) -> None:
    x, y = state_tracking.parity_recall(Random(seed, np.arange(8)), 3 * pairs + more, 0, pairs, symbols)
    for row, asked in zip(x.tolist(), y.tolist(), strict=True):
        assert asked == read_parity_recall(row, pairs, symbols)


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (state_tracking.modular_addition, partial(read_sum, modulus=5)),
        (state_tracking.permutation_words, partial(read_words, elements=3)),
        (state_tracking.parity_recall, partial(read_parity_recall, pairs=2, symbols=4)),
    ],
)
def test_the_example_of_a_docstring_obeys_the_rules(function: Any, reader: Any) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in function.__doc__.splitlines() if line.split()}
    x = [int(token) for token in rows["input"]]
    assert [IGNORED if token == "." else int(token) for token in rows["target"]] == reader(x)


def test_permutations_are_a_group() -> None:
    table = state_tracking.composition(5)
    assert table.shape == (120, 120)
    assert (np.sort(table, 0) == np.arange(120)[:, None]).all()
    assert (np.sort(table, 1) == np.arange(120)).all()
    a, b, c = np.random.default_rng(0).integers(0, 120, (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table[a, b] != table[b, a]).any()


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_never_share_a_sample(task: str) -> None:
    data = StateTrackingData(task, (14, 14), (14,), num_train=500, num_test=500, batch_size=100)
    seen = {
        split: {tuple(row) for batch in data.loader(split) for row in batch["input_ids"].tolist()}
        for split in ("train", "val", "test")
    }
    assert all(seen.values())
    assert not (seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"])


@pytest.mark.parametrize(("task", "chance"), [*zip(TASKS, [1 / 2, 1 / 5, 1 / 6, 1 / 120, 1 / 8], strict=True)])
def test_chance_is_what_the_best_constant_gets(task: str, chance: float) -> None:
    data = StateTrackingData(task, **LENGTHS | {"num_test": 300})
    answers = np.concatenate([batch["targets"].numpy().ravel() for batch in data.test_dataloader()])
    counts = np.bincount(answers[answers != IGNORED])
    assert data.chance() == chance
    assert chance <= counts.max() / counts.sum() < chance + 0.02


def test_recall_without_tracking_gets_half() -> None:
    """Always the first value of the key."""
    data, right = StateTrackingData("parity_recall", **LENGTHS | {"num_test": 300}), []
    for batch in data.test_dataloader():
        for x, y in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
            first = {x[i]: x[i + 1] for i in range(0, 12, 3)}
            right += [first[token] == answer for token, answer in zip(x, y, strict=True) if answer != IGNORED]
    assert np.mean(right) == pytest.approx(data.plateau(), abs=0.03)


def test_slices_of_doubling_lengths_ask_at_other_positions() -> None:
    asked = [
        set(np.nonzero(batch["targets"][0].numpy() >= 0)[0] + 1)
        for batch in StateTrackingData(train_lengths=(3, 40), num_test=1).test_dataloader()
    ]
    assert asked == [set(range(n // 2 + 1, n + 1)) for n in (40, 80, 160, 320)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"task": "s4"}, "task='s4' must be one of parity, modular_addition, s3, s5, parity_recall"),
        ({"ask": "all"}, "ask='all' every or last"),
        ({"train_lengths": (40, 3)}, r"train_lengths=\[40, 3\] must be the shortest and the longest"),
        ({"train_lengths": (0, 3)}, "train_lengths=0 is too small: at least 1"),
        ({"test_lengths": (0,)}, "test_lengths=0 is too small: at least 1"),
        ({"modulus": 1}, "modulus=1 is too small: at least 2"),
        ({"task": "parity_recall"}, "num_pairs=4 .* length of 3 at least 14"),
        ({"task": "parity_recall", "num_pairs": 9}, "num_pairs=9 must be from 1 to num_symbols=8"),
        ({"num_train": 37}, "segment T3 has 0 samples"),
    ],
)
def test_mistakes_are_said(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StateTrackingData(**arguments)


# The truth.


def parity_by_hand(scale: float, length: int) -> float:
    """Accuracy of a DeltaNet layer whose weights are set by hand, with beta = `scale` sigmoid(.) at its highest.

    All keys are the same k. A mark in front writes v = 1 under it, since S starts at 0; then a one moves the stored
    value s to (1 - beta) s and writes nothing, because its v is 0, and a zero has beta = 0. Read under k, s is
    1, -1, 1, ... if beta = 2.
    """
    attention = ARCHITECTURES["delta_net"](8, 1, conv_size=1, allow_neg_eigval=scale == 2).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.norm.weight.fill_(1)
        # Inputs: x[0] = 1 always, x[1] = 1 at the mark, x[2] = 1 at a one, x[3] = 1 at a zero.
        attention.qkv.weight[0, 0] = attention.qkv.weight[8, 0] = attention.qkv.weight[16, 1] = 30
        attention.beta.weight[0, 2], attention.beta.weight[0, 3] = 60, -60
        attention.out.weight.copy_(torch.eye(8))
    bits = torch.randint(0, 2, (16, length), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(16, length + 1, 8, dtype=torch.float64)
    x[..., 0], x[:, 0, 1], x[:, 1:, 2], x[:, 1:, 3] = 1, 1, bits, 1 - bits
    odd = attention(x)[:, 1:, 0] < 0
    return float((odd == bits.cumsum(1) % 2).double().mean())


def test_by_hand_negative_eigenvalues_give_parity_at_any_length() -> None:
    assert parity_by_hand(2, 1000) == 1
    assert parity_by_hand(1, 1000) == pytest.approx(0.5, abs=0.02)


def accuracy_by_length(name: str, **options: Any) -> list[float]:
    """Test accuracy at 16, 32 and 64 tokens of a layer of width 32 after 150 steps with 2 to 16 tokens."""
    torch.manual_seed(0)
    data = StateTrackingData("parity", (2, 16), (16, 32, 64), num_train=15 * 640, num_test=100, batch_size=64)
    model = LanguageModel(partial(ARCHITECTURES[name], conv_size=1, chunk_size=16, **options), 2, 32, 1, 2, ff_dim=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for ids in data.samples("train").train_batches(64, 0):
        batch = data.samples("train")[ids]
        loss = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = []
    for batch in data.test_dataloader():
        asked = batch["targets"] != IGNORED
        found.append(float((model(batch["input_ids"]).argmax(-1) == batch["targets"])[asked].double().mean()))
    return found[::2]


@pytest.mark.parametrize(
    ("name", "options"), [("delta_net", {"allow_neg_eigval": True}), ("delta_net", {}), ("gla", {}), ("mamba2", {})]
)
def test_parity_needs_negative_eigenvalues(name: str, options: dict[str, Any]) -> None:
    _, twice, four_times = accuracy_by_length(name, **options)
    if options:
        assert twice >= 0.99
        assert four_times >= 0.95
    else:
        assert twice == pytest.approx(0.5, abs=0.05)
        assert four_times == pytest.approx(0.5, abs=0.05)
