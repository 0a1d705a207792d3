"""The MAD suite as pure functions: six small tasks that separate architectures (Poli et al. 2024, arXiv 2403.17844).

As in tasks.py, each task takes a `Random` for B samples and returns `input_ids` and `targets`, both (B, T). The
definitions follow the public code, github.com/athms/mad-lab, where it and the paper differ. What differs from the
public code changes no target of a causal model, or few samples:

- A recall sample keeps its last value as an input without a target, so that it has the published length. The public
  code cuts this token off.
- A noisy sample always has a pair, and a fuzzy sample always shows the pair that its end asks for. In the public code
  a few samples do not.
- Training, validation and test never share a sample.
"""

import numpy as np

from .base import IGNORED
from .tasks import Random

Samples = tuple[np.ndarray, np.ndarray]


def compression(random: Random, length: int, vocab_size: int) -> Samples:
    """Compression: repeat a text from what its last token holds.

    T / 2 - 1 random tokens of [0, V - 1), the mark V - 1, and blanks (0). From the mark on, each position asks for one
    of the tokens, in their order and then for the mark; the last position asks nothing. A model with a bottleneck
    (`LanguageModel(bottleneck=True)`) decodes these positions from the mark's activation alone. Without it, attention
    would only look back. In the public code a sample is the first half, and each of its positions asks for its own
    token, of a model that is not causal; T there is T / 2 here.

    Example (T = 10, V = 8): the mark is 7.

        input    3  1  4  1  7  0  0  0  0  0
        target   .  .  .  .  3  1  4  1  7  .
    """
    half = length // 2
    _check(length % 2 == 0 and half >= 2 and vocab_size >= 3, length, vocab_size, "even, at least 4", "at least 3")
    text = random.integers(0, vocab_size - 1, half)
    text[:, -1] = vocab_size - 1
    blank = np.zeros_like(text)
    targets = np.full((len(text), length), IGNORED)
    targets[:, half - 1 : -1] = text
    return np.concatenate([text, blank], 1), targets


def in_context_recall(
    random: Random,
    length: int,
    vocab_size: int,
    training: bool,
    noise_vocab_size: int = 0,
    noise_share: float = 0.0,
) -> Samples:
    """In-context recall: keys and their values, and each key that comes again asks for its value.

    T / 2 pairs of a random key and its value, which is random for each sample. Without noise, keys are the lower half
    of the vocabulary and values the upper half. The last key is one of those before, each equally likely. Training
    asks for every next token; validation and testing ask where a key is not new.

    Noisy in-context recall: the last `noise_vocab_size` ids are noise, and each pair but the last becomes two noise
    tokens with probability `noise_share`.

    Example (T = 10, V = 8, without noise; keys 0 to 3, values 4 to 7):

        input    2  5  0  7  2  5  1  5  0  7
        target   .  .  .  .  5  .  .  .  7  .
    """
    pairs, symbols = length // 2, vocab_size - noise_vocab_size
    wanted = "even, at least 4", "at least 2 without the noise"
    _check(length % 2 == 0 and length >= 4 and symbols >= 2, length, vocab_size, *wanted)
    if not (0 <= noise_share < 1 and noise_vocab_size >= 0) or (noise_share and not noise_vocab_size):
        raise ValueError(
            f"noise_share={noise_share} must be at least 0 and below 1, and noise_vocab_size={noise_vocab_size} at "
            "least 1 where there is noise"
        )
    half = symbols // 2
    keys = random.integers(0, half, pairs)
    values_of = random.integers(half, symbols, half)
    noise = random.uniform(pairs) < noise_share
    noise[:, -1] = False
    np.put_along_axis(noise, random.integers(0, pairs - 1, 1), False, 1)
    keys = np.where(noise, -1 - np.arange(pairs), keys)  # each noise is a key of its own, which never comes again
    is_choice = ~noise[:, :-1] & ~_came_before(keys[:, :-1])
    last = (random.uniform(pairs - 1) * is_choice).argmax(1)[:, None]
    keys[:, -1:] = np.take_along_axis(keys, last, 1)
    values = np.take_along_axis(values_of, np.maximum(keys, 0), 1)
    inputs = np.stack([keys, values], 2).reshape(-1, length)
    inputs = np.where(noise.repeat(2, 1), random.integers(symbols, vocab_size, length), inputs)
    if training:
        return inputs, _next_tokens(inputs)
    targets = np.full_like(inputs, IGNORED)
    targets[:, ::2] = np.where(_came_before(keys), values, IGNORED)
    return inputs, targets


