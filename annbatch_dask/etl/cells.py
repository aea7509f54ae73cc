"""Cells as duplicates= compares them: X alone, gene by gene, whatever its dtype and however it is stored.

Equal cells have equal hashes, which scatter takes from the pass that makes the fingerprint. Where hashes are equal the
cells themselves are compared: as :func:`comparable` has them, equal cells are equal bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.etl.rows import FixedLike, RaggedArrays, RaggedLike, array_name
from annbatch_dask.kernels.cells import is_plain, plain_rows, widest
from annbatch_dask.kernels.fingerprint import add_dense, add_sparse, field_salt
from annbatch_dask.kernels.rows import offsets_of, slabs
from annbatch_dask.kernels.splitmix import finalise
from annbatch_dask.plan.dtypes import ValueRange, smallest_dtype
from annbatch_dask.plan.schema import MatrixSpec
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.spill import write_spill

__all__ = ["HASHES", "comparable", "comparable_dtype", "hash_cells", "n_bins", "write_hashes"]

HASHES = "hashes"
"""Kind of the file of a block's hashes."""
_BIN_ROWS = 2**19
"""About so many hashes are sorted at once: with what stands beside them, less than any task may hold."""
_STEP = 2**20


def n_bins(n_obs: int) -> int:
    """Number of bins, by their first bits, that the hashes of so many rows are sorted in: a power of two."""
    return 1 << (max(0, n_obs - 1) // _BIN_ROWS).bit_length()


def mixed(sums: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of rows from sums over their entries, of which the first bits are as good as any."""
    hashes: NDArray[np.uint64] = finalise.py_func(sums)
    return hashes


def hash_cells(
    spec: MatrixSpec, of_x: NDArray[np.uint64], fixed: FixedLike, ragged: RaggedLike, *, has_nan: bool
) -> tuple[NDArray[np.uint64], bool]:
    """Hashes of cells by X alone: equal where all genes are.

    Parameters
    ----------
    spec
        X.
    of_x
        (n_rows,) what X adds to the fingerprints of the rows, in which zeros that are stored count.
    fixed, ragged
        The rows.
    has_nan
        Whether X has a NaN.

    Returns
    -------
    (n_rows,) hashes, 0 for cells without a count; and whether a row names a gene twice.
    """
    repeats = False
    if spec.kind == "csr":
        indices, offsets = ragged[array_name(spec.name, "indices")]
        values, _ = ragged[array_name(spec.name, "values")]
        sums, has_count = of_x, np.diff(offsets) > 0
        if has_nan or not is_plain(offsets, indices, values):
            sums, has_count, repeats = _sparse_sums(spec, offsets, indices, values)
    else:
        sums, has_count = _dense_sums(spec, of_x, fixed[array_name(spec.name, "dense")])
    return np.where(has_count, np.maximum(mixed(sums), np.uint64(1)), np.uint64(0)), repeats


def _sparse_sums(
    spec: MatrixSpec, offsets: NDArray[np.int64], indices: NDArray, values: NDArray
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], bool]:
    sums = np.zeros(len(offsets) - 1, np.uint64)
    has_count, repeats = np.zeros(len(sums), bool), False
    for a, b in slabs(offsets, _STEP):
        at, local = slice(int(offsets[a]), int(offsets[b])), offsets[a : b + 1] - offsets[a]
        starts, genes, counts, is_summed = plain_rows(local, indices[at], values[at])
        add_sparse(sums[a:b], starts, genes, counts, field_salt(spec.name))
        has_count[a:b] = np.diff(offsets_of(counts == counts)[starts]) > 0  # noqa: PLR0124 - not those of NaN alone
        repeats = repeats or is_summed
    return sums, has_count, repeats


def _dense_sums(
    spec: MatrixSpec, of_x: NDArray[np.uint64], values: NDArray
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    sums, has_count = of_x.copy(), np.zeros(len(values), bool)
    step = max(1, _STEP // max(1, spec.n_cols))
    for a in range(0, len(values), step):
        piece = values[a : a + step]
        is_zero = piece == 0
        has_count[a : a + step] = (~is_zero & (piece == piece)).any(axis=1)  # noqa: PLR0124 - NaN is no count
        if piece.dtype.kind == "f" and np.signbit(piece[is_zero]).any():
            sums[a : a + step] = 0
            add_dense(sums[a : a + step], np.where(is_zero, 0, piece), field_salt(spec.name))
    return sums, has_count


def write_hashes(scratch: Folder, index: int, hashes: NDArray[np.uint64], order: NDArray[np.int64], bins: int) -> None:
    """Write a block's hashes by bin, with each row's place in the block and in its spill file: 16 bytes a row.

    Parameters
    ----------
    hashes
        (n_rows,) of which 0 is left out.
    order
        (n_rows,) the rows in the order of the spill file.
    """
    at = np.empty(len(order), np.uint32)
    at[order] = np.arange(len(order), dtype=np.uint32)
    rows = np.flatnonzero(hashes)
    hashes = hashes[rows]
    bin_of = (hashes >> np.uint64(65 - bins.bit_length()) if bins > 1 else 0 * hashes).astype(np.int64)
    by_bin = np.argsort(bin_of, kind="stable")
    write_spill(
        scratch,
        index,
        order=by_bin,
        rows=np.searchsorted(bin_of[by_bin], np.arange(bins + 1)),
        fixed={"hash": hashes, "row": rows.astype(np.uint32), "at": at[rows]},
        ragged={},
        kind=HASHES,
    )


def comparable_dtype(spec: MatrixSpec, found: ValueRange, *, repeats: bool) -> np.dtype:
    """The dtype that holds every value of X exactly, and sums of them where rows name a gene twice."""
    source = np.dtype(spec.source_dtype)
    return widest(source) if repeats else smallest_dtype(found, source)


def comparable(spec: MatrixSpec, dtype: np.dtype, fixed: FixedLike, ragged: RaggedLike) -> RaggedArrays:
    """X of some rows in a form in which equal cells are equal bytes: their values, and where sparse their genes."""
    if spec.kind == "csr":
        indices, offsets = ragged[array_name(spec.name, "indices")]
        values, _ = ragged[array_name(spec.name, "values")]
        if not is_plain(offsets, indices, values):
            offsets, indices, values, _ = plain_rows(offsets, indices, values)
        return {"genes": (indices, offsets), "values": (_of_dtype(values, dtype), offsets)}
    grid = fixed[array_name(spec.name, "dense")]
    return {"values": (_of_dtype(grid.reshape(-1), dtype), np.arange(len(grid) + 1) * spec.n_cols)}


def _of_dtype(values: NDArray, dtype: np.dtype) -> NDArray:
    """Values in a dtype that holds them, of zeros and of NaN one kind each."""
    out = values.astype(dtype)
    if dtype.kind == "f":
        out += 0  # a negative zero is one no more
        out[np.isnan(out)] = np.nan
    return out
