"""Sparse and dense rows in operations of torch, on whatever device they are: where no kernel can be compiled.

They make what :mod:`annbatch_dask.kernels.gpu` makes, and are tested on the CPU.
"""

from __future__ import annotations

from typing import Any

__all__ = ["densify", "gather", "normalized"]


def gather(slab: Any, at: Any, lengths: Any, dtype: Any) -> Any:
    """Stretches of a slab of bytes, one behind the other.

    Parameters
    ----------
    slab
        (n_bytes,) uint8.
    at, lengths
        (n,) int64: where each stretch begins in bytes, a multiple of the item's size; and its items.
    dtype
        Dtype of the items.
    """
    import torch

    # As signed integers of the same size: torch indexes no others of 16 bits and more.
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    items = slab.view(signed)
    n_items = int(lengths.sum())
    shift = (at // dtype.itemsize - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths, output_size=n_items)
    return items[torch.arange(n_items, device=slab.device) + shift].view(dtype)


def densify(
    sparse: tuple[Any, Any, Any],
    n_columns: int,
    width: int,
    dtype: Any,
    *,
    places: Any | None,
    target_sum: float | None,
) -> tuple[Any, Any]:
    """Dense rows of sparse ones, as the kernel ``densify`` makes them.

    Parameters
    ----------
    sparse
        Values, columns and row lengths (int64), row behind row.
    n_columns, width
        Columns of the data, and of the result.
    dtype
        Dtype of the result: torch's float32, float64, int32 or int64.
    places
        (n_columns,) int32: where each column goes, -1 for one that is left out; None puts each where it was.
    target_sum
        Scale each row to this sum, over all its columns, and take log(1 + x); None takes the values as they are.

    Returns
    -------
    rows, n_outside
        (n_rows, width); and how many entries were left out because their column does not exist, in a tensor.
    """
    import torch

    values, columns, lengths = sparse
    n_rows = len(lengths)
    row = torch.arange(n_rows, device=values.device).repeat_interleave(lengths, output_size=len(values))
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
    values = values.to(dtype)
    row, columns, values = row[is_kept], columns[is_kept], values[is_kept]
    out = torch.zeros(n_rows * width, dtype=dtype, device=values.device)
    out.scatter_add_(0, row * width + columns, values)
    return out.view(n_rows, width), n_outside


def normalized(rows: Any, target_sum: float) -> Any:
    """Dense rows scaled to a sum, log(1 + x) of them; float64."""
    import torch

    rows = rows.to(torch.float64)
    return torch.log1p(rows * _scales(rows.sum(1, keepdim=True), target_sum))


def _scales(totals: Any, target_sum: float) -> Any:
    """Scale factors of rows with these sums; 1 for empty rows."""
    return (target_sum / totals).where(totals != 0, totals.new_ones(()))
