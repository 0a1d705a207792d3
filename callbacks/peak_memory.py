"""PeakMemory: the most memory that a training step takes, and in which of its phases."""

from contextlib import ExitStack
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from bsbr_pl.utils.memory import CudaMemory, LiveTensors, PhasePeaks, peak_resident_bytes

from .step_windows import at_window_edge, log, over_ranks


class PeakMemory(Callback):
    """Logs peak memory, the largest of all processes. Every number is measured.

    On CUDA, the allocator's peaks since the last window of `trainer.log_every_n_steps`:

        memory/peak_bytes, memory/forward_peak_bytes, memory/backward_peak_bytes, memory/optimizer_peak_bytes

    On other devices, the bytes of live tensors (parameters, gradients, optimiser state, activations) during one step,
    and the peak of the process's physical memory so far:

        memory/peak_tensor_bytes, memory/forward_peak_tensor_bytes, ...      once
        memory/peak_resident_bytes                                           at every window

    Args:
        probe_step: the optimiser step of this run, from 0, whose tensors are counted. Step 0 has no optimiser state
            yet. A counted step takes longer than others.

    Raises:
        ValueError: if `probe_step` is negative.
    """

    def __init__(self, probe_step: int = 1) -> None:
        if probe_step < 0:
            raise ValueError(f"probe_step must be 0 or more, got {probe_step}")
        self.probe_step = probe_step
        self._phases: PhasePeaks | None = None
        self._live: LiveTensors | None = None
        self._counting = ExitStack()  # the entered `_live`

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step
        self._probed = trainer.global_step + self.probe_step
        self._live = None
        self._phases = PhasePeaks(CudaMemory(pl_module.device)) if pl_module.device.type == "cuda" else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type != "cuda" and trainer.global_step == self._probed:
            if self._live is None:
                self._live = LiveTensors(pl_module, *trainer.optimizers, batch)
                self._phases = PhasePeaks(self._live)
            self._counting.enter_context(self._live)
        self._enter("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._enter("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._enter("optimizer")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._enter(None)
        self._counting.close()
        if trainer.global_step == self._seen:  # gradients are being accumulated
            return
        self._seen = trainer.global_step
        if self._live is not None:
            self._log_peaks(trainer, "peak_tensor_bytes")
            self._live = self._phases = None
        if at_window_edge(trainer):
            self._log_window(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not at_window_edge(trainer):
            self._log_window(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._counting.close()

    def _log_window(self, trainer: Trainer) -> None:
        if self._phases is not None:
            self._log_peaks(trainer, "peak_bytes")
        elif (resident := peak_resident_bytes()) is not None:
            log(trainer, {"memory/peak_resident_bytes": over_ranks(trainer, [resident], "max")[0]})

    def _log_peaks(self, trainer: Trainer, unit: str) -> None:
        assert self._phases is not None
        peaks = self._phases.read()
        if peaks:
            largest = over_ranks(trainer, list(peaks.values()), "max")
            by_phase = {f"memory/{phase}_{unit}": value for phase, value in zip(peaks, largest, strict=True)}
            log(trainer, {f"memory/{unit}": max(largest), **by_phase}, constant=self._live is not None)

    def _enter(self, phase: str | None) -> None:
        if self._phases is not None:
            self._phases.enter(phase)
