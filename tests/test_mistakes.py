"""What a newcomer gets wrong, for real: every mistake ends in one sentence that says what to do, and an exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from benchmarks.damage import ROOT, quiet, tiny
from bsbr_pl import BSBRModel
from bsbr_pl.attention import LinearAttention, StandardAttention
from bsbr_pl.data import TextData
from bsbr_pl.evals import compare_models
from bsbr_pl.evals.__main__ import main as evaluate
from bsbr_pl.module import LanguageModule

FILES = {
    "tab.yaml": "model:\n\thidden_dim: 32\n",
    "indent.yaml": "model:\n  hidden_dim: 32\n num_layers: 2\n",
    "type.yaml": "model: {hidden_dim: wide}\n",
    "option.yaml": "model: {hiden_dim: 32}\n",
    "section.yaml": "trainer: {learning_rate: 0.1}\n",
    "list.yaml": "- model\n- data\n",
    "empty.yaml": "",
    "empty.txt": "",
    "short.txt": "hello",
    "bsbr.yaml": "model: {attention: bsbr}\n",
}
YAML, NO = "(indent with spaces, alike within a section)", "there is no option"
IN_MODEL, TOO_FEW = "did you mean --model.hidden_dim?", "fewer than one batch of"

#: What is typed after `train.py fit --config=configs/bsbr.yaml` and options of a tiny run, and words of the answer.
MISTAKES = {
    # the command line
    "--hidden_dim=32": f"{NO} --hidden_dim: {IN_MODEL}",
    "--model.hiden_dim=32": f"{NO} --model.hiden_dim: {IN_MODEL}",
    "-model.hidden_dim=32": f"{NO} -model.hidden_dim: {IN_MODEL}",
    "--trainer.max_step=3": f"{NO} --trainer.max_step: did you mean --trainer.max_steps?",
    "--model.batch_size=3": f"{NO} --model.batch_size: did you mean --data.batch_size?",
    "--trainer.learning_rate=1": f"{NO} --trainer.learning_rate: did you mean --model.learning_rate?",
    "--data.contxt_length=3": f"{NO} data.contxt_length: did you mean --data.context_length?",
    "--model.attention.chunksize=8": f"{NO} model.attention.chunksize: did you mean --model.attention.chunk_size?",
    "--model.attention.window_size=8": f"{NO} model.attention.window_size here, but of SlidingWindowAttention",
    "--model.hidden_dim": "argument --model.hidden_dim: expected one argument",
    "--model.hidden_dim=wide": "model.hidden_dim=wide: must be a whole number",
    "--model.learning_rate=fast": "model.learning_rate=fast: must be a number",
    "--seed_everything=abc": "seed_everything=abc: must be true or false or a whole number",
    "--trainer.precision=bf17": "trainer.precision=bf17: must be a whole number or transformer-engine, ",
    "--model.vocab_size=10": "model.vocab_size follows from data.vocab_size: leave it out",
    "more": f"{NO} more",
    # names of classes
    "--model.attention=BSRBAttention": "no class is called 'BSRBAttention': did you mean BSBRAttention?",
    "--model.attention=bsbr_pl.attention.BSRB": "model.attention: module 'bsbr_pl.attention' has no attribute 'BSRB'",
    "--model.attention=lightning.Trainer": "Expected 'lightning.Trainer' to be a subclass of <class 'Attention'>",
    "--model.attention=torch.nn.Linear": "Importing 'torch.nn.Linear' is not allowed",
    "--data=TextDta": "data: no class is called 'TextDta': did you mean TextData?",
    "--trainer.callbacks+=StepTimr": "no class is called 'StepTimr': did you mean StepTimer?",
    "--trainer.logger=Tensorboard": "no class is called 'Tensorboard': did you mean TensorBoardLogger?",
    # configurations
    "--config=bsrb.yaml": "bsrb.yaml': did you mean bsbr.yaml?",
    "--config=tab.yaml": "tab.yaml: no valid YAML at line 2, column 1: found character that cannot start any token",
    "--config=indent.yaml": f"indent.yaml: no valid YAML at line 3, column 2: did not find expected key {YAML}",
    "--config=type.yaml": "type.yaml: model.hidden_dim=wide: must be a whole number",
    "--config=option.yaml": f"{NO} model.hiden_dim: {IN_MODEL}",
    "--config=section.yaml": f"{NO} trainer.learning_rate: did you mean --model.learning_rate?",
    "--config=list.yaml": "list.yaml: a configuration must hold sections, `trainer:`, `model:` or `data:`",
    "--config=empty.yaml": "empty.yaml: a configuration must hold sections",
    # values
    "--model.num_heads=3": "hidden_dim must be a multiple of num_heads, got 16 and 3",
    "--model.num_heads=16": "rotary positions need an even head width, got 1: change hidden_dim or num_heads",
    "--model.num_layers=0": "num_layers must be a positive integer, got 0",
    "--model.learning_rate=-1": "learning_rate must be positive, got -1.0",
    "--model.dropout=2": "dropout must be at least 0 and below 1, got 2.0",
    "--model.attention.chunk_size=0": "chunk_size must be a positive integer, got 0",
    "--trainer.max_steps=0": "max_steps=0 trains nothing: at least 1",
    "--trainer.accelerator=gpu": "no device for accelerator='gpu' is here: `auto` takes what there is",
    "--trainer.accelerator=fast": "You selected an invalid accelerator name: `accelerator='fast'`",
    "--data.batch_size=0": "batch_size=0 is too small: at least 1",
    "--data.batch_size=100000": TOO_FEW,
    "--data.context_length=100000": TOO_FEW,
    "--data.source=short.txt": TOO_FEW,
    "--data.source=nowhere.txt": "source='nowhere.txt' is not there: give 'stdlib', an existing file or folder",
    "--data.source=empty.txt": "source='empty.txt' holds no text to train on",
    "--data.tokenizer=words": "tokenizer",
    "--ckpt_path=nowhere.ckpt": "nowhere.ckpt is not a readable checkpoint: No such file or directory",
}
#: Whole command lines of train.py.
COMMANDS = {
    "": 'expected "subcommand" to be one of {fit,validate,test,predict}, but it was not provided',
    "--config=bsbr.yaml": 'expected "subcommand" to be one of {fit,validate,test,predict}',
    "train --config=bsbr.yaml": "invalid choice: 'train' (choose from 'fit', 'validate', 'test', 'predict')",
    "fit": "model.attention must be given: --model.attention=..., or a --config that sets it",
    "validate --config=bsbr.yaml": "validate needs a trained model: --ckpt_path=<file>, or `last`",
    "test --config=bsbr.yaml --ckpt_path=last": "--ckpt_path=last: there is no runs/*/checkpoints/last.ckpt",
}
#: Those of evaluate.py.
EVALUATIONS = {
    "": "paths must be given",
    "runz": "runz holds no checkpoint (*.ckpt): a folder, file or pattern with one is needed",
    ".": ". holds no checkpoint (*.ckpt)",
    "trained --lenghts=[16]": f"{NO} --lenghts: did you mean --lengths?",
    "trained --lengths=16": "lengths=16: must be a list like [1,2]",
    "trained --rounds=0": "rounds must be at least 1, got [0]",
    "trained --dtype=fp32": "dtype=fp32: must be float32, bfloat16, float64",
    "trained --device=cuda:99": "device='cuda:99' cannot be used here",
    "trained --config=x.yaml": f"{NO} --config",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch, one_thread):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def answer(call, capsys) -> str:
    """What a command that exits says: one line, and at most one that says where to read on."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    code, said = stopped.value.code, capsys.readouterr().err
    assert code not in (0, None)
    said += code if isinstance(code, str) else ""  # as Python prints it
    place = said.rfind(".py: error: ")
    first, *more = said[place:].strip().splitlines()
    assert place >= 0
    assert len(first) < 500
    assert [line.endswith("--help` shows every option") for line in more] in ([], [True])
    assert "usage:" not in said
    return first.removeprefix(".py: error: ")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_options_of_a_training(mistake, folder, capsys):
    options = ["fit", *tiny(folder), mistake]
    assert MISTAKES[mistake] in answer(lambda: train.command_line(options), capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_command(command, capsys):
    assert COMMANDS[command] in answer(lambda: train.command_line(command.split()), capsys)


@pytest.mark.parametrize("command", EVALUATIONS)
def test_a_mistake_in_an_evaluation(command, capsys):
    assert EVALUATIONS[command] in answer(lambda: evaluate(command.split()), capsys)


def test_the_script_itself_says_no_more(folder):
    command = [sys.executable, ROOT / "train.py", "fit", *tiny(folder), "--model.num_heads=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 1
    last = "train.py: error: hidden_dim must be a multiple of num_heads, got 16 and 3"
    assert result.stderr.strip().splitlines()[-1] == last
    assert "Traceback" not in result.stderr


IN_PYTHON = {
    "an option": (lambda: BSBRModel(10, chunk=3), "BSBRModel has no argument 'chunk'; it has vocab_size, hidden_dim"),
    "a width": (lambda: BSBRModel(10, hidden_dim=17), "hidden_dim must be a multiple of num_heads, got 17 and 4"),
    "ids": (lambda: BSBRModel(10)(torch.tensor([[10]])), r"input_ids must lie in 0 ... 9 \(vocab_size\), got 10"),
    "shape": (lambda: BSBRModel(10)(torch.tensor([1])), r"input_ids must be \(batch, length\) in int64"),
    "attention": (lambda: LanguageModule("bsbr", 10), "attention must be an Attention class or a functools.partial"),
    "no checkpoint": (lambda: LanguageModule.load("nowhere.ckpt"), "nowhere.ckpt is not a readable checkpoint"),
    "no text": (
        lambda: TextData("nowhere").prepare_data(),
        "source='nowhere' is not there: give 'stdlib',",
    ),
    "a name": (lambda: compare_models((8,), ("BSRB",)), "no model is called 'BSRB'; there are BSBR, Linear"),
    "one name": (lambda: compare_models((8,), "BSBR"), "models must be a list of names, got 'BSBR'"),
}


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_a_mistake_in_python(mistake):
    call, words = IN_PYTHON[mistake]
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        (["--model.attention=linear", "--model.attention.chunk_size=8"], [LinearAttention]),
        (["--config=key.yaml"], [LinearAttention]),
        (["--config=keys.yaml", "--model.num_layers=2"], [LinearAttention, StandardAttention]),
    ],
    ids=lambda value: str(value[0]),
)
def test_an_architecture_is_known_by_its_key(choice, layers, folder, tmp_path):
    (folder / "key.yaml").write_text("model: {attention: {class_path: linear, init_args: {chunk_size: 8}}}")
    (folder / "keys.yaml").write_text(
        "model: {attention: [{class_path: linear, init_args: {chunk_size: 8}}, standard]}"
    )
    with quiet():
        cli = train.main(["fit", *tiny(folder), f"--trainer.logger.save_dir={tmp_path}", *choice])
    attentions = cli.model.model.attentions
    assert [type(attention) for attention in attentions] == layers
    assert attentions[0].chunk_size == 8
    assert "class_path: bsbr_pl.attention.LinearAttention" in Path(cli.trainer.log_dir, "config.yaml").read_text()
