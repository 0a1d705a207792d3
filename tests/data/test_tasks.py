"""The recall tasks as functions, line by line of their specifications."""

from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.data.tasks import Random, _split_of, draw, induction, mqar, needle, selective_copy

SEEDS = st.integers(0, 2**32)


@st.composite
def mqar_settings(draw_value: st.DrawFn) -> dict[str, Any]:
    pairs = draw_value(st.integers(1, 12))
    length = 2 * draw_value(st.integers(2 * pairs, 2 * pairs + 40))
    vocab_size = draw_value(st.integers(length + 1, length + 500))
    return {
        "length": length,
        "pairs": pairs,
        "vocab_size": vocab_size,
        "random_filler": draw_value(st.booleans()),
        "power": draw_value(st.sampled_from([0.01, 0.5, 1.0])),
    }


class TestMQAR:
    @given(setting=mqar_settings(), seed=SEEDS)
    def test_every_line_of_the_specification(self, setting: dict[str, Any], seed: int) -> None:
        length, pairs, vocab_size = setting["length"], setting["pairs"], setting["vocab_size"]
        inputs, targets = mqar(Random(seed, np.arange(8)), **setting)
        assert inputs.shape == targets.shape == (8, length)
        assert inputs.dtype == targets.dtype == np.int64
        assert (inputs >= 0).all()
        assert (inputs < vocab_size).all()
        for x, y in zip(inputs, targets, strict=True):
            # The context is k1 v1 ... kN vN, keys and values each without repetition, from their halves.
            keys, values = x[0 : 2 * pairs : 2], x[1 : 2 * pairs : 2]
            assert len(set(keys)) == len(set(values)) == pairs
            assert (keys >= 1).all()
            assert (keys < vocab_size // 2).all()
            assert (vocab_size // 2 <= values).all()
            # Behind it, in slots of two positions, each key is asked once, and its value is the target right there.
            asked = np.flatnonzero(y != -100)
            assert len(asked) == pairs
            assert (asked >= 2 * pairs).all()
            assert (asked % 2 == 0).all()
            assert sorted(x[asked]) == sorted(keys)
            assert dict(zip(keys, values, strict=True)) == dict(zip(x[asked], y[asked], strict=True))
            # Everything else is 0, or random tokens in the harder setting.
            if not setting["random_filler"]:
                assert not np.delete(x[2 * pairs :], asked - 2 * pairs).any()

    def test_a_window_still_sees_what_published_windows_recall(self) -> None:
        """Mean over the segments of study/configs/mqar_state.yaml; the figures are read off Zoology's plot of accuracy
        against state size (github.com/HazyResearch/zoology), where the windows know what they see and nothing else."""
        published = {16: 0.145, 32: 0.31, 64: 0.515, 128: 0.656, 256: 0.797, 512: 0.936}
        seen: dict[int, list[float]] = {window: [] for window in published}
        for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)):
            inputs, targets = mqar(Random(2, np.arange(100)), length, pairs, 8192)
            samples, asked = np.nonzero(targets != -100)
            told = (inputs[samples, 1 : 2 * pairs : 2] == targets[samples, asked][:, None]).argmax(1) * 2 + 1
            for window, shares in seen.items():
                shares.append(float((asked - told < window).mean()))
        for window, shares in seen.items():
            assert np.mean(shares) == pytest.approx(published[window], abs=0.01)

    def test_slots_follow_their_weights(self) -> None:
        power, slots, samples = 0.3, 12, 40_000
        _, targets = mqar(Random(1, np.arange(samples)), 2 * slots + 2, 1, 100, power=power)
        seen = (targets[:, 2::2] != -100).mean(0)
        weights = np.arange(1, slots + 1) ** (power - 1)
        np.testing.assert_allclose(seen, weights / weights.sum(), atol=4 * 0.5 / samples**0.5)

    def test_second_slot_is_drawn_from_what_is_left(self) -> None:
        """Successive draws: P(first a, then b) = p(a) p(b) / (1 - p(a)); checked for which pairs of slots are taken."""
        weights, samples = np.array([1.0, 0.5, 0.25]), 40_000
        order = Random(2, np.arange(samples)).weighted(weights, 2)
        p = weights / weights.sum()
        for a in range(3):
            for b in {0, 1, 2} - {a}:
                expected = p[a] * p[b] / (1 - p[a])
                assert abs(((order == [a, b]).all(1)).mean() - expected) < 4 * 0.5 / samples**0.5

    def test_keys_values_and_filler_are_uniform(self) -> None:
        inputs, _ = mqar(Random(3, np.arange(20_000)), 8, 2, 20, random_filler=True)
        for position, low, high in ((0, 1, 10), (2, 1, 10), (1, 10, 20), (3, 10, 20)):
            counts = np.bincount(inputs[:, position], minlength=20)
            assert counts[:low].sum() + counts[high:].sum() == 0
            np.testing.assert_allclose(counts[low:high] / 20_000, 1 / (high - low), atol=0.01)
        np.testing.assert_allclose(np.bincount(inputs[:, 7], minlength=20) / 20_000, 1 / 20, atol=0.01)

    @pytest.mark.parametrize(
        ("length", "pairs", "vocab_size", "match"),
        [
            (65, 4, 8192, r"segment \(T=65, N=4\): T must be even"),
            (64, 17, 8192, r"\(T=64, N=17\).*4 N at most T"),
            (64, 0, 8192, "N at least 1"),
            (64, 4, 64, "vocab_size=64 must be above the context length T=64"),
        ],
    )
    def test_bad_settings(self, length: int, pairs: int, vocab_size: int, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            mqar(Random(0, np.arange(1)), length, pairs, vocab_size)


@given(seed=SEEDS, length=st.integers(3, 60), vocab_size=st.integers(3, 40))
def test_induction(seed: int, length: int, vocab_size: int) -> None:
    inputs, targets = induction(Random(seed, np.arange(8)), length, vocab_size)
    assert (targets[:, :-1] == -100).all()
    assert (inputs >= 0).all()
    for x, y in zip(inputs, targets, strict=True):
        first, last = np.flatnonzero(x == vocab_size - 1)
        assert last == length - 1
        assert first < length - 2
        assert y[-1] == x[first + 1]


@given(seed=SEEDS, copied=st.integers(1, 20), more=st.integers(0, 40), vocab_size=st.integers(3, 40))
def test_selective_copy(seed: int, copied: int, more: int, vocab_size: int) -> None:
    inputs, targets = selective_copy(Random(seed, np.arange(8)), 2 * copied + more, copied, vocab_size)
    assert (inputs[:, -copied:] == 1).all()
    assert (targets[:, :-copied] == -100).all()
    for x, y in zip(inputs, targets, strict=True):
        context = x[:-copied]
        np.testing.assert_array_equal(context[context != 0], y[-copied:])
        assert (y[-copied:] >= 2).all()
        assert (y[-copied:] < vocab_size).all()


@given(
    seed=SEEDS,
    more=st.integers(0, 60),
    depth=st.none() | st.floats(0, 1),
    needles=st.integers(1, 4),
    value_length=st.integers(1, 3),
)
def test_needle(seed: int, more: int, depth: float | None, needles: int, value_length: int) -> None:
    """Read token by token: haystack tokens count up, so that a lost, moved or repeated one is seen."""
    text, mark = np.arange(100), 100
    questions = needles if depth is None else 1
    length = more + (needles + questions) * (2 + value_length) - 1
    task = partial(needle, text=lambda: text, vocab_size=mark + 1, needles=needles, value_length=value_length)
    for x, y in zip(
        *(one.tolist() for one in task(Random(seed, np.arange(8)), length=length, depth=depth)), strict=True
    ):
        values, before, haystack, asked, t = {}, {}, [], 0, 0
        while t < length:
            if x[t] != mark:
                haystack.append(x[t])
                assert y[t] == -100
                t += 1
            elif len(values) < needles:
                assert x[t + 1] not in values
                values[x[t + 1]], before[x[t + 1]] = x[t + 2 : t + 2 + value_length], len(haystack)
                assert y[t : t + 2 + value_length] == [-100] * (2 + value_length)
                t += 2 + value_length
            else:
                assert len(haystack) == more, "questions follow the whole haystack"
                assert y[t] == -100
                assert y[t + 1 : t + 1 + value_length] == values[x[t + 1]]
                assert x[t + 2 : t + 1 + value_length] == values[x[t + 1]][:-1]
                assert depth is None or before[x[t + 1]] == round(depth * more)
                asked += 1
                t += 2 + value_length
                assert t > length or y[t - 1] == -100
        assert asked == questions
        assert haystack == list(range(haystack[0] if haystack else 0, (haystack[0] if haystack else 0) + more))


def test_impossible_needles_are_refused() -> None:
    task = partial(needle, Random(0, np.arange(1)), lambda: np.arange(100), vocab_size=101)
    for arguments, words in (
        ({"length": 106, "depth": None}, "context_length=106 must be from 5 to 105"),
        ({"length": 20, "depth": 1.5}, r"depth=1\.5"),
        ({"length": 20, "depth": None, "needles": 0}, "num_needles=0 must be from 1 to 100"),
        ({"length": 99, "depth": 0, "value_length": 0}, "value_length=0 at least 1"),
        ({"length": 999, "depth": 0, "needles": 101}, "num_needles=101 must be from 1 to 100"),
        ({"length": 22, "depth": None, "needles": 4}, "context_length=22 .* num_needles=4 and 4 questions take 23"),
    ):
        with pytest.raises(ValueError, match=words):
            task(**arguments)


TASKS = {
    "mqar": partial(mqar, length=8, pairs=1, vocab_size=9),  # 3 keys, 5 values, 3 slots: 45 samples in all
    "induction": partial(induction, length=6, vocab_size=4),
    "selective_copy": partial(selective_copy, length=8, copied=2, vocab_size=4),
    "needle": partial(needle, text=lambda: np.arange(6), length=9, vocab_size=7, depth=None),
}


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_never_share_a_sample(task: str) -> None:
    """Of so few possible samples, thousands of draws see every one: still each belongs to one split only."""
    seen = {}
    for split in ("train", "val", "test"):
        inputs = [draw(TASKS[task], seed, split, 0, np.arange(1000))[0] for seed in range(3)]
        seen[split] = set(map(bytes, np.concatenate(inputs)))
    assert all(seen.values())
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


@given(
    seed=SEEDS,
    split=st.sampled_from(["train", "val", "test"]),
    order=st.permutations(range(12)),
    cut=st.integers(0, 12),
)
def test_a_sample_depends_on_seed_split_and_index_alone(seed: int, split: str, order: list[int], cut: int) -> None:
    task = partial(mqar, length=16, pairs=3, vocab_size=64, random_filler=True)
    inputs, targets = draw(task, seed, split, 0, np.arange(12))
    for part in (order[:cut], order[cut:]):
        if part:
            x, y = draw(task, seed, split, 0, np.array(part))
            np.testing.assert_array_equal(x, inputs[part])
            np.testing.assert_array_equal(y, targets[part])
    for other in (draw(task, seed + 1, split, 0, np.arange(12)), draw(task, seed, split, 1, np.arange(12))):
        assert not (other[0] == inputs).all(1).any()


def test_a_task_too_small_to_divide_says_so() -> None:
    def one(random: Random) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(random), 1), np.int64), np.zeros((len(random), 1), np.int64)

    # Its only sample lies on one side, so at least one of two others can have none.
    sides = set()
    for split in ("train", "val", "test"):
        with suppress(ValueError):
            draw(one, 0, split, 0, np.arange(1))
            sides.add(split)
    assert len(sides) == 1
    empty = ({"val", "test"} - sides).pop()
    with pytest.raises(ValueError, match="too few distinct samples to separate train, val, test: increase vocab_size"):
        draw(one, 0, empty, 0, np.arange(1))


