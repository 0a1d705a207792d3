"""The MAD tasks, read back by their published rules; published sizes; what a guess gets."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_protocol import most_frequent

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import MADData, mad_tasks
from bsbr_pl.data.base import IGNORED
from bsbr_pl.data.mad import TASKS as PUBLISHED
from bsbr_pl.data.tasks import Random
from bsbr_pl.module import LanguageModule
from bsbr_pl.spec import specs_of

Row = list[int]
TASKS = ("compression", "in_context_recall", "fuzzy_recall", "noisy_recall", "selective_copying", "memorization")
SEEDS = st.integers(0, 2**32)


# Readers: each gets one sample and asserts every rule of its task.


def read_compression(x: Row, y: Row, vocab_size: int) -> None:
    half = len(x) // 2
    assert all(0 <= token < vocab_size - 1 for token in x[: half - 1])
    assert x[half - 1] == vocab_size - 1
    assert x[half:] == [0] * half
    assert y == [IGNORED] * (half - 1) + x[:half] + [IGNORED]


def read_recall(x: Row, y: Row, vocab_size: int, noise_vocab_size: int = 0) -> None:
    symbols = vocab_size - noise_vocab_size
    values: dict[int, int] = {}
    for place in range(0, len(x), 2):
        (first, second), (asked, never) = x[place : place + 2], y[place : place + 2]
        assert never == IGNORED
        if first >= symbols:
            assert symbols <= second < vocab_size, "noise comes in twos"
            assert asked == IGNORED
            continue
        assert first < symbols // 2 <= second < symbols
        assert asked == (second if first in values else IGNORED)
        assert values.setdefault(first, second) == second
    assert asked == x[-1], "the last pair is a question"


def read_fuzzy(x: Row, y: Row, vocab_size: int, motif_size: int) -> None:
    fill, half = vocab_size - 1, (vocab_size - 1) // 2
    whole = [*x, y[-1]]
    start = next(place for place, token in enumerate(whole) if token != fill)
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    asked, starts, place = [IGNORED] * start, [], start
    values: dict[tuple[int, ...], tuple[int, ...]] = {}
    while place < len(whole):
        starts.append(place - start)
        motifs = []
        for is_key in (True, False):
            motif: Row = []
            while place < len(whole) and (whole[place] < half) == is_key:
                motif.append(whole[place])
                place += 1
            assert len(motif) == len(set(motif))
            assert fill not in motif
            motifs.append(tuple(motif))
        key, value = motifs
        assert len(key) == motif_size
        assert 1 <= len(value) <= motif_size
        asked += [IGNORED] * len(key) + (list(value) if key in values else [IGNORED] * len(value))
        assert values.setdefault(key, value) == value
        pairs.append((key, value))
    assert asked[1:] == y
    assert pairs[-1] in pairs[:-1]
    room = len(x) - len(pairs[-1][0]) - len(pairs[-1][1]) - 2 * motif_size
    assert starts[-2] < room <= starts[-1]


def read_copying(x: Row, y: Row, vocab_size: int, num_copied: int) -> None:
    blank, mark = vocab_size - 2, vocab_size - 1
    assert x.count(mark) == 1
    end = x.index(mark)
    copied = [token for token in x[:end] if token != blank]
    assert x[end - 1] != blank, "a blank stands before a token"
    assert x[end + 1 :] == [blank] * num_copied
    assert y == [IGNORED] * (end + 1) + copied


def read_memorization(x: Row, y: Row, vocab_size: int, known: dict[int, int]) -> None:
    half = (vocab_size - 1) // 2
    assert set(x[1::2]) == {vocab_size - 1}
    assert set(y[::2]) == {IGNORED}
    for key, value in zip(x[::2], y[1::2], strict=True):
        assert 0 <= key < half <= value < vocab_size - 1
        assert known.setdefault(key, value) == value
    assert len(set(known.values())) == len(known)


READERS: dict[str, Any] = {
    "compression": read_compression,
    "in_context_recall": read_recall,
    "fuzzy_recall": read_fuzzy,
    "noisy_recall": read_recall,
    "selective_copying": read_copying,
    "memorization": read_memorization,
}
EXTRA = {
    "fuzzy_recall": {"motif_size": 3},
    "noisy_recall": {"noise_vocab_size": 16},
    "selective_copying": {"num_copied": 16},
}


@pytest.mark.parametrize("task", TASKS)
def test_published_sizes_obey_every_rule(task: str) -> None:
    """Written down from the public code's configs/tasks, and read from val and test samples."""
    data = MADData(task)
    vocab_size, length, examples = {
        "compression": (16, 64, 12_800),
        "in_context_recall": (16, 128, 12_800),
        "fuzzy_recall": (16, 128, 12_800),
        "noisy_recall": (32, 128, 12_800),
        "selective_copying": (16, 256, 12_800),
        "memorization": (256, 32, 256),
    }[task]
    assert (data.vocab_size, data.context_length, data.batch_size) == (vocab_size, length, 128)
    assert len(data.train_dataloader()) == examples / 128
    extra: dict[str, Any] = EXTRA.get(task, {}) | ({"known": {}} if task == "memorization" else {})
    for split in ("val", "test"):
        loader = data.loader(split)
        assert len(loader) == 1_280 / 128
        batch = next(iter(loader))
        for x, y in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
            assert len(x) == length
            READERS[task](x, y, vocab_size, **extra)
    train = next(iter(data.train_dataloader()))
    for x, y in zip(train["input_ids"].tolist(), train["targets"].tolist(), strict=True):
        if not task.endswith("recall"):
            READERS[task](x, y, vocab_size, **extra)
        else:
            assert y[:-1] == x[1:], "training asks for every next token"


