"""Training where something is missing: a stream, a home, room on the disk; the cases of faults/environment.py."""

import pytest
from faults import environment


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    environment.preload("faults.environment")


@pytest.mark.parametrize("name", environment.CASES)
def test_a_short_training_or_one_sentence(name, tmp_path):
    assert environment.attempt(name, tmp_path) == ""