def fuzzy_recall(random: Random, length: int, vocab_size: int, training: bool, motif_size: int) -> Samples:
    """Fuzzy in-context recall: keys and values are motifs of 1 to M tokens, no two tokens of a motif equal.

    Of the ids below V - 1, keys use the lower half and values the rest. Sizes and motifs are random, except that keys
    have M tokens in validation and testing; a key has the same value wherever it comes. Pairs follow each other until
    no more than 2 M tokens and the last pair fit. The last pair repeats one, which is put at a random place. V - 1
    fills the start. Training asks for every next token, validation and testing for all tokens of each value whose key
    is not new.

    Example (T = 17, V = 12, M = 2; keys 0 to 4, values 5 to 10, filling 11):

        input   11 11 11 11  2  0  7  1  3  5  9  2  0  7  1  3  5
        target   .  .  .  .  .  .  .  .  .  .  .  .  7  .  .  5  9
    """
    symbols, longest = vocab_size - 1, 2 * motif_size
    half = symbols // 2
    wanted = f"at least {2 * longest + 1}", f"at least {longest + 1}"
    _check(motif_size >= 1 and length > 2 * longest and half >= motif_size, length, vocab_size, *wanted)
    samples, pairs = len(random), length // 2
    each = Random(random.state.repeat(pairs), np.tile(np.arange(pairs), samples))  # (B N,), for each pair
    keys = _motifs(each, 0, half, motif_size, 1 if training else motif_size).reshape(samples, pairs, motif_size)
    values = _values_of(random, keys, half, symbols, motif_size)

    # The last pair is the question. It also replaces the first pair from a random place on, unless it came before that.
    asked = _size(keys[:, -1:], values[:, -1:])
    room = length - asked - longest  # other pairs start before this position
    starts = _starts(keys, values)
    place = (random.uniform(1) * (length - 2 * asked)).astype(np.int64)
    first = np.minimum((starts >= place).argmax(1), (starts < room).sum(1) - 1)
    came = (keys == keys[:, -1:]).all(2) & (np.arange(pairs) < first[:, None])
    shown = np.arange(samples), np.where(came.any(1), pairs - 1, first)
    keys[shown], values[shown] = keys[:, -1], values[:, -1]

    is_used = _starts(keys, values) < room
    is_used[:, -1] = True
    tokens = np.concatenate([keys, values], 2)
    is_token = (tokens >= 0) & is_used[..., None]
    is_asked = is_token & _came_before(np.where(is_used, _codes(keys), -1 - np.arange(pairs)))[..., None]
    is_asked[..., :motif_size] = False
    tokens, is_token, is_asked = (part.reshape(samples, pairs * longest) for part in (tokens, is_token, is_asked))

    # The tokens end at place T of T + 1 places: the first T are the input, and the last T what comes next.
    place = length + 1 - is_token[:, ::-1].cumsum(1)[:, ::-1]
    row = np.arange(samples)[:, None].repeat(pairs * longest, 1)
    whole, answers = np.full((samples, length + 1), symbols), np.full((samples, length + 1), IGNORED)
    whole[row[is_token], place[is_token]] = tokens[is_token]
    answers[row[is_asked], place[is_asked]] = tokens[is_asked]
    return whole[:, :-1], (whole if training else answers)[:, 1:].copy()


