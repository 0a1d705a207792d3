"""A pytest plugin: marks the tests that tests/slow.txt lists as `slow`, and says how many were left out.

pyproject.toml deselects slow tests (`-m "not slow"`); `python -m pytest -q -m ""` runs all tests, `-m slow` the others.
The files of the longest tests come first: at the end of a run, a process that has nothing left waits for a short test.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("slow.txt")
LEFT_OUT = pytest.StashKey[int]()
#: Files with tests of more than ten seconds, which other tests would otherwise have to wait for.
FIRST = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("study", "processes", "fuzz_rows", "answers", "benchmarks", "readme_figure", "docs", "checkpoint"),
        *("readme", "launch"),
    )
)


def patterns() -> list[re.Pattern[str]]:
    """Regular expressions of the ids of slow tests."""
    lines = (line.partition("#")[0].strip() for line in LIST.read_text().splitlines())
    return [re.compile(line) for line in lines if line]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # a process for each core: each needs one thread
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before the marks are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = patterns()
    for item in items:
        if any(pattern.fullmatch(item.nodeid) for pattern in slow):
            item.add_marker("slow")
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))  # which keeps the order within both parts


def pytest_deselected(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.config.stash[LEFT_OUT] = item.config.stash.get(LEFT_OUT, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: tell the process that sums up
        session.config.workeroutput["slow tests left out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    output = getattr(node, "workeroutput", {})  # every worker collects all tests
    node.config.stash[LEFT_OUT] = output.get("slow tests left out", 0)  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        tests = "slow test" if count == 1 else "slow tests"
        terminalreporter.write_line(f"{count} {tests} left out; run them with: python -m pytest -q -m slow")
