"""Optimiser steps as the unit of a run: where it ends, when it validates, where it stands in the training data.

A run has no epochs unless they are asked for (`max_epochs`, `limit_train_batches` or `overfit_batches`): the training
data is an endless stream, and every optimiser step takes batch_size * accumulate_grad_batches samples of it.
"""

import math
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging, Timer

NEVER = 1 << 62  # a number of batches that no run reaches


def has_epochs(trainer: Trainer) -> bool:
    """Whether the training data ends, and begins again, after so many batches."""
    limit: Any = trainer.limit_train_batches
    limited = isinstance(limit, int) or limit < 1  # 1 is one batch, 1.0 all of them
    return (trainer.max_epochs or -1) > 0 or limited or bool(trainer.overfit_batches)  # type: ignore[attr-defined]


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimiser steps of an epoch, the last perhaps a short one; None where there are none or before data is loaded."""
    batches = trainer.num_training_batches
    if not has_epochs(trainer) or batches == math.inf:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def planned(max_steps: int, max_epochs: int | None, epoch_steps: int | None) -> int | None:
    """Optimiser steps after which a run ends; None where no number of steps or epochs bounds it, or is known yet."""
    bounds = [max_steps] if max_steps > 0 else []
    if (max_epochs or -1) > 0 and epoch_steps:
        bounds.append(max_epochs * epoch_steps)  # type: ignore[operator]
    return min(bounds, default=None)


def planned_steps(trainer: Trainer) -> int | None:
    """`planned` of a Trainer."""
    return planned(trainer.max_steps, trainer.max_epochs, steps_per_epoch(trainer))


def batches_taken(trainer: Trainer) -> int:
    """How many batches of the training stream (over all processes) went into the steps taken so far.

    It follows from the steps, because every step but an epoch's last takes equally many batches. So the place in the
    data is the same whatever the number of workers and processes, and wherever a checkpoint was saved. Where training
    overfits, every epoch begins with the first batch again.
    """
    epoch_steps = steps_per_epoch(trainer)
    if epoch_steps is None:
        return trainer.global_step * trainer.accumulate_grad_batches
    epoch, step = divmod(trainer.global_step, epoch_steps)
    before = 0 if trainer.overfit_batches else epoch * int(trainer.num_training_batches)  # type: ignore[attr-defined]
    return before + step * trainer.accumulate_grad_batches


def arguments(trainer: Trainer) -> dict[str, Any]:
    """What a Trainer was asked for, of what a run's description holds (`run.OF_TRAINER`)."""
    limits = [elapsed + remaining for elapsed, remaining in _times(trainer)]
    clipping = trainer.gradient_clip_algorithm
    return {
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "max_time": round(min(limits), 2) if limits else None,  # the clock went on between the two
        "precision": trainer.precision,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": getattr(clipping, "value", clipping),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "overfit_batches": trainer.overfit_batches,  # type: ignore[attr-defined]
        "limit_train_batches": trainer.limit_train_batches,
        "limit_val_batches": trainer.limit_val_batches,
    }


def ended_by(trainer: Trainer) -> str:
    """Why a run that has ended did so: `max_steps`, `max_epochs`, `max_time`, or the callback that stopped it."""
    if trainer.global_step == planned_steps(trainer):
        return "max_steps" if trainer.global_step == trainer.max_steps else "max_epochs"
    if any(remaining <= 0 for _, remaining in _times(trainer)):
        return "max_time"
    stopping = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return type(stopping[0]).__name__ if stopping else "should_stop"


def _times(trainer: Trainer) -> list[tuple[float, float]]:
    """Seconds trained and seconds left, of every Timer that bounds the run."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    times = [(timer.time_elapsed(), timer.time_remaining()) for timer in timers]
    return [(elapsed, remaining) for elapsed, remaining in times if remaining is not None]


def validation_follows(trainer: Trainer, step: int, every_n_epochs: int | None) -> bool:
    """Whether a validation is due once `step` optimiser steps are taken.

    It is after the last step, and every `val_check_interval` steps; a share (0.5) is one of an epoch, whole ones every
    `every_n_epochs` epochs.
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
    """A number of steps, a share of an epoch, or None for a time, which Lightning watches itself."""
    return getattr(trainer, "val_check_interval", None)  # which a Trainer lacks that was given a time


def check(trainer: Trainer) -> None:
    """Refuse what would make a step something else than batch_size * accumulate_grad_batches samples, or hide the end.

    Raises:
        ValueError: naming the argument of the Trainer, its value and what to do.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    accumulate, ends = trainer.accumulate_grad_batches, has_epochs(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError("GradientAccumulationScheduler changes the size of a step: use accumulate_grad_batches")
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                "StochasticWeightAveraging changes the weights after the last validation and checkpoint: "
                "use EMAWeightAveraging"
            )
    for name in ("overfit_batches", "limit_train_batches"):
        limit = getattr(trainer, name)
        if isinstance(limit, int) and limit % accumulate and (trainer.max_epochs or -1) < 0:
            raise ValueError(
                f"{name}={limit} must be a multiple of accumulate_grad_batches={accumulate}: a step takes as many "
                "batches; or set max_epochs, which allows a short step at the end of each epoch"
            )
    interval = validation_interval(trainer)
    if isinstance(interval, float) and interval < 1 and not ends:
        raise ValueError(
            f"val_check_interval={interval:g} is a share of an epoch, and this run has no epochs: give a number of "
            "optimiser steps, or set max_epochs"
        )
