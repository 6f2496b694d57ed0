"""Hosts of a small cluster: network namespaces with an address, a name and a cable each.

All cables end in the bridge of one more namespace, the switch. Nothing of it is seen outside, and
all of it is gone with the block. Needs root, and iproute2's `ip` and `tc`.
"""

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

# The name as on many Linux machines: an address of loopback, which no other host can reach.
HOSTS_FILE = "127.0.0.1 localhost\n127.0.1.1 {}\n"
START = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def why_not() -> str:
    """Why this machine cannot make hosts; empty: it can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    for program in ("ip", "tc", "unshare"):
        if not shutil.which(program):
            return f"hosts in network namespaces need the program {program}"
    try:
        with Hosts(1, Path("/tmp")):
            return ""
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"


class Hosts:
    """`with Hosts(4, folder) as hosts`: host-0 to host-3, at 10.83.0.1 to 10.83.0.4."""

    def __init__(self, count: int, folder: Path):
        self.count, self.folder = count, folder
        self.names = [f"host-{number}" for number in range(count)]
        self.addresses = [f"10.83.0.{number + 1}" for number in range(count)]
        self._spaces = [f"k2jax-{os.getpid()}-{number}" for number in range(count)]
        self._switch = f"k2jax-{os.getpid()}-switch"
        self._started: list[subprocess.Popen] = []
        self._undo = ExitStack()

    def __enter__(self) -> "Hosts":
        with ExitStack() as undo:
            self._make(undo)
            self._undo = undo.pop_all()
        return self

    def _make(self, undo: ExitStack) -> None:
        for space in (self._switch, *self._spaces):
            _run("ip", "netns", "add", space)
            undo.callback(_run, "ip", "netns", "del", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
        switch = ("ip", "-n", self._switch)
        _run(*switch, "link", "add", "bridge", "type", "bridge")
        _run(*switch, "link", "set", "bridge", "up")
        for number, space in enumerate(self._spaces):
            port = f"port{number}"
            _run(*switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", space)
            _run(*switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", space, "address", "add", f"{self.addresses[number]}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        self._undo.close()

    def start(self, number: int, command: list[str], environment: dict) -> subprocess.Popen:
        """Start a program on a host; what it prints is piped."""
        file = self.folder / f"hosts-{number}"
        file.write_text(HOSTS_FILE.format(self.names[number]))
        inside = ["ip", "netns", "exec", self._spaces[number], "unshare", "--uts"]
        shell = ["sh", "-c", START, self.names[number], str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*inside, *shell, *command], env=environment, **pipes)
        self._started.append(process)
        return process

    def cut(self, number: int) -> None:
        """Pull a host's cable out."""
        _run("ip", "-n", self._switch, "link", "set", f"port{number}", "down")

    def plug(self, number: int) -> None:
        """Put it in again."""
        _run("ip", "-n", self._switch, "link", "set", f"port{number}", "up")

    def slow(self, number: int) -> str:
        """Make a host's cable slow, and say how: by delay, or by rate where `netem` is missing."""
        add = ["tc", "-n", self._switch, "qdisc", "add", "dev", f"port{number}", "root"]
        for kind in ("netem delay 20ms", "tbf rate 40mbit burst 64kb latency 400ms"):
            try:
                _run(*add, *kind.split())
            except subprocess.CalledProcessError:
                continue
            return kind
        return ""


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
