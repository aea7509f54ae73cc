"""The workers of a local cluster: ``python -m annbatch_dask.engines.workers SCHEDULER --spec ...``, like ``dask spec``.

All nannies share this process. On Linux their workers are forked from a server that has the imports behind it: these
take seconds, which is one server's work instead of each worker's, and begins before the nannies' own imports.
"""

from __future__ import annotations

import multiprocessing.forkserver
import sys

_PRELOAD = ["annbatch_dask.preload", "anndata", "distributed.nanny"]


def main() -> None:
    """Run the workers until they are told to stop."""
    method = "forkserver" if sys.platform == "linux" else "spawn"
    if method == "forkserver":
        multiprocessing.forkserver.set_forkserver_preload(_PRELOAD)
        multiprocessing.forkserver.ensure_running()

    import dask
    from distributed.cli.dask_spec import main as run_spec

    with dask.config.set({"distributed.worker.multiprocessing-method": method}):
        run_spec()


if __name__ == "__main__":
    main()
