"""When a run ends and validates and what it has read, against counting step by step."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, Timer

from bsbr_pl import steps
from bsbr_pl.run import OF_TRAINER, run_arguments


def trainer(batches: int = 7, **options: Any) -> Any:
    """A Trainer whose loader has so many batches."""
    defaults = {
        **{"max_steps": -1, "max_epochs": -1, "accumulate_grad_batches": 1, "global_step": 0, "callbacks": []},
        **{"limit_train_batches": 1.0, "overfit_batches": 0.0, "val_check_interval": 1.0},
    }
    return SimpleNamespace(num_training_batches=batches, **defaults | options)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, False),
        ({"max_steps": 5}, False),
        ({"max_epochs": None}, False),
        ({"max_epochs": 1}, True),
        ({"limit_train_batches": 1}, True),
        ({"limit_train_batches": 0.5}, True),
        ({"overfit_batches": 2}, True),
    ],
)
def test_what_has_epochs(options, epochs):
    assert steps.has_epochs(trainer(**options)) is epochs
    assert steps.steps_per_epoch(trainer(**options)) == (7 if epochs else None)
    assert steps.steps_per_epoch(trainer(float("inf"), **options)) is None


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((-1, -1, 4), None), ((-1, None, 4), None), ((9, -1, 4), 9), ((9, 2, 4), 8), ((7, 2, 4), 7), ((-1, 3, 4), 12),
     ((9, 2, None), 9), ((-1, 1, 4), 4), ((1, -1, None), 1)],
)  # fmt: skip
def test_planned_steps(bounds, expected):
    assert steps.planned(*bounds) == expected


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("overfit", [0, 4])
def test_batches_that_were_read(accumulate, overfit):
    """Step by step: each takes `accumulate` batches, the last of an epoch what is left of 7."""
    in_epochs = trainer(max_epochs=9, accumulate_grad_batches=accumulate, overfit_batches=overfit)
    read = left = total = 0
    for step in range(20):
        if not left:
            read, left = (0 if overfit else read), 7
        in_epochs.global_step = step
        assert steps.batches_taken(in_epochs) == read
        assert steps.batches_of(in_epochs, step) == total
        taken = min(accumulate, left)
        read, left, total = read + taken, left - taken, total + taken
        stream = trainer(accumulate_grad_batches=accumulate, global_step=step)
        assert steps.batches_taken(stream) == step * accumulate


@pytest.mark.parametrize(
    ("interval", "every", "options", "expected"),
    [
        (3, None, {"max_steps": 10}, [3, 6, 9, 10]),
        (3, 1, {"max_epochs": 2}, [3, 6, 9, 12, 14]),
        (1.0, 1, {"max_epochs": 2}, [7, 14]),
        (0.5, 1, {"max_epochs": 2}, [3, 6, 10, 13, 14]),
        (0.5, 2, {"max_epochs": 3}, [10, 13, 21]),
        (0.01, None, {"max_epochs": 1}, [1, 2, 3, 4, 5, 6, 7]),
        (0.5, 1, {"max_steps": 10}, [10]),
        (None, 1, {"max_epochs": 2}, [14]),
    ],
)
def test_steps_after_which_a_validation_follows(interval, every, options, expected):
    subject = trainer(val_check_interval=interval, **options)
    end = steps.planned_steps(subject)
    assert [step for step in range(1, end + 1) if steps.validation_follows(subject, step, every)] == expected


@pytest.mark.parametrize(("interval", "words"), [(3, "val_check_interval=3, which counts optimiser steps"),
                                                 (None, "a time")])  # fmt: skip
def test_epochs_between_validations_are_refused_where_steps_or_a_time_say_when(interval, words):
    options = {"max_epochs": 4, "fast_dev_run": False, "val_check_interval": interval}
    with pytest.raises(ValueError, match=f"^check_val_every_n_epoch=2 has no effect beside {words}: leave it out, or"):
        steps.check(trainer(check_val_every_n_epoch=2, **options))
    steps.check(trainer(check_val_every_n_epoch=1, **options))
    steps.check(trainer(check_val_every_n_epoch=2, **options | {"val_check_interval": 1.0}))


def timer(remaining: float | None) -> Timer:
    found = Timer("00:00:01:00")
    found.time_elapsed, found.time_remaining = (
        (lambda stage=None: 60.0 - (remaining or 0.0)),
        (lambda stage=None: remaining),
    )
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 5, "global_step": 5}, "max_steps"),
        ({"max_epochs": 2, "global_step": 14}, "max_epochs"),
        ({"max_steps": 14, "max_epochs": 2, "global_step": 14}, "max_steps"),
        ({"max_steps": 9, "global_step": 5, "callbacks": [timer(0.0)]}, "max_time"),
        ({"max_steps": 9, "global_step": 5, "callbacks": [timer(8.0), EarlyStopping("a")]}, "EarlyStopping"),
        ({"max_steps": 9, "global_step": 5, "callbacks": [timer(None)]}, "should_stop"),
    ],
)
def test_what_ended_a_run(options, expected):
    assert steps.ended_by(trainer(**options)) == expected


def test_arguments_of_a_trainer():
    given = {"max_steps": 5, "max_epochs": 2, "precision": "32-true", "gradient_clip_val": 1.0}
    given |= {"accumulate_grad_batches": 3, "overfit_batches": 2, "limit_train_batches": 4, "limit_val_batches": 6}
    algorithm = SimpleNamespace(value="norm")
    subject = trainer(**given, gradient_clip_algorithm=algorithm, callbacks=[timer(20.0), timer(35.0), timer(None)])
    expected = given | {"gradient_clip_algorithm": "norm", "max_time": 60.0, "weight_averaging": None}
    assert steps.arguments(subject, OF_TRAINER) == expected
    subject.callbacks = []
    assert steps.arguments(subject, OF_TRAINER)["max_time"] is None


def test_arguments_of_a_run_name_the_class_of_its_data():
    data = {"batch_size": 4, "lengths": (1, (2, 3)), "_instantiator": "x"}
    given = steps.arguments(trainer(max_steps=5), OF_TRAINER)
    found = run_arguments({"attention": "standard", "dropout": 0.1}, "MQARData", data, given, 7, None)
    assert (found["model.attention"], found["trainer.max_steps"]) == ("standard", 5)
    assert {name: found[name] for name in found if not name.startswith(("trainer.", "model.attention"))} == {
        "model.dropout": 0.1, "data.class": "MQARData", "data.batch_size": 4, "data.lengths": [1, [2, 3]],
        "seed": 7, "initial_weights": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "epochs"), [({}, 1000), ({"max_steps": 5}, -1), ({"max_time": 60.0}, -1), ({"max_epochs": 3}, 3)]
)
def test_a_run_without_bounds_has_as_many_epochs_as_lightning_gives_it(options, epochs):
    """`max_epochs` of Lightning's Trainer: 1000 by default, and without a limit (-1) beside another bound."""
    given = steps.arguments(trainer(**{"max_epochs": None, **options}), OF_TRAINER)
    found = run_arguments({"attention": "standard"}, None, {}, given | options, None, None)
    assert found["trainer.max_epochs"] == epochs
