"""FiniteLoss: stops training when the loss is no longer finite; no checkpoint holds weights that are not."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from .step_windows import at_window_edge


class FiniteLoss(Callback):
    """Ends a run whose loss is NaN or infinite with an error that names the step and the samples.

    On a CPU each loss is checked before its backward pass. On other devices losses are checked together, every
    `trainer.log_every_n_steps` optimiser steps and before any checkpoint, so that no step waits for the device. Weights
    that are not finite are never saved, by any callback.

    Gradients are not checked: mixed precision in fp16 skips steps with infinite gradients on purpose. If one reaches
    the weights, the loss of the next step is NaN.

    Raises:
        ValueError: in training, naming the step (as logged, from 0), the samples and the last checkpoint.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []  # step, loss, ids of the samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples = batch["index"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._unchecked.append((trainer.global_step, loss.detach(), self._samples))
        if loss.device.type == "cpu":
            self._check(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if at_window_edge(trainer):
            self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)
        for name, weight in checkpoint["state_dict"].items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is not finite after {trainer.global_step} steps: {_advice(trainer)}")

    def _check(self, trainer: Trainer) -> None:
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        losses = torch.stack([loss for _, loss, _ in unchecked]).tolist()  # one synchronisation for all of them
        for loss, (step, _, samples) in zip(losses, unchecked, strict=True):
            if not math.isfinite(loss):
                ids = ", ".join(map(str, samples.tolist()))
                raise ValueError(
                    f"the loss is {loss} at step {step}, on the training samples {ids}: {_advice(trainer)}"
                )


def _advice(trainer: Trainer) -> str:
    paths = [getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks]
    last = next((path for path in paths if path), trainer.ckpt_path)
    saved = f"the last good checkpoint is {last}" if last else "nothing was saved yet"
    return f"lower learning_rate; {saved}"
