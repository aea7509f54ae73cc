"""Machines of a test: network namespaces of addresses of their own, on one switch, whose cables can be cut."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess

ADDRESS = "10.207.0.{}"


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True, timeout=60)


@functools.cache
def missing():
    """Why there can be no such machines here; None where there can."""
    if shutil.which("ip") is None:
        return "no ip: apt-get install iproute2"
    try:
        with nodes(1):
            return None
    except subprocess.CalledProcessError as e:
        return f"network namespaces with a bridge are not permitted here: {e.stderr.strip()}"


class Node:
    """A machine: what starts a process there, its address, and its cable."""

    def __init__(self, number, switch):
        self.name, self.address = f"{switch}-{number}", ADDRESS.format(number)
        self.before = ("ip", "netns", "exec", self.name)
        self._switch, self._port = switch, f"port{number}"

    def plug_in(self):
        ip(
            "-netns",
            self._switch,
            "link",
            "add",
            self._port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.name,
        )
        ip("-netns", self._switch, "link", "set", self._port, "master", "bridge", "up")
        ip("-netns", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-netns", self.name, "link", "set", device, "up")

    def cut(self):
        """What is on its way, and all that is sent from now on, gets lost; nobody is told."""
        ip("-netns", self._switch, "link", "set", self._port, "down")

    def heal(self):
        ip("-netns", self._switch, "link", "set", self._port, "up")


@contextlib.contextmanager
def nodes(n):
    """Some machines, numbered from 1 on; they go with what is said of them, once their processes have ended."""
    switch = f"test{os.getpid()}"
    found = [Node(k + 1, switch) for k in range(n)]
    with contextlib.ExitStack() as stack:
        for name in (switch, *(node.name for node in found)):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("-netns", switch, "link", "add", "bridge", "type", "bridge")
        ip("-netns", switch, "link", "set", "bridge", "up")
        for node in found:
            node.plug_in()
        yield found
