"""Models of the size of a thimble."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All models here are tiny."""
