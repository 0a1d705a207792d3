"""Twelve of the random options and twelve of the random configurations of tests/faults/fuzz_options.py."""

import pytest
from faults import environment, fuzz_options


@pytest.mark.parametrize("what", ["options", "yaml"])
def test_a_short_training_or_one_sentence(what, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    environment.preload("faults.fuzz_options")
    assert fuzz_options.run(what, 12, seed=1) == 0, capsys.readouterr().out
