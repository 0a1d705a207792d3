"""StepTimer: seconds of a step and of the wait for its data, tokens a second."""

from statistics import fmean
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer

from .step_windows import StepWindows, Window, log, over_ranks


class StepTimer(StepWindows):
    """Logs how long optimiser steps take, as means over `trainer.log_every_n_steps` of them.

        step/seconds             work of a step, by the slowest process; on CUDA from events in the stream
        step/data_seconds        between two batches: the loader, and what Lightning and other callbacks do there;
                                 waits that hold a validation or a checkpoint are left out
        step/tokens_per_second   of all processes, data included
        step/p50_seconds, step/p95_seconds   at the end of training, over all its steps

    List it first, so that other callbacks' work falls between steps.

    Args:
        warmup_steps: optimiser steps at the start that are not counted.
    """

    def __init__(self, warmup_steps: int = 3) -> None:
        super().__init__(warmup_steps)
        self._all: list[float] = []

    def on_window(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        self._all += window.seconds
        seconds, wait = fmean(window.seconds), fmean(window.waits) if window.waits else None
        (tokens,) = over_ranks(trainer, [window.tokens], "sum")
        metrics = {
            "step/seconds": seconds,
            "step/tokens_per_second": tokens / len(window.seconds) / (seconds + (wait or 0.0)),
        }
        if wait is not None:
            metrics["step/data_seconds"] = wait
        log(trainer, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._all:
            p50, p95 = np.quantile(self._all, [0.5, 0.95])
            log(trainer, {"step/p50_seconds": float(p50), "step/p95_seconds": float(p95)})

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._all}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._all = list(state_dict["seconds"])
