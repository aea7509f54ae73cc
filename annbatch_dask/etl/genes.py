"""Names of genes as a call asks for them: the map of names, the rules of a collection, annotations by these names."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import (
    AnnbatchDaskError,
    CollectionError,
    MissingPackageError,
    SchemaError,
    SourceError,
    SourceNotFoundError,
)
from annbatch_dask.etl.log import log_folder
from annbatch_dask.formatting import plural
from annbatch_dask.manifest import Manifest, NamingRecord
from annbatch_dask.plan.naming import Naming, first_fit, strip_version
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import SourceSchema
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.sources.references import by_path
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.secrets import shown
from annbatch_dask.warn import warn

__all__ = [
    "AskedNames",
    "OnDuplicateGene",
    "VarKey",
    "ask_names",
    "check_shared",
    "check_versions",
    "copy_gene_maps",
    "keep_gene_map",
    "keyed",
    "naming_of",
    "renamed_annotations",
    "resolve_naming",
    "warn_of_unused",
]

logger = logging.getLogger(__name__)

OnDuplicateGene = Literal["error", "sum", "first"]
VarKey = str | Mapping[str, str | None]


@dataclass(frozen=True)
class AskedNames:
    """What a call says of the names of genes; None is what the collection has, or the default.

    Attributes
    ----------
    var_key, strip_versions, on_duplicate
        As in :class:`annbatch_dask.plan.naming.Naming`.
    mapping
        The map of names, as it was given.
    """

    var_key: tuple[tuple[str, str], ...] | None = None
    mapping: Mapping[str, str] | None = None
    strip_versions: bool | None = None
    on_duplicate: str | None = None


# --- what was given ------------------------------------------------------------------------------------------------


def ask_names(given: Mapping[str, Any], refs: Sequence[SourceRef]) -> AskedNames:
    """Make it from the arguments of a method, by name.

    Raises
    ------
    SourceError, SchemaError, ValueError, TypeError
        Where one of them makes no sense.
    """
    strip, on_duplicate = given["strip_versions"], given["on_duplicate_gene"]
    if on_duplicate not in (None, *get_args(OnDuplicateGene)):
        msg = f"on_duplicate_gene is {on_duplicate!r}; it must be 'error', 'sum' or 'first'"
        raise ValueError(msg)
    if strip not in (None, True, False):
        msg = f"strip_versions is {strip!r}; it must be True or False"
        raise ValueError(msg)
    gene_map = given["gene_map"]
    return AskedNames(
        _pairs(given["var_key"], refs), None if gene_map is None else _read_map(gene_map), strip, on_duplicate
    )


def _pairs(var_key: VarKey | None, refs: Sequence[SourceRef]) -> tuple[tuple[str, str], ...] | None:
    if var_key is None:
        return None
    if isinstance(var_key, str):
        return (("*", var_key),) if var_key else ()
    if not isinstance(var_key, Mapping):
        msg = f"var_key is a {type(var_key).__name__}; give the name of a var column, or names by path"
        raise TypeError(msg)
    pairs = by_path("var_key", {k: "" if v is None else str(v) for k, v in var_key.items()}, refs)
    return pairs if any(column for _, column in pairs) else ()


def _read_map(given: Any) -> dict[str, str]:
    """A map of names as a dict, from what may be one, a pandas object, or the path of a table."""
    if isinstance(given, str | os.PathLike):
        what = f"gene_map {shown(os.fspath(given))}"
        pairs = _columns(what, _read_table(os.fspath(given)), by_index=False)
    elif isinstance(given, pd.Series):
        what, pairs = "gene_map", (list(given.index), list(given))
    elif isinstance(given, pd.DataFrame):
        what, pairs = "gene_map", _columns("gene_map", given, by_index=True)
    elif isinstance(given, Mapping):
        what, pairs = "gene_map", (list(given), list(given.values()))
    else:
        msg = f"gene_map is a {type(given).__name__}; give a dict, a pandas Series or DataFrame, or the path of a table"
        raise TypeError(msg)
    return _checked(what, *pairs)


def _read_table(path: str) -> pd.DataFrame:
    suffixes = [s.lower() for s in PurePath(path).suffixes]
    kind = next((s for s in reversed(suffixes) if s in _KINDS), None)
    if kind is None:
        msg = f"gene_map {shown(path)} has no ending that tells what it is; give a table that is .csv, .tsv or .parquet"
        raise SourceError(msg)
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        # "NA" and "nan" are names here, and so is what looks like a number
        return pd.read_csv(path, sep=_KINDS[kind], dtype=str, keep_default_na=False)
    except FileNotFoundError:
        msg = f"gene_map {shown(path)} does not exist (looked in {os.getcwd()}); check the path"
        raise SourceNotFoundError(msg) from None
    except ImportError as e:
        msg = f"gene_map {shown(path)} is a parquet file, which pandas reads by pyarrow: pip install pyarrow"
        raise MissingPackageError(msg) from e
    except (ValueError, OSError) as e:
        msg = f"gene_map {shown(path)} cannot be read as {kind[1:]}: {' '.join(str(e).split())}; write it anew"
        raise SourceError(msg) from e


_KINDS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".parquet": ""}
"""Endings of tables, and what separates their columns."""


def _columns(what: str, table: pd.DataFrame, *, by_index: bool) -> tuple[list[Any], list[Any]]:
    """Aliases and ids of a table: its two columns; of a frame with one, that and the index."""
    names = [str(c) for c in table.columns]
    if by_index and len(names) == 1:
        return list(table.index), list(table.iloc[:, 0])
    if len(names) != 2:  # noqa: PLR2004
        msg = f"{what} has {len(names)} columns ({', '.join(names[:5])}); give two: first the aliases, then the ids"
        raise SchemaError(msg)
    if not by_index and any(name.startswith("ENS") or name in set(table.iloc[:, 1]) for name in names):
        msg = f"{what} has no line of column names: its first is {', '.join(names)}; add one above it, such as alias,id"
        raise SchemaError(msg)
    return list(table.iloc[:, 0]), list(table.iloc[:, 1])


def _checked(what: str, aliases: Sequence[Any], genes: Sequence[Any]) -> dict[str, str]:
    """The map, whose names are text, none of them empty, and none with two ids."""
    out: dict[str, str] = {}
    empty, twice = [], []
    for alias, gene in zip(aliases, genes, strict=True):
        if any(n is None or n is pd.NA or n != n or n == "" for n in (alias, gene)):  # noqa: PLR0124 - NaN
            empty.append((alias, gene))
        elif out.setdefault(str(alias), str(gene)) != str(gene):
            twice.append((str(alias), out[str(alias)], str(gene)))
    if empty:
        msg = (
            f"{what} has {plural(len(empty), 'row')} of {len(genes):,} without a name, for example "
            f"{empty[0][0]!r} -> {empty[0][1]!r}; leave these out: genes that it does not name keep their names"
        )
        raise SchemaError(msg)
    if twice:
        alias, one, other = twice[0]
        msg = (
            f"{what} has {len(twice):,} names that stand for two ids: {alias} -> {one} and "
            f"{alias} -> {other}; keep one of them, or name genes by another column with var_key"
        )
        raise SchemaError(msg)
    return out


# --- with what the collection has ----------------------------------------------------------------------------------


def resolve_naming(target: Folder, manifest: Manifest | None, asked: AskedNames, refs: Sequence[SourceRef]) -> Naming:
    """How the genes of a build's inputs are named: as asked for, else as the collection was built.

    Raises
    ------
    SchemaError
        If the collection has its genes by another key, or with versions.
    CollectionError
        If its map of names is needed, and is not beside it.
    """
    was = None if manifest is None else manifest.naming
    if was is not None:
        assert manifest is not None  # it has one
        _check_key(target, manifest, was, asked, refs)
        if asked.strip_versions is not None and asked.strip_versions != was.strip_versions:
            msg = (
                f"{target.url} was built with strip_versions={was.strip_versions}, and strip_versions is "
                f"{asked.strip_versions}; leave it out, or build a new collection"
            )
            raise SchemaError(msg)
    rules = was or NamingRecord()
    mapping = asked.mapping
    if mapping is None and rules.gene_map:
        mapping = _find_map(target, rules.gene_map)
    naming = Naming(
        var_key=rules.var_key if asked.var_key is None else asked.var_key,
        strip_versions=rules.strip_versions if asked.strip_versions is None else asked.strip_versions,
        gene_map=_digest(mapping) if mapping else "",
        on_duplicate=asked.on_duplicate or rules.on_duplicate,
        mapping=mapping or {},
    )
    naming.rename(np.zeros(0, object))  # raises where versions are all that tells aliases apart
    return naming


def _check_key(
    target: Folder, manifest: Manifest, rules: NamingRecord, asked: AskedNames, refs: Sequence[SourceRef]
) -> None:
    """Refuse inputs whose genes would be named by a column that no input of the collection was named by."""
    known = {
        first_fit(() if b.naming is None else b.naming.var_key, path) for b in manifest.builds for path in b.sources
    }
    pairs = rules.var_key if asked.var_key is None else asked.var_key
    for ref in refs:
        if (key := first_fit(pairs, ref.label)) not in known:
            msg = (
                f"{target.url} has its genes by {_key_words(sorted(known))}, and those of {ref.label} would be named "
                f"by {_key_words([key])}; name them so with var_key, give it such a column in load_adata, or build a "
                "new collection of all inputs, with var_key by path"
            )
            raise SchemaError(msg)


def _key_words(keys: Sequence[str]) -> str:
    return " and ".join(f"var column {key!r}" if key else "the index of var" for key in keys)


def naming_of(target: Folder, record: NamingRecord | None) -> Naming:
    """The naming of an earlier build.

    Raises
    ------
    CollectionError
        If its map of names is not beside the collection.
    """
    if record is None:
        return Naming()
    mapping = _find_map(target, record.gene_map) if record.gene_map else {}
    return Naming(record.var_key, record.strip_versions, record.gene_map, record.on_duplicate, mapping)


def keyed(refs: Sequence[SourceRef], naming: Naming) -> tuple[SourceRef, ...]:
    """Inputs with the column that names their genes."""
    if naming.is_plain:
        return tuple(refs)
    return tuple(r if r.is_dataset else replace(r, var_key=first_fit(naming.var_key, r.label)) for r in refs)


def check_versions(schemas: Sequence[SourceSchema], naming: Naming) -> None:
    """Refuse to strip versions from new inputs where the collection's own genes have some.

    Raises
    ------
    SchemaError
        With one of them.
    """
    for s in (s for s in schemas[:1] if s.is_dataset and naming.strip_versions):
        versioned = [n for n in s.var_names if strip_version(n) != n]
        if versioned:
            msg = (
                f"{len(versioned):,} genes of the collection have versions, such as {versioned[0]}, and "
                "strip_versions=True would give those of the inputs other names; leave it out, or build a new "
                "collection"
            )
            raise SchemaError(msg)


def warn_of_unused(schemas: Sequence[SourceSchema], mapping: Mapping[str, str]) -> None:
    """Warn of a map that has none of the inputs' genes: its columns may have been given the other way round."""
    inputs = [s for s in schemas if not s.is_dataset]
    if not any(s.n_mapped for s in inputs):
        names = next((list(s.var_names[:2]) for s in inputs if len(s.var_names)), [])
        warn(
            f"gene_map names none of the genes of the {plural(len(inputs), 'input')}: it has names such as "
            f"{next(iter(mapping))}, and they such as {', '.join(names)}; give it from names in the inputs to those in "
            "the collection"
        )


