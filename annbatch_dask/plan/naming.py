"""Names of genes: which var column an input's genes are joined by, and what the collection calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError, SourceError
from annbatch_dask.formatting import first_few, plural
from annbatch_dask.manifest import NamingRecord
from annbatch_dask.plan.schema import SourceSchema

__all__ = [
    "INPUT_VAR_NAMES",
    "Naming",
    "check_fit",
    "check_named",
    "first_fit",
    "name_genes",
    "naming_record",
    "original_names",
    "strip_version",
    "without_versions",
]

INPUT_VAR_NAMES = "input_var_names"
"""The var column that says what inputs called a gene which has another name in the collection."""

_STABLE_ID = re.compile(r"(ENS[A-Z]*\d{11}|ENSGR\d{10}|MGP_\w+?_G\d{7})\.\d+(?:_\d+)?(_PAR_Y)?")
"""Ensembl's stable ids with a version, GENCODE's of lifted genes (``.5_2``) and of the Y chromosome (``_PAR_Y``, and
``ENSGR`` in old releases) among them."""
_SHOWN = 32
"""Genes that the manifest lists by name; of others it has the number."""


def strip_version(name: str) -> str:
    """An Ensembl id without its version; other names as they are.

    Examples
    --------
    >>> [strip_version(name) for name in ("ENSG00000000003.15", "ENSG00000182378.15_PAR_Y", "HLA-A.1")]
    ['ENSG00000000003', 'ENSG00000182378_PAR_Y', 'HLA-A.1']
    """
    match = _STABLE_ID.fullmatch(name)
    return name if match is None else match[1] + (match[2] or "")


def without_versions(gene_map: Mapping[str, str]) -> dict[str, str]:
    """A map of names whose versions, in aliases and in ids, say nothing.

    Raises
    ------
    SchemaError
        Where two versions of one alias have different ids.
    """
    out: dict[str, str] = {}
    for alias, gene in gene_map.items():
        name, to = strip_version(alias), strip_version(gene)
        if out.setdefault(name, to) != to:
            msg = (
                f"gene_map has {name} twice once versions are stripped, for {out[name]} and for {to}; keep one of "
                "them, or give strip_versions=False"
            )
            raise SchemaError(msg)
    return out


def first_fit(pairs: Sequence[tuple[str, str]], label: str) -> str:
    """What is said of an input by paths or patterns of paths, such as the var column that names its genes; or ``""``.

    A path counts before patterns, and of these the first that fits.
    """
    exact = dict(reversed(pairs))
    if label in exact:
        return exact[label]
    return next((said for pattern, said in pairs if _fits(pattern, label)), "")


def check_fit(what: str, pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> None:
    """Refuse a path or pattern that stands for no input.

    Raises
    ------
    SourceError
        It says which, and that the argument ``what`` names it.
    """
    if unknown := [pattern for pattern, _ in pairs if not any(_fits(pattern, label) for label in labels)]:
        msg = f"{what} names {unknown[0]}, which is none of the {len(labels)} inputs; give paths, or patterns of them"
        raise SourceError(msg)


def _fits(pattern: str, label: str) -> bool:
    return pattern == label or fnmatchcase(label, pattern)


@dataclass(frozen=True)
class Naming:
    """How genes of the inputs are named, resolved.

    Attributes
    ----------
    var_key
        Paths or patterns of inputs, and the var column that names their genes; ``""`` is the index, as for all others.
    strip_versions
        Ensembl ids lose their versions.
    gene_map
        Digest of the map of names, ``""`` for none.
    on_duplicate
        What becomes of several genes of one input that get one name: ``"error"``, ``"sum"`` or ``"first"``.
    mapping
        The map: names that the key has, to names of the collection.
    """

    var_key: tuple[tuple[str, str], ...] = ()
    strip_versions: bool = False
    gene_map: str = ""
    on_duplicate: str = "error"
    mapping: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_plain(self) -> bool:
        """True if genes have the names of the index, each once."""
        return self == Naming()

    @property
    def adds(self) -> bool:
        """True if values of genes that get one name are added up."""
        return self.on_duplicate == "sum"

    def rename(self, names: NDArray[np.object_]) -> tuple[NDArray[np.object_], int]:
        """(n,) names in the collection of genes by the names that the key has, and how many of them the map has."""
        if self.strip_versions:
            names = np.array([strip_version(n) for n in names] or [], object)
        if not (table := self._table):
            return names, 0
        return np.array([table.get(n, n) for n in names] or [], object), sum(n in table for n in names)

    @cached_property
    def _table(self) -> Mapping[str, str]:
        return without_versions(self.mapping) if self.strip_versions else self.mapping


def name_genes(sources: Sequence[SourceSchema], naming: Naming) -> list[SourceSchema]:
    """Sources with the names that the collection has for their genes; those of its own datasets have them already."""
    if naming.is_plain:
        return list(sources)
    known: dict[tuple[str, ...], tuple[NDArray[np.object_], int]] = {}

    def renamed(names: NDArray[np.object_]) -> tuple[NDArray[np.object_], int]:
        listed = tuple(names)
        if listed not in known:
            known[listed] = naming.rename(names)
        return known[listed]

    def named(s: SourceSchema) -> SourceSchema:
        names, n_mapped = renamed(s.var_names)
        raw, n_raw = (None, 0) if s.raw_names is None else renamed(s.raw_names)
        of_x = next((m.genes for m in s.matrices if m.name == "X"), "var")
        return replace(s, var_names=names, raw_names=raw, n_mapped=n_raw if of_x == "raw" else n_mapped)

    return [s if s.is_dataset else named(s) for s in sources]


def check_named(sources: Sequence[SourceSchema], naming: Naming) -> None:
    """Refuse genes without a name, and several of one input with one name unless that is asked for.

    Raises
    ------
    SchemaError
        With the first of them.
    """
    carried = set.intersection(*({m.name for m in s.matrices} for s in sources))
    for source in (s for s in sources if not s.is_dataset):
        for frame in dict.fromkeys(m.genes for m in source.matrices if m.genes and m.name in carried):
            if frame in source.unnamed:
                raise SchemaError(source.unnamed[frame])
            names, were = source.names_in(frame)
            _refuse_empty(source, names, were)
            if naming.on_duplicate == "error":
                _refuse_met(source, frame, names, were)


def _refuse_empty(source: SourceSchema, names: NDArray[np.object_], were: NDArray[np.object_]) -> None:
    if len(empty := np.flatnonzero(names == "")):
        msg = (
            f"{source.path}: {plural(len(empty), 'gene')} of {len(names):,} would have no name, for example the one "
            f"that is {were[empty[0]]!r} in its index; give it one in load_adata"
        )
        raise SchemaError(msg)


def _refuse_met(source: SourceSchema, frame: str, names: NDArray[np.object_], were: NDArray[np.object_]) -> None:
    met = _met(names, were)
    if met:
        gene, which = next(iter(met.items()))
        where = "" if frame == "var" else " of raw"
        msg = (
            f"{source.path}: {len(names):,} genes{where} get {len(set(names)):,} names: {first_few(which)} all become "
            f"{gene}; give on_duplicate_gene='sum' to add them up, or 'first' to keep the first, or correct the names"
        )
        raise SchemaError(msg)


def _met(names: NDArray[np.object_], were: NDArray[np.object_]) -> dict[str, tuple[str, ...]]:
    """Names that several genes get, each with what these are called in the index."""
    again = pd.Index(names).duplicated(keep=False)
    out: dict[str, list[str]] = {}
    for name, was in zip(names[again], were[again], strict=True):
        out.setdefault(name, []).append(was)
    return {name: tuple(which) for name, which in out.items()}


def original_names(
    genes: pd.Index, lists: Sequence[tuple[NDArray[np.object_], NDArray[np.object_]]]
) -> tuple[NDArray[np.object_], dict[str, tuple[str, ...]]]:
    """What inputs called the genes of the collection.

    Parameters
    ----------
    genes
        (n_vars,) names in the collection.
    lists
        Names of each source's genes in the collection, and in its index.

    Returns
    -------
    (n_vars,) the first other name that a gene had, its own if it had no other; and all other names of the genes that
    sources call differently.
    """
    found: dict[str, dict[tuple[str, ...], None]] = {}
    seen = set()
    for names, were in lists:
        if names is were or (key := (id(names), tuple(were))) in seen:
            continue
        seen.add(key)
        here: dict[str, tuple[str, ...]] = {}
        for name, was in zip(names, were, strict=True):
            if name != was:
                here[name] = (*here.get(name, ()), was)
        for name, others in here.items():
            found.setdefault(name, {})[others] = None
    first: list[Any] = [next(iter(found[gene]))[0] if gene in found else gene for gene in genes]
    many = {gene: found[gene] for gene in genes if len(found.get(gene, ())) > 1}
    every = {gene: tuple(dict.fromkeys(name for some in sets for name in some)) for gene, sets in many.items()}
    return np.array(first or [], object), every


def naming_record(
    sources: Sequence[SourceSchema], naming: Naming, called: Mapping[str, tuple[str, ...]]
) -> NamingRecord | None:
    """What the manifest says of how the genes of X were named; None where they have the names of the index.

    ``called``: names of the genes that inputs call differently.
    """
    if naming.is_plain:
        return None
    renamed, mapped, joined = [], [], []
    met: dict[str, tuple[str, ...]] = {}
    for source in (s for s in sources if not s.is_dataset):
        names, were = source.names_in(source.x.genes)
        renamed.append(int((names != were).sum()))
        mapped.append(source.n_mapped)
        joined.append(len(names) - len(set(names)))
        for gene, which in _met(names, were).items() if joined[-1] else ():
            met.setdefault(gene, which)
    return NamingRecord(
        var_key=naming.var_key,
        strip_versions=naming.strip_versions,
        gene_map=naming.gene_map,
        on_duplicate=naming.on_duplicate,
        renamed=tuple(renamed),
        mapped=tuple(mapped),
        joined=tuple(joined),
        n_met=len(met),
        met=_first(met),
        n_called=len(called),
        called=_first(called),
    )


def _first(names: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((gene, which[:8]) for gene, which in list(names.items())[:_SHOWN])
