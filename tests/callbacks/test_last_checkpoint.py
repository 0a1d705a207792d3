"""A run that is resumed from any last.ckpt takes the steps that it would have taken: weights, samples, curves."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import LastCheckpoint, RunRecorder, StepTimer, Stopped


class Copies(Checkpoint):
    """Keeps a copy of every last.ckpt, by step. List it behind LastCheckpoint."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def _copy(self, trainer, *_) -> None:
        last = trainer.checkpoint_callbacks[0].last_model_path
        if last:
            step = torch.load(last, weights_only=True)["global_step"]
            shutil.copy(last, self.folder / f"{step}.ckpt")

    on_train_batch_end = on_validation_end = on_train_end = _copy


class Seen(Callback):
    """The samples of each batch, and the learning rate."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.global_step, batch["index"].tolist(), trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.fixture
def fit(make_module, make_data, make_trainer, tmp_path):
    """Train in a folder of its own; what came of it."""

    def run(name, resume=None, num_workers=0, more=(), every_n_steps=1, **options):
        recorder, seen = RunRecorder(), Seen()
        used = [seen, recorder, LastCheckpoint(every_n_steps), *more]
        settings = {"max_steps": 11, "val_check_interval": 4, "limit_train_batches": 7, "log_every_n_steps": 1}
        settings |= {"enable_checkpointing": True, "logger": TensorBoardLogger(tmp_path, name, version="run")}
        trainer = make_trainer(callbacks=used, **settings | options)
        module = make_module(dropout=0.2, seed=0 if resume is None else 1)
        if resume is None:
            torch.manual_seed(5)  # decides the dropout, and a resumed run cannot know it
        data = make_data(num_workers=num_workers)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
        curves = {key: (c["step"], c["value"]) for key, c in recorder._history.metrics.items()}
        optimizer = trainer.optimizers[0].state_dict() if trainer.optimizers else None
        return module.state_dict(), optimizer, curves, seen.batches

    return run


def same(one, other):
    """Equal bit for bit, however nested."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


EPOCHS = {"max_steps": -1, "max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": 1}


@pytest.mark.parametrize(
    ("options", "resumed_at"),
    [
        ({}, [3, 4, 7, 8, 11]),  # epochs end at steps 7 and 14, validations come at 4 and 8, training ends at 11
        ({"val_check_interval": 7}, [6, 7]),  # at the end of an epoch
        ({"accumulate_grad_batches": 2, "limit_train_batches": 1.0}, [1, 4, 7, 8, 11]),  # a stream without epochs
        ({"accumulate_grad_batches": 2, **EPOCHS}, [1, 2, 4, 5]),  # an epoch's last batch is a step alone
        ({"limit_val_batches": 0}, [7]),
        (EPOCHS, [3, 7, 13, 14]),  # the length of the schedule follows from that of an epoch
        ({"num_workers": 1, "log_every_n_steps": 2}, [5, 7]),
    ],
    ids=[
        "steps",
        "validation at an epoch's end",
        "accumulation",
        "accumulation in epochs",
        "no validation",
        "epochs",
        "worker",
    ],
)
def test_resumed_from_any_step_equals_uninterrupted(fit, tmp_path, options, resumed_at):
    saved = tmp_path / "saved"
    saved.mkdir()
    weights, optimizer, curves, batches = fit("whole", more=[Copies(saved)], **options)
    last = batches[-1][0] + 1
    assert {path.stem for path in saved.iterdir()} == {str(step) for step in range(1, last + 1)}
    assert len(curves["train/loss"][0]) == last // options.get("log_every_n_steps", 1)
    for step in resumed_at:
        resumed = fit(f"from_{step}", str(saved / f"{step}.ckpt"), **options)
        assert resumed[3] == [batch for batch in batches if batch[0] >= step]
        assert same(resumed[0], weights)
        assert step == last or same(resumed[1], optimizer)  # without a step there is no optimiser to ask
        assert same(resumed[2], curves)


class Do(Callback):
    """Calls a function at the start of one batch's step."""

    def __init__(self, batch, action) -> None:
        self.batch, self.action, self.count = batch, action, 0

    def on_train_batch_start(self, *_):
        self.count += 1
        if self.count == self.batch:
            self.action()


class DoInValidation(Do):
    on_validation_batch_start = Do.on_train_batch_start

    def on_train_batch_start(self, *_):
        pass


def crash():
    raise RuntimeError("no more")


def test_a_run_goes_on_in_its_folder_without_doubled_steps(fit, tmp_path):
    with pytest.raises(RuntimeError, match="no more"):
        fit("run", more=[Do(10, crash)], every_n_steps=4)
    folder = tmp_path / "run" / "run"
    fit("run", str(folder / "checkpoints" / "last.ckpt"), every_n_steps=4)
    curves = fit("whole")[2]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for name in ("train/loss", "val/loss"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in zip(*curves[name], strict=True)], name
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["steps"], record["resumed_at_step"]) == ("finished", 11, 8)
    assert record["metrics"]["train/loss"]["value"] == curves["train/loss"][1]


def test_a_validation_that_was_cut_off_is_made_again(fit, tmp_path):
    with pytest.raises(RuntimeError, match="no more"):
        fit("run", more=[DoInValidation(1, crash)])
    weights, _, curves, _ = fit("whole")
    resumed = fit("again", str(tmp_path / "run" / "run" / "checkpoints" / "last.ckpt"))
    assert same(resumed[0], weights)
    assert same(resumed[2], curves)


