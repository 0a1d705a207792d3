"""benchmarks/study.py at toy size: it matches, sweeps, trains at the best rate, makes nothing twice, can be checked."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300))


def test_study(tmp_path):
    (tmp_path / "text.py").write_text(TEXT)
    command = [
        *(sys.executable, ROOT / "benchmarks/study.py", tmp_path / "runs", "--tasks", "text", "--models", "linear"),
        *("--seeds", "1", "--rates", "1e-9", "1e-2", "--steps", "8", "--workers", "2", "--"),
        *(f"--data.source={tmp_path / 'text.py'}", "--data.tokenizer=bytes", "--data.context_length=32"),
        *("--trainer.accelerator=cpu", f"--data.cache_dir={tmp_path / 'cache'}"),
    ]

    def run() -> list[str]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| linear | 8 | 0.01 | 1 | " in done.stdout  # the table
        return [line for line in done.stdout.splitlines() if line.startswith(("sweep", "final"))]

    assert len(run()) == 3
    found = json.loads((tmp_path / "runs/text.json").read_text())
    assert found["rates"] == {"linear": 1e-2}  # at 1e-9 nothing is learnt
    assert found["matched"]["linear"]["ff_dim"] != 512
    assert [(one["kind"], one["rate"], one["seed"], one["steps"]) for one in found["runs"]] == [
        ("sweep", 1e-9, 0, 2),
        ("sweep", 1e-2, 0, 2),
        ("final", 1e-2, 1, 8),
    ]
    record = json.loads((tmp_path / "runs/text/final/linear/rate0.01_steps8_seed1/record.json").read_text())
    assert record["metrics"]["val/loss"]["value"][-1] == found["runs"][2]["val/loss"]
    assert run() == []

    published = tmp_path / "runs/text.json"
    for task in ("longer", "mqar"):
        (tmp_path / f"runs/{task}.json").write_bytes(published.read_bytes())
    draw = [sys.executable, ROOT / "benchmarks/study_figure.py", "--results", tmp_path / "runs"]
    subprocess.run(draw, check=True, capture_output=True)
    assert np.asarray(Image.open(tmp_path / "runs/study.png")).std() > 0
    check = [sys.executable, ROOT / "benchmarks/study_check.py", "--published", published, "--models", "linear"]

    def repeat() -> tuple[int, str]:
        done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    code, printed = repeat()
    assert code == 0, printed
    assert printed.strip().endswith("agrees")
    for name, changed, expected in (("data", "another", (0, "not compared")), ("val/loss", 9.0, (1, "DOES NOT AGREE"))):
        rows = [{**one, name: changed} for one in found["runs"]]
        published.write_text(json.dumps(found | {"runs": rows}))
        code, printed = repeat()
        assert code == expected[0]
        assert expected[1] in printed