@given(st.integers(2, 30), st.integers(2, 40), st.integers(0, 9), st.floats(0, 0.9), SEEDS)
def test_recall(half_length: int, symbols: int, noise: int, share: float, seed: int) -> None:
    share = share if noise else 0.0
    vocab_size = symbols + noise
    x, y = mad_tasks.in_context_recall(Random(seed, np.arange(8)), 2 * half_length, vocab_size, False, noise, share)
    trained = mad_tasks.in_context_recall(Random(seed, np.arange(8)), 2 * half_length, vocab_size, True, noise, share)
    assert (trained[0] == x).all(), "training and testing differ in what is asked"
    for row, asked in zip(x.tolist(), y.tolist(), strict=True):
        read_recall(row, asked, vocab_size, noise)


@given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 8), SEEDS)
def test_fuzzy_recall(motif_size: int, more: int, symbols: int, seed: int) -> None:
    length, vocab_size = 4 * motif_size + more, 2 * motif_size + 1 + symbols
    x, y = mad_tasks.fuzzy_recall(Random(seed, np.arange(8)), length, vocab_size, False, motif_size)
    for row, asked in zip(x.tolist(), y.tolist(), strict=True):
        read_fuzzy(row, asked, vocab_size, motif_size)


@given(st.integers(1, 20), st.integers(1, 40), st.integers(3, 30), SEEDS)
def test_selective_copying(copied: int, blanks: int, vocab_size: int, seed: int) -> None:
    length = 2 * copied + blanks + 1
    x, y = mad_tasks.selective_copying(Random(seed, np.arange(8)), length, vocab_size, copied)
    for row, asked in zip(x.tolist(), y.tolist(), strict=True):
        read_copying(row, asked, vocab_size, copied)


@given(st.integers(1, 20), st.integers(3, 60), SEEDS)
def test_memorization_and_compression(half_length: int, vocab_size: int, seed: int) -> None:
    known: dict[int, int] = {}
    for first in (0, 8):
        x, y = mad_tasks.memorization(Random(seed, first + np.arange(8)), 2 * half_length, vocab_size, seed)
        for row, asked in zip(x.tolist(), y.tolist(), strict=True):
            read_memorization(row, asked, vocab_size, known)
        x, y = mad_tasks.compression(Random(seed, np.arange(8)), 2 * half_length + 2, vocab_size)
        for row, asked in zip(x.tolist(), y.tolist(), strict=True):
            read_compression(row, asked, vocab_size)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("compression", {"vocab_size": 8}),
        ("in_context_recall", {"vocab_size": 8}),
        ("fuzzy_recall", {"vocab_size": 12, "motif_size": 2}),
        ("selective_copying", {"vocab_size": 10, "num_copied": 3}),
        ("memorization", {"vocab_size": 10, "known": {2: 7, 0: 4, 3: 5}}),
    ],
)
def test_the_example_of_a_docstring_obeys_the_rules(task: str, options: dict[str, Any]) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in getattr(mad_tasks, task).__doc__.splitlines() if line.split()}
    x = [int(token) for token in rows["input"]]
    y = [IGNORED if token == "." else int(token) for token in rows["target"]]
    length = int(getattr(mad_tasks, task).__doc__.split("Example (T = ")[1].split(",")[0])
    assert len(x) == len(y) == length
    READERS[task](x, y, **options)


# Distributions.


