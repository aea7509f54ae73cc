"""Highly variable genes, as scanpy has them, out of statistics instead of the matrix."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.errors import CollectionError, MissingPackageError
from annbatch_dask.etl.prepare import dataset_refs
from annbatch_dask.etl.stats import GeneSums
from annbatch_dask.formatting import first_few
from annbatch_dask.kernels.gene_sums import SUMS, add_clipped
from annbatch_dask.lazy.blocks import lazy_matrix
from annbatch_dask.lazy.view import View
from annbatch_dask.statistics.genes import gene_sums
from annbatch_dask.statistics.passes import column_of, sum_blocks, whole_counts
from annbatch_dask.storage.root import Root
from annbatch_dask.warn import warn

__all__ = ["Flavor", "variable_genes"]

logger = logging.getLogger(__name__)

Flavor = Literal["seurat", "cell_ranger", "seurat_v3"]

_MAD = 0.6744897501960817
"""Median of absolute deviations of a normal distribution of variance 1."""
_SMALLEST_MEAN = 1e-12
_N_FITTED = 3
"""Points that a parabola takes: loess is handed no fewer."""


def variable_genes(
    root: Root, genes: pd.Index, n_top: int, *, flavor: Flavor, batch_key: str | None, span: float, n_bins: int
) -> pd.DataFrame:
    """(n_vars,) frame of what ``scanpy.pp.highly_variable_genes(..., inplace=False)`` returns.

    Raises
    ------
    ValueError
        For a flavour that there is not.
    CollectionError
        If obs lacks the column, or a batch has too few cells.
    MissingPackageError
        If ``seurat_v3`` is asked for without scikit-misc.
    """
    if flavor not in get_args(Flavor):
        msg = f"flavor is {flavor!r}; give one of {', '.join(map(repr, get_args(Flavor)))}"
        raise ValueError(msg)
    if not isinstance(n_top, Integral) or n_top < 1:
        msg = f"n_top is {n_top!r}; it must be a whole number, 1 or more"
        raise ValueError(msg)
    if flavor == "seurat_v3":
        _loess()  # before anything is read
    found = gene_sums(root, batch_key)
    batches = [k for k, n in enumerate(found.n_cells) if n]
    _check_batches(root, found, batches)
    _check_finite(root, found, genes, flavor)
    if flavor == "seurat_v3":
        return _by_clipped_variance(root, found, batches, genes, n_top, span)
    frames = [_of_batch(found, k, genes, n_top, flavor, n_bins) for k in batches]
    return frames[0].drop(columns="mean_bin") if batch_key is None else _united(frames, genes, n_top)


_KINDS: Mapping[Flavor, str] = {"seurat": "normalized_", "cell_ranger": "log_", "seurat_v3": ""}
"""The sums that each flavour is made of."""


def _check_finite(root: Root, found: GeneSums, genes: pd.Index, flavor: Flavor) -> None:
    """Refuse sums that are no numbers, of which nothing can be ranked."""
    places = [SUMS.index(f"{_KINDS[flavor]}{name}") for name in ("sum", "sum_of_squares")]
    bad = np.flatnonzero(~np.isfinite(found.sums[:, :, places]).all(axis=(0, 2)))
    if len(bad):
        shown = first_few(map(repr, genes[bad]))
        msg = (
            f"{root.path}: {len(bad):,} of {len(genes):,} genes have no mean or variance ({shown}), as X has NaN, "
            "infinite or negative values in cells that have them; mend X in load_adata, or leave out cells or genes"
        )
        raise CollectionError(msg)


def _check_batches(root: Root, found: GeneSums, batches: Sequence[int]) -> None:
    if found.by and found.n_cells[-1]:
        msg = (
            f"{root.path}: {found.n_cells[-1]:,} of {found.n_cells.sum():,} cells have no {found.by!r}; give another "
            "batch_key, or build a collection of the others"
        )
        raise CollectionError(msg)
    if few := [k for k in batches if found.n_cells[k] < 2]:
        where = f"batch {found.groups.tolist()[few[0]]!r} of {found.by}" if found.by else "the collection"
        msg = f"{root.path}: {where} has 1 cell, and a variance needs 2; give another batch_key"
        raise CollectionError(msg)


# --- dispersions: seurat and cell_ranger ---------------------------------------------------------------------------


def _of_batch(found: GeneSums, group: int, genes: pd.Index, n_top: int, flavor: Flavor, n_bins: int) -> pd.DataFrame:
    """Dispersions of the genes in a batch, zeros for those that none of its cells has where there are batches."""
    mean, variance = found.moments(group, _KINDS[flavor])
    has = found.sums[group, :, 0] > 0 if found.by else np.ones(len(genes), bool)
    mean, variance = np.where(mean == 0, _SMALLEST_MEAN, mean)[has], variance[has]
    dispersion = variance / mean
    if flavor == "seurat":
        dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
        mean = np.log1p(mean)
    df = pd.DataFrame({"means": mean, "dispersions": dispersion})
    df["mean_bin"] = _bins(df["means"], flavor, n_bins)
    bins = df.groupby("mean_bin", observed=True)["dispersions"]
    stats = bins.agg(avg="mean", dev="std") if flavor == "seurat" else bins.agg(avg="median", dev=_mad)
    if flavor == "seurat":
        alone = stats["dev"].isna()  # bins of one gene, whose normalised dispersion is 1
        stats.loc[alone, "dev"], stats.loc[alone, "avg"] = stats.loc[alone, "avg"], 0.0
    of_gene = stats.loc[df["mean_bin"]].set_index(df.index)
    with np.errstate(divide="ignore", invalid="ignore"):
        df["dispersions_norm"] = (df["dispersions"] - of_gene["avg"]) / of_gene["dev"]
    df["highly_variable"] = _top(df["dispersions_norm"].to_numpy(), n_top)
    return df.set_axis(genes[has]).reindex(genes).pipe(_filled)


def _filled(df: pd.DataFrame) -> pd.DataFrame:
    """Zeros for genes that were left out, which have no bin."""
    left_out = df["mean_bin"].isna()
    for name in ("means", "dispersions", "dispersions_norm"):
        df.loc[left_out, name] = 0.0
    df["highly_variable"] = df["highly_variable"].eq(True)  # noqa: FBT003 - pandas' method
    return df


def _bins(means: pd.Series, flavor: Flavor, n_bins: int) -> pd.Series:
    if flavor == "seurat":
        return pd.cut(means, bins=n_bins)
    edges = np.r_[-np.inf, np.percentile(means, np.arange(10, 105, 5)), np.inf]
    if len(np.unique(edges)) < len(edges):
        n = int((means == means.mode()[0]).sum())
        msg = (
            f"flavor='cell_ranger' sorts genes by their means into 20 bins of equal size, and {n:,} of {len(means):,} "
            "genes have the same; leave out genes that no cell has (var_subset), or take another flavor"
        )
        raise CollectionError(msg)
    return pd.cut(means, bins=edges)


def _mad(values: pd.Series) -> float:
    a = values.to_numpy()
    return float(np.median(np.abs(a - np.median(a)) / _MAD))


def _top(values: NDArray[np.float64], n_top: int) -> NDArray[np.bool_]:
    """The n_top highest and those equal to the last of them."""
    there = np.sort(values[~np.isnan(values)])[::-1]
    if n_top > len(there):
        if n_top <= len(values):
            warn(f"n_top is {n_top:,}, and {len(there):,} genes have a normalised dispersion; these are returned")
        n_top = len(there)
    cutoff = there[n_top - 1] if n_top else np.inf
    return np.nan_to_num(values, nan=-np.inf) >= cutoff


def _united(frames: Sequence[pd.DataFrame], genes: pd.Index, n_top: int) -> pd.DataFrame:
    """Genes by how many batches have them among their highest, and then by their mean normalised dispersion."""
    df = pd.concat(
        [f.drop(columns="mean_bin").assign(highly_variable=f["highly_variable"].astype(int)) for f in frames]
    )
    how = {"means": "mean", "dispersions": "mean", "dispersions_norm": "mean", "highly_variable": "sum"}
    df = df.groupby(df.index, observed=True).agg(how)
    df["highly_variable_nbatches"] = df["highly_variable"]
    df["highly_variable_intersection"] = df["highly_variable_nbatches"] == len(frames)
    order = ["highly_variable_nbatches", "dispersions_norm"]
    df = df.sort_values(order, ascending=False, na_position="last")
    df["highly_variable"] = np.arange(len(df)) < n_top
    return df.loc[genes]


# --- variances of clipped, standardised counts: seurat_v3 ----------------------------------------------------------


def _loess() -> Any:
    try:
        from skmisc.loess import loess
    except ImportError as e:
        msg = (
            "flavor='seurat_v3' fits variances by scikit-misc's loess, which is not installed; install it with "
            "`pip install 'annbatch-dask[hvg]'`, or take flavor='seurat'"
        )
        raise MissingPackageError(msg) from e
    return loess


def _by_clipped_variance(
    root: Root, found: GeneSums, batches: Sequence[int], genes: pd.Index, n_top: int, span: float
) -> pd.DataFrame:
    """Rank genes by the variance of their standardised counts in each batch, which takes a second pass."""
    manifest = root.manifest
    if manifest is not None and manifest.matrices["X"].integral is False:
        warn(f"{root.path}: flavor='seurat_v3' expects counts, and X holds fractions")
    df = pd.DataFrame(index=genes)
    df["means"], df["variances"] = found.of(None).moments(-1, "")
    means, variances = (np.stack(x) for x in zip(*(found.moments(k, "") for k in batches), strict=True))
    deviations = np.stack([_regular_deviation(m, v, span) for m, v in zip(means, variances, strict=True)])
    n_cells = found.n_cells[batches][:, None]
    clip = deviations * np.sqrt(n_cells) + means
    sums, squares = _clipped_sums(root, found, batches, clip)
    normed = (1 / ((n_cells - 1) * deviations**2)) * (n_cells * means**2 + squares - 2 * sums * means)
    ranks = np.argsort(np.argsort(-normed, axis=1), axis=1).astype(np.float32)
    df["highly_variable_nbatches"] = (ranks < n_top).sum(0)
    ranks[ranks >= n_top] = np.nan
    df["highly_variable_rank"] = _median_of_those_there(ranks)
    df["variances_norm"] = normed.mean(0)
    order = ["highly_variable_rank", "highly_variable_nbatches"]
    best = df[order].sort_values(order, ascending=[True, False], na_position="last").index[:n_top]
    df["highly_variable"] = df.index.isin(best)
    return df if found.by else df.drop(columns="highly_variable_nbatches")


def _median_of_those_there(ranks: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n_vars,) medians over batches, NaN where none has a rank."""
    median: Any = np.ma.median
    out: NDArray[np.float64] = median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
    return out


