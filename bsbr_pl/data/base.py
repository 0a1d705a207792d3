"""The contract of all data modules, and loaders whose order is a pure function of seed, pass and position.

The order of the batches depends neither on the number of processes or workers nor on where training was resumed.
"""

import hashlib
import inspect
import itertools
import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from .. import steps
from ..values import plain

if TYPE_CHECKING:
    from .text import TextData

SPLITS = ("train", "val", "test")
IGNORED = -100  # a target that is not counted
Batch = dict[str, Tensor]
Batches = Sequence[np.ndarray] | np.ndarray  # the ids of each global batch


class Samples(Protocol):
    """The samples of a split. Ids are int64; a batch of ids becomes tensors whose first axis is the batch."""

    def __getitem__(self, ids: np.ndarray) -> Batch: ...

    def train_batches(self, batch_size: int, epoch: int) -> Batches: ...

    def eval_batches(self, batch_size: int) -> Batches: ...


class TokenData(LightningDataModule):
    """Batches of token ids for a causal model.

    A batch is a dict of int64 tensors: `input_ids` and `targets` (B, T), where targets[t] is the label of
    logits[t], and -100 is not counted; `index` (B,), the sample's id; `num_bytes` (B,) for text, the raw bytes of the
    counted targets; `slice` (B,) for recall tasks, an index into `slice_names`.

    `batch_size` counts the samples of all processes together. The loaders divide each batch over the processes, so set
    the Trainer's `use_distributed_sampler=False`.

    A data module is constructed cheaply from its arguments. The facts about it need no prepared data, except
    `vocab_size`, `fingerprint` and `chance()`.
    """

    kind: ClassVar[Literal["text", "recall"]]
    #: Whether the answer to each question of a recall task is in the context, directly after its key.
    answers_in_context: bool = False
    #: Arguments that say where a text is and how it is read. The fingerprint covers the text itself.
    content_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, context_length: int, batch_size: int, eval_batch_size: int | None, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        self.slice_names: list[str] = []
        self.context_length = check_integer("context_length", context_length, 1)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.eval_batch_size = batch_size
        if eval_batch_size is not None:
            self.eval_batch_size = check_integer("eval_batch_size", eval_batch_size, 1)
        self.seed = check_integer("seed", seed, 0)
        self.num_workers = check_integer("num_workers", num_workers, 0)

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **kwargs: Any) -> None:
        """Keep the arguments. Values of numpy become Python's own, because a checkpoint is loaded without numpy's."""
        super().save_hyperparameters(*args, frame=frame or inspect.currentframe().f_back, **kwargs)  # type: ignore[union-attr]
        self.hparams.update({name: plain(value) for name, value in self.hparams.items()})

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor by name."""
        return {name: value for name, value in self.hparams.items() if name[0] != "_"}

    @property
    def train_lengths(self) -> dict[int, int]:
        """Tokens of the training samples, and how many of the samples have each length (1 if all have the same)."""
        return {self.context_length: 1}

    @property
    def validation_length(self) -> int:
        """Tokens of a validation or test sample; of the longest, if they differ; 0 without samples."""
        return self.context_length

    @property
    def text_data(self) -> "TextData | None":
        """The text that the samples are made of; None for a task without text."""
        return None

    def at_length(self, length: int) -> dict[str, Any]:
        """The arguments to change so that all test samples have `length` tokens.

        Raises:
            ValueError: samples of this length are impossible, and why. (Whether a text is long enough for a haystack
                is known only when its tokens are read.)
        """
        changes = self._test_length_arguments(length)
        type(self)(**{**self.arguments, **changes})
        return changes

    def _test_length_arguments(self, length: int) -> dict[str, Any]:
        return {"context_length": length}

    def chance(self) -> float | None:
        """The accuracy of a blind guess among the answers of a recall task; None for text."""
        return None

    def plateau(self) -> float | None:
        """What a model reaches on the test split before it has learned the task: a run that is no better has not yet.

        Of a recall task, the accuracy of a model that knows which answers there are, or which occur in the context, but
        not which belongs to a question; of a text, the bits per byte of a model that knows only the token before.
        """
        return self.chance()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The ids of input_ids and targets are below this number."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides the content of the samples."""

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """The samples of `train`, `val` or `test`."""

    def train_dataloader(self) -> "Loader":
        """An infinite stream for a Trainer; without a Trainer, one pass over the data.

        Raises:
            ValueError: `batch_size` cannot be divided over the processes.
        """
        samples, trainer, processes = self.samples("train"), self.trainer, process()[1]
        if self.batch_size % processes:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of the {processes} processes")
        overfit = trainer is not None and trainer.overfit_batches  # type: ignore[attr-defined]

        def plan(number: int) -> Batches:
            return samples.train_batches(self.batch_size, 0 if overfit else number)

        if trainer is None:
            return Loader(samples, plan, self.num_workers)
        taken = partial(steps.batches_taken, trainer)
        return Stream(samples, plan, self.num_workers, taken, steps.has_epochs(trainer))

    def val_dataloader(self) -> "Loader":
        return self.loader("val")

    def test_dataloader(self) -> "Loader":
        return self.loader("test")

    def predict_dataloader(self) -> "Loader":
        return self.loader("test")

    def loader(self, split: str) -> "Loader":
        """A split's batches for evaluation: each sample once, in order."""
        samples = self.samples(split)
        return Loader(samples, lambda number: samples.eval_batches(self.eval_batch_size), self.num_workers)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{type(self).__name__}({options})"

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the checkpoint was trained on other data (LanguageModule refuses to resume training on it)."""
        training = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if state_dict["fingerprint"] != self.fingerprint and not training:
            warnings.warn(
                f"the checkpoint was trained on other data: {state_dict}, here {self.state_dict()}. Results on this "
                "data do not belong to that training",
                stacklevel=2,
            )


class Steps:
    """What one process gets at each step: its share of the global batch `batches[i]`, which is divided evenly.

    If the last batch of an evaluation has no sample for a process, the process gets one row that counts nothing (all
    targets ignored, no bytes, index -1). So all processes take equally many steps, and no sample is counted twice.
    """

    def __init__(self, samples: Samples, batches: Batches, rank: int, world_size: int) -> None:
        self.samples, self.batches, self.rank, self.world_size = samples, batches, rank, world_size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        ids = np.array_split(self.batches[step], self.world_size)[self.rank]
        if len(ids):
            return self.samples[ids]
        batch = self.samples[self.batches[step][:1]]
        batch["targets"].fill_(IGNORED)
        batch["index"].fill_(-1)
        if "num_bytes" in batch:
            batch["num_bytes"].zero_()
        return batch


class Loader:
    """The batches of a split, each once; every iteration starts from the first.

    Args:
        samples: the samples of the split
        plan: returns the global batches of a pass, as ids, by the number of the pass; as many in every pass
        num_workers: processes that prepare batches ahead; 0 prepares them in this process
    """

    def __init__(self, samples: Samples, plan: Callable[[int], Batches], num_workers: int) -> None:
        self.samples, self.plan, self.num_workers = samples, plan, num_workers
        self._pass, self._steps = 0, Steps(samples, plan(0), *process())

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return self._read(0, 0)

    def _read(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of pass `number` from batch `start` on. Nothing is drawn from the global random state."""
        if number != self._pass:
            self._pass, self._steps = number, Steps(self.samples, self.plan(number), *process())
        if self.num_workers == 0:
            return map(self._steps.__getitem__, range(start, len(self._steps)))
        return iter(
            DataLoader(
                self._steps,  # type: ignore[arg-type]
                batch_size=None,
                sampler=range(start, len(self._steps)),
                num_workers=self.num_workers,
                generator=torch.Generator().manual_seed(0),  # a DataLoader draws a seed whenever it is iterated
            )
        )


