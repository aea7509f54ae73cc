"""Values of several genes of an input that become one, or of one that rows name twice, added up exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.kernels.values import add_floats, add_whole
from annbatch_dask.plan.schema import MatrixSpec

__all__ = ["add_met", "added_columns", "meets"]


class _InexactError(Exception):
    """A sum of whole numbers is not exact; ``total`` is None where it is beyond 64 bits."""

    def __init__(self, total: float | None) -> None:
        super().__init__(total)
        self.total = total


def meets(gene_map: NDArray[np.int32]) -> bool:
    """True if several genes of the source become one, and are added up."""
    return len(gene_map) > 0 and bool(np.bincount(gene_map[gene_map >= 0], minlength=1).max() > 1)


def add_met(
    offsets: NDArray[np.int64], indices: NDArray, values: NDArray, spec: MatrixSpec, *, are_genes: bool = True
) -> tuple[NDArray[np.int64], NDArray, NDArray]:
    """Rows in the order of their genes, of which each is there once: values of equal genes are added up.

    ``are_genes``: they are of several genes of the source, and else of one that its rows name twice. The arrays are
    changed in place; integers that no longer fit get a wider dtype.

    Raises
    ------
    SchemaError
        Where a sum of whole numbers is not exact in the dtype that a reader of the collection gets.
    """
    ends = np.zeros_like(offsets)
    add = _add_floats if values.dtype.kind == "f" else _add_whole
    is_set = values.dtype == bool and not are_genes  # then true and true are true, as in scipy
    spec = replace(spec, source_dtype="int64") if is_set else spec
    try:
        values = add(offsets, indices, values, ends, spec)
    except _InexactError as e:
        raise _inexact(spec, e.total, are_genes=are_genes) from None
    return ends, indices[: ends[-1]], values[: ends[-1]].astype(bool) if is_set else values[: ends[-1]]


def _add_floats(
    offsets: NDArray[np.int64], indices: NDArray, values: NDArray, ends: NDArray[np.int64], spec: MatrixSpec
) -> NDArray:
    dtype = np.promote_types(values.dtype, spec.source_dtype)
    values = values.astype(np.promote_types(dtype, np.float32), copy=False)  # the kernel has no float16
    bad = add_floats(offsets, indices, values, ends)
    if dtype == np.float16:
        values, wide = values.astype(dtype), values
        lost = wide[(values != wide) & (wide == np.floor(wide))]
        bad = bad or (lost[0] if len(lost) else 0)
    if bad:
        raise _InexactError(bad)
    return values


def _add_whole(
    offsets: NDArray[np.int64], indices: NDArray, values: NDArray, ends: NDArray[np.int64], spec: MatrixSpec
) -> NDArray:
    values = values.view(np.uint8) if values.dtype == bool else values
    wide = np.dtype(np.uint64 if values.dtype.kind == "u" else np.int64)
    at = np.zeros(3, np.int64)
    while True:
        limits = np.iinfo(values.dtype)
        add_whole(offsets, indices, values, ends, at, np.array([limits.min, limits.max, 0], wide))
        if at[0] == len(offsets) - 1:
            break
        if values.dtype == wide:
            raise _InexactError(None)
        values = values.astype(f"{wide.kind}{2 * values.dtype.itemsize}")
    _check_sums(values[: ends[-1]], spec)
    return values


def _check_sums(values: NDArray, spec: MatrixSpec) -> None:
    """Refuse integers that are others in the dtype that a reader gets."""
    dtype, most = np.dtype(spec.source_dtype), _most(spec)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    least = -most if dtype.kind == "f" else int(np.iinfo(dtype).min)
    if least <= low and high <= most:
        return
    if dtype.kind == "f" and values.dtype.itemsize <= 4:  # noqa: PLR2004 - float64 holds them
        exact = values.astype(np.float64)
        if np.array_equal(exact.astype(dtype), exact):
            return
    raise _InexactError(high if high > most else low)


def _most(spec: MatrixSpec) -> int:
    """The greatest whole number up to which the dtype that a reader gets holds every one."""
    dtype = np.dtype(spec.source_dtype)
    return 2 ** (np.finfo(dtype).nmant + 1) if dtype.kind == "f" else int(np.iinfo(dtype).max)


def _inexact(spec: MatrixSpec, total: float | None, *, are_genes: bool) -> SchemaError:
    what = "a whole number beyond 64 bits" if total is None else f"{total:,.0f}"
    why = "on_duplicate_gene='sum' makes {} of several genes' values in {}"
    if not are_genes:
        why = "rows name a gene several times, whose values add up to {}, in {}"
    return SchemaError(
        f"{why.format(what, spec.name)}, and {spec.source_dtype} holds whole numbers up to {_most(spec):,}; "
        f"make {spec.name} wider in load_adata" + (", or give on_duplicate_gene='first'" if are_genes else "")
    )


def added_columns(values: NDArray, spec: MatrixSpec) -> NDArray:
    """(n_rows,) sums of some columns, exact as those of :func:`add_met`."""
    n, k = values.shape
    offsets, keys = np.arange(n + 1, dtype=np.int64) * k, np.repeat(np.arange(n, dtype=np.int32), k)
    return add_met(offsets, keys, values.reshape(-1), spec)[2]
