"""Engines that run the tasks of a build: Dask, on a cluster or in this process."""
