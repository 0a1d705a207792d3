"""FailTogether: an error in one of several processes ends all of them."""

import atexit
import faulthandler

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class FailTogether(Callback):
    """Lets a process with an error go, so that no other waits for it for ever: they get an error of their own.

    A ModelCheckpoint with `save_on_exception` would wait for all processes to save, which wait elsewhere: among several
    processes an error is not saved, the last checkpoint before it is there. What all processes get, as Ctrl-C and
    SIGTERM, is no error, and changes nothing.

    Args:
        seconds: that the process may take to exit; closing connections under way has been seen to block.
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
