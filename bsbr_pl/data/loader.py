"""Batches in an order that is a pure function of seed, epoch and position, whatever the processes and the restarts."""

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
    """An iterable of a split's batches: each of them once, from the start every time.

    Args:
        samples: what to draw from
        plan: the global batches of an epoch, by ids; as many in every epoch
        num_workers: processes that prepare batches ahead; 0 prepares them in line
    """

    def __init__(self, samples: Samples, plan: Callable[[int], Batches], num_workers: int) -> None:
        self.samples, self.plan, self.num_workers = samples, plan, num_workers
        self._epoch, self._steps = 0, Steps(samples, plan(0), *process())

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return self._read(0, range(len(self)))

    def _read(self, epoch: int, steps: range) -> Iterator[Batch]:
        """These steps of an epoch, in order. Nothing is drawn from the global random state."""
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, Steps(self.samples, self.plan(epoch), *process())
        if self.num_workers == 0:
            return map(self._steps.__getitem__, steps)
        return iter(
            DataLoader(
                self._steps,  # type: ignore[arg-type]
                batch_size=None,
                sampler=steps,
                num_workers=self.num_workers,
                generator=torch.Generator().manual_seed(0),  # a DataLoader draws a seed whenever it is iterated
            )
        )


class TrainLoader(Loader):
    """An endless shuffled stream, handed out `len(loader)` batches at a time, that can be put back to any place.

    A place is the number of batches handed out so far, not of those that workers have already prepared. Every
    iteration goes on where the last one stopped, so a loader must not be shared: to look at a batch, make another.

    There is no `set_epoch`: after resuming from a checkpoint of an epoch's end, Lightning 2.6 counts one epoch more
    than an uninterrupted run, while the number of batches is always right.
    """

    _handed_out = 0

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning makes more iterators than it uses, and only the first `next` reads the place.
        left = len(self)
        while left:
            epoch, start = divmod(self._handed_out, len(self))
            for batch in self._read(epoch, range(start, min(start + left, len(self)))):
                self._handed_out += 1
                left -= 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._handed_out = state["batches"]


def process() -> tuple[int, int]:
    """(rank, world size) of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def cut(ids: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Ids in batches of batch_size, the last one perhaps shorter."""
    return [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
