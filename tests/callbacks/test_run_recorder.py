"""record.json holds what was logged, by whom ever, and what the run was; it is whole or not there."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks import RunRecorder, StepTimer
from callbacks.run_recorder import History


def record_of(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_everything_is_in_it(make_data, make_module, make_trainer, tmp_path):
    logger, module, data = TensorBoardLogger(tmp_path), make_module(), make_data()
    # The recorder comes first, and still holds what the timer logs at the very end.
    trainer = make_trainer(logger=logger, callbacks=[RunRecorder(), StepTimer()])
    trainer.fit(module, data)
    record = record_of(tmp_path / "lightning_logs" / "version_0")
    assert record["status"] == "finished"
    assert record["steps"] == 8
    assert record["environment"]["device"] == "cpu"
    assert record["environment"]["versions"]["torch"] == torch.__version__
    arguments = record["run"]["arguments"]
    assert (arguments["model.hidden_dim"], arguments["model.attention.chunk_size"]) == (16, 8)
    assert (arguments["data.class"], arguments["data.context_length"]) == ("TextData", 32)
    assert arguments["data.fingerprint"] == record["data_fingerprint"] == data.fingerprint
    assert record["parameters"] == sum(p.numel() for p in module.parameters())
    assert 0 < record["step_seconds"]["p50"] <= record["step_seconds"]["p95"] < record["seconds"]
    metrics = record["metrics"]
    assert metrics["train/loss"]["step"] == [1, 3, 5, 7]
    assert metrics["val/loss"]["step"] == [3, 7]
    assert metrics["val/loss"]["value"][-1] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert metrics["step/seconds"]["step"] == [3, 5, 7]
    for column in metrics.values():
        assert column["seconds"] == sorted(column["seconds"])
        assert len(column["step"]) == len(column["seconds"]) == len(column["value"])
    assert list(tmp_path.rglob("*.tmp")) == []


def test_without_another_logger_it_stands_in_the_root(make_data, make_module, make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(filename="last", every_n_train_steps=4)
    trainer = make_trainer(callbacks=[checkpoint, RunRecorder()], enable_checkpointing=True)
    trainer.fit(make_module(), make_data())
    assert "train/loss" in record_of(tmp_path)["metrics"]
    assert (tmp_path / "checkpoints" / "last.ckpt").exists(), "where Lightning puts it without a logger"


def test_two_loggers_get_the_same(make_data, make_module, make_trainer, tmp_path, lines):
    loggers = [CSVLogger(tmp_path), lines]
    make_trainer(logger=loggers, callbacks=[RunRecorder(), StepTimer()]).fit(make_module(), make_data())
    record = record_of(tmp_path / "lightning_logs" / "version_0")
    assert lines.keys() == set(record["metrics"])


def test_a_resumed_run_goes_on_with_its_record(make_data, make_module, make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="half", every_n_train_steps=3, save_top_k=-1)
    saved = str(tmp_path / "saved" / "half.ckpt")
    whole = make_trainer(callbacks=[RunRecorder(), checkpoint], enable_checkpointing=True, max_steps=5)
    whole.fit(make_module(), make_data())
    make_trainer(callbacks=RunRecorder()).fit(make_module(), make_data())
    expected = record_of(tmp_path)
    seconds = torch.load(saved, weights_only=True)["callbacks"]["RunRecorder"]["seconds"]
    again = make_trainer(callbacks=[RunRecorder(), checkpoint], enable_checkpointing=True)
    again.fit(make_module(seed=1), make_data(), ckpt_path=saved)
    record = record_of(tmp_path)
    assert record["resumed_from"] == saved
    assert record["resumed_at_step"] == 3
    assert record["seconds"] > seconds
    for key in ("train/loss", "val/loss"):
        assert record["metrics"][key]["step"] == expected["metrics"][key]["step"]
        assert record["metrics"][key]["seconds"] == sorted(record["metrics"][key]["seconds"])


def test_a_resumed_run_without_further_steps_leaves_the_record(make_data, make_module, make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="half", every_n_train_steps=3, save_top_k=-1)
    make_trainer(callbacks=[RunRecorder(), checkpoint], enable_checkpointing=True).fit(make_module(), make_data())
    before = (tmp_path / "record.json").read_bytes()
    assert record_of(tmp_path)["steps"] == 8
    again = make_trainer(callbacks=[RunRecorder(), checkpoint], enable_checkpointing=True, max_steps=3)
    again.fit(make_module(seed=1), make_data(), ckpt_path=str(tmp_path / "saved" / "half.ckpt"))
    assert (tmp_path / "record.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"status": "fin'])
def test_a_damaged_record_is_written_again(make_data, make_module, make_trainer, tmp_path, content):
    """From the last checkpoint, without another step."""
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="last", every_n_train_steps=1)
    options = {"enable_checkpointing": True, "max_steps": 1}
    make_trainer(callbacks=[RunRecorder(), checkpoint], **options).fit(make_module(), make_data())
    (tmp_path / "record.json").write_text(content)
    again = make_trainer(callbacks=[RunRecorder(), checkpoint], **options)
    again.fit(make_module(), make_data(), ckpt_path=str(tmp_path / "saved" / "last.ckpt"))
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["steps"]) == ("finished", 1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_says_how(make_data, make_module, make_trainer, tmp_path, error):
    module = make_module()
    step = module.training_step

    def failing(batch, batch_idx):
        if batch_idx == 5:
            raise error("no more")
        return step(batch, batch_idx)

    module.training_step = failing
    with pytest.raises((error, SystemExit)):
        make_trainer(callbacks=RunRecorder()).fit(module, make_data())
    record = record_of(tmp_path)
    assert record["status"].startswith(f"stopped by {error.__name__}")
    assert record["steps"] == 5
    assert record["metrics"]["val/loss"]["step"] == [3]


def test_fast_dev_run_writes_nothing(make_data, make_module, make_trainer, tmp_path):
    make_trainer(callbacks=RunRecorder(), fast_dev_run=2).fit(make_module(), make_data())
    assert not list(tmp_path.rglob("record.json"))


def test_seconds_count_from_the_start_and_go_on_after_a_resume(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("callbacks.run_recorder.time.perf_counter", lambda: now[0])
    history = History("folder")
    assert history.seconds == 0.0, "before training"
    history.started = now[0]
    now[0] = 107.0
    history.log_metrics({"a": 1, "b": torch.tensor(2.5)}, step=3)
    now[0] = 109.0
    history.log_metrics({"a": 2}, step=4)
    assert history.metrics == {
        "a": {"step": [3, 4], "seconds": [7.0, 9.0], "value": [1.0, 2.0]},
        "b": {"step": [3], "seconds": [7.0], "value": [2.5]},
    }
    again = History("folder")
    again.metrics, again.before = history.metrics, history.seconds
    assert again.seconds == 9.0
    again.started = now[0]
    now[0] = 110.5
    again.log_metrics({"b": 0}, step=5)
    assert again.metrics["b"]["seconds"] == [7.0, 10.5]