def check_shared(plan: Plan, schemas: Sequence[SourceSchema]) -> None:
    """Refuse an input of an extension that has none of the collection's genes: its cells would be empty.

    Raises
    ------
    SchemaError
        With a gene of each.
    """
    if plan.extension is None or plan.extension.union or not plan.n_vars:
        return
    for k, s in ((k, s) for k, s in enumerate(schemas) if not s.is_dataset and s.n_obs):
        names = s.genes_of(s.x)
        if len(names) and not plan.n_genes_of(k):
            msg = (
                f"{s.path}: none of its {len(names):,} genes, such as {names[0]}, is among the {plan.n_vars:,} of the "
                f"collection, such as {plan.var.index[0]}; name them by another column with var_key, or by a gene_map; "
                "if they are other genes, genes='union' adds them"
            )
            raise SchemaError(msg)


# --- the map beside the collection ---------------------------------------------------------------------------------


def _digest(mapping: Mapping[str, str]) -> str:
    return blake2b(json.dumps(sorted(mapping.items())).encode(), digest_size=16).hexdigest()


def _file(digest: str) -> str:
    return f"{digest}.genes.json"


def keep_gene_map(target: Folder, naming: Naming) -> None:
    """Write a map of names, under its digest, beside a collection, for extensions and for verify.

    Without it the collection is whole: a warning.
    """
    if naming.gene_map:
        _write(target, naming.gene_map, json.dumps(sorted(naming.mapping.items())).encode())


