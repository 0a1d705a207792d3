"""Child processes that end when this process ends, whatever ends it. Standard library only."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
SECONDS_TO_SAVE = 60  # that a child has after SIGTERM; then it is killed
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before any fork: a forked child loads no library


class Children:
    """Starts child processes, and stops them at the end of a `with` block.

    An exception, Ctrl-C, SIGTERM or SIGHUP in this process stops every child: SIGTERM first, so that a training saves;
    SIGKILL after `SECONDS_TO_SAVE` or at a second signal. A signal ends this process with 128 + signal. If this process
    is killed, Linux sends SIGTERM to the children; other systems leave them running. Processes that a child started
    are killed when the child ends.

    Use it in the main thread: Python handles signals only there, and Linux watches the thread that started a child.
    """

    def __init__(self) -> None:
        self._running: list[subprocess.Popen] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Children":
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers[signum] = signal.signal(signum, _end)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._stop()
        finally:
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Start a child; `options` are those of `subprocess.Popen`.

        The child leads its own process group: Ctrl-C in a terminal reaches this process alone, which passes it on.
        """
        parent = os.getpid()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=lambda: _end_with(parent), **options
        )
        self._running.append(child)
        return child

    def poll(self, child: subprocess.Popen) -> int | None:
        """The exit code of a child, or None while it runs."""
        code = child.poll()
        if code is not None and child in self._running:
            self._running.remove(child)
            _kill_group(child)
        return code

    def _stop(self) -> None:
        running = [child for child in list(self._running) if self.poll(child) is None]
        try:
            for child in running:
                child.terminate()
            deadline = time.monotonic() + SECONDS_TO_SAVE
            for child in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for child in running:
                _kill_group(child)
                child.wait()


def _kill_group(child: subprocess.Popen) -> None:
    """Kill a child that still runs, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _end(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal; `print` may be what was interrupted
        os.write(2, f"\n{signal.Signals(signum).name}: stopping; trainings save first\n".encode())
    raise SystemExit(128 + signum)


def _end_with(parent: int) -> None:
    """Runs in a child before its program: asks Linux for SIGTERM when the parent ends; exits if it has ended already.

    SIGUSR2 is ignored: Slurm sends it to all processes of a job, before the job's time is over.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent may ignore it
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
