"""Row-aligned elements as they travel from scatter to gather: fixed-size and ragged arrays with their names.

A fixed-size array has one entry (or one row) a cell: category codes, numbers, dense matrices, and how many ragged
entries the cell has. A ragged one has any number a cell, and offsets: sparse indices and values, the bytes of strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.fingerprint import (
    add_dense,
    add_sparse,
    add_strings,
    field_salt,
    finish_rows,
)
from annbatch_dask.kernels.rows import offsets_of
from annbatch_dask.plan.dtypes import index_dtype
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import Categories, ColumnSpec, MatrixSpec
from annbatch_dask.sources.columns import ColumnRows

__all__ = [
    "GROUP",
    "HASH",
    "NAMES",
    "PLACE",
    "FixedArrays",
    "FixedLike",
    "RaggedArrays",
    "RaggedLike",
    "all_columns",
    "array_name",
    "decode_strings",
    "encode_strings",
    "group_keys",
    "ragged_arrays",
    "row_hashes",
    "sum_hashes",
    "write_column",
]

PLACE = "#place"
"""Fixed-size array: a row's position within its part; with groupby, within its dataset."""
GROUP = "#group"
"""Fixed-size array: number of a row's group, with groupby."""
HASH = "#hash"
"""Fixed-size array: what a row's columns add to its hash, of rows that are gathered."""
FixedArrays = dict[str, NDArray]
RaggedArrays = dict[str, tuple[NDArray, NDArray[np.int64]]]


FixedLike = Mapping[str, NDArray]
RaggedLike = Mapping[str, tuple[NDArray, NDArray[np.int64]]]
_STEP = 2**16
NAMES = ColumnSpec("", "string")
"""The obs names, which travel like a column of strings."""


def all_columns(plan: Plan) -> tuple[ColumnSpec, ...]:
    """Obs names, the columns, and the source of each row: what travels beside the matrices."""
    return (NAMES, *plan.columns, plan.source_column)


def array_name(element: str, what: str = "values") -> str:
    """Name of one of an element's arrays.

    Parameters
    ----------
    element
        Name of a matrix, or path of a column.
    what
        For a matrix ``dense``, or ``indices``, ``values`` and ``length`` (values per row); for a column ``values``,
        ``mask``, or of strings ``bytes`` and ``length``.
    """
    return f"{element}#{what}"


def ragged_arrays(plan: Plan, dtypes: Mapping[str, str]) -> Iterator[tuple[str, np.dtype, str | int]]:
    """Name and dtype of every ragged array, and the array that counts its entries, or how many each row has.

    ``dtypes``: of the values of each matrix.
    """
    for m in plan.matrices:
        if m.kind == "csr":
            yield array_name(m.name, "indices"), index_dtype(m.n_cols), array_name(m.name, "length")
            yield array_name(m.name, "values"), np.dtype(dtypes[m.name]), array_name(m.name, "length")
        else:
            yield array_name(m.name, "dense"), np.dtype(dtypes[m.name]), m.n_cols
    for c in all_columns(plan):
        if c.kind == "string":
            yield array_name(c.path, "bytes"), np.dtype(np.uint8), array_name(c.path, "length")


