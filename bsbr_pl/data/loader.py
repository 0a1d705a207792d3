"""Batches in an order that is a pure function of seed, epoch and position, whatever the processes and the restarts."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader

IGNORED = -100  # a target that is not counted
Batch = dict[str, Tensor]
Batches = Sequence[np.ndarray] | np.ndarray  # the ids of each global batch


class Samples(Protocol):
    """What a loader draws from. Ids are int64; a batch of ids becomes tensors whose first axis is the batch."""

    def __getitem__(self, ids: np.ndarray) -> Batch: ...

    def train_batches(self, batch_size: int, epoch: int) -> Batches: ...

    def eval_batches(self, batch_size: int) -> Batches: ...


class Steps:
    """Step i's share of one process: `batches[i]` is the global batch, cut evenly over the processes.

    A process left without samples in the last batch of an evaluation gets one row that counts nothing (all targets
    ignored, no bytes, index -1), so that all processes make the same number of steps and nothing is counted twice.
    """

    def __init__(self, samples: Samples, batches: Batches, rank: int, world_size: int) -> None:
        self.samples, self.batches, self.rank, self.world_size = (samples, batches, rank, world_size)

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
    """A split's batches, each of them once, from the start every time.

    Args:
        samples: what to draw from
        plan: the global batches of a pass over the samples, by ids; as many in every pass
        num_workers: processes that prepare batches ahead; 0 prepares them in line
    """

    def __init__(self, samples: Samples, plan: Callable[[int], Batches], num_workers: int) -> None:
        self.samples, self.plan, self.num_workers = samples, plan, num_workers
        self._pass, self._steps = 0, Steps(samples, plan(0), *process())

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return self._read(0, 0)

    def _read(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of a pass from `start` on, in order. Nothing is drawn from the global random state."""
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
    """An endless stream of batches to train on: pass after pass over the samples, each shuffled anew.

    Args:
        place: the number of batches that training has taken so far; asked when an iteration asks for its first batch
        epochs: whether training stops after `len(stream)` batches, one pass, to count an epoch
    """

    def __init__(
        self,
        samples: Samples,
        plan: Callable[[int], Batches],
        num_workers: int,
        place: Callable[[], int],
        epochs: bool,
    ) -> None:
        super().__init__(samples, plan, num_workers)
        self.place, self.epochs = place, epochs

    def __len__(self) -> int:
        if not self.epochs:
            raise TypeError("an endless stream has no length")
        return super().__len__()

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning makes more iterators than it uses, and only the first `next` asks for the place.
        first, start = divmod(self.place(), len(self._steps))
        for number in itertools.count(first):
            yield from self._read(number, start)
            start = 0

    # Lightning asks for these of what can be resumed within an epoch; the place follows from the trainer's step.
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
    """Ids in batches of batch_size, the last one perhaps shorter."""
    return [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
