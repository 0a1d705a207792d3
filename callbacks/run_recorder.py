"""RunRecorder: arguments, progress, environment and metrics of a run in one record.json."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from bsbr_pl.run_folder import run_folder
from bsbr_pl.schema import METRICS, check, check_columns
from bsbr_pl.steps import ended_by
from bsbr_pl.utils.files import read_json, write_json
from bsbr_pl.utils.records import environment, git_commit

STEP_TIMES = {"p50": "step/p50_seconds", "p95": "step/p95_seconds"}

STATE = {"metrics": METRICS, "seconds": (int, float), "facts?": Mapping}  # in a checkpoint


class History(Logger):
    """A logger that keeps every metric in memory: name -> steps, seconds since the run began, values."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self.started: float | None = None  # when training started or was resumed
        self.before = 0.0  # seconds of the run up to the checkpoint that it was resumed from
        self.metrics: dict[str, dict[str, list[Any]]] = {}

    # Lightning saves checkpoints in save_dir/name/version if this is the only logger: in save_dir, as without loggers.
    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def seconds(self) -> float:
        """Since the run began, over all its parts."""
        return self.before + (0.0 if self.started is None else time.perf_counter() - self.started)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            column = self.metrics.setdefault(name, {"step": [], "seconds": [], "value": []})
            column["step"].append(step)
            column["seconds"].append(self.seconds)
            column["value"].append(float(value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the record has the hyper-parameters already."""


class RunRecorder(Callback):
    """Writes record.json into the run's folder after each validation and at the end, atomically.

    It holds every logged metric with step and seconds; the run's arguments and progress (`LanguageModule.run`); the
    data's fingerprint; versions, machine and threads; the git commit, if the code is in a repository; `status`, and for
    a finished run what ended it (`ended_by`). The record of a resumed run includes its earlier parts. Checkpoints hold
    the same, up to their step. With fast_dev_run nothing is written.
    """

    def __init__(self) -> None:
        self._history: History | None = None
        self._facts: dict[str, Any] = {}
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self._history is None:
                self._history = History(str(trainer.default_root_dir))
            if self._history not in trainer.loggers:
                trainer.loggers = [*trainer.loggers, self._history]
            self._folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._history is None:
            return
        self._history.started = time.perf_counter()
        self._trained = True
        self._facts = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_from": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "resumed_at_step": trainer.global_step,
            "environment": {**environment(pl_module.device), "processes": trainer.world_size},
            "git": git_commit(),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "data_fingerprint": getattr(getattr(trainer, "datamodule", None), "fingerprint", None),
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._history is not None and (self._trained or not self._is_finished()):
            self._write(trainer, "finished", ended_by(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.global_step:  # a run that took no step leaves nothing
            self._write(trainer, f"stopped by {type(exception).__name__}: {exception}")

    def state_dict(self) -> dict[str, Any]:
        if self._history is None:
            return {}
        return {"metrics": self._history.metrics, "seconds": self._history.seconds, "facts": self._facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._history is not None and state_dict:
            check(state_dict, STATE, "the checkpoint's record")
            check_columns(state_dict["metrics"], "the checkpoint's record")
            self._history.metrics, self._history.before = state_dict["metrics"], state_dict["seconds"]
            self._facts = state_dict.get("facts", {})  # where training is over already, nothing else is known

    def _is_finished(self) -> bool:
        """Whether the record says that the run is finished; a resumed run without further steps must not change it."""
        return read_json(self._folder / "record.json").get("status") == "finished"

    def _write(self, trainer: Trainer, status: str, ended: str | None = None) -> None:
        if self._history is None or not self._facts or not trainer.is_global_zero:
            return
        metrics = self._history.metrics
        last = {name: metrics[key]["value"][-1] for name, key in STEP_TIMES.items() if key in metrics}
        record = {
            "status": status,
            "ended_by": ended,
            "run": getattr(trainer.lightning_module, "run", None),
            "steps": trainer.global_step,
            "seconds": self._history.seconds,
            "step_seconds": last or None,
            **self._facts,
            "metrics": metrics,
        }
        write_json(self._folder / "record.json", {name: value for name, value in record.items() if value is not None})
