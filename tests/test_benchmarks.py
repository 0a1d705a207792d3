"""Every script that writes a table, at toy size: it runs and writes its rows, its command and the machine. No times."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400))

#: Script -> its options.
SCRIPTS = {
    "benchmarks/operation": ("--lengths", "130", "--rounds", "1"),
    "benchmarks/training_step": ("--lengths", "64", "--batch", "1", "--rounds", "1"),
    "benchmarks/growth": (
        *("--lengths", "130", "260", "--contexts", "16", "130", "--prefill", "130", "--rounds", "1"),
        *("--architectures", "bsbr top-k 8"),
    ),
    "benchmarks/start_up": ("--config", "{config}", "--rounds", "1"),
    "benchmarks/callback_overhead": ("--config", "{config}", "--slice", "0.2"),
    "study/convert_and_heal": (
        *("--steps", "2", "--heal-steps", "1", "--context-length", "32", "--chunk-size", "8", "--folder", "runs"),
        *("--data.source={text}", "--data.tokenizer=bytes", "--data.cache_dir=cache"),
        *("--model.hidden_dim=16", "--model.num_layers=1", "--model.num_heads=2", "--trainer.accelerator=cpu"),
    ),
    "benchmarks/others": ("--layer-lengths", "16", "--operation-lengths", "16", "--rounds", "1"),
}
CONFIG = """
trainer: {max_steps: 4, val_check_interval: 2, log_every_n_steps: 1}
model:
  attention: {class_path: bsbr_pl.attention.BSBRAttention, init_args: {chunk_size: 8}}
  hidden_dim: 16
  num_layers: 1
  num_heads: 2
data:
  class_path: bsbr_pl.data.TextData
  init_args: {source: "%s", tokenizer: bytes, context_length: 32, batch_size: 2}
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path):
    text, config, out = tmp_path / "text.py", tmp_path / "config.yaml", tmp_path / "rows.json"
    text.write_text(TEXT)
    config.write_text(CONFIG % text)
    arguments = [argument.format(text=text, config=config) for argument in SCRIPTS[script]]
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(out.read_text())
    assert written["command"].startswith(f"python {script}.py")
    assert written["environment"]["threads"] >= 1
    if script == "benchmarks/others":  # seven layers and two operations; those of absent packages are left out
        assert len(written["rows"]) + done.stdout.count("left out") == 9
    else:
        assert written["rows"]
    for row in written["rows"]:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert numbers
        assert all(math.isfinite(value) for value in numbers), row


def test_rows_of_a_gpu_can_be_built(tmp_path):
    """All rows of one architecture at toy size on a CPU; a second call finds them and prints the tables."""
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), "--only", " gated_delta_net "]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert [row["key"] for row in rows] == [key for key in listed if " gated_delta_net " in key]
    assert {row["kind"] for row in rows} == {"law", "operation", "step", "decode"}
    assert not [row["error"] for row in rows if "error" in row]
    assert all(row["kept"] for row in rows if row["kind"] == "law")
    again = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    assert f"0 of {len(rows)} rows to measure" in again.stdout
    assert "| gated_delta_net | " in again.stdout
