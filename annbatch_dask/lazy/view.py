"""The outer join of files as one AnnData that reads what is used of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import xarray as xr
from anndata.experimental.backed import Dataset2D
from dask.base import compute
from dask.delayed import delayed

from annbatch_dask.etl.scan import merge_annotations, raw_var, scan
from annbatch_dask.lazy.blocks import lazy_matrix
from annbatch_dask.lazy.columns import SourceRows
from annbatch_dask.lazy.opened import look_at
from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.columns import unite_columns
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.genes import GeneSpace
from annbatch_dask.plan.layout import cut_blocks
from annbatch_dask.plan.memory import MIB, Budget
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import OBS, ColumnSpec, SourceSchema
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.sources.references import references

if TYPE_CHECKING:
    import os

__all__ = ["View", "concat_lazy", "read_lazy"]

logger = logging.getLogger(__name__)

Join = Literal["outer", "inner"]

_BLOCK_NBYTES, _CSC_BLOCK_NBYTES = 128 * MIB, 1024 * MIB
"""Uncompressed bytes of a row block. Of a CSC matrix the whole file goes by for each, so there are few."""
_MAX_BLOCKS = 4096
_RANGE = "_anndata_dummy_range_index"
"""What anndata calls the names that stand in for those it has not read."""


def concat_lazy(
    paths: Iterable[Any],
    *,
    join: Join = "outer",
    merge: str | None = None,
    label: str | None = None,
    counts: str | Mapping[str, str] = "X",
    load_annotation_index: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> ad.AnnData:
    """Join files as :func:`anndata.concat` does, without reading their matrices.

    X, layers, obsm and raw are dask arrays, of CSR blocks where any file is sparse, with one task for about 128 MiB
    of a file. Columns of obs are read when they are used; numbers are dask arrays, with a task for each file, and
    columns that are categorical in all files stay so, with the categories of all. ``view.obs = view.obs.to_memory()``
    puts obs into memory beside a lazy X, for functions that need it as a data frame, such as scanpy's
    ``get.aggregate``. Rows are in the order of the files, genes as :func:`anndata.concat` has them. Matrices that not
    all files have, and ``obsp``, are left out.

    Parameters
    ----------
    paths
        Paths or URLs of ``.h5ad`` files and ``.zarr`` stores, or zarr groups of any store.
    join
        ``"outer"`` (default) has the genes of any file, ``"inner"`` those of all.
    merge
        Which var columns, varm, varp and uns to keep of several files, as in :func:`anndata.concat`; None (default)
        keeps none. All of a single file's are kept.
    label
        Name of a categorical column of obs that says which file a row is from; None (default) adds none.
    counts
        The matrix that becomes X: ``"X"`` (default), ``"raw/X"`` or ``"layers/<key>"``, for all files, or by path
        or pattern of paths.
    load_annotation_index
        Read the obs names, as in :func:`anndata.experimental.read_lazy`. False leaves them in the files, and numbers
        stand in their place until the view is in memory: opening takes a moment, whatever the number of rows.
    storage_options
        fsspec's, for URLs: credentials, endpoint.

    Returns
    -------
    AnnData of (n_obs, n_vars), whose ``obs`` is an :class:`anndata.experimental.backed.Dataset2D`.

    Raises
    ------
    SourceError
        If a file cannot be read.
    SchemaError
        If files contradict each other.
    CollectionChangedError
        When something is read of a file that was replaced since.

    Examples
    --------
    >>> view = concat_lazy(["a.h5ad", "b.h5ad"])
    >>> t_cells = view[view.obs["cell_type"] == "T"]
    >>> t_cells[:100].to_memory().n_obs
    100
    """
    refs = references(paths, None, storage_options, counts)
    return View.of(refs, join=join, merge=merge).to_anndata(label=label, load_annotation_index=load_annotation_index)


def read_lazy(
    path: str | os.PathLike[str],
    *,
    counts: str = "X",
    load_annotation_index: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> ad.AnnData:
    """Open one file: what :func:`concat_lazy` says, and var, varm, varp and uns in memory.

    Matrices of gzip HDF5 files are read chunk by chunk in threads, several times as fast as h5py does it.

    Examples
    --------
    >>> int(read_lazy("a.h5ad").obs["cell_type"].to_series().value_counts().sum())
    300
    """
    return concat_lazy(
        [path], counts=counts, load_annotation_index=load_annotation_index, storage_options=storage_options
    )


@dataclass(frozen=True)
class View:
    """Sources joined by a plan that is not run: its row blocks are tasks of dask arrays instead."""

    plan: Plan
    refs: tuple[SourceRef, ...] = field(repr=False)
    identities: tuple[str, ...] = field(repr=False)
    annotations: ad.AnnData | None = field(repr=False)
    join: Join

    @classmethod
    def of(cls, refs: tuple[SourceRef, ...], *, join: Join = "outer", merge: str | None = None) -> View:
        """Open sources, in threads, and join them."""
        wanted = merge is not None or len(refs) == 1
        looks = compute(*[delayed(look_at)(ref) for ref in refs], scheduler="threads")  # before anything is read
        tasks = [delayed(scan)(ref, wanted, False, True) for ref in refs]  # noqa: FBT003 - a task
        scanned = compute(*tasks, scheduler="threads")
        schemas = [s.schema for s in scanned]
        found = [s.annotations for s in scanned if s.annotations is not None]
        annotations = merge_annotations(found, merge) if found else None
        plan = build_plan(
            schemas,
            Options(
                seed=0,
                shuffle=False,
                elements=Elements.parse(sorted({f"-{name}" for s in schemas for name in s.unsupported})),
                allow_mixed_counts=True,
            ),
            budget=Budget(2**62),  # the engine that will compute is unknown
            var=None if annotations is None else annotations.var,
            transposes=False,
        )
        if plan.left_out:
            logger.info("not in the view, as not all files have it: %s", ", ".join(plan.left_out))
        if join == "inner":
            plan = _inner(plan, schemas)
        n_bytes = max(_BLOCK_NBYTES, plan.n_bytes_read // _MAX_BLOCKS)
        blocks = cut_blocks(plan.sources, block_nbytes=n_bytes, csc_nbytes=_CSC_BLOCK_NBYTES, obs_nbytes=0)
        return cls(replace(plan, blocks=blocks), refs, looks, annotations, join)

    def to_anndata(self, *, label: str | None = None, load_annotation_index: bool = True) -> ad.AnnData:
        """See :func:`concat_lazy`."""
        plan = self.plan
        matrices = {m.name: lazy_matrix(plan, self.refs, self.identities, m) for m in plan.matrices}
        frames = self._frames(label, load_annotation_index=load_annotation_index)
        found = None if self.annotations is None else self.annotations[:, plan.var.index]
        with ad.settings.override(check_uniqueness=False):
            return ad.AnnData(
                X=matrices["X"],
                obs=frames.pop(OBS),
                var=plan.var,
                layers=_below("layers", matrices),
                obsm=_below("obsm", matrices | frames),
                varm=None if found is None else dict(found.varm),
                varp=None if found is None else dict(found.varp),
                uns=None if found is None else dict(found.uns),
                raw=self._raw(matrices["raw/X"]) if "raw/X" in matrices else None,
            )

    def obs_dataset(self) -> xr.Dataset:
        """See :meth:`annbatch_dask.DatasetCollection.obs_dataset`."""
        rows = SourceRows.of(self.plan, self.refs, self.identities)
        variables = {c.name: rows.column(c, "obs") for c in self.columns if c.frame == OBS}
        names = "_index" if "obs_names" in variables else "obs_names"
        return xr.Dataset(variables, {names: rows.names("obs")})

    def _frames(self, label: str | None, *, load_annotation_index: bool) -> dict[str, Dataset2D]:
        """obs, and the frames of obsm, by name."""
        rows, index = SourceRows.of(self.plan, self.refs, self.identities), self.plan.index_name or "_index"
        dim = index if load_annotation_index else _RANGE
        names = rows.names(dim)
        coord = pd.Index(names.to_numpy() if load_annotation_index else np.arange(rows.n_obs).astype(str))
        frames: dict[str, dict[str, xr.Variable]] = {OBS: {}}
        for spec in self.columns:
            is_plain = spec.kind == "numeric" and not spec.nullable
            frames.setdefault(spec.frame, {})[spec.name] = (
                rows.numbers(spec, dim)
                if is_plain
                else rows.column(spec, dim, keep_unused=not ad.settings.remove_unused_categories)
            )
        if label is not None:
            frames[OBS][label] = rows.labels(self.plan.source_column, dim)
        for variables in frames.values():
            variables |= {index: names, dim: xr.Variable((dim,), coord)}
        return {frame: _dataset_2d(xr.Dataset(variables), index) for frame, variables in frames.items()}

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Columns of obs, and of frames in obsm: those of any file, or those that all have where joined so."""
        found = unite_columns(self.plan.sources)
        return found if self.join == "outer" else tuple(c for c in found if all(c.present))

    def _raw(self, x: Any) -> dict[str, Any]:
        return {"X": x, "var": raw_var(self.plan.genes["raw"].genes, self.annotations)}


def _dataset_2d(dataset: xr.Dataset, index: str) -> Dataset2D:
    out = Dataset2D(dataset)
    out.is_backed = True
    out.true_index_dim = index
    return out


def _inner(plan: Plan, schemas: Sequence[SourceSchema]) -> Plan:
    """Restrict to the genes that all sources have, in the order of :func:`anndata.concat`."""
    genes = {}
    for name, space in plan.genes.items():
        listed = {
            (k, m.genes): pd.Index(source.genes_of(m))
            for k, source in enumerate(schemas)
            for m in source.matrices
            if (k, m.genes) in space.which
        }
        joined = reduce(pd.Index.intersection, listed.values())
        genes[name] = GeneSpace.of(joined, {key: names.to_numpy(object) for key, names in listed.items()})
    matrices = [replace(m, n_cols=len(genes[m.genes].genes)) if m.genes else m for m in plan.matrices]
    return replace(plan, genes=genes, var=plan.var.loc[genes["var"].genes], matrices=tuple(matrices))


def _below(parent: str, elements: Mapping[str, Any]) -> dict[str, Any]:
    """Elements of a mapping, by their key in it."""
    return {name.split("/", 1)[1]: v for name, v in elements.items() if name.startswith(f"{parent}/")}
