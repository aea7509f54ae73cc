"""Checks and resolves the arguments of a call: inputs to sources, sizes and switches to numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args

from annbatch_dask.errors import LayoutError, SourceError
from annbatch_dask.etl.genes import AskedNames, ask_names
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.naming import first_fit
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.qc import QC
from annbatch_dask.seeds import resolve_seed
from annbatch_dask.sizes import check_positive, parse_rows_or_nbytes
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.sources.references import by_path, check_portable, references
from annbatch_dask.storage.secrets import no_text
from annbatch_dask.storage.shards import compressor_json
from annbatch_dask.where import Condition

__all__ = [
    "DuplicateCells",
    "GeneOrder",
    "MatrixLayout",
    "Mode",
    "OnDuplicate",
    "Request",
    "make_request",
    "with_conditions",
]

Mode = Literal["extend", "append", "reshuffle"]
OnDuplicate = Literal["warn", "error"]
MatrixLayout = Literal["open", "packed"]
GeneOrder = Literal["names", "abundance"]
DuplicateCells = Literal["keep", "report", "drop", "error"]


@dataclass(frozen=True)
class Request:
    """The arguments of :meth:`annbatch_dask.DatasetCollection.add_adatas` that say what the collection shall be.

    Attributes
    ----------
    refs
        The inputs.
    options
        Sizes, seed and switches; of layout, gene order and statistics the defaults.
    layout, gene_order, stats, stats_by
        As asked for; None is the collection's, or the default.
    names
        What is asked for of the names of genes.
    keep
        How many versions stay, with the one that is made; None is as many as the last build was told to keep.
    """

    refs: tuple[SourceRef, ...]
    options: Options
    merge: str | None
    mode: Mode
    genes: Literal["collection", "union"]
    on_duplicate_source: OnDuplicate
    layout: MatrixLayout | None
    gene_order: GeneOrder | None
    names: AskedNames
    stats: bool | None
    stats_by: str | None
    keep: int | None = None

    def identity(self, options: Options) -> str:
        """Identity of the call with its resolved options."""
        inputs = [(r.label, r.counts, r.where) if r.where else (r.label, r.counts) for r in self.refs]
        return options.request(inputs, self.mode, self.genes, self.merge)


def make_request(given: Mapping[str, Any]) -> Request:
    """Make a request from the arguments of the method, by name.

    Raises
    ------
    SourceError, LayoutError, SelectionError, ValueError, TypeError
        Where one of them makes no sense.
    """
    refs = references(given["adata_paths"], given["load_adata"], given["storage_options"], given["counts"])
    if unnamed := next(filter(None, (no_text(ref.label) for ref in refs)), ""):
        raise SourceError(unnamed)
    check_portable(refs)
    refs = with_conditions(refs, given["where"])
    plain = {n: given[n] for n in ("merge", "mode", "genes", "on_duplicate_source", "layout", "gene_order")}
    plain |= {n: given[n] for n in ("stats", "stats_by", "keep")}
    check_positive("keep", given["keep"])
    _check_kinds(given)
    return Request(refs, _options(given), **plain, names=ask_names(given, refs))


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Refuse what would be taken for something else, or end in an error of Python's own."""
    if not isinstance(given["stats_by"], str | None):
        msg = f"stats_by is {given['stats_by']!r}; name one column of obs"
        raise TypeError(msg)
    if isinstance(given["var_subset"], str):
        msg = f"var_subset is the text {given['var_subset']!r}; give a list of names"
        raise TypeError(msg)
    for name in ("var_subset", "elements", "groupby"):
        if not isinstance(given[name], Iterable | None):
            msg = f"{name} is {given[name]!r}; give a list of names"
            raise TypeError(msg)
    for name in ("shuffle", "allow_mixed_counts", "stats", "strip_versions"):
        if isinstance(given[name], str):  # as a quoted 'no' of YAML is, which would be taken for True
            msg = f"{name} is the text {given[name]!r}; give True or False"
            raise TypeError(msg)
    if given["merge"] not in (None, *(known := ("same", "unique", "first", "only"))):
        msg = f"merge is {given['merge']!r}; give one of {', '.join(map(repr, known))}, or None"
        raise ValueError(msg)


def _options(given: Mapping[str, Any]) -> Options:
    if not isinstance(given["n_obs_per_chunk"], Integral) or given["n_obs_per_chunk"] < 1:
        msg = f"n_obs_per_chunk is {given['n_obs_per_chunk']!r}; it must be a whole number, 1 or more"
        raise LayoutError(msg)
    dataset_rows, dataset_nbytes = parse_rows_or_nbytes("dataset_size", given["dataset_size"])
    shard_rows, shard_nbytes = parse_rows_or_nbytes("shard_size", given["shard_size"])
    qc, elements = QC.of(given["qc"]), Elements.parse(given["elements"])
    if qc is not None and any(not elements.keeps(c.path) for c in qc.columns()):
        msg = "qc annotates obs, and elements leaves obs out; add 'obs' to elements, or give QC(annotate=False)"
        raise ValueError(msg)
    return Options(
        seed=resolve_seed(given["seed"], given["rng"]),
        shuffle=given["shuffle"],
        dataset_rows=dataset_rows,
        dataset_nbytes=dataset_nbytes,
        n_obs_per_chunk=int(given["n_obs_per_chunk"]),
        shard_rows=shard_rows,
        shard_nbytes=shard_nbytes,
        compressor=compressor_json(given["zarr_compressor"]),
        var_subset=None if given["var_subset"] is None else tuple(map(str, given["var_subset"])),
        groupby=_groupby(given["groupby"]),
        elements=elements,
        allow_mixed_counts=given["allow_mixed_counts"],
        qc=qc,
        duplicates=_duplicates(given["duplicates"]),
    )


def _duplicates(given: str) -> str:
    if given not in (known := get_args(DuplicateCells)):
        msg = f"duplicates is {given!r}; it must be one of {', '.join(map(repr, known))}"
        raise ValueError(msg)
    return given


def _groupby(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of columns, each once."""
    if names is None:
        return ()
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found:
        msg = "groupby must contain at least one column; None sorts by none"
        raise ValueError(msg)
    if len(set(found)) < len(found):
        msg = f"groupby columns must be unique; got {list(found)}"
        raise ValueError(msg)
    return found


def with_conditions(refs: Sequence[SourceRef], where: str | Mapping[str, str] | None) -> tuple[SourceRef, ...]:
    """The inputs, each with the condition that its rows meet: one for all, or by path or pattern (the first that fits).

    Raises
    ------
    SelectionError
        If one cannot be read.
    SourceError
        If one is for none of the inputs.
    """
    if where is None:
        return tuple(refs)
    texts = where.values() if isinstance(where, Mapping) else [where]
    if not all(isinstance(text, str) for text in texts):
        msg = f"where is {where!r}; give a condition on obs as text, or conditions by path"
        raise TypeError(msg)
    for text in texts:
        Condition.parse(text)
    if isinstance(where, str):
        return tuple(replace(ref, where=where) for ref in refs)
    pairs = by_path("where", where, refs)
    return tuple(replace(ref, where=first_fit(pairs, ref.label) or ref.where) for ref in refs)
