"""A Ray cluster of two nodes on the loopback device of this machine, behind a token; for the benchmarks and tests of sweeps."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
"""Two addresses of the loopback device: Ray refuses a second node at 127.0.0.1."""
_START_S = 120.0
_OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two nodes that run.

    Attributes:
        where: What ``--on`` takes.
        variables: That every process needs which talks to them.
        head: The process that keeps the head.
        second: The process that keeps the other node.
    """

    where: str
    variables: dict[str, str]
    head: "subprocess.Popen[bytes]"
    second: "subprocess.Popen[bytes]"

    def second_is_busy(self) -> bool:
        """Whether a trial runs on the second node."""
        family = psutil.Process(self.second.pid).children(recursive=True)
        return any(_title(process).startswith("ray::run_there") for process in family)

    def lose_second(self) -> None:
        """Kill the raylet of the second node, as a power cut would: its workers end with it."""
        for child in psutil.Process(self.second.pid).children():
            if child.name() == "raylet":
                child.kill()


@contextmanager
def ray_pair(*, cpus: int = 1) -> Iterator[Pair]:
    """Start both nodes, and end them, with everything that they started."""
    folder = Path(tempfile.mkdtemp(prefix="rb-"))  # short: sockets lie below it, whose paths are limited to 107 characters
    port, client_port = _free_ports(2)
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "",
    }
    common = ["--block", f"--num-cpus={cpus}", f"--object-store-memory={_OBJECT_STORE}", "--disable-usage-stats"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        head = [
            "--head",
            f"--node-ip-address={HEAD}",
            f"--port={port}",
            f"--ray-client-server-port={client_port}",
            "--include-dashboard=false",
        ]
        nodes.append(_start(folder / "head.log", [*head, f"--temp-dir={folder}", *common], variables))
        nodes.append(_start(folder / "second.log", [f"--address={HEAD}:{port}", f"--node-ip-address={SECOND}", *common], variables))
        yield Pair(where=f"ray:{HEAD}:{port}", variables=variables, head=nodes[0], second=nodes[1])
    finally:
        for node in reversed(nodes):
            _end(node)
        shutil.rmtree(folder, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    """What a process calls itself; nothing when it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((HEAD, 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _start(log: Path, arguments: list[str], variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a node and wait until it says that it runs."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *arguments]
    with log.open("wb") as stream:
        node = subprocess.Popen(command, env={**os.environ, **variables}, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    end_s = time.monotonic() + _START_S
    while "Ray runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > end_s:
            _end(node)
            raise RuntimeError(f"the node did not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)
    return node


def _end(node: "subprocess.Popen[bytes]") -> None:
    """End a node and what it started: politely, then for certain."""
    try:
        family = psutil.Process(node.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    node.send_signal(signal.SIGTERM)
    try:
        node.wait(timeout=20)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
