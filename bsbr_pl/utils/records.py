"""The environment of a measurement: versions, machine, commit."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1] / "__init__.py"


def default_device(device: str | torch.device | None) -> torch.device:
    """The device itself; if None, CUDA if there is one, else the CPU.

    Raises:
        ValueError: torch knows no device of this name.
    """
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # lists two dozen kinds
        raise ValueError(f"device={device!r} cannot be used here: give cpu, cuda or cuda:0") from error


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The facts on which a measured time depends, as plain values: versions, machine, threads."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    versions = {"python": platform.python_version(), "bsbr_pl": __version__, "torch": torch.__version__}
    for package in ("lightning", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "versions": {name: str(value) for name, value in versions.items()},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512: not always clear from the name
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(torch.device(device)),
    }
    if torch.device(device).type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _cpu_name() -> str:
    """The name of the processor if the system reports it (Linux), otherwise its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> dict[str, Any] | None:
    """Commit of the repository that tracks this code, and whether files differ from it; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(PACKAGE))  # a virtual environment may be inside another repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
