"""Measures the rows that are missing, within a time limit; compiled forms are first compiled in parallel."""

import ast
import contextlib
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_clock import both_times, peak
from gpu_law import law
from gpu_model import decode, step, training_step
from gpu_operation import operation_call
from gpu_rows import Row, Setting, rows

from bsbr_pl.utils.records import git_commit
from bsbr_pl.values import one_line

SCRIPT = Path(__file__).with_name("gpu.py")
KEY_SECONDS = 60  # to compile one row


def measure(row: Row, setting: Setting) -> dict[str, Any]:
    if row.kind == "peak":
        return peak(row.name, setting)
    if row.kind == "operation":
        return both_times(operation_call(row, setting), setting)
    return {"law": law, "step": step, "decode": decode}[row.kind](row, setting)


def compile_row(row: Row, setting: Setting) -> None:
    """Compile what a row needs, at the least cost: one layer of a model that is compiled layer by layer."""
    if row.kind == "operation":
        operation_call(row, setting)()
    elif row.kind == "step":
        _, call = training_step(row, setting, 1 if row.form == "compiled" else None, with_head=False)
        call()
    elif row.kind == "law":
        law(row, setting)


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


@functools.cache
def code(name: str) -> str:
    """A short sha256 of what the rows of this name measure: the file of an architecture and those that it imports, the
    model and its compiled form. SDPA and the peaks have no code of this package."""
    package, found, todo = SCRIPT.parents[1] / "bsbr_pl", set[Path](), [name.split()[0]]
    while todo:
        file = package / "attention" / f"{todo.pop()}.py"
        if file.exists() and file not in found:
            found.add(file)
            todo += imported(file)
    files = [*sorted(found), package / "model.py", package / "compiled.py", package / "patches.py"] if found else []
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def imported(file: Path) -> list[str]:
    """The modules that a module imports from its own package."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return names


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def missing(found: list[dict[str, Any]], wanted: list[Row], facts: dict[str, Any]) -> list[Row]:
    """The rows that are not measured with the card and torch of these facts, and the code of now.

    A row that failed once is tried again.
    """
    counts: dict[tuple[str, str | None], int] = {}
    for line in found:
        if all(line.get(fact) == facts[fact] for fact in ("card", "torch")):
            key = (line["key"], line.get("code"))
            counts[key] = counts.get(key, 0) + (1 if "error" in line else 2)
    return [row for row in wanted if counts.get((row.key, code(row.name)), 0) < 2]


def compile_all(todo: list[Row], seconds: float) -> None:
    """Compile what the rows need, in one process per core, for at most `seconds`."""
    compiled = [row for row in todo if row.form != "eager"]
    workers = min(max(1, (os.cpu_count() or 2) - 1), len(compiled))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    processes = []
    for i in range(workers):
        keys = [row.key for row in compiled[i::workers]]
        command = [sys.executable, str(SCRIPT), "--warm", json.dumps(keys)]
        processes.append(subprocess.Popen(command, env=environment))
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def compile_keys(keys: list[str]) -> None:
    """The work of one process of `compile_all`."""
    by_key = {row.key: row for row in rows()}
    for key in keys:
        start = time.monotonic()
        try:
            with at_most(KEY_SECONDS):
                compile_row(by_key[key], Setting("cuda"))
            print(f"compiled {key} in {time.monotonic() - start:.0f} s", flush=True)
        except Exception as error:
            print(f"could not compile {key}: {one_line(error, 300)}", flush=True)
        clean()


def clean() -> None:
    """Free the memory of the previous row."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in this thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure_rows(wanted: list[Row], out: Path, seconds: float, warm_seconds: float, toy: bool) -> None:
    """Append each missing row to `out` when it is measured. No row is started after `seconds`."""
    device = "cpu" if toy else "cuda"
    start, name = time.monotonic(), card(device)
    facts = {"card": name, "torch": torch.__version__, "commit": (git_commit() or {}).get("commit")}
    todo = missing(read(out), wanted, facts)
    print(f"{name}, torch {torch.__version__}: {len(todo)} of {len(wanted)} rows to measure", flush=True)
    if not toy and warm_seconds > 0 and any(row.form != "eager" for row in todo):
        compile_all(todo, warm_seconds)
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    for row in todo:
        left = seconds - (time.monotonic() - start)
        if left < 8:
            break
        began = time.monotonic()
        found = attempt(row, Setting(device, toy, measured_peak(read(out), name)), max(5, min(75, int(left))))
        own = {"code": code(row.name), "took": round(time.monotonic() - began, 1)}
        line = {"key": row.key, **vars(row), **found, **facts, **own}
        with out.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        numbers = {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}
        print(f"{row.key}: {numbers} ({line['took']} s)", flush=True)


def attempt(row: Row, setting: Setting, seconds: int) -> dict[str, Any]:
    """The values of a row, or its error."""
    try:
        with at_most(seconds):
            return measure(row, setting)
    except Exception as error:
        traceback.print_exc(limit=-3)
        return {"error": f"{type(error).__name__}: {one_line(error, 500)}"}
    finally:
        clean()


def measured_peak(lines: list[dict[str, Any]], name: str) -> float | None:
    """Operations per second of the matrix product on the card of this name, if that row is there."""
    key = Row("peak", "matrix product").key
    found = [line["per_second"] for line in lines if (line["key"], line["card"]) == (key, name) and "error" not in line]
    return found[-1] if found else None
