"""Tools for testing what is built on this package: AnnData files to try things on, and tests of samplers.

`SamplerTests` needs pytest; nothing else here does.
"""

from annbatch_dask.testing.anndatas import make_adata, write_h5ad_pair
from annbatch_dask.testing.samplers import SamplerTests, batch_rows

__all__ = ["SamplerTests", "batch_rows", "make_adata", "write_h5ad_pair"]