def test_random_numbers_are_uniform_and_unrelated() -> None:
    numbers = Random(5, np.arange(1000)).uniform(100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, 10, (0, 1))[0] / 1e5, 0.1, atol=0.005)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02
    rows = Random(6, np.arange(5000)).distinct(3, 8, 5)
    assert (np.sort(rows, 1) == np.arange(3, 8)).all()
    np.testing.assert_allclose(np.bincount(rows[:, 0] - 3) / 5000, 0.2, atol=0.03)


def drawn(task: Any) -> tuple[np.ndarray, np.ndarray]:
    """The example in a task's docstring: input_ids and targets (T,)."""
    rows = {line.split()[0]: line.split()[1:] for line in task.__doc__.splitlines() if line.split()}
    inputs, targets = rows["input"], rows["target"]
    return np.array(inputs, int), np.array([-100 if target == "." else int(target) for target in targets])


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (mqar, {"length": 12, "pairs": 2, "vocab_size": 20}),
        (induction, {"length": 8, "vocab_size": 10}),
        (selective_copy, {"length": 10, "copied": 3, "vocab_size": 10}),
        (needle, {"text": lambda: np.arange(99), "length": 12, "vocab_size": 100, "depth": 0.5}),
    ],
)
def test_the_example_of_a_docstring_is_a_sample_of_the_task(task: Any, options: dict[str, Any]) -> None:
    """Given the random tokens and positions of the example, the task draws the example."""

    class Scripted(Random):
        """Draws what the example shows."""

        def __init__(self, *draws: list[int]) -> None:
            super().__init__(np.arange(1))
            self.draws = [np.array([numbers]) for numbers in draws]

        def integers(self, low: int, high: int, count: int) -> np.ndarray:
            numbers = self.draws.pop(0)
            assert numbers.shape == (1, count)
            assert ((low <= numbers) & (numbers < high)).all()
            return numbers

        distinct = integers

        def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
            return self.integers(0, len(weights), count)

    draws: dict[Any, list[list[int]]] = {
        mqar: [[2, 8], [13, 17], [2, 0]],  # keys, values, the slot of each question
        induction: [[2, 5, 0, 4, 0, 7, 7, 0], [2]],  # tokens, the first trigger's position
        selective_copy: [[6, 3, 8], [5, 1, 4]],  # tokens, positions in any order
        needle: [[20], [7], [3], [0]],  # the start of the haystack, key, value, a place that the depth overrides
    }
    inputs, targets = task(Scripted(*draws[task]), **options)
    example = drawn(task)
    np.testing.assert_array_equal(inputs[0], example[0])
    np.testing.assert_array_equal(targets[0], example[1])


def test_every_place_is_drawn() -> None:
    """Of 4,000 samples each of some 60 places gets about 66, and the chance that one gets none is 1e-27."""
    random = Random(7, np.arange(4000))
    inputs, _ = induction(random, 64, 10)
    assert set((inputs[:, :-1] == 9).argmax(1)) == set(range(62)), "the last answer is the token before the end"
    inputs, targets = needle(random, lambda: np.arange(100), 45, 101, None)
    assert set(inputs[:, -1]) == set(targets[:, -1]) == set(range(100)), "key and value: any token but the mark"
    place = (inputs == 100).argmax(1)
    assert set(place) == set(range(41))
    assert set(np.where(place > 0, inputs[:, 0], inputs[:, 3])) == set(range(61)), "the start of the haystack"
    inputs, _ = selective_copy(random, 40, 3, 5)
    assert (inputs[:, :37] > 0).any(0).all()


def test_six_of_eight_samples_are_for_training():
    tokens = np.random.default_rng(0).integers(0, 100, (40_000, 12))
    shares = np.bincount(_split_of(tokens)) / len(tokens)
    assert shares == pytest.approx([0.75, 0.125, 0.125], abs=0.01)  # three standard deviations: 0.0065
