"""StepTimer: seconds of a step, seconds of waiting for its data, tokens per second."""

from statistics import fmean
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer

from bsbr_pl.schema import check

from .step_windows import StepWindows, Window, log, over_ranks


class StepTimer(StepWindows):
    """Logs how long optimiser steps take, as means over `trainer.log_every_n_steps` of them.

        step/seconds             compute time of a step on the slowest process; on CUDA from events in the stream
        step/data_seconds        between two batches: the loader, Lightning and other callbacks; without the times that
                                 contain a validation or a checkpoint
        step/tokens_per_second   of all processes, data included
        step/p50_seconds, step/p95_seconds   at the end of training, over all its steps

    List it first: then the time of other callbacks counts as data, not as compute.

    Args:
        warmup_steps: optimiser steps at the start that are not timed.
    """

    def __init__(self, warmup_steps: int = 3) -> None:
        super().__init__(warmup_steps)
        self._all: list[float] = []

    def on_window(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        self._all += window.seconds
        metrics = {"step/seconds": fmean(window.seconds)}
        if window.waits:
            metrics["step/data_seconds"] = fmean(window.waits)
        (tokens,) = over_ranks(trainer, [window.tokens], "sum")
        log(trainer, metrics | {"step/tokens_per_second": tokens / len(window.seconds) / sum(metrics.values())})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._all:
            p50, p95 = np.quantile(self._all, [0.5, 0.95])
            log(trainer, {"step/p50_seconds": float(p50), "step/p95_seconds": float(p95)}, constant=True)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._all}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check(state_dict, {"seconds": [(int, float)]}, "the checkpoint's state of StepTimer")
        self._all = list(state_dict["seconds"])
