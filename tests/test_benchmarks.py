"""Every script that writes a table, at toy size: it runs and writes its rows, its command and the machine. No times."""

import contextlib
import itertools
import json
import math
import shutil
import subprocess
import time
from unittest import mock

import pytest
import torch
from test_readme import ROOT, run

from bsbr_pl.attention import kernels
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils import timing

pytestmark = pytest.mark.filterwarnings("ignore")  # scripts are not tested for them
RUN = subprocess.run
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


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch, one_thread):
    """In a folder of its own, with what a script would find in a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])
    for folder in ("benchmarks", "study"):
        monkeypatch.syspath_prepend(ROOT / folder)
    for compiler in ("TORCHINDUCTOR", "TRITON"):
        monkeypatch.setenv(f"{compiler}_CACHE_DIR", str(tmp_path / "compiled"))


def started_here(command, cwd, **_) -> None:
    """`subprocess.run` of a Python in this process, which has imported torch."""
    _, script, *arguments = command
    with contextlib.chdir(cwd), mock.patch("sys.argv", []), mock.patch("subprocess.run", RUN):
        if script == "-c":
            exec(*arguments)
        else:
            assert not run(script, arguments)


def timed_once(calls, *_, **__) -> dict[str, timing.Timing]:
    """`measure` in a single round and in this process: start_up.py would start ten others."""
    found = {}
    for name, call in calls.items():
        start = time.perf_counter()
        with mock.patch("subprocess.run", started_here):
            call()
        found[name] = timing.summarize([time.perf_counter() - start])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path, capsys, monkeypatch):
    text, config, out = tmp_path / "text.py", tmp_path / "config.yaml", tmp_path / "rows.json"
    text.write_text(TEXT)
    config.write_text(CONFIG % text)
    if script == "benchmarks/start_up":
        monkeypatch.setattr(timing, "measure", timed_once)
    arguments = [argument.format(text=text, config=config) for argument in SCRIPTS[script]]
    assert not run(f"{ROOT / script}.py", [*arguments, f"--out={out}"])
    written = json.loads(out.read_text())
    assert written["command"].startswith(f"python {script}.py")
    assert written["environment"]["threads"] >= 1
    if script == "benchmarks/others":  # seven layers and two operations; those of absent packages are left out
        assert len(written["rows"]) + capsys.readouterr().out.count("left out") == 9
    else:
        assert written["rows"]
    for row in written["rows"]:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert numbers
        assert all(math.isfinite(value) for value in numbers), row


def test_rows_of_a_gpu_can_be_built(tmp_path, capsys):
    """All rows of one architecture at toy size on a CPU; a second call finds them and prints the tables."""

    def gpu(*more: str) -> str:
        assert not run(f"{ROOT / 'benchmarks/gpu.py'}", ["--out=gpu.jsonl", "--only= gated_delta_net ", *more])
        return capsys.readouterr().out

    gpu("--dry-run")
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    listed = gpu("--list").split("\n")[:-1]
    assert [row["key"] for row in rows] == [key for key in listed if " gated_delta_net " in key]
    assert {row["kind"] for row in rows} == {"law", "operation", "step", "decode"}
    assert not [row["error"] for row in rows if "error" in row]
    assert all(row["kept"] for row in rows if row["kind"] == "law")
    again = gpu("--dry-run")
    assert f"0 of {len(rows)} rows to measure" in again
    assert "| gated_delta_net | " in again


@pytest.mark.parametrize("name", ["linear", "gau"])
def test_operation_runs_the_kernel_of_a_gpu(name, monkeypatch):
    """The kernels that need no Triton, in bf16 on a CPU."""
    from gpu_operation import operation
    from gpu_rows import Row, Setting

    given = Row("operation", name, 130, 2, 16, "float32"), Setting("cpu", toy=True)
    forward, inputs = operation(*given)
    plain = forward(*inputs)
    monkeypatch.setattr(kernels, "low_precision", lambda x: torch.bfloat16)
    forward, inputs = operation(*given)
    error = (forward(*inputs) - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert 0 < error < 2e-2


def test_a_decoded_token_continues_the_one_before(monkeypatch):
    """Two steps from one state would time a copy of its cache."""
    from gpu_model import decode
    from gpu_rows import Row, Setting

    lengths, step = [], LanguageModel.step

    def noted(model, ids, states):
        lengths.append(states[0].tokens)
        return step(model, ids, states)

    monkeypatch.setattr(LanguageModel, "step", noted)
    assert decode(Row("decode", "standard", 1024), Setting("cpu", toy=True))["launched_ms"] > 0
    assert lengths == [130, 131, 132]


def test_the_device_time_does_not_depend_on_how_often_a_call_was_launched(monkeypatch):
    """A call that continues is made anew before a CUDA graph of it."""
    import gpu_clock
    from gpu_rows import Setting

    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    graphed = []

    def graph(call):
        graphed.append(call())
        return call

    monkeypatch.setattr(gpu_clock, "graphed", graph)

    def start():
        count = itertools.count()
        return lambda: next(count)

    assert "device_ms" in gpu_clock.both_times(start(), Setting("cuda", toy=True), start)
    assert graphed == [2]  # after one call, and one for the peak memory


def test_a_row_that_compiles_too_long_leaves_time_for_the_next(monkeypatch, capsys):
    import gpu_run
    from gpu_rows import rows

    first, second = [row for row in rows() if row.form == "compiled"][:2]
    monkeypatch.setattr(gpu_run, "KEY_SECONDS", 1)
    monkeypatch.setattr(gpu_run, "compile_row", lambda row, _: time.sleep(3 if row == first else 0))
    gpu_run.compile_keys([first.key, second.key])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"could not compile {first.key}: took longer than 1 s"
    assert told[1].startswith(f"compiled {second.key} in ")


ROW = {"torch": torch.__version__, "card": "one", "code": "now"}


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ({}, False),
        ({"card": "two"}, True),
        ({"torch": "1.0"}, True),
        ({"code": "before"}, True),
        ({"kept": False}, False),
        ({"error": "no memory"}, True),
    ],
    ids=str,
)
def test_a_row_counts_for_its_card_torch_and_code(line, again):
    from gpu_rows import Row
    from gpu_run import code, missing

    row = Row("law", "bsbr")
    now = ROW | {"key": row.key, "code": code("bsbr")}
    assert missing([now | line], [row], ROW) == [row] * again
    assert missing([{"key": row.key, "card": "one", "torch": ROW["torch"]}], [row], ROW) == [row], "rows without code"
    assert not missing([now | {"error": "no memory"}] * 2, [row], ROW), "failed twice"


def test_the_peak_is_that_of_the_card():
    from gpu_run import measured_peak

    key = "peak matrix product 0 0x0 bfloat16 eager"
    lines = [{"key": key, "card": card, "per_second": i} for i, card in enumerate(["one", "two"])]
    assert [measured_peak(lines, card) for card in ("one", "two", "three")] == [0, 1, None]


def test_tables_show_the_newest_row_and_mark_older_code():
    from gpu_tables import tables

    def decode(name: str, **more) -> dict:
        line = {"key": f"decode {name}", "kind": "decode", "name": name, "tokens": 1024, "launched_ms": 1.0}
        return ROW | line | more

    lines = [
        decode("bsbr", code="before"),
        decode("bsbr", launched_ms=2.0),
        decode("gau", code="before"),
        *[decode("gau", error="no memory")] * 2,
        decode("linear", error="no memory"),
    ]
    found = tables(lines, lambda name: "now").splitlines()
    assert [line for line in found if "1,024" in line] == [
        "| bsbr | 1,024 |  | 2 | now |",
        "| gau | 1,024 |  | 1 | older |",
    ]
    assert [line for line in found if "failed" in line] == ["- failed twice: decode gau"]


def test_the_code_of_a_row_is_that_of_the_attentions(tmp_path, monkeypatch):
    import gpu_run

    def codes() -> dict[str, str]:
        gpu_run.code.cache_clear()
        return {name: gpu_run.code(name) for name in ("gau", "gla", "kda", "bsbr top-k 8", "sdpa")}

    before = codes()
    shutil.copytree(ROOT / "bsbr_pl", tmp_path / "bsbr_pl", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(gpu_run, "SCRIPT", tmp_path / "benchmarks" / "gpu.py")
    assert codes() == before
    every = {"gau", "gla", "kda", "bsbr top-k 8"}
    changed = {
        "attention/gau.py": {"gau"},
        "attention/triton_chunks.py": {"gla", "kda"},  # imported by what they import
        "attention/bsbr.py": {"bsbr top-k 8"},
        "attention/kernels.py": every,
        "model.py": every,
        "compiled.py": every,
    }
    for name, expected in changed.items():
        with (tmp_path / "bsbr_pl" / name).open("a") as file:
            file.write("\n")
        after = codes()
        assert {key for key in after if after[key] != before[key]} == expected
        before = after
    gpu_run.code.cache_clear()
