"""Four of the runs that tests/faults/resume_matrix.py kills and resumes."""

import pytest
from faults import resume_matrix


@pytest.mark.parametrize("number", [0, 1, 2, 3])  # 0 in a process of its own
def test_a_killed_run_ends_as_one_that_was_never_stopped(number, tmp_path, one_thread):
    with resume_matrix.prepared():
        assert resume_matrix.check(number, 0, tmp_path).startswith("equal")