@pytest.mark.parametrize("steps", [6, 7, 8])  # within an epoch, at its end, and after a validation
def test_a_finished_run_can_be_prolonged(fit, tmp_path, steps):
    fit("run", max_steps=steps)
    last = str(tmp_path / "run" / "run" / "checkpoints" / "last.ckpt")
    *_, curves, batches = fit("more", last, max_steps=13)
    *_, whole_curves, whole = fit("whole", max_steps=13)
    assert [batch[:2] for batch in batches] == [batch[:2] for batch in whole[steps:]]
    assert curves["train/loss"][0] == whole_curves["train/loss"][0]  # other values: the schedule was a shorter one
    assert curves["val/loss"][0] == sorted({*whole_curves["val/loss"][0], steps - 1})  # the end of the first part too


@pytest.mark.parametrize(
    ("place", "signum", "options", "stops_after"),
    [
        (Do(6, lambda: os.kill(os.getpid(), signal.SIGTERM)), signal.SIGTERM, {}, 6),
        (Do(4, lambda: os.kill(os.getpid(), signal.SIGINT)), signal.SIGINT, {}, 4),  # a validation follows
        (DoInValidation(1, lambda: os.kill(os.getpid(), signal.SIGINT)), signal.SIGINT, {}, 4),
        (
            Do(1, lambda: os.kill(os.getpid(), signal.SIGTERM)),
            signal.SIGTERM,
            {"accumulate_grad_batches": 2, "limit_train_batches": 8},
            1,
        ),
    ],
    ids=["between", "before validation", "in validation", "while accumulating"],
)
def test_a_signal_saves_and_stops(fit, tmp_path, capsys, place, signum, options, stops_after):
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped:
        fit("run", more=[place], every_n_steps=100, **options)
    assert signal.getsignal(signum) is before
    assert stopped.value.code == 128 + signum
    path = tmp_path / "run" / "run" / "checkpoints" / "last.ckpt"
    assert str(stopped.value) == f"{signum.name} after {stops_after} steps, which {path} holds"
    assert torch.load(path, weights_only=True)["global_step"] == stops_after
    assert f"{signum.name}: stopping after this step" in capsys.readouterr().err
    weights, _, curves, _ = fit("whole", **options)
    resumed = fit("again", str(path), **options)
    assert same(resumed[0], weights)
    assert same(resumed[2], curves)


def test_a_signal_during_the_last_step_changes_nothing(fit, tmp_path):
    weights, *_ = fit("run", more=[Do(11, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert same(weights, fit("whole")[0])


def test_step_times_of_all_parts_of_a_run_count(fit, tmp_path):
    saved = str(tmp_path / "a" / "run" / "checkpoints" / "last.ckpt")
    fit("a", more=[StepTimer(0)], max_steps=6)
    timer = StepTimer(0)
    fit("b", saved, more=[timer])
    assert len(timer._all) == 11


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="every_n_steps must be a positive integer, got 0"):
        LastCheckpoint(0)


def test_nothing_is_saved_in_fast_dev_run(make_module, make_data, make_trainer, tmp_path):
    make_trainer(callbacks=LastCheckpoint(1), fast_dev_run=2, enable_checkpointing=True).fit(make_module(), make_data())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_was_logged_is_written_before_a_checkpoint(make_module, make_data, make_trainer, lines, monkeypatch):
    done, log = [], lines.log_metrics
    monkeypatch.setattr(lines, "log_metrics", lambda *args, **kwargs: (done.append("logged"), log(*args, **kwargs)))
    monkeypatch.setattr(lines, "save", lambda: done.append("written"))
    settings = {"logger": lines, "max_steps": 3, "log_every_n_steps": 1, "enable_checkpointing": True}
    trainer = make_trainer(callbacks=LastCheckpoint(1), **settings)
    save = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda *args, **kwargs: (done.append("saved"), save(*args, **kwargs))
    )
    trainer.fit(make_module(), make_data())
    places = [i for i, what in enumerate(done) if what == "saved"]
    assert len(places) == 3
    assert [done[i - 1] for i in places] == ["written"] * 3


@pytest.mark.parametrize(("own", "other"), [(True, False), (False, True), (False, False)])
def test_a_signal_to_any_process_stops_all_of_them(own, other):
    def decide(decision: bool, all: bool = True) -> bool:
        return decision and other if all else decision or other

    callback = LastCheckpoint()
    callback._signal = signal.SIGTERM if own else None
    at_an_edge = {"global_step": 10, "log_every_n_steps": 5, "world_size": 2}
    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=decide), **at_an_edge)
    assert callback._asked_to_stop(trainer) is (own or other)


@pytest.mark.parametrize(("signum", "codes"), [(signal.SIGTERM, [128 + signal.SIGTERM]), (signal.SIGINT, [])])
def test_a_worker_of_a_loader_ends_at_sigterm_and_leaves_ctrl_c_to_the_training(signum, codes, monkeypatch):
    callback, ended = LastCheckpoint(), []
    callback._process = os.getpid() + 1
    monkeypatch.setattr(os, "_exit", ended.append)
    callback._on_signal(signum, None)
    assert ended == codes
    assert callback._signal is None
