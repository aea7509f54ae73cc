"""The gene space: an outer join of the sources' genes, and one index map per distinct gene list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.dtypes import index_dtype
from annbatch_dask.plan.naming import INPUT_VAR_NAMES, Naming, check_named
from annbatch_dask.plan.schema import SourceSchema

__all__ = ["GeneMap", "GeneSpace", "check_genes", "join_genes", "order_genes", "unite_names"]


def check_genes(sources: Sequence[SourceSchema], naming: Naming) -> None:
    """Refuse genes that could not be told apart, or have no name.

    Raises
    ------
    SchemaError
        With the first of them.
    """
    if naming.is_plain:
        checked: set[int] = set()
        for source in sources:
            _check_unique(source, checked)
    else:
        check_named(sources, naming)


def _check_unique(source: SourceSchema, checked: set[int]) -> None:
    """Refuse a source that names a gene twice, in var or raw.var; a list that many share is looked at once."""
    for where, listed in (("var_names", source.var_names), ("raw.var_names", source.raw_names)):
        if listed is None or id(listed) in checked:
            continue
        checked.add(id(listed))
        names = pd.Index(listed)
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
    filled = list({id(names): names for names in lists if len(names)}.values())
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
    places: dict[int, NDArray[np.intp]] = {}
    for listed, found in zip(names, abundance, strict=True):
        if id(listed) not in places:
            places[id(listed)] = genes.get_indexer(pd.Index(listed, dtype=object))
        at = places[id(listed)]
        np.add.at(total, at[at >= 0], found[at >= 0])
    return genes[np.argsort(-total, kind="stable")]


@dataclass(frozen=True)
class GeneMap:
    """Column of each gene of a list in the collection, -1 where it is left out, in few bytes.

    Attributes
    ----------
    n_cols
        Genes of the collection.
    stored
        The columns, ``n_cols`` where a gene is left out, in as few bytes as hold that; or a bit a column of the
        collection, where columns ascend, no gene is left out, and that is less.
    is_bits
        Which of the two.
    """

    n_cols: int
    stored: NDArray[np.unsignedinteger] = field(repr=False)
    is_bits: bool

    @classmethod
    def of(cls, places: NDArray[np.int32], n_cols: int) -> GeneMap:
        """Keep a map."""
        stored = np.where(places < 0, n_cols, places).astype(index_dtype(n_cols + 1))
        if 8 * stored.nbytes <= n_cols or (places < 0).any() or (np.diff(places) <= 0).any():
            return cls(n_cols, stored, is_bits=False)
        has = np.zeros(n_cols, bool)
        has[places] = True
        return cls(n_cols, np.packbits(has), is_bits=True)

    @property
    def places(self) -> NDArray[np.int32]:
        """(n_genes,) the map."""
        if self.is_bits:
            return np.flatnonzero(np.unpackbits(self.stored, count=self.n_cols)).astype(np.int32)
        places = self.stored.astype(np.int32)
        places[places == self.n_cols] = -1
        return places

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many of the collection's genes are in the list, and how many of the list's become one, at most."""
        places = self.places
        found = np.bincount(places[places >= 0], minlength=1)
        return int(np.count_nonzero(found)), int(found.max())


@dataclass(frozen=True)
class GeneSpace:
    """Genes that matrices of the collection have as columns, and where each source's genes are among them.

    Attributes
    ----------
    genes
        (n_vars,) names.
    maps
        Of each distinct gene list. Sources with equal ones share one, so a thousand files of one panel cost one. Values
        of genes that have one column are added up.
    which
        The map of each (source, gene list), where the list is ``"var"`` or ``"raw"``.
    input_names
        (n_vars,) what inputs call the genes, where they were not named by the inputs' indices; else None.
    """

    genes: pd.Index = field(repr=False)
    maps: tuple[GeneMap, ...] = field(repr=False)
    which: Mapping[tuple[int, str], int] = field(repr=False)
    input_names: NDArray[np.object_] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, genes: pd.Index, lists: Mapping[tuple[int, str], NDArray[np.object_]], *, first: bool = False
    ) -> GeneSpace:
        """Map every gene list that is used. ``first``: of several genes of a name, all but the first are left out."""
        maps: list[GeneMap] = []
        which: dict[tuple[int, str], int] = {}
        seen: dict[tuple[str, ...], int] = {}
        known: dict[int, int] = {}  # most lists of equal names are one object, and need not be compared
        for key, names in lists.items():
            if id(names) not in known:
                listed = tuple(names)
                if listed not in seen:
                    seen[listed] = len(maps)
                    index = pd.Index(names, dtype=object)
                    places = genes.get_indexer(index).astype(np.int32)
                    if first:
                        places[index.duplicated()] = -1
                    maps.append(GeneMap.of(places, len(genes)))
                known[id(names)] = seen[listed]
            which[key] = known[id(names)]
        return cls(genes, tuple(maps), which)

    def frame(self, known: pd.DataFrame | None) -> pd.DataFrame:
        """var: what is known of the genes, in their order, and what inputs call them."""
        var = pd.DataFrame(index=self.genes) if known is None else known.loc[self.genes]
        if self.input_names is None:
            return var
        column = pd.Series(self.input_names, var.index, dtype=object)
        return var.assign(**{INPUT_VAR_NAMES: column})

    def map_of(self, source: int, genes: str) -> NDArray[np.int32]:
        """(n_genes,) column of each gene of one of a source's lists, -1 where it is left out."""
        return self.maps[self.which[source, genes]].places

    def n_genes_of(self, source: int, genes: str) -> int:
        """How many of the collection's genes are in a source's list."""
        return self.maps[self.which[source, genes]].counts[0]

    def most_met(self, source: int, genes: str) -> int:
        """How many genes of a source's list become one, at most."""
        return self.maps[self.which[source, genes]].counts[1]

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
        for j, places in enumerate(m.places for m in self.maps):
            has[places[places >= 0], j] = bits[j] > 0
        _, first, counts = np.unique(np.packbits(has, axis=1), axis=0, return_index=True, return_counts=True)
        found: Counter[int] = Counter()
        for row, n in zip(has[first], counts.tolist(), strict=True):
            found[reduce(or_, (bits[j] for j in np.flatnonzero(row)), 0)] += n
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
