"""An SSH server on this machine, with its keys in one folder, that lets nobody in but who has the key made for it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import threading
from importlib.util import find_spec
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SEPARATION = Path("/run/sshd")  # which a server of root's asks for
CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
SetEnv {environment}
"""


def missing():
    """Why there can be no such server here; None where there can."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        return "no sshd: apt-get install openssh-server"
    if find_spec("asyncssh") is None:
        return "no asyncssh, by which Dask's SSHCluster connects"
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            SEPARATION.mkdir(exist_ok=True)
        if not SEPARATION.is_dir():
            return f"sshd needs {SEPARATION} where root starts it"
    return None


def end(processes):
    """Kill processes, and all that they started."""
    family = []
    for p in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [p, *p.children(recursive=True)]
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    psutil.wait_procs(family)


@contextlib.contextmanager
def server(folder: Path, **environment):
    """Options for ``asyncssh.connect``; commands have the environment. Each connection is a process of its own.

    What they started ends with them.
    """
    folder.mkdir()
    for name in ("host", "client"):
        key = ["-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(["ssh-keygen", *key], check=True, timeout=60)
    settings = " ".join(f'"{name}={value}"' for name, value in environment.items())
    config = folder / "sshd_config"
    config.write_text(CONFIG.format(folder=folder, environment=settings))
    started: list[subprocess.Popen] = []

    def serve(listener):
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = listener.accept()
                command = [SSHD, "-i", "-f", str(config), "-E", str(folder / "log")]
                with connection:
                    started.append(subprocess.Popen(command, stdin=connection, stdout=connection))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield {
                "port": listener.getsockname()[1],
                "username": pwd.getpwuid(os.geteuid()).pw_name,
                "client_keys": [str(folder / "client")],
                "known_hosts": None,
            }
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            end([psutil.Process(p.pid) for p in started if p.poll() is None])
            for p in started:
                p.wait()
