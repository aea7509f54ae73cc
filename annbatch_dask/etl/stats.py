"""Statistics of genes: a gather task sums them up while the rows go by, and stores them beside what it writes.

They are in ``uns`` of each dataset, where anndata and all that reads by it leave them alone, and say nothing of the
other datasets: so a dataset that an extension leaves as it is keeps its own, and all of them add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from annbatch_dask.etl.frames import write_elements
from annbatch_dask.etl.rows import FixedArrays, RaggedArrays, array_name
from annbatch_dask.kernels.gene_sums import SUMS, add_csr, add_dense, new_sums
from annbatch_dask.manifest import STATS, TARGET_SUM
from annbatch_dask.plan.plan import Plan

__all__ = ["DatasetSums", "GeneSums", "add_rows", "stored_sums"]

_ARRAY: dict[str, Any] = {"encoding-type": "array", "encoding-version": "0.2.0"}
_EXACT = 2**53
"""Whole numbers below it are what float64 holds exactly."""


@dataclass(frozen=True)
class GeneSums:
    """Sums over cells of each gene, by group of cells.

    Attributes
    ----------
    by
        Column of obs whose categories are the groups; "" where all cells are one.
    groups
        The categories, (n_groups,).
    n_cells
        (n_groups + 1,) cells of each, and of none: those without a category, or all where ``by`` is "".
    sums
        (n_groups + 1, n_vars, 7) float64, in the order of :data:`annbatch_dask.kernels.gene_sums.SUMS`.
    """

    by: str
    groups: pd.Index
    n_cells: NDArray[np.int64]
    sums: NDArray[np.float64] = field(repr=False)

    def of(self, by: str | None) -> GeneSums:
        """The same by no group, or by its own column."""
        if by == self.by or (by is None and not self.by):
            return self
        assert by is None  # who asks for another column counts anew
        none = pd.Index([], dtype=object)
        return GeneSums("", none, self.n_cells.sum(keepdims=True), self.sums.sum(0, keepdims=True))

    def moments(self, group: int, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n_vars,) means and unbiased variances of a group, NaN where it has too few cells.

        ``kind``: what the names of their sums begin with: ``""``, ``"normalized_"`` or ``"log_"``.
        """
        n, nothing = int(self.n_cells[group]), np.full(self.sums.shape[1], np.nan)
        total, squares = (self.sums[group, :, SUMS.index(f"{kind}{name}")] for name in ("sum", "sum_of_squares"))
        mean = total / n if n else nothing
        if n < 2:
            return mean, nothing
        with np.errstate(over="ignore", invalid="ignore"):  # of infinite values it is NaN, as pandas has it
            variance = np.maximum(squares / n - mean**2, 0) * (n / (n - 1))
        return mean, variance


class DatasetSums:
    """The sums of a dataset that is being written."""

    def __init__(self, plan: Plan) -> None:
        self._spec = plan.x
        self._column = plan.stats_column
        categories = None if self._column is None else self._column.categories
        self._groups = pd.Index([], dtype=object) if categories is None else categories.index()
        self._sums = new_sums(len(self._groups) + 1, plan.n_vars)
        self._n_cells = np.zeros(len(self._groups) + 1, np.int64)

    def append(self, fixed: FixedArrays, ragged: RaggedArrays) -> None:
        """Add rows."""
        if self._spec.kind == "dense":
            rows: Any = fixed[array_name("X", "dense")]
            n_rows = len(rows)
        else:
            indices, offsets = ragged[array_name("X", "indices")]
            rows, n_rows = (offsets, indices, ragged[array_name("X", "values")][0]), len(offsets) - 1
        codes = np.full(n_rows, -1) if self._column is None else fixed[array_name(self._column.path)]
        add_rows(self._sums, self._n_cells, codes, rows)

    def written(self) -> dict[str, Any]:
        """What stores them in the dataset, by name within it; written array by array, as they may be large."""
        by = "" if self._column is None else self._column.name
        found, files = GeneSums(by, self._groups, self._n_cells, self._sums), dict[str, Any]()
        attributes = {"encoding-type": "dict", "encoding-version": "0.1.0"}
        group = zarr.create_group(zarr.storage.MemoryStore(files), path=f"uns/{STATS}", attributes=attributes)
        for name, value in _elements(found):
            if isinstance(value, np.ndarray) and value.dtype.kind in "if":  # as anndata does, in half the time
                group.create_array(name, data=value, attributes=_ARRAY)
            else:
                write_elements(group, {name: value})
        return {name: content for name, content in files.items() if name.startswith(group.path)}


def add_rows(sums: NDArray[np.float64], n_cells: NDArray[np.int64], codes: NDArray, rows: Any) -> None:
    """Add rows to the sums of their groups, of which the last is of those without a code.

    Parameters
    ----------
    sums, n_cells
        (n_groups + 1, n_vars, 8), of :func:`annbatch_dask.kernels.gene_sums.new_sums`, and (n_groups + 1,); changed in
        place.
    codes
        (n_rows,) group of each row, -1 for none.
    rows
        (n_rows, n_vars) array, or offsets, indices and values of a CSR matrix.
    """
    last = len(n_cells) - 1
    groups = np.where(codes < 0, last, codes).astype(np.int64)
    n_cells += np.bincount(groups, minlength=last + 1)
    if isinstance(rows, tuple):
        offsets, indices, values = rows
        add_csr(sums, groups, offsets, indices, _plain(values), TARGET_SUM)
    else:
        add_dense(sums, groups, _plain(rows), TARGET_SUM)


def _plain(values: NDArray) -> NDArray:
    """Values in a dtype that kernels know, without a loss."""
    if values.dtype == bool:
        return values.view(np.uint8)
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _elements(found: GeneSums) -> Iterator[tuple[str, Any]]:
    """What is stored, by name: whole numbers as such. One array of sums is made at a time."""
    yield from (("by", found.by), ("target_sum", TARGET_SUM))
    yield from (("groups", found.groups.to_numpy()), ("n_cells", found.n_cells))
    for k, name in enumerate(SUMS):
        yield name, _whole(found.sums[:, :, k])


def _whole(values: NDArray[np.float64]) -> NDArray:
    """Whole numbers that are exact as integers."""
    is_whole = np.isfinite(values).all() and (values == np.floor(values)).all() and (np.abs(values) < _EXACT).all()
    return values.astype(np.int64) if is_whole else np.ascontiguousarray(values)


def stored_sums(group: zarr.Group) -> GeneSums | None:
    """The sums that are stored in a dataset; None where there are none."""
    import anndata as ad  # takes seconds, and gather tasks start without it

    uns: Any = group["uns"] if "uns" in group else {}
    if STATS not in uns:
        return None
    found: Mapping[str, Any] = ad.io.read_elem(uns[STATS])
    if float(found["target_sum"]) != TARGET_SUM:  # of another release
        return None
    sums = np.stack([np.asarray(found[name], np.float64) for name in SUMS], axis=-1)
    groups = pd.Index(np.asarray(found["groups"]))
    return GeneSums(str(found["by"]), groups, np.asarray(found["n_cells"], np.int64), sums)
