"""What can be done to the values of a batch while it is put together."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NormalizeLog1p"]


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
    >>> Loader(batch_size=4096, dense=True, transform=NormalizeLog1p(1e4))  # doctest: +SKIP
    """

    target_sum: float = 1e4

    def __post_init__(self) -> None:
        if not self.target_sum > 0:
            msg = f"target_sum is {self.target_sum}; it must be greater than 0"
            raise ValueError(msg)
