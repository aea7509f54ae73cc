"""Transforms of a batch's values, applied while it is assembled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from annbatch_dask.transforms.scale import Scale
from annbatch_dask.transforms.tokens import BinnedExpression, RankTokens

__all__ = ["BinnedExpression", "NormalizeLog1p", "RankTokens", "Scale"]


@dataclass(frozen=True)
class NormalizeLog1p:
    """Scale every cell to the same sum and take log(1 + x), in the pass that picks its values.

    The result is that of ``scanpy.pp.normalize_total(adata, target_sum)`` and ``scanpy.pp.log1p(adata)`` on the whole
    matrix: the sum runs over all genes, also where ``var_names`` delivers a few of them. Values come as float32,
    or float64 where the data is, unless ``dtype`` names another float. A cell without counts stays zero.

    Parameters
    ----------
    target_sum
        What every cell is scaled to.

    Examples
    --------
    >>> from annbatch_dask.transforms import NormalizeLog1p
    >>> loader = Loader(batch_size=64, chunk_size=16, preload_nchunks=8, dense=True, transform=NormalizeLog1p(1e4))
    >>> batch = next(iter(loader.use_collection(collection)))
    >>> np.allclose(np.expm1(batch["X"]).sum(1), 1e4, rtol=1e-4)
    True
    """

    target_sum: float = 1e4

    def __post_init__(self) -> None:
        if not isinstance(self.target_sum, Real) or isinstance(self.target_sum, bool):
            msg = f"target_sum is {self.target_sum!r}; it must be a number"
            raise TypeError(msg)
        if not 0 < self.target_sum < math.inf:
            msg = f"target_sum is {self.target_sum}; it must be greater than 0, and finite"
            raise ValueError(msg)
