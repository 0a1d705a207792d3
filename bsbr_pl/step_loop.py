"""Lightning's training loop, counted in optimiser steps."""

from lightning import Trainer

from . import steps

NEVER = 1 << 62  # a number of batches that no run reaches


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
        steps.check(trainer)
        self.trainer = trainer
        self.every_n_epochs: int | None = trainer.check_val_every_n_epoch  # type: ignore[attr-defined]
        self.stop_after_step = False
        trainer.check_val_every_n_epoch = None  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Give the Trainer back its option."""
        self.trainer.check_val_every_n_epoch = self.every_n_epochs  # type: ignore[attr-defined]

    def start(self, validated: int | None) -> None:
        """Training starts or resumes; the last validation was after the step `validated`."""
        if not steps.has_epochs(self.trainer):
            self.trainer.fit_loop.min_epochs = 0  # Lightning sets 1 if min_steps is given, which is never reached
        self.validate_after_batch(validated == self.trainer.global_step)  # when resuming, Lightning asks once more

    def validate_after_batch(self, due: bool) -> None:
        """Say whether Lightning validates after the current batch."""
        if steps.validation_interval(self.trainer) is not None:
            self.trainer.val_check_batch = 1 if due else NEVER
        elif due:  # the interval is a time, which Lightning measures; it validates when it is told to stop
            self.trainer.should_stop = True

    def validate_after_step(self) -> None:
        """Say whether Lightning validates after the current step, by `steps.validation_follows`."""
        step = self.trainer.global_step + 1
        self.validate_after_batch(steps.validation_follows(self.trainer, step, self.every_n_epochs))

    def end_batch(self, within_step: bool) -> None:
        """Postpone a stop that was asked for within a step, as max_time does, to the end of the step."""
        stop = self.trainer.should_stop or self.stop_after_step
        self.trainer.should_stop, self.stop_after_step = stop and not within_step, stop and within_step


def validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates right after the current batch, as `StepLoop` told it."""
    return trainer.enable_validation and trainer.val_check_batch == 1
