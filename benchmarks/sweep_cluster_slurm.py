"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd of Debian's slurm-wlm; for the benchmark of sweeps.

Needs root, and `apt-get install --no-install-recommends slurm-wlm munge`. Nothing of the system's own configuration is used or changed.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

HEAD, SECOND = "node1", "node2"
_START_S = 60.0
_CONFIGURATION = """\
ClusterName=pair
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
MinJobAge=300
JobRequeue=1
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=pair Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two nodes that run.

    Attributes:
        where: What ``--on`` takes.
        variables: That every process needs which talks to them.
        second: The daemon of the second node.
    """

    where: str
    variables: dict[str, str]
    second: "subprocess.Popen[bytes]"

    def second_is_busy(self) -> bool:
        """Whether a trial runs on the second node."""
        return any("submitit.core._submit" in process.cmdline() for process in self._processes_of_second())

    def lose_second(self) -> None:
        """Kill the daemon of the second node and every process of its jobs, as a power cut would."""
        self.second.kill()
        self.second.wait()
        doomed = self._processes_of_second()
        keepers = {parent for process in doomed for parent in process.parents() if parent.name().startswith("slurmstepd")}
        for process in (*keepers, *doomed):  # who could still report first
            process.kill()

    def _processes_of_second(self) -> list[psutil.Process]:
        """Processes of jobs of this cluster that the second node runs."""
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if variables.get("SLURMD_NODENAME") == SECOND and variables.get("SLURM_CONF") == self.variables["SLURM_CONF"]:
                found.append(process)
        return found


@contextmanager
def slurm_pair(*, cpus: int = 1) -> Iterator[Pair]:
    """Start all daemons, and end them."""
    folder = Path(tempfile.mkdtemp(prefix="rb-slurm-"))
    folder.chmod(0o755)  # munged insists that everybody can reach its socket
    host = socket.gethostname()
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(3), cpus=cpus))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (folder / "state").mkdir()
    variables = {"SLURM_CONF": str(configuration)}
    munge = [f"--{name}-file={folder}/munge.{end}" for name, end in (("key", "key"), ("pid", "pid"), ("seed", "seed"), ("log", "log"))]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            ["munged", "--foreground", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", HEAD],
            ["slurmd", "-D", "-N", SECOND],
        ):
            with (folder / f"daemon-{len(daemons)}.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log))
            time.sleep(1)  # each needs the one before
        _wait_until_idle(variables)
        yield Pair(where="slurm:pair", variables=variables, second=daemons[-1])
    finally:
        for daemon in reversed(daemons):
            _end(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_until_idle(variables: dict[str, str]) -> None:
    end_s = time.monotonic() + _START_S
    said = ""
    while said.split() != ["idle", "idle"]:
        if time.monotonic() > end_s:
            raise RuntimeError(f"the nodes are not ready: {said}")
        time.sleep(0.5)
        command = ["/usr/bin/sinfo", "--noheader", "--Node", "--format=%T"]
        said = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False).stdout
