"""One thread for all instruments' tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All models here are tiny."""
