"""Interrupted runs from the command line: `--ckpt_path last`, signals, kills."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train

ROOT = Path(__file__).parent.parent
TEXT = "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(200))
OPTIONS = [
    *("--data.source=text.txt", "--data.tokenizer=bytes", "--data.context_length=32", "--data.batch_size=4"),
    *("--data.cache_dir=cache", "--model.hidden_dim=16", "--model.num_heads=2", "--model.dropout=0.1"),
    *("--trainer.accelerator=cpu", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"),
]
FIT = ["fit", f"--config={ROOT / 'configs/bsbr.yaml'}", "--config=light.yaml", *OPTIONS]
LIGHT = """
trainer:
  callbacks:
    - class_path: callbacks.StepTimer
    - class_path: callbacks.RunRecorder
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/loss, enable_version_counter: false}
    - class_path: callbacks.LastCheckpoint
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "light.yaml").write_text(LIGHT)
    return tmp_path


def weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_last_goes_on_with_the_newest_run_in_its_folder(folder, capsys):
    train.main([*FIT, "--trainer.max_steps=3", "--model.num_layers=1"])
    train.main([*FIT, "--trainer.max_steps=3"])
    train.main([*FIT, "--trainer.max_steps=6", "--ckpt_path=last"])
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["version_0", "version_1"]
    run = folder / "runs/version_1"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    # Sorted: files of one second and process, which only a test writes, are read in the order of their names as text.
    assert sorted(event.step for event in events.Scalars("train/loss")) == [0, 1, 2, 3, 4, 5]
    assert sorted(event.step for event in events.Scalars("val/loss")) == [2, 5]
    record = json.loads((run / "record.json").read_text())
    assert record["metrics"]["train/loss"]["step"] == [0, 1, 2, 3, 4, 5]
    assert (record["resumed_at_step"], record["status"]) == (3, "finished")

    saved = yaml.safe_load((run / "config.yaml").read_text())  # starts a run of its own
    assert (saved["ckpt_path"], saved["trainer"]["logger"]["init_args"]["version"]) == (None, None)

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train.main([*FIT, "--trainer.max_steps=6", "--ckpt_path=last"])  # nothing is left to do
    assert stopped.value.code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.strip().splitlines()[-1] == (
        "runs/version_1 is finished: 6 steps, by max_steps. Nothing was changed. For more steps, give the same command "
        "a larger --trainer.max_steps"
    )

    older = [*FIT, "--model.num_layers=1", "--trainer.max_steps=4", "--ckpt_path=last"]
    train.main([*older, "--trainer.logger.init_args.version=0"])
    assert len(list((folder / "runs").iterdir())) == 2
    assert json.loads((folder / "runs/version_0/record.json").read_text())["steps"] == 4

    validate = ["validate", *FIT[1:], "--model.num_layers=1", "--ckpt_path=last"]
    measured = train.main(validate).trainer.callback_metrics["val/loss"]  # of version_0, the newest now
    assert float(measured) != pytest.approx(record["metrics"]["val/loss"]["value"][-1])


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_last_without_a_checkpoint_is_an_error(command):
    with pytest.raises(ValueError, match=r"^--ckpt_path=last: there is no runs/\*/checkpoints/last.ckpt, so start"):
        train.main([command, *FIT[1:], "--ckpt_path=last"])


def wait_for(path: str, process: subprocess.Popen) -> None:
    while not list(Path().glob(path)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(signum):
    command = [sys.executable, ROOT / "train.py", *FIT, "--trainer.max_steps=100000", "--data.num_workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for("runs/version_0/checkpoints/last.ckpt", process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    checkpoint = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert errors.strip().splitlines()[-1] == (
        f"train.py: stopped by {signum.name} after {checkpoint['global_step']} steps, which runs/version_0/checkpoints/"
        "last.ckpt holds: the same command with --ckpt_path=last goes on from there"
    )
    assert "Traceback" not in errors
    record = json.loads(Path("runs/version_0/record.json").read_text())
    assert (record["steps"], record["status"][:16]) == (checkpoint["global_step"], "stopped by Stopp")
    more = checkpoint["global_step"] + 1
    cli = train.main([*FIT, f"--trainer.max_steps={more}", "--ckpt_path=last"])
    assert cli.trainer.global_step == more
