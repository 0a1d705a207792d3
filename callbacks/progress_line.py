"""ProgressLine: one line that says how far a run is."""

import contextlib
import shutil
import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from tqdm import tqdm

from bsbr_pl.steps import planned_steps, seconds_left, validates_now
from bsbr_pl.utils.timing import Clock

from .step_windows import at_window_edge

QUALITY = {"val/bits_per_byte": "bits/byte", "val/accuracy": "accuracy"}  # the first that is measured is shown
SECONDS = 0.1  # between two drawings on a terminal
LINES = 20  # of a whole run, where the output is not a terminal
BAR = 12  # characters of a bar; without that much room there is none


class ProgressLine(ProgressBar):
    """Shows the whole run in one line of at most the terminal's width:

        step 320/640  02:10 left  12.3k tok/s  loss 2.345  lr 0.015  bits/byte 1.394

    The time left is of the whole run. Tokens per second are those of all processes since the last window of
    `trainer.log_every_n_steps` steps, without validation. The loss is that of the last step (on a GPU of the last
    window, so that no step waits for the device), the learning rate that of the next step; the last field is of the
    last validation. A line that is too long omits the learning rate first.

    On a terminal the line is drawn in place. Elsewhere it is printed after each validation and about 20 times a run.
    """

    clock: Clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm[Any] | None = None  # while one is drawn on a terminal

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = self._printed = trainer.global_step
        self._started = self._edge = self.clock()
        self._first: int | None = None  # the step from which on the run is timed: the first one is slower
        self._tokens = pl_module.seen["tokens"]  # type: ignore[index]
        self._rate: float | None = None
        self._loss: Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:  # gradients are being accumulated
            return
        self._seen = step
        if self._first is None:
            self._first, self._started = step, self.clock()
        if at_window_edge(trainer):
            self._read_rate(pl_module)
        if at_window_edge(trainer) or pl_module.device.type == "cpu":
            self._loss = trainer.callback_metrics.get("train/loss")
        if not validates_now(trainer):
            every = (planned_steps(trainer) or 100 * LINES) / LINES
            self._show(trainer, due=int(step / every) > int(self._printed / every))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *more: Any
    ) -> None:
        self._show_batch(trainer, "validating", batch_idx, trainer.num_val_batches[0])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *more: Any
    ) -> None:
        self._show_batch(trainer, "testing", batch_idx, trainer.num_test_batches[0])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._close()
        elif not trainer.sanity_checking:
            self._edge, self._tokens = self.clock(), pl_module.seen["tokens"]  # type: ignore[index]
            self._show(trainer, due=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._printed:
            self._show(trainer, due=True)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _read_rate(self, pl_module: LightningModule) -> None:
        now, tokens = self.clock(), pl_module.seen["tokens"]  # type: ignore[index]
        self._rate = float(tokens - self._tokens) / max(now - self._edge, 1e-9)
        self._edge, self._tokens = now, tokens

    def _show(self, trainer: Trainer, due: bool, doing: str = "") -> None:
        """Draw the line, or print it where the output is not a terminal and it is `due`."""
        if self._enabled and (_is_terminal() or due):
            self._printed = trainer.global_step
            with contextlib.suppress(OSError):  # a pipe that nobody reads any more does not end a training
                self._draw(self._fields(trainer, doing), trainer.global_step, planned_steps(trainer), due)

    def _show_batch(self, trainer: Trainer, doing: str, batch_idx: int, batches: float) -> None:
        if not self._enabled or not _is_terminal() or trainer.sanity_checking:
            return
        text = f"{doing} {batch_idx + 1}/{batches}"
        if trainer.state.fn == TrainerFn.FITTING:
            self._show(trainer, False, text)
        else:
            self._draw([text], batch_idx + 1, batches, batch_idx + 1 == batches)

    def _draw(self, fields: list[str], done: int, total: float | None, due: bool) -> None:
        width = shutil.get_terminal_size().columns
        while len("  ".join(fields)) >= width and len(fields) > 2:
            del fields[-2]
        text = "  ".join(fields)
        if not _is_terminal():
            print(text, flush=True)
            return
        if self._bar is None:
            self._bar, self._drawn = tqdm(total=total, file=sys.stdout, ascii=" =", bar_format="{desc}"), -SECONDS
        if due or self.clock() - self._drawn >= SECONDS:
            self._drawn = self.clock()
            self._bar.ncols, self._bar.n = width - 1, done
            self._bar.bar_format = "{desc}  [{bar}]" if total and width - len(text) > BAR else "{desc}"
            self._bar.set_description_str(text)

    def _fields(self, trainer: Trainer, doing: str) -> list[str]:
        step, total = trainer.global_step, planned_steps(trainer)
        fields = [f"step {step}/{total}" if total else f"step {step}"]
        if (left := self._seconds_left(trainer)) is not None:
            fields.append(f"{tqdm.format_interval(left)} left")
        if self._rate is not None:
            fields.append(f"{tqdm.format_sizeof(self._rate)} tok/s")
        if self._loss is not None:
            fields.append(f"loss {float(self._loss):.3f}")
        if trainer.optimizers:
            fields.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2g}")
        found = trainer.callback_metrics
        quality = [f"{name} {found[key]:.3f}" for key, name in QUALITY.items() if key in found]
        return [*fields, doing or next(iter(quality), "not validated yet")]

    def _seconds_left(self, trainer: Trainer) -> float | None:
        """The time left by the steps so far, or by `max_time` if it ends the run first."""
        step, total, bounds = trainer.global_step, planned_steps(trainer), seconds_left(trainer)
        if total and self._first is not None and step > self._first:
            bounds.append((self.clock() - self._started) / (step - self._first) * (total - step))
        return min(bounds, default=None)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None if the process was started without
