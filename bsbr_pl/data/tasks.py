"""The recall tasks as pure functions: each sample depends on (seed, split, index) and on nothing else.

A task takes a `Random` for B samples and returns `input_ids` and `targets`, both (B, T) int64. A target stands at the
position whose logits must predict it (there is no shift); all other targets are -100.

Random numbers come from a counter: number j of sample i is a hash of (seed, split, i, j). So a whole batch is computed
at once, and a sample does not depend on the other samples of its batch. Training, validation and test never share a
sample: a hash of a sample's tokens says which split it belongs to, and a sample of another split is drawn again.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .base import IGNORED, SPLITS

Task = Callable[["Random"], tuple[np.ndarray, np.ndarray]]

# A hash of its tokens puts each sample into one of eight equal parts: six are for training, one for each other split.
_SPLIT_OF_EIGHTH = np.array([0, 0, 0, 0, 0, 0, 1, 2])
_MAX_TRIES = 2000


class Random:
    """Random numbers for B samples at once; those of a sample depend on its own key alone.

    Args:
        key: integers or (B,) arrays of integers, at least one of them an array
    """

    def __init__(self, *key: int | np.ndarray) -> None:
        state = np.zeros(1, np.uint64)
        for part in key:
            state = _hash(state ^ _hash(np.atleast_1d(part).astype(np.uint64)))
        self.state = state
        self.used = 0

    def __len__(self) -> int:
        return len(self.state)

    def uniform(self, count: int) -> np.ndarray:
        """(B, count) numbers in [0, 1)."""
        counter = np.arange(self.used, self.used + count, dtype=np.uint64)
        self.used += count
        return (_hash(self.state[:, None] ^ _hash(counter)) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        """(B, count) integers in [low, high)."""
        return low + (self.uniform(count) * (high - low)).astype(np.int64)

    def distinct(self, low: int, high: int, count: int) -> np.ndarray:
        """(B, count) integers in [low, high), no two of a row equal, in random order (Floyd's algorithm)."""
        if not len(self):
            return np.empty((0, count), np.int64)
        below = np.arange(high - low - count, high - low)
        proposed = (self.uniform(count) * (below + 1)).astype(np.int64)
        chosen = np.full((len(self), count), -1)
        for j in range(count):
            taken = (chosen[:, :j] == proposed[:, j : j + 1]).any(1)
            chosen[:, j] = np.where(taken, below[j], proposed[:, j])
        order = self.uniform(count).argsort(1)
        return low + np.take_along_axis(chosen, order, 1)

    def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """(B, count) distinct indices, drawn one after another with probability proportional to the weights left.

        The indices are sorted by the arrival times of independent exponential clocks whose rates are the weights.
        """
        arrival = -np.log1p(-self.uniform(len(weights))) / weights
        return arrival.argsort(1)[:, :count]


def draw(task: Task, seed: int, split: str, stream: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples `index` (B,) of a split: input_ids, targets (B, T). Each segment of a split has its own `stream`.

    Raises:
        ValueError: the task has too few distinct samples to divide between the splits.
    """
    wanted = SPLITS.index(split)
    inputs, targets = task(Random(seed, wanted, stream, index, 0))
    for attempt in range(1, _MAX_TRIES):
        wrong = np.flatnonzero(_split_of(inputs) != wanted)
        if not len(wrong):
            return inputs, targets
        inputs[wrong], targets[wrong] = task(Random(seed, wanted, stream, index[wrong], attempt))
    raise ValueError(f"the task has too few distinct samples to separate {', '.join(SPLITS)}: increase vocab_size")


def mqar(
    random: Random, length: int, pairs: int, vocab_size: int, random_filler: bool = False, power: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Multi-query associative recall: N key-value pairs, then each key once more: predict its value.

    Keys lie in [1, V/2), values in [V/2, V), each distinct in a sample. Of the (T - 2N) / 2 slots of two positions
    after the pairs, slot g = 1, 2, ... holds a question with probability proportional to g^(power - 1). All other
    positions hold 0, or random tokens if `random_filler`. Arora et al. 2023, arXiv 2312.04927, appendix E.

    Example (T = 12, N = 2, V = 20): 2 -> 13 and 8 -> 17; then 8 is asked at position 4, and 2 at position 8.

        input    2 13  8 17  8  0  0  0  2  0  0  0
        target   .  .  .  . 17  .  .  . 13  .  .  .

    Raises:
        ValueError: an odd length, fewer than four positions for each pair, or too small a vocabulary.
    """
    if length % 2 or pairs < 1 or 4 * pairs > length:
        raise ValueError(f"segment (T={length}, N={pairs}): T must be even, N at least 1 and 4 N at most T")
    if vocab_size <= length:
        raise ValueError(f"vocab_size={vocab_size} must be above the context length T={length}")
    samples = len(random)
    keys = random.distinct(1, vocab_size // 2, pairs)
    values = random.distinct(vocab_size // 2, vocab_size, pairs)
    slots = random.weighted(np.arange(1, (length - 2 * pairs) // 2 + 1) ** (power - 1), pairs)
    questions = 2 * pairs + 2 * slots
    filler = random.integers(0, vocab_size, length) if random_filler else 0
    inputs = np.full((samples, length), filler)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(inputs, questions, keys, 1)
    targets = np.full((samples, length), IGNORED)
    np.put_along_axis(targets, questions, values, 1)
    return inputs, targets


def induction(random: Random, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Induction heads: predict the token after the first trigger.

    The trigger V - 1 stands at a random position and again at the end. All other positions hold random tokens of
    [0, V - 1); the token after the first trigger is the target of the last position. Dao et al. 2022, arXiv
    2212.14052, section 3.

    Example (T = 8, V = 10): the trigger is 9, and 4 followed it.

        input    2  5  9  4  0  7  7  9
        target   .  .  .  .  .  .  .  4
    """
    if length < 3 or vocab_size < 3:
        raise ValueError(f"induction needs context_length={length} and vocab_size={vocab_size} to be at least 3")
    samples = np.arange(len(random))
    inputs = random.integers(0, vocab_size - 1, length)
    place = random.integers(0, length - 2, 1)[:, 0]
    inputs[samples, place] = inputs[:, -1] = vocab_size - 1
    targets = np.full_like(inputs, IGNORED)
    targets[:, -1] = inputs[samples, place + 1]
    return inputs, targets


def selective_copy(random: Random, length: int, copied: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Selective copying: repeat the tokens that are scattered among blanks, in their order.

    The first T - M positions hold M random tokens of [2, V) at random positions among blanks (0). The last M positions
    hold the mark 1, and the tokens are their targets. Gu & Dao 2023, arXiv 2312.00752, section 4.1.1.

    Example (T = 10, M = 3, V = 10):

        input    0  6  0  0  3  8  0  1  1  1
        target   .  .  .  .  .  .  .  6  3  8
    """
    if not 1 <= copied <= length // 2 or vocab_size < 3:
        raise ValueError(
            f"num_copied={copied} must be from 1 to half of context_length={length}, and vocab_size={vocab_size} "
            "at least 3"
        )
    tokens = random.integers(2, vocab_size, copied)
    places = np.sort(random.distinct(0, length - copied, copied), 1)
    inputs = np.zeros((len(random), length), np.int64)
    np.put_along_axis(inputs, places, tokens, 1)
    inputs[:, -copied:] = 1
    targets = np.full_like(inputs, IGNORED)
    targets[:, -copied:] = tokens
    return inputs, targets


def needle(
    random: Random,
    text: Callable[[], np.ndarray],
    length: int,
    vocab_size: int,
    depth: float | None,
    needles: int = 1,
    value_length: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Needles in a haystack: `mark key value` N times within real text, then questions `mark key`: predict the value.

    The mark is V - 1. Keys are distinct; a value is a word of L random tokens. Without a depth all N needles stand at
    random positions and each is asked. With a depth only one is asked: it stands at this depth, the others anywhere.
    The last token of the last answer is not an input, so the haystack has T + 1 - (L + 2)(N + questions) tokens.

    Example (T = 12, V = 100, N = L = 1, depth 0.5): the text is 20 21 22 ..., the mark 99, the key 7, the value 3.

        input   20 21 22 23 99  7  3 24 25 26 99  7
        target   .  .  .  .  .  .  .  .  .  .  .  3

    Args:
        text: returns the stream of tokens that haystacks are cut from, all below vocab_size - 1
        vocab_size: ids of the text, and the mark
        depth: where the asked needle stands, 0 at the start of the haystack, 1 at its end; None for random positions
        needles: number N of needles
        value_length: tokens L of a value

    Raises:
        ValueError: no needle, more needles than keys, no room, a text shorter than a haystack, a depth outside [0, 1].
    """
    if not 1 <= needles < vocab_size or value_length < 1:
        raise ValueError(
            f"num_needles={needles} must be from 1 to {vocab_size - 1}, the number of keys, and "
            f"value_length={value_length} at least 1"
        )
    questions, word = needles if depth is None else 1, value_length + 2
    taken = word * (needles + questions) - 1
    tokens, hay = text(), length - taken
    if hay < 0:
        raise ValueError(
            f"context_length={length} is too small: num_needles={needles} and {questions} questions take {taken} tokens"
        )
    if hay > len(tokens):
        most = len(tokens) + taken
        raise ValueError(f"context_length={length} must be from {taken} to {most}, the length of the text + {taken}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be from 0 (start of the haystack) to 1 (its end)")
    samples = len(random)
    start = random.integers(0, len(tokens) - hay + 1, 1)
    keys = random.distinct(0, vocab_size - 1, needles)
    values = random.integers(0, vocab_size - 1, needles * value_length).reshape(samples, needles, value_length)
    words = np.concatenate((np.full((samples, needles, 1), vocab_size - 1), keys[..., None], values), 2)
    places = random.integers(0, hay + 1, needles)  # tokens of the haystack before each needle
    if depth is not None:
        places[:, 0] = round(depth * hay)
    places += word * places.argsort(1, kind="stable").argsort(1)  # and the needles before it
    positions = (places[..., None] + np.arange(word)).reshape(samples, needles * word)
    is_hay = np.ones((samples, hay + word * needles), bool)
    np.put_along_axis(is_hay, positions, False, 1)
    context = tokens[start + is_hay.cumsum(1) - 1]
    np.put_along_axis(context, positions, words.reshape(samples, needles * word), 1)
    stream = np.concatenate((context, words[:, :questions].reshape(samples, questions * word)), 1)  # (B, T + 1)
    inputs, targets = stream[:, :-1].astype(np.int64), stream[:, 1:].astype(np.int64)
    asked = np.arange(1, length + 1) - context.shape[1]  # from the first question on, of the token to predict
    targets[:, (asked < 0) | (asked % word < 2)] = IGNORED
    return inputs, targets


def associative_recall_hits(input_ids: Tensor, targets: Tensor) -> Tensor:
    """Recall on real text: the distance to the latest earlier occurrence of each bigram (input_ids[t], targets[t]).

    A token is a hit if its bigram with the token before it has already occurred in the context, so that the token can
    be copied from there (Arora et al. 2023). Ignored targets (-100) are no hits and make none.

    Args:
        input_ids, targets: (B, T) int64, targets[t] being the token after input_ids[t]

    Returns:
        distance (B, T) int64: t minus the position of the latest earlier occurrence in the same row, or 0
    """
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    bigram = input_ids * (targets.max().clamp(min=0) + 1) + targets
    # Each ignored position gets a code of its own, below all bigrams.
    bigram = torch.where(targets == IGNORED, -1 - position, bigram)
    # Equal bigrams become neighbours, in the order of their positions.
    ordered, order = bigram.sort(dim=1, stable=True)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    distance = torch.zeros_like(input_ids)
    return distance.scatter(1, order[:, 1:], (order[:, 1:] - order[:, :-1]) * repeated)


def _split_of(inputs: np.ndarray) -> np.ndarray:
    """(B,) the number of the split that each row of tokens belongs to."""
    place = np.arange(inputs.shape[1], dtype=np.uint64) << np.uint64(32)
    code = _hash(_hash(inputs.astype(np.uint64) ^ place).sum(1, dtype=np.uint64))
    return _SPLIT_OF_EIGHTH[(code >> np.uint64(61)).astype(np.int64)]


def _hash(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele et al. 2014) on each element of an array of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
