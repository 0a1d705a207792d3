"""Twelve changed rows and checkpoints, of the many that tests/faults/fuzz_rows.py makes."""

import subprocess
import sys
from pathlib import Path


def test_changed_rows_and_records_leave_a_report():
    script = Path(__file__).parent / "faults" / "fuzz_rows.py"
    done = subprocess.run([sys.executable, str(script), "--count=12", "--seed=7"], capture_output=True, text=True)
    assert done.stdout == "12 cases: {'right': 12}\n", done.stderr
