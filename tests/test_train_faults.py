"""The command line against hostile configurations and a failing machine: nothing foreign runs, nothing old is lost."""

import sys

import pytest

import train
from benchmarks.damage import tiny


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
    with pytest.raises((SystemExit, *train.MENDABLE)) as error:
        train.main(["fit", *options, "--config=hostile.yaml"])
    said = str(error.value) + capsys.readouterr().err
    assert any(
        words in said for words in ("not allowed", "no class", "does not correspond to a subclass", "constructor")
    )
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "imported").exists()
