"""All callbacks together: training is bit-equal with and without them, in every situation a Trainer can be in."""

import faulthandler
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import environment
from faults.kill_and_resume import finish
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import callbacks
from bsbr_pl.attention import ARCHITECTURES, BSBRAttention
from bsbr_pl.data import TextData
from bsbr_pl.module import LanguageModule
from callbacks import AttentionMaps, FailTogether, FlopCounter, PeakMemory, RunRecorder, StepTimer

ROOT = Path(__file__).parents[2]


def all_callbacks(every_n_steps: int = 20) -> list[Callback]:
    return [StepTimer(), PeakMemory(), FlopCounter(), AttentionMaps(every_n_steps), RunRecorder()]


def trained(make_module: Callable, make_data: Callable, make_trainer: Callable, used: list[Callback], **arguments):
    """Weights after training, and the state of the random numbers."""
    name = arguments.pop("name", "bsbr")
    module = make_module(name, dropout=0.1)
    torch.manual_seed(1)
    steps = {"max_steps": 50, "log_every_n_steps": 10, "val_check_interval": 25, "gradient_clip_val": 1.0}
    make_trainer(callbacks=used, **steps | arguments).fit(module, make_data())
    return module.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_bit_equal(name, make_module, make_data, make_trainer, lines):
    """After 50 steps of BSBR, and 12 of the others: with a picture and a validation before the last steps."""
    every_n_steps = 20 if name == "bsbr" else 6
    steps = {} if name == "bsbr" else {"max_steps": 12, "log_every_n_steps": 4, "val_check_interval": 8}
    makers = (make_module, make_data, make_trainer)
    bare, bare_state = trained(*makers, [], name=name, **steps)
    watched, state = trained(*makers, all_callbacks(every_n_steps), name=name, logger=lines, **steps)
    assert all(torch.equal(bare[key], watched[key]) for key in bare)
    assert torch.equal(bare_state, state)
    prefixes = {key.split("/")[0] for key in lines.keys()}  # noqa: SIM118
    assert {"step", "memory", "flops", "attention", "train", "val"} <= prefixes


def test_accumulated_gradients_too(make_module, make_data, make_trainer, lines):
    makers, accumulate = (make_module, make_data, make_trainer), {"max_steps": 10, "accumulate_grad_batches": 3}
    bare, _ = trained(*makers, [], **accumulate)
    watched, _ = trained(*makers, all_callbacks(), logger=lines, **accumulate)
    assert all(torch.equal(bare[key], watched[key]) for key in bare)


def test_a_resumed_run_is_bit_equal_and_measures_again(make_module, make_data, make_trainer, tmp_path, lines):
    whole = make_module()
    make_trainer(max_steps=20).fit(whole, make_data())
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    watched = {"callbacks": [*all_callbacks(), checkpoint], "enable_checkpointing": True}
    make_trainer(max_steps=20, **watched).fit(make_module(), make_data())
    resumed = make_module(seed=1)
    watched["callbacks"] = [*all_callbacks(), checkpoint]
    trainer = make_trainer(max_steps=20, logger=lines, **watched)
    trainer.fit(resumed, make_data(), ckpt_path=tmp_path / "saved" / "step=10.ckpt", weights_only=True)
    assert min(step for step, _ in lines.of("step/")) > 10
    assert len(lines.of("memory/peak_tensor_bytes")) == 1
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_fast_dev_run_and_no_logger(make_module, make_data, make_trainer):
    make_trainer(callbacks=all_callbacks(), fast_dev_run=2).fit(make_module(), make_data())
    make_trainer(callbacks=all_callbacks(), log_every_n_steps=0).fit(make_module(), make_data())
    make_trainer(callbacks=[c for c in all_callbacks() if not isinstance(c, RunRecorder)]).fit(
        make_module(), make_data()
    )


def test_only_fitting_is_measured(make_module, make_data, make_trainer, lines):
    trainer = make_trainer(callbacks=all_callbacks(), logger=lines)
    trainer.validate(make_module(), make_data(), verbose=False)
    trainer.test(make_module(), make_data(), verbose=False)
    assert all(key.split("/")[0] in ("val", "test", "epoch") for key in lines.keys())  # noqa: SIM118


