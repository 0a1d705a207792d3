"""The recall tasks of recall.py as data modules, in segments of one length and slices to report on."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from .base import TokenData, digest
from .corpus import Corpus
from .loader import Batch, cut
from .recall import Task, check_mqar, draw, induction, mqar, needle, selective_copy
from .text import TextData

VERSION = 1  # changes whenever the same arguments would give other samples


class Segment(NamedTuple):
    """`size` samples of one task at one length, reported under `name`."""

    name: str
    task: Task
    size: int


class RecallSamples:
    """The segments of one split; a sample's id counts through all of them. A batch keeps to one segment."""

    def __init__(self, segments: Sequence[Segment], slice_names: list[str], split: str, seed: int) -> None:
        self.segments, self.slice_names, self.split, self.seed = (segments, slice_names, split, seed)
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
        """Whole batches of every segment, shuffled within and among segments; leftovers wait for another epoch."""
        random = np.random.default_rng([self.seed, epoch])
        batches: list[np.ndarray] = []
        for segment, start in zip(self.segments, self.bounds, strict=False):
            if segment.size < batch_size:
                raise ValueError(
                    f"segment {segment.name} has {segment.size} training samples, fewer than one batch of "
                    f"{batch_size} (batch_size times processes): lower either, or draw more samples"
                )
            order = start + random.permutation(segment.size)
            batches += list(order[: segment.size // batch_size * batch_size].reshape(-1, batch_size))
        return [batches[i] for i in random.permutation(len(batches))]

    def eval_batches(self, batch_size: int) -> list[np.ndarray]:
        """Every sample once, in order."""
        bounds = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return [batch for start, stop in bounds for batch in cut(np.arange(start, stop), batch_size)]


class RecallData(TokenData):
    """A recall task: `train` segments to learn from and `test` segments, drawn anew for validation and for testing."""

    #: Arguments that do not decide what the samples are.
    not_decisive: ClassVar[tuple[str, ...]] = ("batch_size", "eval_batch_size", "num_workers", "cache_dir")
    _vocab_size: int
    _train: list[Segment]
    _test: list[Segment]

    def _set_segments(self, vocab_size: int, train: list[Segment], test: list[Segment]) -> None:
        for segment in train + test:
            if segment.size < 1:
                raise ValueError(f"segment {segment.name} has {segment.size} samples: at least 1")
        self._vocab_size, self._train, self._test = vocab_size, train, test
        self.slice_names = list(dict.fromkeys(segment.name for segment in train + test))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        other = self.not_decisive
        decisive = {name: value for name, value in self.hparams.items() if name not in other and name[0] != "_"}
        return digest(type(self).__name__, VERSION, decisive)

    def samples(self, split: str) -> RecallSamples:
        return RecallSamples(self._train if split == "train" else self._test, self.slice_names, split, self.seed)


class MQARData(RecallData):
    """Multi-query associative recall (Arora et al. 2023). The defaults are the published task's shortest length.

    Args:
        vocab_size: keys are its lower half, values its upper half
        train_segments, test_segments: (T, N, samples): context length, key-value pairs, number of samples
        random_filler: random tokens instead of 0 where neither pairs nor questions stand
        power: questions come soon (towards 0) or anywhere (1)
    """

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
        for length, pairs, _ in (*train_segments, *test_segments):
            check_mqar(length, pairs, vocab_size)
        longest = max((length for length, *_ in (*train_segments, *test_segments)), default=0)
        super().__init__(longest, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)

        def segment(length: int, pairs: int, count: int) -> Segment:
            task = partial(
                mqar, length=length, pairs=pairs, vocab_size=vocab_size, random_filler=random_filler, power=power
            )
            return Segment(f"T{length}_N{pairs}", task, count)

        self._set_segments(vocab_size, [segment(*s) for s in train_segments], [segment(*s) for s in test_segments])


class InductionData(RecallData):
    """Induction heads: trained at one length, tested at several.

    Args:
        vocab_size: ordinary tokens and the trigger
        context_length: of the training samples
        test_lengths: of the validation and test samples
        num_train, num_test: samples; num_test is for each of the lengths
    """

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

        def segment(length: int, count: int) -> Segment:
            return Segment(f"T{length}", partial(induction, length=length, vocab_size=vocab_size), count)

        tests = [segment(length, num_test) for length in test_lengths]
        self._set_segments(vocab_size, [segment(context_length, num_train)], tests)


class SelectiveCopyData(RecallData):
    """Selective copying: repeat the `num_copied` tokens that lie scattered in the context.

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


class NeedleData(RecallData):
    """A needle in a haystack of real text: one key-value pair, trained at random depths, tested at chosen ones.

    Each split's haystacks are cut from the same split of the text.

    Args:
        source, tokenizer, bpe_vocab_size, cache_dir: the text, as in `TextData`
        depths: of the test samples' pairs, 0 for the start of the context and 1 for its end
        num_train, num_test: samples; num_test is for each of the depths
    """

    not_decisive = (*RecallData.not_decisive, "source", "tokenizer", "bpe_vocab_size")  # the text's own fingerprint is

    def __init__(
        self,
        source: str = "stdlib",
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
    ) -> None:
        super().__init__(context_length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        self.depths, self.num_train, self.num_test = depths, num_train, num_test
        self.slice_names = ["depth_random", *(f"depth_{depth:g}" for depth in depths)]

    @cached_property
    def text_data(self) -> TextData:
        """Made when asked for: while the command line makes this object, another would save this one's arguments."""
        h = self.hparams
        return TextData(h["source"], h["tokenizer"], h["bpe_vocab_size"], h["context_length"], cache_dir=h["cache_dir"])

    def prepare_data(self) -> None:
        self.text_data.prepare_data()

    @property
    def vocab_size(self) -> int:
        """Ids of the text and the mark."""
        return self.text_data.vocab_size + 1

    @property
    def fingerprint(self) -> str:
        return digest(super().fingerprint, self.text_data.fingerprint)

    def samples(self, split: str) -> RecallSamples:
        depths: Sequence[float | None] = [None] if split == "train" else self.depths
        segments = [
            Segment(
                name=f"depth_{'random' if depth is None else format(depth, 'g')}",
                task=partial(
                    needle,
                    text=partial(Corpus.tokens, self.text_data.corpus, split),
                    length=self.context_length,
                    vocab_size=self.vocab_size,
                    depth=depth,
                ),
                size=self.num_train if split == "train" else self.num_test,
            )
            for depth in depths
        ]
        return RecallSamples(segments, self.slice_names, split, self.seed)
