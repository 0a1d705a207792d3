"""FailTogether: an error in one of several processes ends all of them."""

import atexit
import faulthandler

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class FailTogether(Callback):
    """Terminates a rank that raised, so that the other ranks fail instead of waiting forever.

    With several processes an error saves no checkpoint: a ModelCheckpoint with `save_on_exception` would wait for all
    processes to save. The last checkpoint before the error stays. Ctrl-C and SIGTERM reach every process and
    are not errors; this callback ignores them.

    Args:
        seconds: after an error the process ends within this time; closing open connections can block.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        alone = trainer.world_size == 1 or not torch.distributed.is_initialized()
        if alone or not isinstance(exception, Exception):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False
        atexit.register(faulthandler.dump_traceback_later, self.seconds, exit=True)
