"""study/children.py: real processes; whatever ends the parent ends its children, which save first."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from filelock import FileLock

STUDY = Path(__file__).parents[1] / "study"
#: Holds a lock while it lives, and takes a moment to save on SIGTERM; `with a worker` it starts another such process.
CHILD = textwrap.dedent("""
    import signal, subprocess, sys, time
    from pathlib import Path
    from filelock import FileLock

    def save(*signal_and_frame):
        time.sleep(0.3)
        Path("saved" + sys.argv[1]).touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "stubborn" else save)
    lock = FileLock("lock" + sys.argv[1])
    lock.acquire(blocking=False)
    if sys.argv[2] == "with a worker":
        subprocess.Popen([sys.executable, __file__, sys.argv[1] + "worker", "stubborn"])
    Path("there" + sys.argv[1]).touch()
    time.sleep(60)
""")
PARENT = textwrap.dedent(f"""
    import signal, sys, time
    from pathlib import Path
    sys.path.insert(0, {str(STUDY)!r})
    import children

    children.SECONDS_TO_SAVE = float(sys.argv[2])
    with children.Children() as started:
        for number in "01":
            started.start([sys.executable, "child.py", number, sys.argv[1]])
        while not Path("fail").exists():
            time.sleep(0.05)
        raise RuntimeError("something failed")
""")


@pytest.fixture(autouse=True)
def _signals_are_heard():
    """Also where the tests themselves run under nohup, or behind `&` in a script, where the other two are ignored."""
    heard = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    ignored = [signum for signum in heard if signal.getsignal(signum) == signal.SIG_IGN]
    for signum in ignored:
        signal.signal(signum, signal.SIG_DFL)
    yield
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


@pytest.fixture
def start(tmp_path):
    """Starts a parent with two children, and waits until these are there."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    parents = []

    def start_parent(kind: str, seconds_to_save: float = 60) -> subprocess.Popen:
        command = [sys.executable, "parent.py", kind, str(seconds_to_save)]
        parents.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL))
        wait_for(lambda: all((tmp_path / f"there{number}").exists() for number in "01"))
        return parents[-1]

    yield start_parent
    for parent in parents:
        parent.kill()
        parent.wait()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(folder: Path, *names: str) -> None:
    """No process holds these locks any more; raises a Timeout after some seconds otherwise."""
    for name in names:
        FileLock(folder / name).acquire(timeout=10).lock.release()


HOW = ["SIGTERM", "SIGHUP", "SIGINT", "exception", *(["SIGKILL", "SIGQUIT"] if sys.platform == "linux" else [])]


@pytest.mark.parametrize("how", HOW)
def test_children_save_and_end_with_their_parent(how, start, tmp_path):
    parent = start("plain")
    if how == "exception":
        (tmp_path / "fail").touch()
        expected = 1
    else:
        signum = signal.Signals[how]
        parent.send_signal(signum)
        expected = 128 + signum if how in ("SIGTERM", "SIGHUP", "SIGINT") else -signum
    assert parent.wait(60) == expected
    ended(tmp_path, "lock0", "lock1")
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def test_what_a_child_started_ends_with_the_child(start, tmp_path):
    parent = start("with a worker")
    wait_for(lambda: all((tmp_path / f"there{number}worker").exists() for number in "01"))
    parent.terminate()
    assert parent.wait(60) == 143
    ended(tmp_path, "lock0", "lock1", "lock0worker", "lock1worker")
    assert (tmp_path / "saved0").exists()


@pytest.mark.parametrize("signals", [1, 2])
def test_a_child_that_does_not_end_is_killed(signals, start, tmp_path):
    """After its time to save, or at the second signal."""
    parent = start("stubborn", 1 if signals == 1 else 60)
    parent.terminate()
    if signals == 2:
        time.sleep(0.5)
        assert parent.poll() is None, "it waits for its children"
        parent.send_signal(signal.SIGHUP)
    assert parent.wait(60) in (143, 129)
    ended(tmp_path, "lock0", "lock1")


def test_nohup_is_respected(tmp_path, start, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which children inherit
    try:
        parent = start("plain")
    finally:
        signal.signal(signal.SIGHUP, before)
    parent.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert parent.poll() is None
    parent.terminate()
    assert parent.wait(60) == 143