def test_no_callback_reaches_into_the_trainer():
    import ast

    for path in sorted((ROOT / "callbacks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trainer":
                assert not node.attr.startswith("_"), f"{path.name}: trainer.{node.attr}"


def test_yaml_names_them_and_their_arguments(tmp_path, monkeypatch):
    from lightning import LightningDataModule

    from bsbr_pl.module import LanguageModule
    from train import CLI

    monkeypatch.setattr(sys, "argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "seed_everything: 0\ntrainer:\n  logger: false\n  accelerator: cpu\n  callbacks:\n"
        "    - class_path: callbacks.StepTimer\n      init_args: {warmup_steps: 5}\n"
        "    - class_path: callbacks.PeakMemory\n    - class_path: callbacks.FlopCounter\n"
        "    - class_path: callbacks.AttentionMaps\n      init_args: {every_n_steps: 7, max_length: 32}\n"
        "    - class_path: callbacks.RunRecorder\n"
        "model: {attention: {class_path: bsbr_pl.attention.BSBRAttention}, hidden_dim: 16, num_heads: 2}\n"
        "data: {class_path: bsbr_pl.data.InductionData}\n"
    )
    settings = {"subclass_mode_data": True, "auto_configure_optimizers": False, "save_config_callback": None}
    cli = CLI(LanguageModule, LightningDataModule, run=False, args=["--config", str(config)], **settings)
    ours = [callback for callback in cli.trainer.callbacks if type(callback).__module__.startswith("callbacks")]
    assert [type(callback) for callback in ours] == [StepTimer, PeakMemory, FlopCounter, AttentionMaps, RunRecorder]
    assert ours[0].warmup_steps == 5
    assert (ours[3].every_n_steps, ours[3].max_length) == (7, 32)


def test_every_export_is_there_and_sorted():
    assert sorted(callbacks.__all__) == callbacks.__all__
    assert {"AttentionMaps", "FlopCounter", "PeakMemory", "RunRecorder", "StepTimer"} <= set(callbacks.__all__)


class Slow(LanguageModule):
    def training_step(self, batch, batch_idx):
        time.sleep(0.2 if self.global_rank == 1 else 0.0)  # the slower process sets the pace
        return super().training_step(batch, batch_idx)


def train_on_two(texts: Path) -> None:
    """What a process does that forks into two."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    used = [StepTimer(0), PeakMemory(), FlopCounter(0), AttentionMaps(2), RunRecorder()]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    steps = {"max_steps": 4, "max_epochs": -1, "log_every_n_steps": 2, "num_sanity_val_steps": 0}
    steps |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "use_distributed_sampler": False}
    processes = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    trainer = Trainer(**processes, **steps, **quiet, logger=CSVLogger("."), callbacks=used)
    data = TextData(str(texts), "bytes", context_length=32, batch_size=4, cache_dir="cache", val_fraction=0.15)
    trainer.fit(Slow(BSBRAttention, 257, hidden_dim=16, num_layers=1, num_heads=2), data)


def test_two_processes(texts, tmp_path):
    """Rank 0 logs, and the times are those of the slower process."""
    environment.preload("faults.environment")
    (tmp_path / "temporary").mkdir()
    finish(tmp_path, train_on_two, texts)
    records = list(tmp_path.rglob("record.json"))
    assert len(records) == 1
    record = json.loads(records[0].read_text())
    metrics = record["metrics"]
    assert record["environment"]["processes"] == 2
    assert metrics["step/seconds"]["step"] == [1, 3]
    assert all(0.2 <= value < 5 for value in metrics["step/seconds"]["value"])
    tokens, seconds = 4 * 32, metrics["step/seconds"]["value"][1] + metrics["step/data_seconds"]["value"][1]
    assert metrics["step/tokens_per_second"]["value"][1] == pytest.approx(tokens / seconds)
    forward = metrics["flops/forward_flops"]["value"][0]
    assert metrics["flops/step_flops"]["value"][0] == pytest.approx(3 * 4 * forward, rel=0.05)
    assert metrics["attention/entropy_nats/layer0"]["step"] == [1, 3]
    assert metrics["memory/peak_tensor_bytes"]["value"][0] > 0


@pytest.mark.parametrize(
    ("error", "ends"), [(RuntimeError(), True), (KeyboardInterrupt(), False), (SystemExit(), False)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_only_an_error_in_one_of_several_processes_ends_it_soon(error, ends, processes, monkeypatch):
    """Ctrl-C and SIGTERM reach every process by themselves."""
    registered = []
    monkeypatch.setattr("atexit.register", lambda *arguments, **options: registered.append((arguments, options)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    saver = ModelCheckpoint(save_on_exception=True)
    trainer = SimpleNamespace(world_size=processes, checkpoint_callbacks=[saver])
    FailTogether(7.0).on_exception(trainer, None, error)
    expected = [((faulthandler.dump_traceback_later, 7.0), {"exit": True})] if ends and processes == 2 else []
    assert registered == expected
    assert saver.save_on_exception == (not expected)