def encode_strings(strings: NDArray[np.object_]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Length in bytes of each string, and the UTF-8 bytes of all."""
    encoded = [s.encode("utf-8", "surrogatepass") for s in strings]
    counts = np.fromiter(map(len, encoded), np.uint32, len(encoded))
    return counts, np.frombuffer(b"".join(encoded), np.uint8)


def decode_strings(offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> NDArray[np.object_]:
    """The strings again."""
    out = np.empty(len(offsets) - 1, object)
    for a in range(0, len(out), _STEP):  # what Python needs beside them stays small
        edges = offsets[a : a + _STEP + 1].tolist()
        first, raw = edges[0], data[edges[0] : edges[-1]].tobytes()
        strings = [raw[i - first : j - first].decode("utf-8", "surrogatepass") for i, j in pairwise(edges)]
        out[a : a + _STEP] = strings
    return out


def write_column(
    spec: ColumnSpec, rows: ColumnRows, fixed: dict[str, NDArray], ragged: dict[str, tuple[NDArray, NDArray[np.int64]]]
) -> None:
    """Add a column's rows, in the collection's dtype and codes, to the arrays of a block."""
    if spec.kind == "string":
        counts, data = encode_strings(rows.values)
        fixed[array_name(spec.path, "length")] = counts
        ragged[array_name(spec.path, "bytes")] = data, offsets_of(counts)
    else:
        fixed[array_name(spec.path)] = rows.values
    if spec.nullable:
        fixed[array_name(spec.path, "mask")] = np.zeros(len(rows.values), bool) if rows.mask is None else rows.mask


def group_keys(plan: Plan, fixed: FixedLike, ragged: RaggedLike) -> list[NDArray]:
    """Two sort keys for each column, (n_rows,) each: whether it is missing, and values that sort as the column does."""
    return [key for c in plan.group_columns for key in _sortable(c, fixed, ragged)]


def _sortable(column: ColumnSpec, fixed: FixedLike, ragged: RaggedLike) -> tuple[NDArray, NDArray]:
    if column.kind == "string":
        data, offsets = ragged[array_name(column.path, "bytes")]
        values: NDArray = decode_strings(offsets, data)
    else:
        values = fixed[array_name(column.path)]
    if values.dtype == np.float16:
        values = values.astype(np.float32)  # pandas groups by no halves
    if column.categories is not None:
        missing = values < 0
    elif column.nullable:
        missing = np.asarray(fixed[array_name(column.path, "mask")], bool)
    else:
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    nothing = np.asarray("" if values.dtype == object else 0, values.dtype)
    return missing, np.where(missing, nothing, values)


def row_hashes(
    n_rows: int,
    matrices: Sequence[MatrixSpec],
    columns: Sequence[ColumnSpec],
    fixed: FixedLike,
    ragged: RaggedLike,
    *,
    of_x: NDArray[np.uint64] | None = None,
) -> NDArray[np.uint64]:
    """(n_rows,) hashes of whole rows; see :mod:`annbatch_dask.kernels.fingerprint`.

    They depend on what a row says and not on how it is held: categories enter by their value and not their code, a
    missing value like a column that is not there. So they stay the same when a collection is extended.
    ``of_x``: (n_rows,) zeros, which become what X alone adds.
    """
    hashes = np.zeros(n_rows, np.uint64)
    for m in matrices:
        sums = hashes if of_x is None or m.name != "X" else of_x
        if m.kind == "csr":
            indices, offsets = ragged[array_name(m.name, "indices")]
            add_sparse(sums, offsets, indices, ragged[array_name(m.name, "values")][0], field_salt(m.name))
        else:
            add_dense(sums, fixed[array_name(m.name, "dense")], field_salt(m.name))
    if of_x is not None:
        hashes += of_x
    for c in columns:
        hashes += _column_hashes(n_rows, c, fixed, ragged)
    return hashes


def _column_hashes(n_rows: int, spec: ColumnSpec, fixed: FixedLike, ragged: RaggedLike) -> NDArray[np.uint64]:
    """(n_rows,) hashes of a column's values, 0 where missing."""
    salt = field_salt(spec.path)
    if spec.categories is not None:
        table = np.append(_category_hashes(spec.categories, salt), [np.uint64(0)])
        by_code: NDArray[np.uint64] = table[fixed[array_name(spec.path)]]
        return by_code
    hashes = np.zeros(n_rows, np.uint64)
    if spec.kind == "string":
        data, offsets = ragged[array_name(spec.path, "bytes")]
        add_strings(hashes, offsets, data, salt)
    else:
        add_dense(hashes, fixed[array_name(spec.path)].reshape(n_rows, 1), salt)
    if spec.nullable:
        hashes[fixed[array_name(spec.path, "mask")]] = 0
    return hashes


def _category_hashes(categories: Categories, salt: np.uint64) -> NDArray[np.uint64]:
    """(n_categories,) what a string or number column would have for each value."""
    hashes = np.zeros(len(categories.values), np.uint64)
    if categories.dtype == "str":
        counts, data = encode_strings(np.array(categories.values, object))
        add_strings(hashes, offsets_of(counts), data, salt)
    else:
        dtype = np.dtype(categories.dtype if categories.dtype in ("int64", "uint64") else np.float64)
        add_dense(hashes, np.array(categories.values, dtype).reshape(-1, 1), salt)
    return hashes


def sum_hashes(hashes: NDArray[np.uint64]) -> int:
    """Order-independent fingerprint of some rows: the sum of their finished hashes modulo 2**64."""
    return int(finish_rows(hashes))
