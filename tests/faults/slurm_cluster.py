"""A Slurm of one node on this machine: munged, slurmctld and slurmd, without accounting, for one user.

    python tests/faults/slurm_cluster.py -- sinfo                # starts it, runs the command, stops it
    python tests/faults/slurm_cluster.py --cpus 4 -- bash        # a shell in which sbatch, squeue, scancel work

Needs Debian's `slurm-wlm` and `munge`. Runs as root or as any other user. Everything it writes is in one temporary
folder, and all its processes end with it.
"""

import argparse
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONFIGURATION = """
ClusterName=faults
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Starts the three daemons on entering a `with` block, and stops them at its end.

    Args:
        folder: empty; must be readable by the jobs.
        cpus: of the node, which may be more than the machine has.
    """

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        facts = {"host": host, "user": user, "folder": self.folder, "cpus": self.cpus, "ports": free_ports(2)}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**facts))
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        try:
            for name in ("munged", "slurmctld", "slurmd"):
                self.start(name)
            wait_for(lambda: "idle" in told("sinfo", "--noheader", "--format=%T"), 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], capture_output=True)
            wait_for(lambda: not told("squeue", "--noheader"), 60, quietly=True)
        for name in reversed(list(self._daemons)):
            self.stop(name, signal.SIGTERM)

    def start(self, name: str) -> None:
        """Start a daemon, in the foreground of a process of its own; its output goes to NAME.out."""
        munge = [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        options = {
            "munged": ["--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge],
            "slurmctld": ["-D"],
            "slurmd": ["-D", "-c"] if not list((self.folder / "spool").iterdir()) else ["-D"],
        }[name]
        program = shutil.which(name, path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin")))
        if program is None:
            raise FileNotFoundError(f"{name} is not installed: apt-get install slurm-wlm munge")
        with (self.folder / f"{name}.out").open("a") as output:
            self._daemons[name] = subprocess.Popen([program, *options], stdout=output, stderr=output)

    def stop(self, name: str, signum: signal.Signals) -> None:
        """End a daemon. SIGKILL leaves the jobs of a slurmd running."""
        process = self._daemons.pop(name)
        process.send_signal(signum)
        process.wait(60)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens to."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def told(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def wait_for(condition: Callable[[], object], seconds: float, quietly: bool = False) -> None:
    """Wait until the condition holds. Raises TimeoutError after `seconds`, unless `quietly`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            if quietly:
                return
            raise TimeoutError(f"{condition} did not hold within {seconds} s")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of the node")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), chosen.cpus):
        return subprocess.run(chosen.command).returncode


if __name__ == "__main__":
    sys.exit(main())
