"""A loss that is no number ends the run, says where it came from, and reaches no checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import FiniteLoss, LastCheckpoint


def broken_at(module, step, value):
    """The module, with a loss of `value` at one step."""
    right = module.training_step

    def training_step(batch, batch_idx):
        loss = right(batch, batch_idx)
        return loss * value if module.global_step == step else loss

    module.training_step = training_step
    return module


class Samples(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.last = batch["index"].tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_step_the_samples_and_the_last_checkpoint_are_named(make_data, make_module, make_trainer, tmp_path, value):
    samples, last = Samples(), tmp_path / "checkpoints" / "last.ckpt"
    best = ModelCheckpoint(tmp_path / "checkpoints", filename="best", monitor="val/loss", save_on_exception=True)
    trainer = make_trainer(callbacks=[samples, FiniteLoss(), best, LastCheckpoint(2)], enable_checkpointing=True)
    module = broken_at(make_module(), 5, value)
    with pytest.raises(ValueError, match="the loss is") as error:
        trainer.fit(module, make_data())
    ids = ", ".join(map(str, samples.last))
    assert str(error.value) == (
        f"the loss is {value} at step 5, on the training samples {ids}: lower learning_rate; the last good checkpoint "
        f"is {last}"
    )
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert all(p.isfinite().all() for p in module.parameters()), "the step was not taken"


def test_without_a_checkpoint_it_says_so(make_data, make_module, make_trainer):
    with pytest.raises(ValueError, match="nothing was saved yet"):
        make_trainer(callbacks=FiniteLoss()).fit(broken_at(make_module(), 0, float("nan")), make_data())


class Poison(Callback):
    """As an infinite gradient would: the weights are NaN after a step whose loss was finite."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            pl_module.model.embedding.weight.data.fill_(float("nan"))


def test_weights_that_are_not_finite_are_not_saved(make_data, make_module, make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Poison(), FiniteLoss(), LastCheckpoint(2)], enable_checkpointing=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"embedding.weight is not finite after 4 steps: .* checkpoint is .*last.ckpt"):
        trainer.fit(make_module(), make_data())
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 2
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


class OnDevice:
    """A loss that is not on a CPU: reading it too often would be waiting for it."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, value):
        self.value = value

    def detach(self):
        return torch.tensor(self.value)


@pytest.mark.parametrize("saved", [False, True])
def test_on_a_device_losses_are_read_together_and_before_a_checkpoint(saved):
    guard, losses = FiniteLoss(), [1.0, float("nan"), float("nan"), 1.0]
    trainer = SimpleNamespace(log_every_n_steps=4, checkpoint_callbacks=[], ckpt_path=None)

    def step(i):
        trainer.global_step = i
        guard.on_train_batch_start(trainer, None, {"index": torch.tensor([10 * i, 10 * i + 1])}, i)
        guard.on_before_backward(trainer, None, OnDevice(losses[i]))
        trainer.global_step = i + 1
        guard.on_train_batch_end(trainer, None, None, None, i)

    for i in range(3):
        step(i)
    with pytest.raises(ValueError, match="the loss is nan at step 1, on the training samples 10, 11:"):
        guard.on_save_checkpoint(trainer, None, {"state_dict": {}}) if saved else step(3)
