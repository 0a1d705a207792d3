"""FiniteLoss: training stops when the loss is no longer a number, and no checkpoint is written from then on."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from .step_windows import at_window_edge


class FiniteLoss(Callback):
    """Ends a run whose loss is NaN or infinite with an error that names the step and the samples.

    On a CPU each loss is looked at before its backward pass. Elsewhere losses stay on the device, and are looked at
    together, every `trainer.log_every_n_steps` optimiser steps and before any checkpoint, so that no step waits for the
    device. No checkpoint holds weights that are not finite, whoever saves it.

    Gradients are not looked at: mixed precision in fp16 steps over infinite ones on purpose. One that does reach the
    weights makes the loss of the next step NaN.

    Raises:
        ValueError: in training, naming the step (as logged, from 0), the samples and the last checkpoint.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[int, Tensor, Tensor]] = []  # step, loss, ids of the samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples = batch["index"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._unread.append((trainer.global_step, loss.detach(), self._samples))
        if loss.device.type == "cpu":
            self._read(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_window_edge(trainer):
            self._read(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read(trainer)
        for name, weight in checkpoint["state_dict"].items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is not finite after {trainer.global_step} steps: {_advice(trainer)}")

    def _read(self, trainer: Trainer) -> None:
        unread, self._unread = self._unread, []
        if unread:
            losses = torch.stack([loss for _, loss, _ in unread]).tolist()  # one synchronisation for all of them
            for loss, (step, _, samples) in zip(losses, unread, strict=True):
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss is {loss} at step {step}, on the training samples "
                        f"{', '.join(map(str, samples.tolist()))}: {_advice(trainer)}"
                    )


def _advice(trainer: Trainer) -> str:
    paths = [getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks]
    last = next(filter(None, paths), trainer.ckpt_path)
    return (
        f"lower learning_rate; the last good checkpoint is {last}"
        if last
        else "lower learning_rate; nothing was saved yet"
    )
