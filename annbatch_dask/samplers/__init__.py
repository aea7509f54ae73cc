"""Samplers: the rows to load and their order.

The k-th load request of an epoch is a function of the sampler's seed, the number of the epoch and k, and of
nothing else: not of threads, workers, timing, or other passes that are open.
"""

from annbatch_dask.samplers.classes import ClassSampler, WeightedClassSampler
from annbatch_dask.samplers.distributed import DistributedSampler
from annbatch_dask.samplers.matched import MatchedControlSampler
from annbatch_dask.samplers.runs import RandomSampler, SequentialSampler
from annbatch_dask.samplers.sets import CellSets

__all__ = [
    "CellSets",
    "ClassSampler",
    "DistributedSampler",
    "MatchedControlSampler",
    "RandomSampler",
    "SequentialSampler",
    "WeightedClassSampler",
]
