"""The command line against hostile configurations and a failing machine: nothing foreign runs, nothing old is lost."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from faults.damage import ROOT, quiet, tiny
from filelock import FileLock

import train


@pytest.fixture
def options(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tiny(tmp_path)


TOUCH = "{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}"
FUNCTION = "lightning.pytorch.cli.instantiate_class"  # of a package that is trusted
HOSTILE = {
    "attention": "model: {attention: {class_path: os.system, init_args: {command: touch ran}}}",
    "attention as a word": "model: {attention: os.system}",
    "another class": f"model: {{attention: {TOUCH}}}",
    "in a list": f"model: {{attention: [{TOUCH}]}}",
    "a function": f"model: {{attention: {{class_path: {FUNCTION}, init_args: {{args: [], init: {TOUCH}}}}}}}",
    "unchecked options": f"model: {{attention: {{class_path: {FUNCTION}, dict_kwargs: {{args: [], init: {TOUCH}}}}}}}",
    "unknown module": "model: {attention: {class_path: foreign.Attention}}",
    "callbacks": f"trainer: {{callbacks: [{TOUCH}]}}",
    "callbacks, unknown module": "trainer: {callbacks: [{class_path: foreign.Attention}]}",
    "data": "data: {class_path: builtins.eval, init_args: {source: 1}}",
    "data, a method": "data: {class_path: bsbr_pl.data.TextData.load_from_checkpoint, init_args: {checkpoint_path: x}}",
    "logger": f"trainer: {{logger: {TOUCH}}}",
    "YAML": "model: !!python/object/apply:os.system [touch ran]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_calls_and_imports_nothing_foreign(name, options, tmp_path, monkeypatch, capsys):
    (tmp_path / "foreign.py").write_text("open('imported', 'w')\nclass Attention: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.yaml").write_text(HOSTILE[name])
    with pytest.raises((SystemExit, *train.USER_ERRORS)) as error:
        train.main(["fit", *options, "--config=hostile.yaml"])
    said = str(error.value) + capsys.readouterr().err
    assert any(
        words in said
        for words in ("not trusted", "not allowed", "no class", "does not correspond to a subclass", "constructor")
    )
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "imported").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FAULTS = {
    "--trainer.accelerator=gpu": "no device for accelerator='gpu' is here",
    "--trainer.logger.init_args.name=../../x": "name='../../x' of TensorBoardLogger leads out of its folder",
    "--trainer.logger.init_args.version=/x": "version='/x' of TensorBoardLogger leads out of its folder",
    "--trainer.logger.init_args.save_dir=file": "File exists: ",
    "--trainer.logger.init_args.version=version_0": "holds another run",
    "--trainer.plugins=lightning.pytorch.plugins.TorchCheckpointIO": "multiple values for CheckpointIO",
    "--data.cache_dir=file": "file",
    "--data.source=binary": "binary is not UTF-8",
    "--data.source=void": "source='void' has no files",
    "--config=binary": "binary is no text in UTF-8",
    "--config=void": "void",
    "--ckpt_path=void": "void is not a readable checkpoint: Is a directory",
    "--model.hidden_dim=32": "a run cannot be resumed with model.hidden_dim=32 instead of 16: ",
    "--model.attention=LinearAttention": "model.attention='linear' instead of 'bsbr'",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    """A folder with a finished run, and what else the faults need; and the options of that run."""
    folder = tmp_path_factory.mktemp("run")
    argv, sys.argv = sys.argv, ["train.py"]
    options = tiny(folder)
    with quiet():
        train.main(["fit", *options])
    sys.argv = argv
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "file").write_text("")
    (folder / "void").mkdir()
    return folder, options


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_answered_and_nothing_is_lost(fault, run, monkeypatch, capsys):
    folder, options = run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    before = contents(folder)
    resumed = [f"--ckpt_path={folder / 'runs/version_0/checkpoints/last.ckpt'}"] if fault.startswith("--model") else []
    with pytest.raises((SystemExit, *train.USER_ERRORS)) as error:
        train.main(["fit", *options, *resumed, fault])
    assert FAULTS[fault] in str(error.value) + capsys.readouterr().err
    assert before.items() <= contents(folder).items()


def test_a_folder_that_another_process_trains_in_is_left_alone(run, monkeypatch):
    folder, options = run
    monkeypatch.setattr(sys, "argv", ["train.py"])
    last = folder / "runs/version_0/checkpoints/last.ckpt"
    before = contents(folder / "runs/version_0/checkpoints")
    more = ["--trainer.max_steps=3", "--trainer.logger.init_args.version=version_0", f"--ckpt_path={last}"]
    again = ["fit", *options, *more]
    with FileLock(folder / "runs/version_0/.training.lock"), pytest.raises(ValueError, match="another process trains"):
        train.main(again)
    assert contents(folder / "runs/version_0/checkpoints") == before
    with quiet():
        train.main(again)  # as soon as that process is gone


def test_validating_in_the_folder_of_a_run_leaves_it_as_it_was(run, monkeypatch):
    folder, options = run
    monkeypatch.setattr(sys, "argv", ["train.py"])
    before = contents(folder)
    last = folder / "runs/version_0/checkpoints/last.ckpt"
    with quiet():
        train.main(["validate", *options, "--trainer.logger.init_args.version=version_0", f"--ckpt_path={last}"])
    assert before.items() <= contents(folder).items()


def test_without_tensorboard_there_is_a_sentence(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(train.USER_ERRORS, match="Neither `tensorboard` nor `tensorboardX` is available"):
        train.main(["fit", *run[1]])


def test_a_full_disk_ends_in_one_line_and_leaves_the_older_checkpoint(run):
    """As if the disk were full after 20 kB of each file: less than a checkpoint, more than the rest."""
    folder, options = run
    before = contents(folder / "runs/version_0/checkpoints")
    last = folder / "runs/version_0/checkpoints/last.ckpt"
    resumed = ["--trainer.logger.init_args.version=version_0", "--trainer.max_steps=4", f"--ckpt_path={last}"]
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", "fit", *options, *resumed],
        capture_output=True,
        text=True,
        cwd=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("train.py: error: [Errno 27] File too large: ")
    assert "Traceback" not in result.stderr
    assert contents(folder / "runs/version_0/checkpoints") == before
