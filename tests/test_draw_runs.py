"""Fifteen runs with random options, of the many that tests/faults/draw_runs.py makes."""

import random

import pytest
from faults import draw_runs


@pytest.fixture(scope="module", autouse=True)
def _prepared():
    with draw_runs.prepared():
        yield


@pytest.mark.parametrize("number", range(15))
def test_a_run_does_and_says_what_its_command_asks_for(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_runs.check(draw_runs.draw(random.Random(f"0 {number}")))
