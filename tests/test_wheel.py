"""The wheel: what is in it, and that it works where there is no checkout."""

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import bsbr_pl, torch
from bsbr_pl.attention import BSBRAttention
from bsbr_pl.module import LanguageModule
from bsbr_pl.data import TextData
from functools import partial
from lightning import Trainer
assert bsbr_pl.__file__.startswith({wheel!r}), bsbr_pl.__file__
data = TextData("text.txt", "bytes", context_length=32, batch_size=4, cache_dir="cache")
module = LanguageModule(partial(BSBRAttention, chunk_size=8), 257, hidden_dim=16, num_layers=1, num_heads=2)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, use_distributed_sampler=False, **quiet)
trainer.fit(module, datamodule=data)
trainer.save_checkpoint("trained.ckpt")
import runpy, sys
sys.argv = ["bsbr_pl", *{command!r}]
runpy.run_module("bsbr_pl", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, beside what must not get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("bsbr_pl", "callbacks", "configs", "tests"):
        shutil.copytree(ROOT / part, folder / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, folder / "source")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_it_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "bsbr_pl").rglob("*.py")}
    assert len(sources) > 40
    pages = {f"bsbr_pl/report/{name}" for name in ("report.html", "report.md", "words.toml")}
    expected = sources | pages | {"bsbr_pl/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.fixture
def alone(wheel, tmp_path):
    """A function that runs Python code where there is the wheel and no checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "text.txt").write_text("".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(100)))
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)

    return run


def trained_and(*command: str, folder: Path) -> str:
    """Code that trains trained.ckpt with the wheel, and then runs a command."""
    return USE.format(wheel=str(folder / "site"), command=command)


def test_it_trains_and_evaluates_without_a_checkout(alone, tmp_path):
    options = ["trained.ckpt", "--multiples=[1]", "--lengths=[]"]
    alone(trained_and("evaluate", "--trust_data", *options, folder=tmp_path))
    assert "bits per byte" in (tmp_path / "evaluation/report.html").read_text()


LOAD = """
import sys, bsbr_pl.hf, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "lightning" not in sys.modules
model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=False)
batch = AutoTokenizer.from_pretrained("exported", trust_remote_code=False)("def add_", return_tensors="pt")
found = model.generate(**batch, max_new_tokens=20, do_sample=False)
from bsbr_pl.module import LanguageModule
ours = LanguageModule.load("trained.ckpt").model
assert torch.equal(found, ours.generate(batch["input_ids"], 20, temperature=0)[:, : found.shape[1]])
assert (model(**batch).logits - ours(batch["input_ids"])).abs().max() <= 1e-6
"""


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra [hf]")
def test_it_exports_without_a_checkout(alone, tmp_path):
    alone(trained_and("export", "trained.ckpt", "exported", folder=tmp_path))
    alone(LOAD)
