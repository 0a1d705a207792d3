"""The published study: its tables say what its runs found, and its pages show them."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # a script finds what lies beside it
        return importlib.import_module("study")


@pytest.mark.parametrize(
    "task", ["longer", "long", "text", "mqar", "mqar_state", "induction", "selective_copy", "needle"]
)
def test_tables_are_those_of_the_runs(study, task):
    found = json.loads((RESULTS / f"{task}.json").read_text())
    assert study.as_markdown(found) in (RESULTS / "README.md").read_text()
    for run in found["runs"]:
        assert run["git"]["commit"]
        assert run["data"]


def test_the_readme_shows_the_same(study):
    table = study.as_markdown(json.loads((RESULTS / "longer.json").read_text()))
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(tuple(study_models()))]
    assert len(shown) >= 5
    assert all(line in table.splitlines() for line in shown)


def study_models() -> list[str]:
    return [f"| {path.stem} |" for path in (ROOT / "configs/study/models").glob("*.yaml")]
