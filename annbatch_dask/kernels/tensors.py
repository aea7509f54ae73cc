"""Sparse and dense rows in torch, on whatever device they lie: for machines without cupy, and tested on the CPU."""

from __future__ import annotations

from typing import Any

__all__ = ["densify", "normalized"]


def densify(
    sparse: tuple[Any, Any, Any],
    n_columns: int,
    width: int,
    dtype: Any,
    *,
    places: Any | None,
    target_sum: float | None,
) -> tuple[Any, Any]:
    """Dense rows of sparse ones, as :func:`annbatch_dask.kernels.gpu.densify` makes them.

    Parameters
    ----------
    sparse
        Values, columns and row pointers (int64): row ``i`` is ``indptr[i]:indptr[i + 1]``.
    n_columns, width
        Columns of the data, and of the result.
    dtype
        Of the result: torch's float32, float64, int32 or int64.
    places, target_sum
        As there.

    Returns
    -------
    rows, n_outside
        (n_rows, width); and how many entries were left out because their column does not exist, in a tensor.
    """
    import torch

    values, columns, indptr = sparse
    n_rows = len(indptr) - 1
    row = torch.arange(n_rows, device=values.device).repeat_interleave(indptr.diff(), output_size=len(values))
    columns = columns.to(torch.int64)
    if target_sum is not None:
        values = values.to(torch.float64)
        totals = values.new_zeros(n_rows).index_add_(0, row, values)
        values = torch.log1p(values * _scales(totals, target_sum)[row])
    is_kept = (columns >= 0) & (columns < n_columns)
    n_outside = len(columns) - is_kept.sum()
    if places is not None:
        columns = places[columns.clamp(0, n_columns - 1)].to(torch.int64) if n_columns else columns
        is_kept &= columns >= 0
    row, columns, values = row[is_kept], columns[is_kept], values[is_kept]
    out = torch.zeros(n_rows * width, dtype=dtype, device=values.device)
    out.scatter_add_(0, row * width + columns, values.to(dtype))
    return out.view(n_rows, width), n_outside


def normalized(rows: Any, target_sum: float) -> Any:
    """Dense rows scaled to a sum, log(1 + x) of them; float64."""
    import torch

    rows = rows.to(torch.float64)
    return torch.log1p(rows * _scales(rows.sum(1, keepdim=True), target_sum))


def _scales(totals: Any, target_sum: float) -> Any:
    """What rows with these sums are multiplied by; 1 where there is nothing to scale."""
    return (target_sum / totals).where(totals != 0, totals.new_ones(()))
