"""State tracking: each token changes a state, and the model must say which state it is (train short, ask at length).

The functions are pure, as in tasks.py. A position asks for the state after its token, from position `asked_from` on.

A recurrence whose transitions have eigenvalues in [0, 1] alone cannot track parity at any length (Grazzi et al. 2024,
arXiv 2411.12537); one Householder product a token, with eigenvalues in [-1, 1], tracks parity, and permutation words of
n elements need n - 1 of them, or more layers (Siems et al. 2025, arXiv 2502.10297).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import permutations
from typing import Literal

import numpy as np

from .base import IGNORED, check_integer
from .recall import RecallData, Segment
from .tasks import Random

Samples = tuple[np.ndarray, np.ndarray]


def modular_addition(random: Random, length: int, asked_from: int, modulus: int) -> Samples:
    """Modular addition: the sum of all tokens so far, modulo m. Tokens lie in [0, m). With m = 2 it is parity.

    Example (T = 6, m = 5):

        input    3  4  0  1  4  2
        target   3  2  2  3  2  4
    """
    inputs = random.integers(0, modulus, length)
    return inputs, _ask(inputs.cumsum(1) % modulus, asked_from)


def permutation_words(random: Random, length: int, asked_from: int, elements: int) -> Samples:
    """Permutation words: the product of all permutations so far. Tokens are the n! permutations of n elements.

    Token i is permutation i in lexicographic order. The first token acts first: after p and then q, element e is at
    q(p(e)).

    Example (T = 4, n = 3; 0 = identity, 1 = swap the last two, 2 = swap the first two, 3 = 0 -> 1 -> 2 -> 0,
    4 = 0 -> 2 -> 1 -> 0, 5 = swap first and last):

        input    1  2  3  5
        target   1  3  4  1
    """
    table = composition(elements)
    inputs = random.integers(0, len(table), length)
    states = inputs.copy()
    for t in range(1, length if len(random) else 1):
        states[:, t] = table[states[:, t - 1], inputs[:, t]]
    return inputs, _ask(states, asked_from)


@cache
def composition(elements: int) -> np.ndarray:
    """(n!, n!): the number of the permutation that applies the one of the row and then the one of the column."""
    all_of = list(permutations(range(elements)))
    number = {permutation: i for i, permutation in enumerate(all_of)}
    return np.array([[number[tuple(q[e] for e in p)] for q in all_of] for p in all_of])


def parity_recall(random: Random, length: int, asked_from: int, pairs: int, symbols: int) -> Samples:
    """Parity-conditioned retrieval: each key has two values, and the parity of the bits says which is asked for.

    N triples of a key and its two values; then bits, each followed by one of the keys, whose first value is asked for
    if the bits so far have an even sum, else its second. Keys are distinct and lie in [2, 2 + S), values in
    [2 + S, 2 + 2 S), the two of a key distinct. A model that recalls and tracks nothing is right in half of the cases.

    Example (T = 12, N = 2, S = 4; keys 2 to 5, values 6 to 9):

        input    3  8  6  5  7  9  1  5  0  3  1  3
        target   .  .  .  .  .  .  .  9  .  6  .  8
    """
    start = 3 * pairs
    if not (1 <= pairs <= symbols and symbols >= 2 and length >= start + 2):
        raise ValueError(
            f"num_pairs={pairs} must be from 1 to num_symbols={symbols}, num_symbols at least 2, and a length of "
            f"{length} at least {start + 2}"
        )
    questions = (length - start) // 2
    keys = random.distinct(2, 2 + symbols, pairs)
    values = random.integers(0, symbols, 2 * pairs).reshape(-1, pairs, 2)
    values[..., 1] = (values[..., 0] + random.integers(1, symbols, pairs)) % symbols
    values += 2 + symbols
    bits = random.integers(0, 2, length)
    asked = random.integers(0, pairs, questions)
    inputs = bits
    inputs[:, :start] = np.concatenate([keys[..., None], values], 2).reshape(-1, start)
    parity = bits[:, start::2].cumsum(1)[:, :questions] % 2
    places = slice(start + 1, start + 2 * questions, 2)
    inputs[:, places] = np.take_along_axis(keys, asked, 1)
    targets = np.full_like(inputs, IGNORED)
    targets[:, places] = np.take_along_axis(values.reshape(-1, 2 * pairs), 2 * asked + parity, 1)
    return inputs, _ask(targets, asked_from)


def _ask(targets: np.ndarray, asked_from: int) -> np.ndarray:
    targets[:, :asked_from] = IGNORED
    return targets


class StateTrackingData(RecallData):
    """A state to track: trained on short samples of several lengths, tested on longer ones.

    With `ask="every"`, training asks at every position, and a test sample in its second half: where test lengths double
    from the longest training length on, each slice asks at positions that no shorter one has. With `ask="last"`, as
    published for parity, each sample asks at its last position alone.

    Args:
        task: parity, modular_addition, s3, s5 (permutation words of 3 or 5 elements) or parity_recall
        train_lengths: the shortest and the longest training sample; all lengths between get equally many samples
        test_lengths: of the validation and test samples
        ask: at `every` position or at the `last` one
        modulus: of modular_addition
        num_pairs, num_symbols: of parity_recall: keys in a sample; different keys, and as many different values
        num_train: samples of all lengths together, rounded down to equally many for each length
        num_test: samples for each of the test lengths
    """

    def __init__(
        self,
        task: Literal["parity", "modular_addition", "s3", "s5", "parity_recall"] = "parity",
        train_lengths: tuple[int, int] = (3, 40),
        test_lengths: Sequence[int] = (40, 80, 160, 320),
        ask: Literal["every", "last"] = "every",
        modulus: int = 5,
        num_pairs: int = 4,
        num_symbols: int = 8,
        num_train: int = 100_000,
        num_test: int = 500,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        tasks: dict[str, tuple[int, Callable[..., Samples]]] = {
            "parity": (2, partial(modular_addition, modulus=2)),
            "modular_addition": (modulus, partial(modular_addition, modulus=modulus)),
            "s3": (6, partial(permutation_words, elements=3)),
            "s5": (120, partial(permutation_words, elements=5)),
            "parity_recall": (2 + 2 * num_symbols, partial(parity_recall, pairs=num_pairs, symbols=num_symbols)),
        }
        if task not in tasks or ask not in ("every", "last"):
            raise ValueError(f"task={task!r} must be one of {', '.join(tasks)}, and ask={ask!r} every or last")
        check_integer("modulus", modulus, 2)
        shortest, longest = (check_integer("train_lengths", length, 1) for length in train_lengths)
        if shortest > longest:
            raise ValueError(f"train_lengths={list(train_lengths)} must be the shortest and the longest")
        super().__init__(longest, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        vocab_size, function = tasks[task]
        each = num_train // (longest - shortest + 1)

        def segment(length: int, size: int, test: bool) -> Segment:
            check_integer("test_lengths", length, 1)
            asked_from = length - 1 if ask == "last" else length // 2 if test else 0
            return Segment(f"T{length}", partial(function, length=length, asked_from=asked_from), size, length)

        train = [segment(length, each, False) for length in range(shortest, longest + 1)]
        self._set_segments(vocab_size, train, [segment(length, num_test, True) for length in test_lengths])

    def plateau(self) -> float:
        """Of parity_recall, what recall gets without tracking."""
        return 1 / 2 if self.hparams["task"] == "parity_recall" else self.chance()
