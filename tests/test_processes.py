"""Several processes: losses, figures and checkpoints are those of one, a failure ends all, evaluations are shared."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import environment
from faults.kill_and_resume import start
from two_processes import GLOBAL_BATCH, RESUMED, RUNS, SAVED, STRATEGIES, checkpoint, data_of, fit

import bsbr_pl.report
from bsbr_pl.__main__ import run as command
from bsbr_pl.data import InductionData, MQARData, NeedleData, SelectiveCopyData
from bsbr_pl.data.base import Steps
from bsbr_pl.evals import evaluation
from bsbr_pl.evals.checkpoints import read_all
from bsbr_pl.evals.evaluation import Evaluation
from bsbr_pl.metrics import IGNORED
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import Results
from bsbr_pl.values import digest

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-W", "ignore"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*command: object, folder: Path, seconds: int = 240) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), cwd=folder, env=variables, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever the processes left behind
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    (root / "texts").symlink_to(texts)
    return root


@pytest.fixture(scope="module")
def options(texts) -> list[str]:
    """A command line of seconds on two processes, with all callbacks of base.yaml."""
    data = {"source": texts, "tokenizer": "bytes", "context_length": 32, "batch_size": 2, "cache_dir": "cache"}
    trainer = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 2, "accelerator": "cpu", "devices": 2}
    model = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2}
    sections = {"data": data, "trainer": trainer, "model": model}
    named = [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    return ["fit", f"--config={ROOT / 'configs/bsbr.yaml'}", *named]


@pytest.fixture(scope="module")
def alone(folder, one_thread) -> dict[str, dict[str, Any]]:
    """What each run logs on one process."""
    return {name: fit(name, folder, "auto", 1) for name in RUNS}


@pytest.fixture(scope="module")
def two(folder, options, alone) -> dict[str, dict[str, Any]]:
    """What each run logs on two processes, by run and strategy, and going on from checkpoints of others."""
    command = [*options, "--trainer.strategy=fsdp2"]
    done = run(*TORCHRUN, ROOT / "tests" / "two_processes.py", folder, *command, folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return json.loads((folder / "two.json").read_text())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_what_one_does(name, strategy, alone, two, folder):
    one, both = alone[name], two[f"{name} {strategy}"]
    last = data_of(name, folder).samples("val").eval_batches(GLOBAL_BATCH)[-1]
    assert len(last) % 2 == 1, "the processes get unequal shares"
    assert both["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert both.keys() == one.keys()
    for key in one:
        if key.startswith("val/"):
            assert both[key] == pytest.approx(one[key], rel=1e-9), key


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(("auto", *STRATEGIES), 2)))
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_goes_on_under_any_other_strategy(name, before, after, alone, two, folder):
    """From one process to two and back, ddp and fsdp2: the losses are those of the run that was never stopped."""
    saved = checkpoint(name, before, folder)
    found = fit(name, folder, "auto", 1, saved) if after == "auto" else two[f"{name} {before} {after}"]
    assert found["losses"] == pytest.approx(alone[name]["losses"][SAVED:], rel=1e-9)
    assert found["val/loss"] == pytest.approx(alone[name]["val/loss"], rel=1e-9)
    assert sum(p.numel() for p in LanguageModule.load(saved).parameters()) > 0


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_count_equally_many_targets(processes, folder):
    """What makes the mean over processes of mean losses the mean over all tokens."""
    few = {"num_train": 24, "batch_size": 4}
    for data in (
        data_of("bsbr", folder),
        InductionData(16, 24, [16], **few),
        SelectiveCopyData(16, 24, 4, **few),
        MQARData(64, [(16, 2, 24), (24, 3, 24)], [(16, 2, 8)], batch_size=4),
        NeedleData(str(folder / "texts"), "bytes", context_length=32, cache_dir=str(folder / "cache"), **few),
    ):
        samples = data.samples("train")
        batches = samples.train_batches(4 * processes, 0)
        for shares in zip(*(Steps(samples, batches, rank, processes) for rank in range(processes)), strict=True):
            counted = {int((share["targets"] != IGNORED).sum()) for share in shares}
            assert len(counted) == 1
            assert counted != {0}


def check_run(folder: Path, printed: str) -> None:
    """The first process alone printed, logged and saved, in one folder."""
    assert printed.count("xz -9") == printed.count("Generated:") == 1
    assert [path.name for path in (folder / "runs").iterdir()] == ["version_0"]
    record = json.loads((folder / "runs/version_0/record.json").read_text())
    assert (record["status"], record["steps"], record["environment"]["processes"]) == ("finished", 4, 2)
    for name in ("train/loss", "val/loss", "step/seconds", "memory/peak_tensor_bytes", "flops/forward_flops"):
        assert record["metrics"][name]["value"][0] > 0
    assert record["metrics"]["attention/entropy_nats/layer0"]["step"] == [3]
    assert LanguageModule.load(folder / "runs/version_0/checkpoints/last.ckpt").hparams["hidden_dim"] == 16


def test_the_command_line_trains_on_two_processes(options, tmp_path):
    done = run(sys.executable, ROOT / "train.py", *options, "--trainer.strategy=ddp", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr, "the metrics are those of all processes already"
    check_run(tmp_path, done.stdout)


def test_the_command_line_trains_under_torchrun(two, folder):
    check_run(folder, (folder / "printed").read_text())


def test_one_process_that_fails_ends_all(tmp_path):
    """One of the cases of the script: without `callbacks.FailTogether` the processes wait for each other."""
    only = ["--launchers=own", "--strategies=ddp", "--ranks=0", "--ways=raised"]
    done = run(*PYTHON, ROOT / "tests/faults/failing_processes.py", *only, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "error shown: True, left: 0" in done.stdout


def evaluate(number: str, *arguments: str) -> None:
    """What each of two processes does; it notes when it measures times, and keeps its report apart."""
    measure, write_report = evaluation.measure_costs, bsbr_pl.report.write_report

    def timed(*args: Any) -> Any:
        start = time.time()
        found = measure(*args)
        with open(f"times{number}", "a") as stream:
            stream.write(f"{start} {time.time()}\n")
        return found

    evaluation.measure_costs = timed
    bsbr_pl.report.write_report = lambda rows, folder: write_report(rows, folder / number)
    if code := command("evaluate", list(arguments), "evaluate.py"):
        raise RuntimeError(f"exit code {code}")


def test_two_evaluations_divide_the_work(alone, folder, tmp_path, monkeypatch):
    """Two real processes, and this one, which keeps one row to itself for a while."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    environment.preload("faults.environment")
    paths = [checkpoint(name, "auto", folder) for name in ("bsbr", "linear")]
    results = Results(tmp_path / "evaluation" / "results.jsonl")
    ours = Evaluation(results)
    rows = [ours.identity(found.subject(), "certificate") for found in read_all(paths)]
    arguments = [*paths, "--trust_data", "--lengths=[8,16,32,64]", "--rounds=2", "--multiples=[1,2]", "--device=cpu"]
    with results.claim(rows[0], wait=False) as claimed:
        assert claimed
        both = [start(tmp_path, evaluate, number, *arguments) for number in "12"]
        deadline = time.monotonic() + 120
        while not all(results.get(row) for row in rows[1:]) and time.monotonic() < deadline:
            time.sleep(0.1)
            results.read()
        assert not results.get(rows[0])
    for process in both:
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    keys = [digest(json.loads(line)["identity"]) for line in results.path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 2 * (1 + 1 + 2 + 1 + 4), "nothing is missing, nothing measured twice"
    times = [np.loadtxt(file, ndmin=2) for file in tmp_path.glob("times*")]
    spans = np.concatenate(times)[np.concatenate(times)[:, 0].argsort()]
    assert len(spans) == 4
    assert (spans[1:, 0] >= spans[:-1, 1]).all(), "no two processes measured times at once"
    first, second = ((tmp_path / "evaluation" / number / "report.html").read_text() for number in "12")
    assert first == second
    assert "bsbr" in first


HOLD = "import sys, time, filelock as f; held = f.FileLock(sys.argv[1]); held.acquire(); print(); time.sleep(99)"


def test_what_a_killed_process_had_claimed_is_free(tmp_path):
    results, row = Results(tmp_path / "results.jsonl"), {"kind": "text"}
    with results.claim(row, wait=False) as claimed:
        assert claimed
    file = tmp_path / ".lock" / digest(row)
    assert file.exists()
    with subprocess.Popen([*PYTHON, "-u", "-c", HOLD, str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with results.claim(row, wait=False) as claimed_meanwhile:
            pass
        process.kill()
    assert not claimed_meanwhile
    with results.claim(row, wait=False) as claimed:
        assert claimed
