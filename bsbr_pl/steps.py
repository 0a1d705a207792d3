"""Optimiser steps as the unit of a run: when it ends, when it validates, which training data it has read.

A run has epochs only if `max_epochs`, `limit_train_batches` or `overfit_batches` is set. Otherwise the training data is
an endless stream, and every optimiser step takes batch_size * accumulate_grad_batches samples of it.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

#: Callbacks that a run must not have: what they change, and what to use instead.
REFUSED = {
    GradientAccumulationScheduler: "changes the size of a step: use accumulate_grad_batches",
    StochasticWeightAveraging: "changes the weights after the last validation and checkpoint: use EMAWeightAveraging",
    ModelPruning: "changes the weights after the last validation and checkpoint: prune the weights of a finished run",
    BaseFinetuning: "trains only some of the parameters: use initial_weights, with which all are trained",
    LearningRateFinder: "changes the learning rate: set learning_rate",
    BatchSizeFinder: "changes the batch size: set batch_size",
}
NEVER = 1 << 62  # a number of batches that no run reaches


def has_epochs(trainer: Trainer) -> bool:
    """Whether the training data is divided into epochs."""
    limit: Any = trainer.limit_train_batches
    limited = isinstance(limit, int) or limit < 1  # 1 is one batch, 1.0 all of them
    return (trainer.max_epochs or -1) > 0 or limited or bool(trainer.overfit_batches)  # type: ignore[attr-defined]


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimiser steps of an epoch; the last may be short. None without epochs, or before the data is loaded."""
    batches = trainer.num_training_batches
    if not has_epochs(trainer) or batches == math.inf:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def planned(max_steps: int, max_epochs: int | None, epoch_steps: int | None) -> int | None:
    """Optimiser steps of a run; None if neither steps nor epochs bound it, or an epoch's length is not known yet."""
    bounds = [max_steps] if max_steps > 0 else []
    if (max_epochs or -1) > 0 and epoch_steps:
        bounds.append(max_epochs * epoch_steps)  # type: ignore[operator]
    return min(bounds, default=None)


def planned_steps(trainer: Trainer) -> int | None:
    """`planned` of a Trainer."""
    return planned(trainer.max_steps, trainer.max_epochs, steps_per_epoch(trainer))


def batches_taken(trainer: Trainer) -> int:
    """How many batches of the training stream (over all processes) the steps so far have read.

    Every step takes equally many batches, except the last of an epoch, so the number follows from the step: it does
    not depend on workers, processes or when a checkpoint was saved. With `overfit_batches`, every epoch reads the same
    batches.
    """
    step, epoch_steps = trainer.global_step, steps_per_epoch(trainer)
    if trainer.overfit_batches and epoch_steps:  # type: ignore[attr-defined]
        step %= epoch_steps
    return batches_of(trainer, step)


def batches_of(trainer: Trainer, steps: int) -> int:
    """How many batches so many steps read; the last step of each epoch may be short."""
    epoch_steps = steps_per_epoch(trainer)
    if epoch_steps is None:
        return steps * trainer.accumulate_grad_batches
    epochs, more = divmod(steps, epoch_steps)
    return epochs * int(trainer.num_training_batches) + more * trainer.accumulate_grad_batches


def arguments(trainer: Trainer, names: Iterable[str]) -> dict[str, Any]:
    """These arguments of a Trainer, which keeps all but `max_time` and `weight_averaging` as attributes."""
    found = {name: getattr(trainer, name, None) for name in names}
    clipping = found["gradient_clip_algorithm"]
    limits = [elapsed + remaining for elapsed, remaining in _times(trainer)]
    return found | {
        "gradient_clip_algorithm": getattr(clipping, "value", clipping),
        "max_time": round(min(limits), 2) if limits else None,  # elapsed and remaining are read one after the other
        "weight_averaging": weight_averaging(trainer.callbacks),  # type: ignore[attr-defined]
    }


def weight_averaging(callbacks: Iterable[Any]) -> dict[str, Any] | None:
    """The class of the callback that averages the weights, and by `.name` its settings; None without one."""
    found = next((callback for callback in callbacks if isinstance(callback, WeightAveraging)), None)
    if found is None:
        return None
    kept = {name.removeprefix("_"): value for name, value in vars(found).items()}
    for function in filter(callable, kept["kwargs"].values()):  # avg_fn, which alone knows the decay
        kept |= inspect.getclosurevars(inspect.unwrap(function)).nonlocals
    asked = {name for cls in type(found).__mro__[:-1] for name in inspect.signature(cls).parameters}
    return of_averaging(type(found), {name: value for name, value in kept.items() if name in asked})