def copy_gene_maps(source: Folder, target: Folder, manifest: Manifest) -> None:
    """Write the maps of a collection's builds beside another one, as far as they are there."""
    for digest in {b.naming.gene_map for b in manifest.builds if b.naming is not None} - {""}:
        if (payload := log_folder(source).find(_file(digest))) is not None:
            _write(target, digest, payload)


def _write(target: Folder, digest: str, payload: bytes) -> None:
    try:
        log_folder(target).write(_file(digest), payload)
    except (OSError, AnnbatchDaskError) as e:
        logger.warning("%s: its gene_map could not be written down: %s", target.url, e)


def _find_map(target: Folder, digest: str) -> dict[str, str]:
    folder = log_folder(target)
    found = folder.find(_file(digest))
    mapping = {} if found is None else dict(json.loads(found))
    if not mapping or _digest(mapping) != digest:
        msg = (
            f"{target.url} was built with a gene_map that was kept as {folder.url}/{_file(digest)}, and it is not "
            "there, or another; copy that folder with the collection, or give the map with gene_map"
        )
        raise CollectionError(msg)
    return mapping


# --- annotations ---------------------------------------------------------------------------------------------------


def renamed_annotations(found: ad.AnnData, source: SourceSchema) -> ad.AnnData:
    """Annotations of genes by their names in the collection; those of the first where several became one."""
    names = source.genes_of(source.x)
    keep = _firsts(names)
    out = found[:, keep].copy()
    out.var_names = pd.Index(names[keep], dtype=object)
    out.raw = None
    if found.raw is not None and source.raw_names is not None and "raw" not in source.unnamed:
        keep = _firsts(source.raw_names)
        var = found.raw.var.iloc[keep].set_axis(pd.Index(source.raw_names[keep], dtype=object))
        out.raw = ad.AnnData(X=np.zeros((0, len(var)), np.float32), obs=found.obs, var=var)
    return out


def _firsts(names: NDArray[np.object_]) -> NDArray[np.intp]:
    return np.flatnonzero(~pd.Index(names, dtype=object).duplicated())
