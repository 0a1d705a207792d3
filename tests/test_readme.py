"""Every command of README.md is run here, on less text for fewer steps, or it says where it is."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

DATA = {"source": "text.txt", "tokenizer": "bytes", "context_length": 32, "batch_size": 4, "cache_dir": "cache"}
TRAINER = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "enable_progress_bar": "false"}
MODEL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}
SECTIONS = {"data": DATA, "trainer": TRAINER, "model": MODEL}
TRAIN = [f"--{section}.{name}={value}" for section, values in SECTIONS.items() for name, value in values.items()]
APART = [*TRAIN, "--trainer.logger.init_args.save_dir=others"]  # there is less to evaluate then
EVALUATE = ["--trust_data", "--device=cpu", "--multiples=[1]", "--lengths=[16]", "--rounds=1"]

#: What is appended to the commands that are run here, in the order of the page.
HERE = {
    "train.py fit --config configs/bsbr_pro.yaml": TRAIN,
    "train.py fit --config configs/delta_net.yaml": APART,
    "train.py fit --model.attention=delta_net": APART,
    "train.py fit --config configs/bsbr_pro.yaml --model.attention.chunk_size=64 --trainer.max_steps=100": APART,
    "train.py validate --config configs/bsbr_pro.yaml --ckpt_path runs/version_0/checkpoints/best.ckpt": TRAIN,
    "train.py fit --config configs/bsbr_pro.yaml --ckpt_path last": [*TRAIN, "--trainer.max_steps=4"],
    "train.py fit --help": [],
    "train.py fit --data.help TextData": [],
    "train.py fit --model.attention.help BSBRAttention": [],
    "evaluate.py runs/": EVALUATE,
    "-m bsbr_pl evaluate runs/": EVALUATE,
    "-m bsbr_pl report a/results.jsonl b/results.jsonl": ["--output_dir=merged"],
    "-m bsbr_pl match --match=params": ["--hidden_dim=16", "--architectures=[linear]", "--tokens=32"],
    "study/train_all.py runs/all": ["--architectures=linear", "--seeds=0", "--", *TRAIN],
    "evaluate.py runs/all": EVALUATE,
}
#: Where the others are run, and how that file says so.
ELSEWHERE = {
    "python3 -m venv .venv": (".ci/run", "-m venv"),
    "pip install -q -c constraints.txt -e .": (".ci/run", "-c constraints.txt -e '.[dev]'"),
    "pip install -q -c constraints.txt -e '.[dev]'": (".ci/run", "-c constraints.txt -e '.[dev]'"),
    "pip install -c constraints.txt -e '.[docs]'": (".ci/run", "-c constraints.txt -e '.[docs]'"),
    "train.py fit --config configs/bsbr_pro.yaml --model.compile=true": ("tests/test_module.py", "compile=compiled"),
    "make docs": ("Makefile", "docs:"),
    "-m bsbr_pl retrieval runs/version_1/checkpoints/best.ckpt": (
        "tests/evals/test_retrieval.py",
        'main(["retrieval", str(path)',
    ),
    "-m pytest -q": ("Makefile", "python -m pytest -q"),
    '-m pytest -q -m ""': ("Makefile", 'python -m pytest -q -m ""'),
    "-m pytest -q -m slow": ("tests/test_slow_tests.py", '"-m", "slow"'),
    "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": ("constraints.txt", "torch==2.13.0"),
    "tensorboard --logdir runs": ("tests/callbacks/test_tensorboard.py", '"tensorboard.main", "--logdir"'),
    "--config configs/bsbr.yaml --config configs/data/mqar.yaml": (
        "tests/test_train.py",
        '"bsbr.yaml", "data/mqar.yaml"',
    ),
}


def commands(page: str = README) -> list[str]:
    """Of the bash blocks and of the text, less the environment's folder and the comments."""
    page = re.sub(r"\\\n *|^#(!|SBATCH).*\n", "", page, flags=re.M)  # lines that go on are one; #! and #SBATCH are none
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    spans = re.findall(
        r"`((?:pip|python|make|\.venv/bin/|--config) ?[^`\n]*)`", re.sub(r"```.*?```", "", page, flags=re.S)
    )
    found = [part.split("  #")[0].strip() for line in blocks + spans for part in line.split(" && ")]
    return [re.sub(r"^(\.venv/bin/)?(python )?", "", command) for command in found if command]


def test_every_command_is_known():
    assert set(commands()) == set(HERE) | set(ELSEWHERE)
    assert [command for command in commands() if command in HERE] == list(HERE), "the order is that of the page"
    for place, words in ELSEWHERE.values():
        assert words in (ROOT / place).read_text()


def run(command: str, more: list[str]) -> int | str | None:
    """The exit code of a command, run as a script in this process."""
    script, *arguments = [*shlex.split(command), *more]
    sys.argv[:] = [script, *arguments]
    try:
        if script == "-m":
            sys.argv.pop(0)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.filterwarnings("ignore:'bsbr_pl.__main__' found in sys.modules")  # evaluate.py was before it
def test_the_commands_run(tmp_path, monkeypatch, one_thread, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.syspath_prepend(ROOT / "study")  # a script finds the modules of its folder
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text.txt").write_text(
        "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(200))
    )
    printed = {}
    for command, more in HERE.items():
        if " report " in command:
            for machine in ("a", "b"):
                shutil.copytree("evaluation", machine)
        assert not run(command, more), command
        printed[command] = capfd.readouterr().out
    fit, validate, help_, evaluate, _, report, match = (list(HERE)[i] for i in (0, 4, 6, 9, 10, 11, 12))
    for words in ("bits per byte", "xz -9", "gzip -9", "accuracy", "Generated:"):
        assert words in printed[fit]
    assert "val/loss" in printed[validate]
    assert "--model.attention" in printed[help_]
    assert "chunk_size" in printed["train.py fit --model.attention.help BSBRAttention"]
    assert printed[evaluate].endswith("evaluation/report.html\n")
    assert printed[report] == "merged/report.html\n"
    assert (tmp_path / "merged/report.html").read_bytes() == (tmp_path / "a/report.html").read_bytes(), "equal rows"
    assert re.search(r"^linear .* \+0\.\d\d %", printed[match], re.M)
    for left in ("config.yaml", "record.json", "checkpoints/best.ckpt"):
        assert (tmp_path / "runs" / "version_0" / left).exists()
    for left in ("results.jsonl", "report.html"):
        assert (tmp_path / "evaluation" / left).exists()
    assert (tmp_path / "runs/all/linear/seed0/checkpoints/best.ckpt").exists()

    for example in re.findall(r"```python\n(.*?)```", README, re.S):  # test_answers.py runs others
        names = {"ids": torch.arange(5)[None]}
        exec(example, names)
        assert names["weights"].shape == (1, 1, 2, 5, 5)
