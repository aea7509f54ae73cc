"""The gene space: an outer join of the sources' genes, and one index map per distinct gene list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.naming import INPUT_VAR_NAMES, Naming, check_named
from annbatch_dask.plan.schema import SourceSchema

__all__ = ["GeneSpace", "check_genes", "join_genes", "order_genes", "unite_names"]


def check_genes(sources: Sequence[SourceSchema], naming: Naming) -> None:
    """Refuse genes that could not be told apart, or have no name.

    Raises
    ------
    SchemaError
        With the first of them.
    """
    if naming.is_plain:
        for source in sources:
            _check_unique(source)
    else:
        check_named(sources, naming)


def _check_unique(source: SourceSchema) -> None:
    """Refuse a source that names a gene twice, in var or raw.var."""
    for where, listed in (("var_names", source.var_names), ("raw.var_names", source.raw_names)):
        names = pd.Index([] if listed is None else listed)
        if not names.is_unique:
            repeated = list(dict.fromkeys(names[names.duplicated()]))
            msg = (
                f"{source.path}: {where} are not unique: {len(names):,} names, {names.nunique():,} distinct, for "
                f"example {repeated[:3]}; name genes by a column of var with var_key, give on_duplicate_gene='sum' "
                "or 'first', or call adata.var_names_make_unique() in load_adata"
            )
            raise SchemaError(msg)


def unite_names(lists: Sequence[Any]) -> list[str]:
    """The strings of all lists, as the unions of pandas indices from the first to the last have them, in one pass.

    Sorted; in the order they have where all lists that are not empty are equal.
    """
    filled = [names for names in lists if len(names)]
    if all(np.array_equal(names, filled[0]) for names in filled):
        return list(dict.fromkeys(filled[0])) if filled else []
    return sorted(set().union(*filled))


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
    joined = pd.Index(unite_names(names), dtype=object)
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


def order_genes(genes: pd.Index, names: Sequence[NDArray[np.object_]], abundance: Sequence[NDArray]) -> pd.Index:
    """Sort genes by the number of cells that express them, most first; ties keep their order.

    Parameters
    ----------
    genes
        (n_vars,) names.
    names, abundance
        Genes of each source, and the estimated number of its cells that express each.
    """
    total = np.zeros(len(genes))
    for listed, found in zip(names, abundance, strict=True):
        at = genes.get_indexer(pd.Index(listed, dtype=object))
        np.add.at(total, at[at >= 0], found[at >= 0])
    return genes[np.argsort(-total, kind="stable")]


@dataclass(frozen=True)
class GeneSpace:
    """Genes that matrices of the collection have as columns, and where each source's genes are among them.

    Attributes
    ----------
    genes
        (n_vars,) names.
    maps
        Distinct (n_vars_of_source,) int32 maps: column of each source gene in the collection, -1 where it is left out.
        Sources with equal gene lists share one, so a thousand files of one panel cost one. Values of genes that have
        one column are added up.
    which
        The map of each (source, gene list), where the list is ``"var"`` or ``"raw"``.
    input_names
        (n_vars,) what inputs call the genes, where they were not named by the inputs' indices; else None.
    """

    genes: pd.Index = field(repr=False)
    maps: tuple[NDArray[np.int32], ...] = field(repr=False)
    which: Mapping[tuple[int, str], int] = field(repr=False)
    input_names: NDArray[np.object_] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, genes: pd.Index, lists: Mapping[tuple[int, str], NDArray[np.object_]], *, first: bool = False
    ) -> GeneSpace:
        """Map every gene list that is used. ``first``: of several genes of a name, all but the first are left out."""
        maps: list[NDArray[np.int32]] = []
        which: dict[tuple[int, str], int] = {}
        seen: dict[tuple[str, ...], int] = {}
        for key, names in lists.items():
            listed = tuple(names)
            if listed not in seen:
                seen[listed] = len(maps)
                index = pd.Index(names, dtype=object)
                places = genes.get_indexer(index).astype(np.int32)
                if first:
                    places[index.duplicated()] = -1
                maps.append(places)
            which[key] = seen[listed]
        return cls(genes, tuple(maps), which)

    def frame(self, known: pd.DataFrame | None) -> pd.DataFrame:
        """var: what is known of the genes, in their order, and what inputs call them."""
        var = pd.DataFrame(index=self.genes) if known is None else known.loc[self.genes]
        if self.input_names is None:
            return var
        column = pd.Series(self.input_names, var.index, dtype=object)
        return var.assign(**{INPUT_VAR_NAMES: column})

    def map_of(self, source: int, genes: str) -> NDArray[np.int32]:
        """The map of one of a source's gene lists."""
        return self.maps[self.which[source, genes]]

    def n_genes_of(self, source: int, genes: str) -> int:
        """How many of the collection's genes are in a source's list."""
        return int(np.count_nonzero(self._counts(source, genes)))

    def most_met(self, source: int, genes: str) -> int:
        """How many genes of a source's list become one, at most."""
        return int(self._counts(source, genes).max())

    def _counts(self, source: int, genes: str) -> NDArray[np.int64]:
        """How many genes of a source's list each of the collection's is."""
        places = self.map_of(source, genes)
        return np.bincount(places[places >= 0], minlength=1)

    def overlaps(self, lists: Sequence[tuple[int, str]]) -> dict[int, int]:
        """Count the genes of each combination of sources.

        Parameters
        ----------
        lists
            A gene list of each source, as in ``which``.

        Returns
        -------
        Genes by a bit mask of the sources that have them (bit k is the k-th list), the most frequent mask first.
        """
        bits = [0] * len(self.maps)
        for k, key in enumerate(lists):
            bits[self.which[key]] |= 1 << k
        has = np.zeros((len(self.genes), len(self.maps)), bool)
        for j, places in enumerate(self.maps):
            has[places[places >= 0], j] = bits[j] > 0
        _, first, counts = np.unique(np.packbits(has, axis=1), axis=0, return_index=True, return_counts=True)
        found: Counter[int] = Counter()
        for row, n in zip(has[first], counts.tolist(), strict=True):
            found[reduce(or_, (bits[j] for j in np.flatnonzero(row)), 0)] += n
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
