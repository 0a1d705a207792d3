"""The command line: every YAML trains, and what a run leaves behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.module import LanguageModule

ROOT = Path(__file__).parent.parent
TEXT = "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(400))


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A run of seconds: a text of 16 kB, bytes as tokens, three steps, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "text.txt").write_text(TEXT)
    data = {"source": "text.txt", "tokenizer": "bytes", "context_length": 32, "batch_size": 4, "cache_dir": "cache"}
    trainer = {"max_steps": 3, "val_check_interval": 3, "log_every_n_steps": 1, "accelerator": "cpu"}
    model = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2}
    sections = {"data": data, "trainer": trainer, "model": model}
    return [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_from_its_yaml(name, arguments, capsys, tmp_path):
    cli = train.main(["fit", f"--config={ROOT / 'configs' / f'{name}.yaml'}", *arguments])
    assert isinstance(cli.model.model.attentions[0], ARCHITECTURES[name])

    printed = capsys.readouterr().out
    for word in ("bits per byte", "xz -9", "gzip -9", "accuracy", "Generated:"):
        assert word in printed

    folder = tmp_path / "runs" / "version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["attention"]["class_path"].endswith(ARCHITECTURES[name].__name__)
    loaded = LanguageModule.load(folder / "checkpoints" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), cli.model.parameters(), strict=True))

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2]
    (validation,) = events.Scalars("val/bits_per_byte")
    assert validation.value == pytest.approx(float(cli.trainer.callback_metrics["val/bits_per_byte"]))


@pytest.mark.parametrize("name", ["standard", "sliding_window", "moba", "bsbr", "fox"])
def test_the_pro_forms_are_those_of_the_study(name):
    """But for the sizes of chunks and windows, which are the default here."""
    own, study = (
        yaml.safe_load((ROOT / folder / f"{name}_pro.yaml").read_text())["model"]["attention"]
        for folder in ("configs", "study/configs/models")
    )
    assert own["class_path"] == study["class_path"] == f"bsbr_pl.attention.{ARCHITECTURES[name].__name__}"
    sizes = {size: value for size, value in study["init_args"].items() if size in ("chunk_size", "window_size")}
    assert own["init_args"] | sizes == study["init_args"]


def test_a_hybrid_in_one_line_trains_and_resumes(arguments):
    command = ["fit", *arguments, "--model.attention=bsbr + standard", "--model.num_layers=4"]
    cli = train.main(command)
    names = [type(attention).__name__ for attention in cli.model.model.attentions]
    assert names == ["BSBRAttention", "StandardAttention"] * 2
    resumed = train.main([*command, "--ckpt_path=last", "--trainer.max_steps=5"])
    assert resumed.trainer.global_step == 5


def test_a_recall_task_reports_every_slice(arguments):
    segments = ["--data.train_segments=[[16,2,64],[32,4,64]]", "--data.test_segments=[[16,2,8],[32,4,8]]"]
    kept = [argument for argument in arguments if not argument.startswith("--data")]
    configs = [f"--config={ROOT / 'configs' / name}" for name in ("bsbr.yaml", "data/mqar.yaml")]
    cli = train.main(["fit", *configs, *kept, *segments, "--data.vocab_size=64", "--data.batch_size=4"])
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    both = metrics["val/accuracy_T16_N2"] * 2 / 6 + metrics["val/accuracy_T32_N4"] * 4 / 6
    assert metrics["val/accuracy"] == pytest.approx(both)
    assert "val/bits_per_byte" not in metrics


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("induction", ["--data.vocab_size=16", "--data.context_length=16", "--data.test_lengths=[16]"]),
        ("selective_copy", ["--data.context_length=32", "--data.num_copied=2"]),
        (
            "needle",
            [
                "--data.source=text.txt",
                "--data.tokenizer=bytes",
                "--data.context_length=64",
                "--data.test_lengths=[64]",
            ],
        ),
    ],
)
def test_every_recall_task_trains_from_its_yaml(task, options, arguments):
    kept = [argument for argument in arguments if not argument.startswith("--data")]
    configs = [f"--config={ROOT / 'configs' / name}" for name in ("bsbr.yaml", f"data/{task}.yaml")]
    few = ["--data.num_train=8", "--data.num_test=4", "--data.batch_size=4"]
    cli = train.main(["fit", *configs, *kept, *options, *few])
    found = {name.removeprefix("val/accuracy_") for name in cli.trainer.callback_metrics if "accuracy_" in name}
    assert found == {name for name in cli.datamodule.slice_names if name != "T64_N8"}


def test_layers_may_differ_and_the_saved_configuration_says_how(arguments, tmp_path):
    options = [argument for argument in arguments if not argument.startswith(("--data", "--model"))]
    options += ["--data.train_segments=[[16,2,64]]", "--data.test_segments=[[16,2,8]]", "--data.batch_size=4"]
    first = train.main(["fit", f"--config={ROOT / 'configs/mqar_standard.yaml'}", *options])
    assert [attention.rope for attention in first.model.model.attentions] == [True, False]
    again = train.main(["fit", f"--config={tmp_path / 'runs/version_0/config.yaml'}"])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_the_vocabulary_is_the_data_sets(arguments):
    cli = train.main(["fit", f"--config={ROOT / 'configs/bsbr.yaml'}", *arguments])
    assert cli.model.model.vocab_size == cli.datamodule.vocab_size


def test_command_line_wins_over_checkpoint(arguments, tmp_path):
    """Lightning lets the arguments stored in a checkpoint override those of the command line; ours does not."""
    config = f"--config={ROOT / 'configs/bsbr.yaml'}"
    train.main(["fit", config, *arguments, "--model.learning_rate=0.001"])
    checkpoint = str(tmp_path / "runs/version_0/checkpoints/last.ckpt")
    again = ["--trainer.max_steps=4", "--model.learning_rate=0.5", f"--ckpt_path={checkpoint}"]
    cli = train.main(["fit", config, *arguments, *again])
    assert cli.model.hparams["learning_rate"] == 0.5
    assert cli.trainer.global_step == 4


def test_validation_of_a_checkpoint_repeats_the_number_of_training(arguments, tmp_path):
    config = f"--config={ROOT / 'configs/bsbr.yaml'}"
    fitted = train.main(["fit", config, *arguments]).trainer.callback_metrics["val/loss"]
    checkpoint = str(tmp_path / "runs/version_0/checkpoints/last.ckpt")
    validated = train.main(["validate", config, *arguments, f"--ckpt_path={checkpoint}"]).trainer.callback_metrics
    assert float(validated["val/loss"]) == pytest.approx(float(fitted), rel=1e-5)


def test_it_runs_from_any_folder(arguments, tmp_path):
    command = [sys.executable, ROOT / "train.py", "fit", f"--config={ROOT / 'configs/linear.yaml'}", *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").exists()
    shutil.rmtree(tmp_path / "runs")
