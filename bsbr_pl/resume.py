"""ResumableModule: what a checkpoint keeps of its run, and how the run is resumed from it."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from . import steps
from .run import (
    OF_TRAINER,
    Arguments,
    applied_differences,
    check_resumable,
    check_same_model,
    model_arguments,
    run_arguments,
    run_of,
)


class ResumableModule(LightningModule):
    """A LightningModule whose checkpoints keep the run: its arguments, its progress, its dropout seed."""

    def __init__(self) -> None:
        super().__init__()
        self.initial_weights: str | None = None  # name and digest of the file that they were read from
        self.dropout_seed: int | None = None
        self.seen = {"tokens": 0, "samples": 0}  # trained on, over all processes
        self.changes: list[dict[str, Any]] = []  # of arguments, by resumes
        self.validated: int | None = None  # the step of the last validation
        self._stage: str | None = None  # of the Trainer, if there is one
        self.restoring = False  # a checkpoint was loaded, and nothing was computed from it yet

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has divided the weights among the processes."""
        return any(isinstance(part, FSDPModule) for part in self.modules())

    def setup(self, stage: str) -> None:
        self._stage = stage

    @property
    def run(self) -> dict[str, Any]:
        """What the run was asked to do and what it has done, as its checkpoints and its record.json hold it.

        `arguments` are those of bsbr_pl.run; `changes` what resumes changed, with the step; `planned_steps` when the
        run ends, None where no number of steps or epochs says so; `step` and the `tokens` and `samples` trained on so
        far; `validated` the step of the last validation.
        """
        return {
            "arguments": self._arguments(),
            "changes": self.changes,
            "planned_steps": steps.planned_steps(self.trainer),
            "epoch_steps": steps.steps_per_epoch(self.trainer),
            "step": self.trainer.global_step,
            "validated": self.validated,
            **self.seen,
        }

    def _arguments(self) -> Arguments:
        data: Any = getattr(self.trainer, "datamodule", None)
        of_data = {} if data is None else dict(data.hparams)
        if "batch_size" in of_data:
            of_data["batch_size"] = data.batch_size  # a BatchSizeFinder changes it
        data_class = None if data is None else type(data).__name__
        trainer = steps.arguments(self.trainer, OF_TRAINER)
        found = run_arguments(self.hparams, data_class, of_data, trainer, seed(), self.initial_weights)
        return found | {"data.fingerprint": getattr(data, "fingerprint", None)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the run, and name the parameters that the optimiser's state belongs to.

        Lightning numbers them by their place in the optimiser's groups, but FSDP2 by their place in the model.
        """
        checkpoint |= {"dropout_seed": self.dropout_seed, "initial_weights": self.initial_weights, "run": self.run}
        if not self.is_sharded:
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            for optimizer, saved in zip(self.trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
                _name_parameters(optimizer, saved, names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the progress, the changes and the dropout seed.

        Raises:
            ValueError: naming the fixed arguments that differ (of an evaluation, only those of the model), or those
                that explain why the weights do not fit.
        """
        self.restoring = True
        if self._stage:  # fp64 weights are not rounded by a module that becomes fp64 only later
            self.trainer.precision_plugin.convert_module(self)
        if self._stage == "fit":
            run, now = run_of(checkpoint), self._arguments()
            before = run["arguments"]
            check_resumable(before, now)
            self.seen = {name: run[name] for name in self.seen}
            self.validated = run["validated"]
            self.changes = [*run["changes"], *applied_differences(before, now, checkpoint["global_step"])]
            _check_parts(checkpoint)
            for saved in checkpoint.get("optimizer_states", ()):
                self._check_state(saved)
        elif self._stage:  # weights of equal shapes may be those of another model, with another window for example
            check_same_model(model_arguments(checkpoint["hyper_parameters"]), model_arguments(self.hparams))
        self._check_fit(checkpoint)
        self.dropout_seed = checkpoint.get("dropout_seed")
        self.initial_weights = checkpoint.get("initial_weights")

    def _check_state(self, saved: dict[str, Any]) -> None:
        """Raise a ValueError where an optimiser's state is not that of this model's parameters."""
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        named = {name for group in saved["param_groups"] for name in group["params"]}
        moments = [(name, value) for name, values in saved["state"].items() for value in values.values()]
        unequal = [name for name, value in moments if value.dim() and shapes.get(name, value.shape) != value.shape]
        if unequal or saved["state"].keys() - named:
            raise ValueError("the optimiser's state in the checkpoint is not that of its weights")

    def check_restored(self, optimizer: Optimizer) -> None:
        """Raise a ValueError where the first step after a resume has a gradient of a parameter without moments."""
        if self.restoring and optimizer.state:
            for name, parameter in self.named_parameters():
                if parameter.grad is not None and not optimizer.state.get(parameter):
                    raise ValueError(f"the optimiser's state in the checkpoint lacks {name}")

    def _check_fit(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        weights = checkpoint.get("state_dict", own)  # fsdp2 has loaded them already
        unknown = sorted(map(str, weights.keys() ^ own.keys()))
        if not unknown and all(weights[name].shape == own[name].shape for name in own):
            return
        with torch.device("meta"):
            saved = type(self)(**checkpoint["hyper_parameters"]).hparams  # with the defaults of later arguments
        other = [f"{name}={value!r}" for name, value in saved.items() if self.hparams.get(name, value) != value]
        if not other:
            which = f"{unknown[0]} is not in both" if unknown else "a size differs"
            raise ValueError(f"the checkpoint's weights are not those of its model: {which}")
        raise ValueError(f"the checkpoint's weights do not fit this model, but one with {', '.join(other)}")


def _check_parts(checkpoint: Mapping[str, Any]) -> None:
    """Raise a ValueError where the state of the loops, of the optimiser or of the schedule is missing.

    Lightning would start them anew. A sharded checkpoint has the optimiser's state in files of its own.
    """
    loops = checkpoint.get("loops")
    if not isinstance(loops, dict) or "fit_loop" not in loops:
        raise ValueError("the checkpoint lacks the state of its training loop")
    _check_counts(loops)
    for name in ("optimizer_states", "lr_schedulers"):
        if name in checkpoint and len(checkpoint[name]) != 1:
            raise ValueError(f"the checkpoint must have one entry of {name}, and has {len(checkpoint[name])}")


def _check_counts(loops: Any) -> None:
    """Raise a ValueError where a count in the state of Lightning's loops is no whole number."""
    for name, value in loops.items() if isinstance(loops, dict) else ():
        if name in ("ready", "started", "processed", "completed") and type(value) is not int:
            raise ValueError(f"the checkpoint's loops have {name}={str(value)[:80]}, which is no whole number")
        _check_counts(value)


def seed() -> int | None:
    """The seed of Lightning's seed_everything; None if nothing was seeded."""
    value = os.environ.get("PL_GLOBAL_SEED")
    return int(value) if value else None


def _name_parameters(optimizer: Optimizer, saved: dict[str, Any], names: dict[int, str]) -> None:
    """Replace the numbers of parameters in an optimiser's saved state by their names."""
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    saved["state"] = {order[i]: state for i, state in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [order[i] for i in group["params"]]
