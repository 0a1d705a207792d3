"""tests/faults/mutate.py on a package of three functions."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "faults" / "mutate.py"
PACKAGE = """
def area(width: int, height: int = 1) -> int:
    return width * height


def longer(x: int) -> int:
    return x + 1


def alone(x: int) -> bool:
    return x > 3
"""
TESTS = """
from bsbr_pl.toy import area, longer

def test_area():
    assert area(3, 2) == 6

def test_longer():
    assert longer(9) > 0
"""
RUN = "import mutate; mutate.LOADED = (); mutate.main()"  # without half a minute of imports


def test_it_notices_what_survives_and_what_does_not(tmp_path):
    for name in ("bsbr_pl", "tests/faults"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "tests/faults")
    (tmp_path / "bsbr_pl/__init__.py").touch()
    (tmp_path / "bsbr_pl/toy.py").write_text(PACKAGE)
    (tmp_path / "tests/test_toy_package.py").write_text(TESTS)
    command = [sys.executable, "-c", RUN, str(tmp_path / "found.jsonl"), "bsbr_pl/toy.py", "--count=99"]

    def found() -> list[dict]:
        subprocess.run(command, cwd=tmp_path / "tests/faults", check=True, capture_output=True)
        return [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]

    rows = found()
    assert {(row["what"], row["old"], row["outcome"]) for row in rows} == {
        ("arithmetic", "width * height", "killed"),
        ("constant", "1", "survived"),  # once as a default and once in longer
        ("arithmetic", "x + 1", "survived"),
        ("comparison", "x > 3", "survived"),  # no test executes it
        ("constant", "3", "survived"),  # no test executes it
    }
    assert len(rows) == 6
    assert (tmp_path / "bsbr_pl/toy.py").read_text() == PACKAGE
    assert found() == rows, "a second run measures nothing again"


def test_every_listed_change_can_be_made():
    """Code that moved must take its entry in mutations.toml along."""
    listed = tomllib.loads(SCRIPT.with_name("mutations.toml").read_text())["change"]
    for change in listed:
        assert (ROOT / change["file"]).read_text().count(change["old"]) == 1, change
        assert change["new"] != change["old"]
