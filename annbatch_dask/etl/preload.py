"""Loaded by workers of the local cluster as they start, so that no task waits for imports."""

import importlib
import threading

import annbatch_dask.etl.gather
import annbatch_dask.etl.scatter  # noqa: F401


def dask_setup(worker: object) -> None:
    """Import anndata beside the first tasks: only the end of a gather task needs it."""
    threading.Thread(target=importlib.import_module, args=("anndata",), daemon=True).start()