def selective_copying(random: Random, length: int, vocab_size: int, num_copied: int) -> Samples:
    """Selective copying: repeat the tokens that are scattered among blanks, in their order.

    M random tokens of [0, V - 2) and T - 2 M - 1 blanks (V - 2), each of which stands before a random one of the
    tokens; the mark V - 1; then M blanks, where the tokens are asked for. `tasks.selective_copy` differs: there
    tokens are at uniform places, and a mark stands at each question.

    Example (T = 12, M = 3, V = 10):

        input    8  6  8  8  3  8  8  1  9  8  8  8
        target   .  .  .  .  .  .  .  .  .  6  3  1
    """
    blanks = length - 2 * num_copied - 1
    if num_copied < 1 or blanks < 1 or vocab_size < 3:
        raise ValueError(
            f"num_copied={num_copied} must be from 1 to {max(0, (length - 2) // 2)} for context_length={length}, and "
            f"vocab_size={vocab_size} at least 3"
        )
    tokens = random.integers(0, vocab_size - 2, num_copied)
    before = random.integers(0, num_copied, blanks)[:, :, None]
    places = (before <= np.arange(num_copied)).sum(1) + np.arange(num_copied)
    inputs = np.full((len(random), length), vocab_size - 2)
    np.put_along_axis(inputs, places, tokens, 1)
    inputs[:, length - num_copied - 1] = vocab_size - 1
    targets = np.full_like(inputs, IGNORED)
    targets[:, -num_copied:] = tokens
    return inputs, targets


def memorization(random: Random, length: int, vocab_size: int, seed: int) -> Samples:
    """Memorization: values that are not in the context; the model must know them by heart.

    T / 2 random keys, each followed by the mark V - 1, where its value is asked for. The map from keys to values
    follows from `seed` and is the same in all samples: one to one, from the lower half of the ids below V - 1 to the
    rest.

    Example (T = 8, V = 10; keys 0 to 3, values 4 to 8; 2 -> 7, 0 -> 4, 3 -> 5):

        input    2  9  0  9  3  9  2  9
        target   .  7  .  4  .  5  .  7
    """
    _check(length % 2 == 0 and length >= 2 and vocab_size >= 3, length, vocab_size, "even, at least 2", "at least 3")
    half = (vocab_size - 1) // 2
    value_of = half + Random(seed, 0).uniform(vocab_size - 1 - half)[0].argsort()
    keys = random.integers(0, half, length // 2)
    inputs = np.full((len(random), length), vocab_size - 1)
    inputs[:, ::2] = keys
    targets = np.full_like(inputs, IGNORED)
    targets[:, 1::2] = value_of[keys]
    return inputs, targets


def _check(possible: bool, length: int, vocab_size: int, wanted_length: str, wanted_vocab_size: str) -> None:
    if not possible:
        raise ValueError(
            f"context_length={length} must be {wanted_length}, and vocab_size={vocab_size} {wanted_vocab_size}"
        )


def _next_tokens(inputs: np.ndarray) -> np.ndarray:
    """Targets (B, T) that ask for the next token at each position."""
    return np.pad(inputs[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


def _came_before(codes: np.ndarray) -> np.ndarray:
    """(B, N) integers -> (B, N) whether the same integer stands earlier in the row."""
    same = codes[:, :, None] == codes[:, None, :]
    return np.tril(same, -1).any(2)


def _motifs(random: Random, low: int, high: int, longest: int, shortest: int = 1) -> np.ndarray:
    """(B, longest): distinct tokens of [low, high), `shortest` to `longest` of them, then -1."""
    size = random.integers(shortest, longest + 1, 1)
    return np.where(np.arange(longest) < size, random.distinct(low, high, longest), -1)


def _codes(motifs: np.ndarray) -> np.ndarray:
    """(..., M) tokens from -1 on -> (...) one number for each motif."""
    return ((motifs + 1) * (motifs.max(initial=0) + 2) ** np.arange(motifs.shape[-1])).sum(-1)


def _size(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tokens of each pair of motifs (B, N, M): (B, N)."""
    return (keys >= 0).sum(2) + (values >= 0).sum(2)


def _starts(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where each pair starts if they follow each other: (B, N)."""
    sizes = _size(keys, values)
    return sizes.cumsum(1) - sizes


def _values_of(random: Random, keys: np.ndarray, low: int, high: int, longest: int) -> np.ndarray:
    """The values of keys (B, N, M): random motifs of [low, high) that depend on the sample and the key alone."""
    key = (keys + 1).reshape(-1, keys.shape[2])
    each = Random(random.state.repeat(keys.shape[1]), *key.T)
    return _motifs(each, low, high, longest).reshape(*keys.shape[:2], longest)