def _regular_deviation(mean: NDArray, variance: NDArray, span: float) -> NDArray[np.float64]:
    """Standard deviation that a gene of this mean has, by a fit over all that vary; 1 of those that do not."""
    varies, fitted = variance > 0, np.zeros(len(mean))
    if varies.any():
        _check_span(span, int(varies.sum()))
        model = _loess()(np.log10(mean[varies]), np.log10(variance[varies]), span=span, degree=2)
        try:
            model.fit()
        except ValueError as e:
            e.add_note(f"while fitting the variances of {int(varies.sum()):,} genes: give another span than {span}")
            raise
        fitted[varies] = model.outputs.fitted_values
    return np.sqrt(10**fitted)


def _check_span(span: float, n_genes: int) -> None:
    """Refuse a fit to fewer points than a parabola has, which ends the process where it does not fail."""
    if not 0 < span <= 1 or int(span * n_genes) < _N_FITTED:
        msg = (
            f"span is {span}, a share of {n_genes:,} genes that vary, and the fit of flavor='seurat_v3' needs 0 < span "
            f"<= 1 and {_N_FITTED} genes in it; give a larger span, or another flavor or batch_key"
        )
        raise CollectionError(msg)


def _clipped_sums(
    root: Root, found: GeneSums, batches: Sequence[int], clip: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n_batches, n_vars) sums, and sums of squares, of counts of at most ``clip``."""
    logger.info("%s: X is read for flavor='seurat_v3'", root.path)
    with root.as_opened():
        view = View.of(tuple(dataset_refs(root)), merge="first")
        matrix = lazy_matrix(view.plan, view.refs, view.identities, view.plan.x)
        codes = np.zeros(matrix.shape[0], np.int64)
        if found.by:
            column = column_of(root, found.by)
            place = {found.groups[k]: n for n, k in enumerate(batches)}
            codes = np.array([place.get(name, -1) for name in column.categories], np.int64)[column.codes]
        total = sum_blocks(matrix, codes, _clipped_sums_of_block, _add_all, clip)
    return total[:, :, 0], total[:, :, 1]


def _add_all(found: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum(found, axis=0)
    return total


def _clipped_sums_of_block(block: Any, codes: NDArray, clip: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.zeros((*clip.shape, 2))
    csr = block if sp.issparse(block) else sp.csr_matrix(block)
    add_clipped(out, codes, csr.indptr.astype(np.int64), csr.indices, whole_counts(csr.data), clip)
    return out
