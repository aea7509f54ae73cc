"""The interface of a sampler."""

from annbatch_dask.samplers.sampler import Sampler

__all__ = ["Sampler"]
