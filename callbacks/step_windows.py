"""Shared by the callbacks: logging, and windows of timed optimiser steps."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bsbr_pl.utils.timing import Clock, StepClock


def log(trainer: Trainer, metrics: Mapping[str, float], constant: bool = False) -> None:
    """Give metrics to every logger, at the same step as Lightning's own.

    Args:
        trainer: whose loggers they are.
        metrics: name -> value.
        constant: they are logged once in a run: TensorBoard shows them as text, not as a curve of one point.
    """
    step = max(0, trainer.global_step - 1)
    for logger in trainer.loggers:
        if constant and isinstance(logger, TensorBoardLogger):
            for name, value in metrics.items():
                logger.experiment.add_text(name, f"{value:,.6g}", step)
        else:
            logger.log_metrics(dict(metrics), step=step)


def at_window_edge(trainer: Trainer) -> bool:
    """Whether Lightning logs the metrics of the last step."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def over_ranks(trainer: Trainer, values: Sequence[float], how: str) -> list[float]:
    """Each number reduced over all processes by `how` (max, sum); every process must call this."""
    device = trainer.strategy.root_device
    exact = torch.float64 if device.type != "mps" else torch.float32
    reduced = trainer.strategy.reduce(torch.tensor(values, dtype=exact, device=device), reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced.tolist()


@dataclass
class Window:
    """Some consecutive optimiser steps."""

    seconds: list[float]  # of each step, on the slowest process
    waits: list[float]  # seconds before each step in which only data was waited for, on the slowest process
    tokens: int  # of this process


class StepWindows(Callback):
    """Times optimiser steps and calls `on_window` every `trainer.log_every_n_steps` of them, and once more at the end.

    A step begins when its (first) batch is on the device and ends with its (last) batch: data, validation, checkpoints
    and logging are between steps. The first `warmup_steps` after a start or a resume are left out.

    Args:
        warmup_steps: optimiser steps that are not timed.

    Raises:
        ValueError: if `warmup_steps` is negative.
    """

    clock: Clock = staticmethod(time.perf_counter)

    def __init__(self, warmup_steps: int = 3) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.steps = StepClock()

    def on_window(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """A window is complete."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = StepClock(pl_module.device, self.clock)
        self._seen = trainer.global_step
        self._cold = self.warmup_steps
        self._tokens = [0]  # of each step since the last window, and of the current step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._tokens[-1] += batch["input_ids"].numel()
        self.steps.begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped = trainer.global_step > self._seen
        self.steps.end(stepped)
        if stepped:
            self._seen = trainer.global_step
            self._tokens.append(0)
            if at_window_edge(trainer):
                self._close(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.interrupt()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.steps.interrupt()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps, tokens = self.steps.read(), self._tokens[:-1]
        self._tokens = self._tokens[-1:]
        cold = min(self._cold, len(steps))
        self._cold -= cold
        steps, tokens = steps[cold:], tokens[cold:]
        if not steps:
            return
        known = [step.wait for step in steps if step.wait is not None]  # None for the same steps on every process
        slowest = over_ranks(trainer, [*(step.seconds for step in steps), *known], "max")
        self.on_window(trainer, pl_module, Window(slowest[: len(steps)], slowest[len(steps) :], sum(tokens)))
