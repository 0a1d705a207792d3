"""What all data modules share: loaders for the three splits, and a state that tells what data a checkpoint saw."""

import hashlib
import inspect
import json
import warnings
from abc import abstractmethod
from functools import partial
from numbers import Integral
from types import FrameType
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from .. import steps
from .loader import Batches, Loader, Samples, Stream, process


class TokenData(LightningDataModule):
    """Batches of token ids for a causal model.

    A batch is a dict of int64 tensors: `input_ids` and `targets` (B, T), where targets[t] is what logits[t] should
    say and -100 is not counted; `index` (B,), the sample's id; `num_bytes` (B,) for text, the raw bytes that the
    counted targets stand for; `slice` (B,) for tasks in slices, an index into `slice_names`.

    `batch_size` samples are a batch over all processes, which divide it; set the Trainer's
    `use_distributed_sampler=False`, because the loaders do so themselves.
    """

    def __init__(
        self, context_length: int, batch_size: int, eval_batch_size: int | None, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        self.slice_names: list[str] = []
        for name, value, least in (
            ("context_length", context_length, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ValueError(f"{name}={value!r} is no integer")
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small: at least {least}")
        self.context_length, self.batch_size = context_length, batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.seed, self.num_workers = seed, num_workers

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **kwargs: Any) -> None:
        """Numbers and arrays of numpy become Python's own: a checkpoint that runs no code can hold no others."""
        super().save_hyperparameters(*args, frame=frame or inspect.currentframe().f_back, **kwargs)  # type: ignore[union-attr]
        self.hparams.update({name: plain(value) for name, value in self.hparams.items()})

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids that input_ids and targets are drawn from."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides the samples' content."""

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """The samples of `train`, `val` or `test`."""

    def train_dataloader(self) -> Loader:
        """The endless stream that a Trainer trains on; without a Trainer one pass over the data.

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
        place = partial(steps.batches_taken, trainer)
        return Stream(samples, plan, self.num_workers, place, steps.has_epochs(trainer))

    def val_dataloader(self) -> Loader:
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    def predict_dataloader(self) -> Loader:
        return self.loader("test")

    def loader(self, split: str) -> Loader:
        """A split's batches for evaluation: each sample once, in order."""
        samples = self.samples(split)
        return Loader(samples, lambda number: samples.eval_batches(self.eval_batch_size), self.num_workers)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.hparams.items() if name[0] != "_")
        return f"{type(self).__name__}({options})"

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        training = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING  # which the module refuses
        if state_dict["fingerprint"] != self.fingerprint and not training:
            warnings.warn(
                f"the checkpoint saw other data: {state_dict} there, {self.state_dict()} here. Figures on this data "
                "are not those of its training run",
                stacklevel=2,
            )


def plain(value: Any) -> Any:
    """Without numpy's types."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def digest(*values: object) -> str:
    """Hexadecimal fingerprint of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
