"""Statistics of genes: those that builds stored, and of datasets that have none, worked out by a pass on Dask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.etl.prepare import dataset_refs
from annbatch_dask.etl.readable import check_readable
from annbatch_dask.etl.stats import GeneSums, add_rows, stored_sums
from annbatch_dask.kernels.gene_sums import SUMS, new_sums
from annbatch_dask.lazy.blocks import lazy_matrix
from annbatch_dask.lazy.view import View
from annbatch_dask.manifest import STATS, TARGET_SUM
from annbatch_dask.statistics.passes import column_of, sum_blocks, whole_counts
from annbatch_dask.storage.metadata import is_metadata
from annbatch_dask.storage.root import Root

__all__ = ["gene_stats", "gene_sums", "stored_gene_sums"]

logger = logging.getLogger(__name__)
_N_THREADS = 16

Arrays = tuple[NDArray[np.int64], NDArray[np.float64]]


def gene_stats(found: GeneSums, genes: pd.Index) -> pd.DataFrame:
    """Sums, means and variances as a frame of (n_vars,) rows, or (n_groups * n_vars,) where they are by group."""
    if not found.by:
        return _frame(found, -1).set_axis(genes).assign().pipe(_with_target)
    frames = [_frame(found, k) for k in range(len(found.groups))] or [_frame(found, -1).iloc[:0]]
    index = pd.MultiIndex.from_product([found.groups, genes], names=[found.by, genes.name])
    return pd.concat(frames).set_axis(index).pipe(_with_target)


def _with_target(frame: pd.DataFrame) -> pd.DataFrame:
    frame.attrs["target_sum"] = TARGET_SUM
    return frame


def _frame(found: GeneSums, group: int) -> pd.DataFrame:
    n, sums = int(found.n_cells[group]), dict(zip(SUMS, found.sums[group].T, strict=True))
    out = pd.DataFrame({"n_cells": n, "n_nonzero": sums["n_nonzero"].astype(np.int64)}, index=range(sums["sum"].size))
    for kind in ("", "normalized_", "log_"):
        total, squares = sums[f"{kind}sum"], sums[f"{kind}sum_of_squares"]
        out[f"{kind}sum"], out[f"{kind}sum_of_squares"] = total, squares
        out[f"{kind}mean"], out[f"{kind}variance"] = found.moments(group, kind)
    return out


def gene_sums(root: Root, by: str | None) -> GeneSums:
    """The sums of all datasets, by a column of obs or over all cells.

    Raises
    ------
    CollectionError
        If obs lacks the column.
    IntegrityError
        If what is stored is damaged.
    """
    with root.as_opened():
        names, fit = root.names(), _all_stored(root, by)
        missing = [name for name, s in zip(names, fit, strict=True) if s is None]
        found = [s for s in fit if s is not None]
        if missing:
            what = "no statistics" + ("" if by is None else f" by {by}")
            logger.info(
                "%s: %d of %d datasets have %s: their X is read; builds with stats store them",
                *(root.path, len(missing), len(names), what),
            )
            found.append(_counted(root, by, missing))
    return reduce(_add, found)


def stored_gene_sums(root: Root) -> GeneSums | None:
    """The sums over all cells, where all datasets have them stored; else None."""
    with root.as_opened():
        found = _all_stored(root, None)
    there = [s for s in found if s is not None]
    return reduce(_add, there) if len(there) == len(found) else None


def _all_stored(root: Root, by: str | None) -> list[GeneSums | None]:
    """What each dataset has stored of this, if it is of what the dataset is now."""
    edited = _edited(root)
    stale = [_is_out_of_date(edited.get(name, ()), by) for name in root.names()]
    with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="stats") as pool:
        stored = list(pool.map(_stored, root.readable(), stale))
    return [s.of(by) if s is not None and by in (None, s.by) else None for s in stored]


def _edited(root: Root) -> dict[str, frozenset[str]]:
    """What somebody edited of the datasets; IntegrityError where their statistics are damaged."""
    if (manifest := root.manifest) is None or not root.has_folder:
        return {}
    return check_readable(root.target, manifest, lambda n: n.startswith(f"uns/{STATS}/") and not is_metadata(n))


def _is_out_of_date(edited: frozenset[str] | Sequence[str], by: str | None) -> bool:
    """True if the statistics of a dataset are not of what it is now."""
    of = {"", "X", "var", "uns", f"uns/{STATS}"} | (set() if by is None else {"obs", f"obs/{by}"})
    return bool(of & set(edited))


def _stored(group: Any, is_out_of_date: bool) -> GeneSums | None:  # noqa: FBT001 - of a pool's map
    return None if is_out_of_date else stored_sums(group)


def _counted(root: Root, by: str | None, names: Sequence[str]) -> GeneSums:
    """The sums of some datasets, by a pass over their X."""
    refs = tuple(r for r, name in zip(dataset_refs(root), root.names(), strict=True) if name in set(names))
    view = View.of(refs, merge="first")
    matrix = lazy_matrix(view.plan, view.refs, view.identities, view.plan.x)
    labels = None if by is None else column_of(root, by, names)
    codes = np.full(matrix.shape[0], -1, np.int8) if labels is None else labels.codes
    n_groups = 0 if labels is None else len(labels.categories)
    n_cells, sums = sum_blocks(matrix, codes, _sums_of_block, _add_arrays, n_groups)
    groups = pd.Index([], dtype=object) if labels is None else labels.categories
    return GeneSums(by or "", groups, n_cells, sums)


def _sums_of_block(block: Any, codes: NDArray, n_groups: int) -> Arrays:
    """Cells, and sums, of each group of a block's rows."""
    sums, n_cells = new_sums(n_groups + 1, block.shape[1]), np.zeros(n_groups + 1, np.int64)
    rows: Any = block
    if sp.issparse(block):
        rows = block.indptr.astype(np.int64), block.indices, whole_counts(block.data)
    add_rows(sums, n_cells, codes, rows)
    return n_cells, sums[:, :, : len(SUMS)]


def _add_arrays(found: Sequence[Arrays]) -> Arrays:
    n_cells, sums = found[0][0].copy(), found[0][1].copy()
    for more_cells, more in found[1:]:
        n_cells += more_cells
        sums += more
    return n_cells, sums


def _add(one: GeneSums, two: GeneSums) -> GeneSums:
    """The sums over the cells of both, by the groups of either."""
    if one.groups.equals(two.groups):
        return GeneSums(one.by, one.groups, one.n_cells + two.n_cells, one.sums + two.sums)
    groups = pd.Index(list(dict.fromkeys([*one.groups, *two.groups])))
    n_cells, sums = np.zeros(len(groups) + 1, np.int64), np.zeros((len(groups) + 1, *one.sums.shape[1:]))
    for part in (one, two):
        at = np.append(groups.get_indexer(part.groups), len(groups))
        n_cells[at] += part.n_cells
        sums[at] += part.sums
    return GeneSums(one.by, groups, n_cells, sums)
