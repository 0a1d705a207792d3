"""The recall tasks of tasks.py as data modules: segments of one length each, and slices to report accuracy on."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import IGNORED, Batch, TokenData, check_integer, cut, digest
from .corpus import Corpus
from .tasks import Random, Task, draw, induction, mqar, needle, selective_copy
from .text import TextData

VERSION = 1  # changes whenever the same arguments would give other samples
NOT_CONTENT = ("batch_size", "eval_batch_size", "num_workers", "cache_dir")  # arguments that change no sample
NO_SAMPLES = Random(np.empty(0, np.uint64))  # B = 0: a task checks its arguments and draws nothing


class Segment(NamedTuple):
    """`size` samples of one task at one length, reported under `name`."""

    name: str
    task: Task
    size: int
    length: int | None = None  # tokens; None for the data's context_length


class RecallSamples:
    """The segments of one split. A sample's id counts through all segments; a batch keeps to one segment."""

    def __init__(self, segments: Sequence[Segment], slice_names: list[str], split: str, seed: int) -> None:
        self.segments, self.slice_names, self.split, self.seed = segments, slice_names, split, seed
        self.bounds = np.cumsum([0, *(segment.size for segment in segments)])

    def __getitem__(self, ids: np.ndarray) -> Batch:
        """input_ids, targets (B, T); slice, index (B,)."""
        number = int(np.searchsorted(self.bounds, ids[0], "right")) - 1
        segment = self.segments[number]
        inputs, targets = draw(segment.task, self.seed, self.split, number, ids - self.bounds[number])
        return {
            "input_ids": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "slice": torch.full((len(ids),), self.slice_names.index(segment.name)),
            "index": torch.from_numpy(ids.astype(np.int64)),
        }

    def train_batches(self, batch_size: int, epoch: int) -> list[np.ndarray]:
        """Full batches of every segment, shuffled within and among segments; the rest of a segment is left out.

        Raises:
            ValueError: a segment has fewer samples than one batch.
        """
        random = np.random.default_rng([self.seed, epoch])
        batches: list[np.ndarray] = []
        for segment, start in zip(self.segments, self.bounds, strict=False):
            if segment.size < batch_size:
                raise ValueError(
                    f"segment {segment.name} has {segment.size} training samples, fewer than one batch of "
                    f"{batch_size} (batch_size times processes): lower batch_size, or increase the number of samples"
                )
            order = start + random.permutation(segment.size)
            batches += list(order[: segment.size // batch_size * batch_size].reshape(-1, batch_size))
        return [batches[i] for i in random.permutation(len(batches))]

    def eval_batches(self, batch_size: int) -> list[np.ndarray]:
        """Every sample once, in order."""
        bounds = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return [batch for start, stop in bounds for batch in cut(np.arange(start, stop), batch_size)]


class RecallData(TokenData):
    """A recall task: training segments, and test segments that are drawn anew for validation and for testing.

    A subclass calls `save_hyperparameters` and `_set_segments` at the end of its constructor.
    """

    kind = "recall"
    _vocab_size: int
    _train: list[Segment]
    _test: list[Segment]

    def _set_segments(self, vocab_size: int, train: list[Segment], test: list[Segment]) -> None:
        for segment in train + test:
            if segment.size < 1:
                raise ValueError(f"segment {segment.name} has {segment.size} samples: at least 1")
            segment.task(NO_SAMPLES)
        self._vocab_size, self._train, self._test = vocab_size, train, test
        self.slice_names = list(dict.fromkeys(segment.name for segment in train + test))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def train_lengths(self) -> dict[int, int]:
        sizes: Counter[int] = Counter()
        for segment in self._train:
            sizes[segment.length or self.context_length] += segment.size
        return dict(sizes) if len(sizes) > 1 else dict.fromkeys(sizes, 1)

    @property
    def validation_length(self) -> int:
        return max((segment.length or self.context_length for segment in self._test), default=0)

    def _test_length_arguments(self, length: int) -> dict[str, Any]:
        return {"test_lengths": [length]} if "test_lengths" in self.hparams else {"context_length": length}

    @property
    def fingerprint(self) -> str:
        without = (*NOT_CONTENT, *self.content_arguments)
        content = {name: value for name, value in self.arguments.items() if name not in without}
        return digest(type(self).__name__, VERSION, content)

    def samples(self, split: str) -> RecallSamples:
        return RecallSamples(self._train if split == "train" else self._test, self.slice_names, split, self.seed)

    def _answers(self) -> Tensor:
        """The different answers of the test split."""
        found = torch.cat([batch["targets"].flatten() for batch in self.loader("test")]).unique()
        return found[found != IGNORED]

    def chance(self) -> float:
        """1 / (number of different answers in the test split)."""
        return 1 / len(self._answers())

    def _most_frequent(self) -> float:
        """Accuracy on the test split of whoever answers with the answer that occurred most often in the context so far,
        whatever the question; with one of them at random, if several did."""
        answers, right = self._answers(), defaultdict[int, list[float]](list)
        for batch in self.loader("test"):
            for number, inputs, targets in zip(batch["slice"], batch["input_ids"], batch["targets"], strict=True):
                asked = targets != IGNORED
                seen = (inputs[:, None] == answers).cumsum(0)[asked]  # (questions, answers)
                most = seen == seen.amax(1, keepdim=True)
                hit = most[targets[asked][:, None] == answers].double() / most.sum(1)
                right[int(number)].append(float(hit.mean()))
        return fmean(map(fmean, right.values()))


class MQARData(RecallData):
    """Multi-query associative recall (Arora et al. 2023). The defaults are the published task's shortest length.

    Args:
        vocab_size: keys are from its lower half, values from its upper half
        train_segments, test_segments: (T, N, samples): context length, key-value pairs, number of samples
        random_filler: random tokens instead of 0 at the positions of neither pairs nor questions
        power: near 0, questions follow soon after the pairs; 1: they are anywhere, uniformly
    """

    answers_in_context = True

    def __init__(
        self,
        vocab_size: int = 8192,
        train_segments: Sequence[tuple[int, int, int]] = ((64, 4, 100_000),),
        test_segments: Sequence[tuple[int, int, int]] = ((64, 4, 3_000),),
        random_filler: bool = False,
        power: float = 0.01,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        longest = max((length for length, *_ in (*train_segments, *test_segments)), default=0)
        super().__init__(longest, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)

        def segment(length: int, pairs: int, size: int) -> Segment:
            task = partial(mqar, vocab_size=vocab_size, random_filler=random_filler, power=power)
            return Segment(f"T{length}_N{pairs}", partial(task, length=length, pairs=pairs), size, length)

        self._set_segments(vocab_size, [segment(*s) for s in train_segments], [segment(*s) for s in test_segments])

    def plateau(self) -> float:
        """One of the N values of the context, whatever the key; the mean over the test segments."""
        return fmean(1 / pairs for _, pairs, _ in self.hparams["test_segments"])

    def _test_length_arguments(self, length: int) -> dict[str, Any]:
        """Pairs and samples are those of the first test segment, or without one of the first training segment."""
        _, pairs, size = [*self.hparams["test_segments"], *self.hparams["train_segments"]][0]
        return {"test_segments": [[length, pairs, size]]}


class InductionData(RecallData):
    """Induction heads: trained at one length, tested at several.

    Args:
        vocab_size: ordinary tokens and the trigger
        context_length: of the training samples
        test_lengths: of the validation and test samples
        num_train, num_test: samples; num_test is for each of the lengths
    """

    answers_in_context = True

    def __init__(
        self,
        vocab_size: int = 16,
        context_length: int = 256,
        test_lengths: Sequence[int] = (64, 128, 256, 512, 1024),
        num_train: int = 100_000,
        num_test: int = 1_000,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(context_length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)

        def segment(length: int, size: int) -> Segment:
            return Segment(f"T{length}", partial(induction, length=length, vocab_size=vocab_size), size, length)

        tests = [segment(length, num_test) for length in test_lengths]
        self._set_segments(vocab_size, [segment(context_length, num_train)], tests)

    def plateau(self) -> float:
        return self._most_frequent()


class SelectiveCopyData(RecallData):
    """Selective copying: repeat the `num_copied` tokens that are scattered in the context.

    Args:
        vocab_size: tokens to copy, the blank and the mark
        context_length: all positions, those of the answers included
        num_train, num_test: samples
    """

    def __init__(
        self,
        vocab_size: int = 16,
        context_length: int = 256,
        num_copied: int = 16,
        num_train: int = 100_000,
        num_test: int = 1_000,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(context_length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        task = partial(selective_copy, length=context_length, copied=num_copied, vocab_size=vocab_size)
        name = f"T{context_length}_M{num_copied}"
        self._set_segments(vocab_size, [Segment(name, task, num_train)], [Segment(name, task, num_test)])

    def plateau(self) -> float:
        return self._most_frequent()


class NeedleData(RecallData):
    """Needles in a haystack of real text, trained at random depths; tested at each length, number of needles and depth.

    A training sample asks for all of its needles. A test sample asks for one, the one at the depth that its slice
    names: `T512_N4_d0.25` has 512 tokens and 4 needles. The haystacks of each split are cut from the same split of the
    text.

    Args:
        source, tokenizer, bpe_vocab_size, cache_dir: the text, as in `TextData`
        context_length: of the training samples
        depths: of the needle in the test samples, 0 for the start of the context and 1 for its end
        num_train, num_test: samples; num_test is for each of the slices
        num_needles: of a training sample, each asked; with one, few models find it in 2,000 steps
        value_length: tokens of a value
        test_needles: numbers of needles in the test samples
        test_lengths: of the validation and test samples; None for context_length
    """

    answers_in_context = True
    content_arguments = ("source", "tokenizer", "bpe_vocab_size")

    def __init__(
        self,
        source: str = "packages",
        tokenizer: str = "bpe",
        bpe_vocab_size: int = 4096,
        context_length: int = 512,
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        num_train: int = 100_000,
        num_test: int = 200,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        num_needles: int = 4,
        value_length: int = 1,
        test_needles: Sequence[int] = (1, 4),
        test_lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(context_length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        self.test_lengths = [context_length] if test_lengths is None else list(test_lengths)
        check_integer("num_train", num_train, 1)
        check_integer("num_test", num_test, 1)
        longest = max([context_length, *self.test_lengths])
        train, test = (self._segments(split, partial(np.empty, longest), 2**31) for split in ("train", "test"))
        self._set_segments(2**31, train, test)  # the text and its vocabulary are read later

    @cached_property
    def text_data(self) -> TextData:
        # Not created in the constructor: Lightning would save this object's arguments as those of the text.
        h = self.hparams
        return TextData(h["source"], h["tokenizer"], h["bpe_vocab_size"], h["context_length"], cache_dir=h["cache_dir"])

    def prepare_data(self) -> None:
        self.text_data.prepare_data()

    @property
    def vocab_size(self) -> int:
        """The ids of the text, and the mark."""
        return self.text_data.vocab_size + 1

    @property
    def fingerprint(self) -> str:
        return digest(super().fingerprint, self.text_data.fingerprint)

    def plateau(self) -> float:
        """One of the N values of the context, whatever the key, or chance if there is one; the mean over the slices."""
        chance = self.chance()
        return fmean(1 / needles if needles > 1 else chance for needles in self.hparams["test_needles"])

    def samples(self, split: str) -> RecallSamples:
        text = partial(Corpus.tokens, self.text_data.corpus, split)
        return RecallSamples(self._segments(split, text, self.vocab_size), self.slice_names, split, self.seed)

    def _segments(self, split: str, text: Callable[[], np.ndarray], vocab_size: int) -> list[Segment]:
        h = self.hparams
        task = partial(needle, text=text, vocab_size=vocab_size, value_length=h["value_length"])
        if split == "train":
            length, needles = self.context_length, h["num_needles"]
            task = partial(task, length=length, depth=None, needles=needles)
            return [Segment(f"T{length}_N{needles}", task, h["num_train"], length)]
        return [
            Segment(
                f"T{length}_N{needles}_d{depth:g}",
                partial(task, length=length, depth=depth, needles=needles),
                h["num_test"],
                length,
            )
            for length, needles, depth in product(self.test_lengths, h["test_needles"], h["depths"])
        ]
