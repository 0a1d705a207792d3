"""The scripts of docs/research run, in small, and the page shows them as they are."""

import importlib.util
import re
from pathlib import Path

import matplotlib
import pytest

from bsbr_pl.results import read_rows

FOLDER = Path(__file__).parent.parent / "docs" / "research"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"research_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def quick(one_thread):
    """Small models, and pictures for nobody to see."""
    matplotlib.use("Agg")


def kept(folder: Path, name: str, capsys) -> str:
    """What a script printed is what it kept."""
    printed = capsys.readouterr().out
    assert (folder / f"{name}.txt").read_text() == printed
    return printed


def test_compare(tmp_path, capsys):
    models = ("BSBR", "Standard")
    small = {"hidden_dim": 16, "num_layers": 1, "train_steps": 2, "rounds": 2, "cache_dir": tmp_path / "cache"}
    options = {"model_options": {"BSBR": {"chunk_size": 8}}}
    load("compare").main((16, 32), models, folder=tmp_path, device="cpu", **small, **options)
    printed = kept(tmp_path, "compare", capsys)
    for word in (
        "inference_time (s)",
        "memory_usage (MB)",
        "accuracy (share)",
        "below Standard from",
        "trained for 2 steps",
    ):
        assert word in printed
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_scaling(tmp_path, capsys):
    small = {"hidden_dim": 16, "num_layers": 1, "rounds": 2, "device": "cpu"}
    load("scaling").main((16, 32, 64), ("BSBR", "Standard"), folder=tmp_path, **small)
    printed = kept(tmp_path, "scaling", capsys)
    for word in ("time (s)", "memory (GB)", "flops (operations)", "exponent"):
        assert word in printed
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_memory(tmp_path, capsys):
    load("memory").main((8, 16), seq_length=32, hidden_dim=64, folder=tmp_path)
    lines = kept(tmp_path, "memory", capsys).splitlines()
    for line, chunk_size in zip(lines, (8, 16), strict=True):
        found = re.fullmatch(r"chunk_size +(\d+): peak_memory (\S+) MB, current_memory (\S+) MB \(.*", line)
        assert int(found[1]) == chunk_size
        assert float(found[2]) >= float(found[3]) > 0


def test_attention(tmp_path, capsys):
    load("attention").main(seq_length=16, chunk_size=8, folder=tmp_path)
    assert kept(tmp_path, "attention", capsys).startswith(
        "attention_weights: (2, 1, 4, 16, 16), 46.9% of them exactly 0"
    )
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_experiment(tmp_path, capsys):
    load("experiment").main((8, 16), steps=2, folder=tmp_path, output_dir=tmp_path / "runs")
    lines = kept(tmp_path, "experiment", capsys).splitlines()
    assert [line.split()[:2] for line in lines] == [[m, t] for m in ("BSBR", "Linear", "Standard") for t in ("8", "16")]
    assert len(read_rows([tmp_path / "runs" / "results.jsonl"])) == 6


def test_the_page_shows_the_scripts_and_what_they_printed():
    page = (FOLDER / "README.md").read_text()
    assert load("page").render(page) == page, "run python docs/research/page.py"
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"page.py"}
    assert set(re.findall(r"<!-- (\S+\.py) -->", page)) == scripts
    for name in scripts:
        assert f"```python\n{(FOLDER / name).read_text()}```\n" in page