def of_averaging(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`weight_averaging` of a class and its arguments; where the averages are kept changes none of them."""
    plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str | None)}
    return {"": cls.__name__} | {f".{name}": value for name, value in plain.items() if name != "device"}


def ended_by(trainer: Trainer) -> str:
    """What ended a run: `max_steps`, `max_epochs`, `max_time`, or the callback that stopped it."""
    if trainer.global_step == planned_steps(trainer):
        return "max_steps" if trainer.global_step == trainer.max_steps else "max_epochs"
    if any(remaining <= 0 for _, remaining in _times(trainer)):
        return "max_time"
    stopping = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return type(stopping[0]).__name__ if stopping else "should_stop"


def seconds_left(trainer: Trainer) -> list[float]:
    """Seconds until each `max_time` that bounds the run."""
    return [max(0.0, remaining) for _, remaining in _times(trainer)]


def _times(trainer: Trainer) -> list[tuple[float, float]]:
    """Seconds elapsed and seconds remaining of every Timer that bounds the run."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    times = [(timer.time_elapsed(), timer.time_remaining()) for timer in timers]
    return [(elapsed, remaining) for elapsed, remaining in times if remaining is not None]


def validation_follows(trainer: Trainer, step: int, every_n_epochs: int | None) -> bool:
    """Whether a validation is due after optimiser step number `step`.

    It is due after the last step and every `val_check_interval` steps. An interval below 1 is a share of an epoch, and
    then only every `every_n_epochs`-th epoch is validated.
    """
    interval, epoch_steps = validation_interval(trainer), steps_per_epoch(trainer)
    if step == planned_steps(trainer):
        return True
    if isinstance(interval, int):
        return step % interval == 0
    if epoch_steps is None or interval is None:
        return False
    every = max(1, int(epoch_steps * interval))
    epoch, step_of_epoch = divmod(step - 1, epoch_steps)
    due_epoch = (epoch + 1) % (every_n_epochs or 1) == 0
    return due_epoch and (step_of_epoch + 1) % every == 0


def validation_interval(trainer: Trainer) -> int | float | None:
    """A number of steps, a share of an epoch, or None for a time, which Lightning measures itself."""
    return getattr(trainer, "val_check_interval", None)  # a Trainer that was given a time lacks it


def check(trainer: Trainer) -> None:
    """Reject options that change the number of samples of a step, or the weights after the last validation.

    Raises:
        ValueError: naming the argument of the Trainer, its value and what to do.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    accumulate, ends = trainer.accumulate_grad_batches, has_epochs(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise ValueError(f"{type(callback).__name__} {reason}")
    for name in ("overfit_batches", "limit_train_batches"):
        limit = getattr(trainer, name)
        if isinstance(limit, int) and limit % accumulate and (trainer.max_epochs or -1) < 0:
            raise ValueError(
                f"{name}={limit} must be a multiple of accumulate_grad_batches={accumulate}: the batches of "
                "one step; or set max_epochs, which allows a short step at the end of each epoch"
            )
    interval, every = validation_interval(trainer), trainer.check_val_every_n_epoch or 1  # type: ignore[attr-defined]
    if not isinstance(interval, float) and every > 1:
        counted = "a time" if interval is None else f"val_check_interval={interval}, which counts optimiser steps"
        raise ValueError(
            f"check_val_every_n_epoch={every} has no effect beside {counted}: leave it out, or set val_check_interval "
            "to a share of an epoch, such as 1.0"
        )
    if isinstance(interval, float) and interval < 1 and not ends:
        raise ValueError(
            f"val_check_interval={interval:g} is a share of an epoch, but this run has no epochs: set a number of "
            "optimiser steps, or max_epochs"
        )


class StepLoop:
    """Makes a Trainer validate after optimiser steps and stop only between them.

    Lightning counts batches, and compares validation intervals with the length of an epoch. This class alone sets
    attributes of the Trainer and of its loops: `check_val_every_n_epoch`, `val_check_batch`, `should_stop` and
    `fit_loop.min_epochs`, all of them public.

    Args:
        trainer: before it fits.

    Raises:
        ValueError: naming an option of the Trainer that a run of whole steps cannot have.
    """

    def __init__(self, trainer: Trainer) -> None:
        check(trainer)
        self.trainer = trainer
        self.every_n_epochs: int | None = trainer.check_val_every_n_epoch  # type: ignore[attr-defined]
        self.stop_after_step = False
        trainer.check_val_every_n_epoch = None  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Give the Trainer back its option."""
        self.trainer.check_val_every_n_epoch = self.every_n_epochs  # type: ignore[attr-defined]

    def start(self, validated: int | None) -> None:
        """Training starts or resumes; the last validation was after the step `validated`."""
        if not has_epochs(self.trainer):
            self.trainer.fit_loop.min_epochs = 0  # Lightning sets 1 if min_steps is given, which is never reached
        self.validate_after_batch(validated == self.trainer.global_step)  # when resuming, Lightning asks once more

    def validate_after_batch(self, due: bool) -> None:
        """Say whether Lightning validates after the current batch."""
        if validation_interval(self.trainer) is not None:
            self.trainer.val_check_batch = 1 if due else NEVER
        elif due:  # the interval is a time, which Lightning measures; it validates when it is told to stop
            self.trainer.should_stop = True

    def validate_after_step(self) -> None:
        """Say whether Lightning validates after the current step, by `validation_follows`."""
        step = self.trainer.global_step + 1
        self.validate_after_batch(validation_follows(self.trainer, step, self.every_n_epochs))

    def end_batch(self, within_step: bool) -> None:
        """Postpone a stop that was asked for within a step, as max_time does, to the end of the step."""
        stop = self.trainer.should_stop or self.stop_after_step
        self.trainer.should_stop, self.stop_after_step = stop and not within_step, stop and within_step


def validates_now(trainer: Trainer) -> bool:
    """Whether the Trainer validates right after the current batch, as `StepLoop` told it."""
    return trainer.enable_validation and trainer.val_check_batch == 1
