"""FlopCounter: the FLOPs of a model, by two tools and by its closed form, and the utilization of the device."""

from contextlib import suppress
from statistics import fmean
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bsbr_pl.data.base import IGNORED
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.flops import count_flops, matmul_peak
from bsbr_pl.utils.macs import count_macs

from .step_windows import StepWindows, Window, log, over_ranks

TOLERANCE = 0.02  # a larger relative difference between a tool and the closed form gives a warning


class FlopCounter(StepWindows):
    """Logs once, for one forward pass over one sequence of the training length:

        flops/forward_macs                    multiply-adds, by fvcore with the formulas of `bsbr_pl.utils.macs`
        flops/forward_flops                   2 a multiply-add, by torch's FlopCounterMode
        flops/forward_closed_form_flops       2 a multiply-add, by the model's own formula, if it has one
        flops/forward_elementwise_operations  the rest of the arithmetic, by fvcore: norms, softmax, additions, ...
        flops/uncounted_operators             calls of operators that fvcore has no formula for; their names are printed

    and for training, without what a kernel computes again in the backward pass:

        flops/step_flops                      forward and backward of one optimiser step, all processes, by the length
                                              and the share of asked positions of the first batch
        flops/peak_flops_per_second           measured: the best matrix product on this device
        flops/utilization                     FLOPs per second of training / peak, at every window, data included

    Args:
        warmup_steps: optimiser steps at the start that are not timed.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._flops_per_token: float | None = None  # of training
        self._peak = 0.0
        self._step_flops_logged = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._flops_per_token is None:
            self._count(trainer, pl_module, batch)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_window(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        (tokens,) = over_ranks(trainer, [window.tokens], "sum")
        if not (trainer.is_global_zero and self._flops_per_token):
            return
        steps = len(window.seconds)
        seconds = fmean(window.seconds) + (fmean(window.waits) if window.waits else 0.0)
        rate = self._flops_per_token * window.tokens / steps / seconds
        self._peak = max(self._peak, rate)  # training can reach more than the measured product
        if not self._step_flops_logged:
            self._step_flops_logged = True
            log(trainer, {"flops/step_flops": self._flops_per_token * tokens / steps}, constant=True)
        log(trainer, {"flops/utilization": rate / self._peak})

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._flops_per_token = 0.0
        assert isinstance(pl_module, LanguageModule)
        model, input_ids = pl_module.whole_model(), batch["input_ids"][:1]
        length = input_ids.shape[1]
        if not trainer.is_global_zero:
            return
        closed = None
        with suppress(NotImplementedError):
            closed = model.flops(length)
        try:
            macs, flops = count_macs(model, input_ids), count_flops(model, input_ids)
            unasked = (
                1 - (batch["targets"] != IGNORED).double().mean() if "slice" in batch else 0.0
            )  # they have no logits
            of_head = 3 * 2 * model.embedding.weight.numel()
            self._flops_per_token = float(count_flops(model, input_ids, backward=True) / length - unasked * of_head)
        except Exception as error:
            if closed is not None:
                raise
            rank_zero_warn(f"FlopCounter cannot count this model, whose FLOPs stay absent: {str(error)[:200]}")
            return
        self._peak = matmul_peak(pl_module.device, _dtype(str(trainer.precision)))
        for tool, counted in (("fvcore", 2 * macs.total), ("torch", flops)):
            if closed is not None and abs(counted - closed) > TOLERANCE * closed:
                rank_zero_warn(f"{tool} counts {counted:,} FLOPs at {length} tokens, the closed form says {closed:,}")
        if macs.uncounted:
            names = ", ".join(f"{name} ({calls})" for name, calls in sorted(macs.uncounted.items()))
            rank_zero_info(f"FlopCounter: fvcore has no formula for {names}")
        metrics = {
            "flops/forward_macs": macs.total,
            "flops/forward_flops": flops,
            **({} if closed is None else {"flops/forward_closed_form_flops": closed}),
            "flops/forward_elementwise_operations": sum(macs.elementwise.values()),
            "flops/uncounted_operators": sum(macs.uncounted.values()),
            "flops/peak_flops_per_second": self._peak,
        }
        log(trainer, metrics, constant=True)


def _dtype(precision: str) -> torch.dtype:
    """The dtype of products under a Trainer's precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision.split("-")[0], torch.float32)
