"""Hosts on one machine: network namespaces, joined by a switch, with links of a limited rate.

    host 0   eth0 ---- port0
                             switch (a bridge in another namespace)
    host 1   eth0 ---- port1

Each host has one veth link with the same `tc tbf` at both ends: one limits what the host sends, the other what it receives, as with a
network card. Needs Linux, root and iproute2: `missing` says why there can be none.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERFACE = "eth0"
"""Of each host."""

_CLONE_NEWNET = 0x40000000


def missing() -> str:
    """Why there can be no `Hosts` here, in a few words, or an empty string."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(absent)} of iproute2 not found"
    name = f"childtune-{os.getpid()}-probe"
    try:
        _call("ip", "netns", "add", name)
        _call("ip", "-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", "port0")
        _call("ip", "-n", name, "link", "add", "switch", "type", "bridge")
        _limit(name, INTERFACE, 100)
    except OSError as error:
        return str(error)
    finally:
        with suppress(OSError):
            _call("ip", "netns", "del", name)
    return ""


class Hosts:
    """A context manager: `count` hosts, of 100 Mbit/s until `limit`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._names = [f"childtune-{os.getpid()}-{i}" for i in range(count)]
        self._switch = f"childtune-{os.getpid()}-switch"

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        switch = self._switch
        for name in [switch, *self._names]:
            _call("ip", "netns", "add", name)
            _call("ip", "-n", name, "link", "set", "lo", "up")
        _call("ip", "-n", switch, "link", "add", "switch", "up", "type", "bridge")
        for i, name in enumerate(self._names):
            _call(
                *("ip", "-n", switch, "link", "add", f"port{i}", "type", "veth"),
                *("peer", "name", INTERFACE, "netns", name),
            )
            _call("ip", "-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _call("ip", "-n", name, "address", "add", f"{self.address(i)}/24", "dev", INTERFACE)
            _call("ip", "-n", name, "link", "set", INTERFACE, "up")
        self.limit(100)

    def close(self) -> None:
        for name in [*self._names, self._switch]:
            with suppress(OSError):
                _call("ip", "netns", "del", name)

    def address(self, host: int) -> str:
        return f"10.99.0.{host + 1}"

    def limit(self, mbit: int) -> None:
        """Every link carries so many megabits a second, in each direction."""
        for i, name in enumerate(self._names):
            _limit(name, INTERFACE, mbit)
            _limit(self._switch, f"port{i}", mbit)

    def cut_off(self, host: int) -> None:
        """Take its link down, as when a cable is pulled: nobody is told."""
        _call("ip", "-n", self._switch, "link", "set", f"port{host}", "down")

    def join_again(self, host: int) -> None:
        _call("ip", "-n", self._switch, "link", "set", f"port{host}", "up")

    def enter(self, host: int) -> None:
        """From now on what this thread and the threads that it starts open is on the host's network."""
        _enter(Path("/run/netns") / self._names[host])

    @contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """`enter` for the length of a `with`."""
        with Path("/proc/thread-self/ns/net").open("rb") as before:
            self.enter(host)
            try:
                yield
            finally:
                _set_network(before.fileno())


def bytes_sent() -> int:
    """What this thread's host has sent so far over its link, headers included."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith(f"{INTERFACE}:")).partition(":")[2].split()
    return int(fields[8])


def _limit(namespace: str, interface: str, mbit: int) -> None:
    # A bucket of 5 ms, and not below what a sender hands over at once. Queues are long, so that nothing is lost by being early.
    burst = max(mbit * 5000 // 8, 128 * 1024)
    _call(
        *("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", interface, "root"),
        *("tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "200ms"),
    )


def _enter(namespace: Path) -> None:
    with namespace.open("rb") as handle:
        _set_network(handle.fileno())


def _set_network(handle: int) -> None:
    # os.setns is there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(handle, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _call(*command: str) -> None:
    """Raises OSError with what the command wrote."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip() or f'ended with {result.returncode}'}")