def fuzzy_by_the_rules(random: np.random.Generator, length: int, vocab_size: int, most: int, sizes: list[int]) -> Row:
    """A fuzzy sample, token by token, as the public code makes one: T + 1 tokens. Keys have one of the `sizes`."""
    half, fill = (vocab_size - 1) // 2, vocab_size - 1

    def motif(low: int, high: int, of: list[int]) -> tuple[int, ...]:
        return tuple(random.permutation(np.arange(low, high))[: random.choice(of)].tolist())

    key, value = motif(0, half, sizes), motif(half, fill, list(range(1, most + 1)))
    asked = len(key) + len(value)
    place, values, row = random.integers(length - 2 * asked), {key: value}, []
    shown = False
    while len(row) < length - asked - 2 * most:
        last = motif(0, half, sizes)
        if len(row) >= place and not shown:
            last = key
        shown |= last == key
        row += [*last, *values.setdefault(last, motif(half, fill, list(range(1, most + 1))))]
    if not shown:  # the public code would ask what was never shown
        return fuzzy_by_the_rules(random, length, vocab_size, most, sizes)
    row += [*key, *value]
    return [fill] * (length + 1 - len(row)) + row


@pytest.mark.parametrize("training", [True, False])
def test_fuzzy_samples_are_distributed_as_the_public_codes(training: bool) -> None:
    """Length of the filling, share of key tokens, and how often the last pair's first token came: means of 2,000."""

    def facts(row: Row) -> tuple[float, ...]:
        tokens = [token for token in row if token != 15]
        keys = [token < 7 for token in tokens]
        runs = sum(a != b for a, b in itertools.pairwise(keys))
        return len(row) - len(tokens), sum(keys) / len(keys), runs, tokens[: len(tokens) // 2].count(tokens[-1])

    random, samples = np.random.default_rng(0), 2_000
    sizes = [1, 2, 3] if training else [3]
    wanted = np.array([facts(fuzzy_by_the_rules(random, 60, 16, 3, sizes)) for _ in range(samples)])
    x, y = mad_tasks.fuzzy_recall(Random(1, np.arange(samples)), 60, 16, training, 3)
    found = np.array([facts([*row, last]) for row, last in zip(x.tolist(), y[:, -1].tolist(), strict=True)])
    noise = np.hypot(wanted.std(0), found.std(0)) / samples**0.5
    np.testing.assert_array_less(abs(wanted.mean(0) - found.mean(0)), 4 * noise)


def test_noise_keys_and_blanks_are_as_frequent_as_published() -> None:
    x, _ = mad_tasks.in_context_recall(Random(0, np.arange(2000)), 128, 32, True, 16, 0.2)
    # 62 of 63 pairs before the last are noise with probability 0.2; one, at a random place, is not.
    assert (x >= 16).mean() == pytest.approx(0.2 * 62 / 64, abs=0.002)
    np.testing.assert_allclose(np.bincount(x[x < 16], minlength=16)[:8] / (x < 8).sum(), 1 / 8, atol=0.005)
    x, _ = mad_tasks.selective_copying(Random(0, np.arange(2000)), 256, 16, 16)
    places = np.nonzero(x[:, :239] != 14)[1].reshape(-1, 16)
    gaps = np.diff(places, axis=1, prepend=-1) - 1  # each of 223 blanks chooses one of 16 gaps
    np.testing.assert_allclose(gaps.mean(0), 223 / 16, atol=0.4)
    np.testing.assert_allclose(gaps.std(0), (223 / 16 * 15 / 16) ** 0.5, atol=0.3)


# The data module.

SMALL: dict[str, dict[str, Any]] = {
    "compression": {"context_length": 8, "vocab_size": 5},
    "in_context_recall": {"context_length": 6, "vocab_size": 6},
    "fuzzy_recall": {"context_length": 13, "vocab_size": 7, "motif_size": 2},
    "noisy_recall": {"context_length": 6, "vocab_size": 8, "noise_vocab_size": 2, "noise_share": 0.5},
    "selective_copying": {"context_length": 9, "vocab_size": 4, "num_copied": 3},
    "memorization": {"context_length": 8, "vocab_size": 9},
}


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_never_share_a_sample(task: str) -> None:
    """So small that draws without a rule would share many."""
    data = MADData(task, **SMALL[task], num_train=400, num_test=400)
    seen = {
        split: {tuple(row) for batch in data.loader(split) for row in batch["input_ids"].tolist()}
        for split in ("train", "val", "test")
    }
    assert all(seen.values())
    assert not (seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"])


@pytest.mark.parametrize("task", TASKS)
def test_training_repeats_a_fixed_set_and_a_sample_depends_on_its_index_alone(task: str) -> None:
    data = MADData(task, num_train=24, batch_size=8)
    samples = data.samples("train")
    epochs = [np.concatenate(samples.train_batches(8, epoch)) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert (epochs[0] != epochs[1]).any()
    whole = samples[np.arange(24)]
    part = samples[np.array([17, 3])]
    for name in ("input_ids", "targets"):
        assert (part[name] == whole[name][[17, 3]]).all()
    other = MADData(task, num_train=24, seed=1).samples("train")[np.arange(24)]
    assert (other["input_ids"] != whole["input_ids"]).any()


@pytest.mark.parametrize("task", TASKS)
def test_chance_is_what_the_best_constant_gets(task: str) -> None:
    """Compression asks for its mark too, once in 32 positions."""
    data = MADData(task, num_test=300)
    answers = np.concatenate([batch["targets"].numpy().ravel() for batch in data.test_dataloader()])
    counts = np.bincount(answers[answers != IGNORED])
    assert data.chance() - 0.003 < counts.max() / counts.sum() < data.chance() + 0.03
    plateau = {"compression": (1 + 31 / 15) / 32, "memorization": data.chance()}
    assert data.plateau() == pytest.approx(plateau.get(task, most_frequent(data)))
    wanted = {"compression": 1 / 16, "selective_copying": 1 / 14, "memorization": 1 / 127}
    assert data.chance() == wanted.get(task, 1 / 8)


def test_memorization_has_one_map_for_all_samples_and_another_for_each_seed() -> None:
    maps = []
    for seed in (0, 1):
        data = MADData(seed=seed, num_test=150)
        known: dict[int, int] = {}
        for split in ("train", "val", "test"):
            for batch in data.loader(split):
                for x, y in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
                    read_memorization(x, y, 256, known)
            assert len(known) == 127, "every key is learned before it is asked"
        maps.append(known)
    assert maps[0] != maps[1]


def test_ladders_change_one_size() -> None:
    assert MADData("noisy_recall", noise_share=0.8).samples("test")[np.arange(50)]["input_ids"].ge(16).sum() > 4000
    assert MADData("memorization", vocab_size=8192).vocab_size == 8192
    assert MADData("selective_copying", num_copied=96).samples("test")[np.arange(2)]["targets"].ge(0).sum() == 192
    assert len(MADData("compression", num_train=800).train_dataloader()) == 6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"task": "recall"}, "task='recall' must be one of compression, in_context_recall"),
        ({"task": "memorization", "noise_share": 0.4}, r"noise_share=0.4 is no argument of memorization: leave it out"),
        ({"task": "memorization", "context_length": 33}, "context_length=33 must be even"),
        ({"task": "noisy_recall", "noise_share": 1.0}, r"noise_share=1.0 must be at least 0 and below 1"),
        ({"task": "noisy_recall", "noise_vocab_size": 0}, "noise_vocab_size=0 at least 1"),
        ({"task": "noisy_recall", "vocab_size": 17}, "vocab_size=17 at least 2 without the noise"),
        ({"task": "fuzzy_recall", "vocab_size": 6}, "vocab_size=6 at least 7"),
        ({"task": "fuzzy_recall", "context_length": 12}, "context_length=12 must be at least 13"),
        ({"task": "selective_copying", "num_copied": 128}, "num_copied=128 must be from 1 to 127"),
        ({"task": "compression", "context_length": 2}, "context_length=2 must be even, at least 4"),
        ({"task": "memorization", "num_train": 0}, "segment memorization_T32 has 0 samples"),
    ],
)
def test_mistakes_are_said(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MADData(**arguments)


# The study's configurations.

STUDY = Path(__file__).parents[2] / "study" / "configs" / "mad"


@pytest.mark.parametrize("file", sorted(STUDY.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_study_trains_for_the_epochs_and_tokens_that_it_says(file: Path) -> None:
    text = file.read_text()
    settings = yaml.safe_load(text)
    arguments, steps = settings["data"]["init_args"], settings["trainer"]["max_steps"]
    data = MADData(**arguments)
    published = not file.stem.startswith("short_")
    assert file.stem.removeprefix("short_") == arguments["task"]
    epochs = 200 if published else 1.25 if file.stem in ("short_in_context_recall", "short_noisy_recall") else 2.5
    assert steps * data.batch_size == epochs * arguments["num_train"]
    assert f" {epochs} epochs of " in text
    tokens = steps * data.batch_size * data.context_length / 1e6
    assert f"samples, {tokens:.1f} million tokens" in text.replace("shorter ", "")
    assert settings["model"].get("bottleneck", False) == (arguments["task"] == "compression")
    if published:
        task = arguments["task"]
        assert arguments == {"task": task, "batch_size": 128} | PUBLISHED[task][1]


@pytest.mark.parametrize("file", sorted(STUDY.glob("models/*.yaml")), ids=lambda file: file.stem)
def test_every_model_of_the_study_is_made(file: Path) -> None:
    described = yaml.safe_load(file.read_text())["model"]
    task = yaml.safe_load((STUDY / "memorization.yaml").read_text())["model"]
    with torch.device("meta"):
        module = LanguageModule(**{**described, "attention": specs_of(described["attention"])}, **task, vocab_size=256)
    assert all(attention.num_heads == described["num_heads"] for attention in module.model.attentions)


def test_the_study_has_every_architecture() -> None:
    assert ARCHITECTURES.keys() <= {file.stem for file in STUDY.glob("models/*.yaml")}
