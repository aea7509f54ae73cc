"""The documented path of :mod:`annbatch_dask.preload`, for ``--preload annbatch_dask.etl.preload``."""

from annbatch_dask.preload import dask_setup

__all__ = ["dask_setup"]
