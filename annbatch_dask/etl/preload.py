"""Imported by workers of the local cluster as they start, so that no task waits for imports."""

import annbatch_dask.etl.gather
import annbatch_dask.etl.scatter  # noqa: F401