class Stream(Loader):
    """An infinite stream of training batches: pass after pass over the samples, each in another order.

    Args:
        taken: returns the number of batches that training has taken so far; called when the first batch is asked for
        epochs: whether training counts epochs of `len(stream)` batches, one pass each
    """

    def __init__(
        self, samples: Samples, plan: Callable[[int], Batches], num_workers: int, taken: Callable[[], int], epochs: bool
    ) -> None:
        super().__init__(samples, plan, num_workers)
        self.taken, self.epochs = taken, epochs

    def __len__(self) -> int:
        if not self.epochs:
            raise TypeError("an infinite stream has no length")
        return super().__len__()

    def __iter__(self) -> Iterator[Batch]:
        # A generator, because Lightning makes iterators that it never uses: the first `next` asks for the position.
        first, start = divmod(self.taken(), len(self._steps))
        for number in itertools.count(first):
            yield from self._read(number, start)
            start = 0

    # Lightning resumes within an epoch only with these two. The position itself follows from the trainer's step.
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def process() -> tuple[int, int]:
    """(rank, world size) of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def cut(ids: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Ids in batches of `batch_size`; the last one may be shorter."""
    return [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]


def digest(*values: object) -> str:
    """Hexadecimal fingerprint of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def check_integer(name: str, value: Any, least: int) -> int:
    """The value, or ValueError if it is no integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{name}={value} is too small: at least {least}")
    return value  # type: ignore[return-value]
