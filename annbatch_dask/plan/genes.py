"""The gene space: an outer join of the sources' genes, and one index map per distinct gene list."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.schema import SourceSchema

__all__ = ["check_unique", "gene_maps", "join_genes"]


def check_unique(source: SourceSchema) -> None:
    """Refuse a source that names a gene twice: its columns could not be told apart.

    Raises
    ------
    SchemaError
        With the first repeated names.
    """
    names = pd.Index(source.var_names)
    if not names.is_unique:
        repeated = list(dict.fromkeys(names[names.duplicated()]))
        msg = (
            f"{source.path}: var_names are not unique: {len(names):,} names, {names.nunique():,} distinct, for "
            f"example {repeated[:3]}; call adata.var_names_make_unique() in load_adata, or mend the file"
        )
        raise SchemaError(msg)


def join_genes(names: Sequence[NDArray[np.object_]], subset: Sequence[str] | None) -> pd.Index:
    """Genes of the collection, in the order of ``anndata.concat(join="outer")``.

    Parameters
    ----------
    names
        Gene names of each source.
    subset
        Keep only these; None keeps all. The order is that of the join, not of the subset.

    Raises
    ------
    SchemaError
        If the subset names no known gene.
    """
    joined = reduce(lambda a, b: a.union(b), (pd.Index(n, dtype=object) for n in names))
    if subset is None:
        return joined
    kept = joined[joined.isin(list(subset))]
    if not len(kept):
        msg = (
            f"var_subset names {len(subset):,} genes and none is among the {len(joined):,} genes of the "
            f"inputs, which look like {list(joined[:3])}; give names as they stand in var_names"
        )
        raise SchemaError(msg)
    return kept


def gene_maps(
    names: Sequence[NDArray[np.object_]], genes: pd.Index
) -> tuple[tuple[NDArray[np.int32], ...], tuple[int, ...]]:
    """Column of each source gene in the collection, -1 where it is left out.

    Sources with equal gene lists share one map, so a thousand files of one panel cost one.

    Returns
    -------
    maps
        Distinct (n_vars_of_source,) int32 maps.
    which
        For each source, the map it uses.
    """
    maps: list[NDArray[np.int32]] = []
    which: list[int] = []
    seen: dict[tuple[str, ...], int] = {}
    for source in names:
        key = tuple(source)
        if key not in seen:
            seen[key] = len(maps)
            maps.append(genes.get_indexer(pd.Index(source, dtype=object)).astype(np.int32))
        which.append(seen[key])
    return tuple(maps), tuple(which)
