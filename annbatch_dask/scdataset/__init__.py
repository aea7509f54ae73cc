"""scDataset's interface: code written for scDataset 0.3 runs after changing the import.

Order, ranks, workers, epochs and resuming are those of :mod:`annbatch_dask.samplers`; reading is whatever the
collection's ``[]`` or a ``fetch_callback`` does.
"""

from annbatch_dask.scdataset.experimental import estimate_sample_size, suggest_parameters
from annbatch_dask.scdataset.multiindexable import MultiIndexable
from annbatch_dask.scdataset.sampler import StrategySampler
from annbatch_dask.scdataset.scdataset import scDataset
from annbatch_dask.scdataset.strategy import (
    BlockShuffling,
    BlockWeightedSampling,
    ClassBalancedSampling,
    SamplingStrategy,
    Streaming,
)
from annbatch_dask.scdataset.transforms import adata_to_mindex, bionemo_to_tensor, hf_tahoe_to_tensor

__all__ = [
    "BlockShuffling",
    "BlockWeightedSampling",
    "ClassBalancedSampling",
    "MultiIndexable",
    "SamplingStrategy",
    "StrategySampler",
    "Streaming",
    "adata_to_mindex",
    "bionemo_to_tensor",
    "estimate_sample_size",
    "hf_tahoe_to_tensor",
    "scDataset",
    "suggest_parameters",
]
