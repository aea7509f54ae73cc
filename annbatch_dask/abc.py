"""What a sampler has to provide."""

from annbatch_dask.samplers.sampler import Sampler

__all__ = ["Sampler"]
