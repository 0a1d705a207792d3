"""Every command and every example of docs/howto/answers.md runs here, on less text for fewer steps."""

import importlib.util
import math
import re
import shlex
import shutil
import sys

import matplotlib
import pytest
import torch
from PIL import Image
from test_readme import EVALUATE, ROOT, TRAIN, commands, run

import train

PAGE = (ROOT / "docs" / "howto" / "answers.md").read_text()
TEXTS = [option for option in TRAIN if not option.startswith("--data.source")]
#: Runs that are not evaluated: there is less to certify then.
APART = [*TRAIN, "--trainer.logger.init_args.save_dir=others"]
TASK = [option for option in TRAIN if not option.startswith("--data")]
TASK += ["--data.train_segments=[[16,2,64]]", "--data.test_segments=[[16,2,8]]", "--data.batch_size=4"]
FIT = "train.py fit --config configs/bsbr.yaml"
OWN = "train.py fit --trust my_package --model.attention=my_package.MyAttention"
STOPPING = f"{FIT} --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss --without=[FiniteLoss]"
LOGGER = f"{FIT} --trust my_logger --trainer.logger=my_logger.TrackioLogger"

#: What is appended to the commands, in the order of the page.
HERE = {
    f"{FIT} --data.source=mytexts/": TEXTS,
    OWN: TRAIN,
    f"{FIT} --ckpt_path last": [*TEXTS, "--data.source=mytexts/", "--trainer.max_steps=3"],
    f"{FIT} --trainer.logger=CSVLogger --trainer.logger.save_dir=runs": TRAIN,
    f"{FIT} --trainer.logger=WandbLogger --trainer.logger.project=attention": [*TRAIN, "--trainer.logger.offline=true"],
    f"{FIT} --trainer.logger=MLFlowLogger --trainer.logger.tracking_uri=sqlite:///mlflow.db": TRAIN,
    f"{FIT} --config configs/scale/10m.yaml": APART,
    "train.py fit --config runs/version_0/config.yaml": [],
    STOPPING: APART,
    "evaluate.py runs/": EVALUATE,
    "-m bsbr_pl report a/results.jsonl b/results.jsonl": ["--output_dir=merged"],
    f"{FIT} --trainer.precision=bf16-mixed": APART,
    f"{FIT} --config configs/data/mqar.yaml": TASK,
    "evaluate.py runs/ '--multiples=[1]' '--lengths=[256,1024]'": EVALUATE,
}
#: Run in test_the_logger_of_the_page and in tests/two_processes.py.
ELSEWHERE = {LOGGER, f"{FIT} --trainer.devices=2 --trainer.strategy=ddp"}
NEEDS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
MY_PACKAGE = """
from bsbr_pl.attention import StandardAttention


class MyAttention(StandardAttention):
    pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_package.py").write_text(MY_PACKAGE)
    texts = ["\n".join(f"def add_{i}(a, b):\n    return a + b + {i * j}\n" for i in range(20)) for j in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    (tmp_path / "mytexts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "mytexts" / f"{number}.txt").write_text(text)
    return tmp_path


def test_every_command_is_known():
    assert [command for command in commands(PAGE) if command not in ELSEWHERE] == list(HERE)
    assert set(commands(PAGE)) >= ELSEWHERE
    assert len(re.findall(r"^## \.\.\. .*\?$", PAGE, re.M)) == 14


@pytest.mark.filterwarnings("ignore:'bsbr_pl.__main__' found in sys.modules")  # evaluate.py was before it
def test_the_commands_and_examples_run(folder, capsys):
    for command, more in HERE.items():
        words = shlex.split(command)
        logger = next((name for name in NEEDS if f"--trainer.logger={name}" in words), None)
        if logger and not importlib.util.find_spec(NEEDS[logger]):
            with pytest.raises((ValueError, SystemExit, ModuleNotFoundError)):
                train.main([*words[1:], *more])
            continue
        if " report " in command:
            for machine in ("a", "b"):
                shutil.copytree("evaluation", machine)
        if words[0] == "train.py":
            sys.argv[:] = ["train.py"]
            cli = train.main([*words[1:], *more])
            assert cli.trainer.global_step == (3 if "last" in words or "runs/version_0/config.yaml" in words else 2)
        else:
            assert not run(command, more), command
        if command == OWN:
            assert type(cli.model.model.attentions[0]).__name__ == "MyAttention"
    assert (folder / "runs" / "version_0" / "checkpoints" / "last.ckpt").exists()
    assert len(list(folder.glob("runs/*/metrics.csv"))) == 1
    capsys.readouterr()

    matplotlib.use("Agg")
    _, loop, table, checkpoint, picture, costs = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict = {}
    costs = costs.replace("(64, 256, 1024)", "(16, 32, 64)").replace("hidden_dim=128", "hidden_dim=16")
    for example in (loop, table, checkpoint, picture, costs):
        exec(example, names)
    printed = capsys.readouterr().out
    assert names["loss"].item() < math.log(256)
    assert "values.bits_per_byte" in printed
    assert "def add(a, b):" in printed
    length = names["ids"].shape[1]
    assert names["weights"].shape == (1, 1, 2, length, length)
    torch.testing.assert_close(names["weights"], names["weights"].tril())
    assert "flops (operations)" in printed
    with Image.open("map.png") as image:
        assert min(image.size) > 200


def test_the_logger_of_the_page(folder, monkeypatch):
    """trackio is not a dependency: its three functions are recorded here."""
    calls = []
    (folder / "trackio.py").write_text("init = log = finish = None\n")
    (folder / "my_logger.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    import trackio

    for name in ("init", "log", "finish"):
        monkeypatch.setattr(trackio, name, lambda *args, name=name, **options: calls.append((name, args, options)))
    train.main([*shlex.split(LOGGER)[1:], *TRAIN, "--trainer.log_every_n_steps=1"])
    assert calls[0][0] == "init"
    assert calls[0][2]["project"] == "attention"
    assert calls[0][2]["config"]["hidden_dim"] == "16"
    assert calls[-1][0] == "finish"
    logged = {name: value for call, args, _ in calls if call == "log" for name, value in args[0].items()}
    assert {"train/loss", "val/bits_per_byte"} <= set(logged)
    for name in ("config.yaml", "record.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / "runs" / "version_0" / name).exists(), "though the logger has no folder"
    for name in ("trackio", "my_logger"):
        sys.modules.pop(name)
