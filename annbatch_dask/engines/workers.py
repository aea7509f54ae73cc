"""The workers of a local cluster: a process of ``main``, which takes a line on standard input.

All nannies share this process. On Linux their workers are forked from a server that has the imports behind it: these
take seconds, which is one server's work instead of each worker's, and begins before the nannies' own imports. Both
begin before there is a scheduler: the line is JSON of its address and of what ``dask spec`` takes. Where none comes, no
worker is needed after all.
"""

from __future__ import annotations

import json
import multiprocessing.forkserver
import signal
import sys
from tempfile import gettempdir

_PRELOAD = ["annbatch_dask.engines.shared"]
_LONGEST = 70
"""Of the name of the folder for temporary files: the server's socket is in it, whose name has 107 bytes at most."""


def main() -> None:
    """Run the workers until they are told to stop."""
    method = "forkserver" if sys.platform == "linux" and len(gettempdir()) <= _LONGEST else "spawn"
    if method == "forkserver":
        multiprocessing.forkserver.set_forkserver_preload(_PRELOAD)
        multiprocessing.forkserver.ensure_running()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits on the other end is interrupted too

    import dask
    from distributed.cli.dask_spec import main as run_spec

    line = sys.stdin.readline()
    if not line:
        return
    scheduler, spec = json.loads(line)
    signal.signal(signal.SIGINT, handler)
    with dask.config.set({"distributed.worker.multiprocessing-method": method}):
        run_spec([scheduler, "--spec", json.dumps(spec)])
