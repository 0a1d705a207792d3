"""Slow tests are left out, counted in the last lines, and run when they are asked for; tests/slow.txt names tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import slow_tests

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.parametrize("seconds", [1, 2, 100, 200])
def test_waits(seconds):
    assert seconds != 200, "a slow test that fails"
"""

CONFTEST = """
from pathlib import Path
pytest_plugins = ["slow_tests"]

def pytest_configure(config):
    import slow_tests
    slow_tests.LIST = Path(__file__).with_name("slow.txt")
"""


def pytest_(folder: Path, *options: str) -> str:
    """The output of pytest with the options of pyproject.toml, on four tests of which two are listed as slow."""
    (folder / "test_waiting.py").write_text(TESTS)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "slow.txt").write_text("# a list\n.*test_waits.[12]00.  # seconds\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", folder, folder]
    command += options
    path = {"PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True).stdout


@pytest.mark.parametrize("processes", ["0", "2"])
def test_slow_tests_are_left_out(processes, tmp_path):
    """In one process and in two, which count together."""
    printed = pytest_(tmp_path, "-n", processes)
    assert "2 slow tests left out; run them with: python -m pytest -q -m slow" in printed.splitlines()
    assert re.search(r"^2 passed", printed, re.M), printed


def test_slow_tests_run_when_they_are_asked_for(tmp_path):
    printed = pytest_(tmp_path, "-n0", "-m", "slow")
    assert "left out" not in printed
    assert re.search(r"^1 failed, 1 passed", printed, re.M), printed
    assert re.search(r"^1 failed, 3 passed", pytest_(tmp_path, "-n0", "-m", ""), re.M)


def test_files_of_long_tests_come_first():
    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

        def add_marker(self, _: str) -> None:
            pass

    assert all((ROOT / name).exists() for name in slow_tests.FIRST)
    items = [Item(f"{name}::test") for name in ("tests/a.py", slow_tests.FIRST[1], "tests/b.py", slow_tests.FIRST[0])]
    slow_tests.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [
        *(f"{slow_tests.FIRST[1]}::test", f"{slow_tests.FIRST[0]}::test"),
        *("tests/a.py::test", "tests/b.py::test"),
    ]


def test_the_list_names_tests(request):
    """Every line is the id of a test, or a pattern of several, in a file that exists."""

    def without_tests(ids: list[str]) -> list[str]:
        return [one.pattern for one in slow_tests.patterns() if not any(map(one.fullmatch, ids))]

    if not without_tests([item.nodeid for item in request.session.items]):
        return  # all tests are collected already
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "slow", "--collect-only", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"^\d+/\d+ tests collected", done.stdout, re.M), done.stdout[-500:]
    assert not without_tests([line for line in done.stdout.splitlines() if "::" in line]), "take them out of slow.txt"
