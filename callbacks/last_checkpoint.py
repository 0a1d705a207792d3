"""LastCheckpoint: last.ckpt, from which an interrupted run resumes exactly."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from bsbr_pl.attention.parts import check_positive
from bsbr_pl.run_folder import put_csv_rows_back, run_folder
from bsbr_pl.steps import validates_now

from .step_windows import at_window_edge

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal ended training after its state was saved. The exit code is 128 + signal, as of a killed process."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(128 + signum)
        self.message = f"{signal.Signals(signum).name} after {step} steps, which {path} holds"

    def __str__(self) -> str:
        return self.message


class LastCheckpoint(Checkpoint):
    """Saves `checkpoints/last.ckpt` in the run's folder: every so many steps, after each validation, and at the end.

    A resumed run takes exactly the steps that it would have taken without the interruption. Therefore nothing is saved
    while gradients are accumulated, nor between a step and the validation that follows it, which Lightning 2.6 would
    omit after resuming. An error saves nothing, because it can happen in the middle of a step.

    SIGTERM and SIGINT (Ctrl-C) raise `Stopped` once the current step or validation is finished and saved; a second
    signal ends the process at once.

    Args:
        every_n_steps: optimiser steps from one checkpoint to the next.

    Raises:
        ValueError: if `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_positive(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.last_model_path = ""  # the name that ModelCheckpoint has for it
        self._signal: signal.Signals | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        self._seen = self._saved = trainer.global_step
        self._between_steps, self._stopping = True, False
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for signum in SIGNALS:  # Lightning restores the earlier handlers
                signal.signal(signum, self._on_signal)
        if trainer.ckpt_path and trainer.is_global_zero:
            _drop_later_events(trainer)
            put_csv_rows_back(trainer)
            for leftover in self._path.parent.glob("*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._stopping:  # not right after saving: other callbacks still had their hooks to run
            raise Stopped(self._signal or signal.SIGTERM, trainer.global_step, self._path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._between_steps = trainer.global_step > self._seen
        if self._between_steps:
            self._seen = trainer.global_step
            due = trainer.global_step % self.every_n_steps == 0
            if (self._asked_to_stop(trainer) or due) and not validates_now(trainer):
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._between_steps:
            self._asked_to_stop(trainer)
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()  # the log must survive a kill as well
        trainer.save_checkpoint(self._path, weights_only=False)  # without this argument Lightning warns
        self._saved, self.last_model_path = trainer.global_step, str(self._path)

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process has received a signal; several processes compare at the edges of windows only."""
        if trainer.world_size == 1 or at_window_edge(trainer):
            self._stopping = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        return self._stopping

    def _on_signal(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker of a loader received the signal as well
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        self._signal = signal.Signals(signum)
        signal.signal(signum, signal.SIG_DFL)
        print(f"\n{self._signal.name}: stopping after this step; a second one stops without saving", file=sys.stderr)


def _drop_later_events(trainer: Trainer) -> None:
    """Tell TensorBoard to forget what the interrupted run logged after the checkpoint that it is resumed from."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # installed if its logger works

            start = Event(step=trainer.global_step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(start)
