"""FailTogether: an error in one of several processes ends all of them."""

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy


class FailTogether(Callback):
    """Leaves the group of processes when an error ends this one, so that none waits for another for ever.

    A ModelCheckpoint with `save_on_exception` saves at an error, and waits for the other processes to have come there
    too, which wait for this one elsewhere. Without the group it saves and goes (the first process does; under `fsdp2`,
    where all are needed for a checkpoint, none does), and the others get an error of their own. What stops all
    processes at once, as Ctrl-C and SIGTERM do, is no error, and changes nothing.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1 or not isinstance(exception, Exception):
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
