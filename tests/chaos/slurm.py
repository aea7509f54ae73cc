"""A SLURM of one node on this machine: munged, slurmctld and slurmd, with all their files in one folder."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={n_cpus} RealMemory={n_cpus}000 State=UNKNOWN
PartitionName=regular Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no SLURM here; None where there can."""
    if absent := [p for p in PROGRAMS if shutil.which(p, path=_PATH) is None]:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def call(*command, **environment):
    """Output of a command; an error if it fails."""
    return subprocess.run(
        command, env=os.environ | {"PATH": _PATH} | environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


@contextlib.contextmanager
def daemon(*command):
    """A process in the foreground, killed at the end with its children."""
    p = subprocess.Popen(
        command, env=os.environ | {"PATH": _PATH}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield p
    finally:
        p.terminate()
        p.wait(60)


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def slurm(folder: Path, *, n_cpus):
    """Path of the configuration of a SLURM that takes jobs; all jobs are cancelled at the end."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    user = pwd.getpwuid(os.geteuid()).pw_name
    path = folder / "slurm.conf"
    path.write_text(CONFIG.format(host=host, ports=free_ports(2), folder=folder, user=user, n_cpus=n_cpus))
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"))]
    munge += [f"--key-file={key}", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    with (
        daemon("munged", "--force", "--foreground", *munge),
        daemon("slurmctld", "-D", "-i", "-f", str(path)),
        daemon("slurmd", "-D", "-f", str(path)),
    ):
        # sbatch itself waits for the controller and the node; this says at once what is wrong
        call("srun", "--immediate=60", "true", SLURM_CONF=str(path))
        try:
            yield path
        finally:
            call("scancel", "--quiet", f"--user={user}", SLURM_CONF=str(path))
            while call("squeue", "--noheader", SLURM_CONF=str(path)).strip():
                pass
