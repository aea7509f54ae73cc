"""Turns a request into a plan: inspect the collection, scan the inputs, decide."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import anndata as ad
import dask

from annbatch_dask.engines.base import EngineChoice
from annbatch_dask.errors import CollectionError, LayoutError
from annbatch_dask.etl.choose import check_any_kept
from annbatch_dask.etl.frames import try_frames
from annbatch_dask.etl.genes import (
    check_shared,
    check_versions,
    keyed,
    renamed_annotations,
    resolve_naming,
    warn_of_unused,
)
from annbatch_dask.etl.inputs import Input, known_inputs
from annbatch_dask.etl.request import GeneOrder, MatrixLayout, OnDuplicate, Request
from annbatch_dask.etl.scan import Scanned, look, merge_annotations, scan, with_ranges
from annbatch_dask.formatting import first_few
from annbatch_dask.manifest import SRC_PATH, DatasetRecord, Manifest, MatrixRecord, dataset_number
from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.dtypes import ValueRange
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.genes import check_genes
from annbatch_dask.plan.memory import BLOCK_NBYTES
from annbatch_dask.plan.naming import name_genes
from annbatch_dask.plan.options import Extension, Options
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import INPUT_SRC_PATH, SourceSchema
from annbatch_dask.sizes import parse_nbytes
from annbatch_dask.sources.identity import identity_of, where_of
from annbatch_dask.sources.matrices import describe_matrix
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.storage.frames import n_rows
from annbatch_dask.storage.metadata import METADATA
from annbatch_dask.storage.root import H5adRoot, Root
from annbatch_dask.storage.uploads import UPLOAD_NBYTES
from annbatch_dask.warn import warn

__all__ = ["Prepared", "dataset_refs", "is_done_already", "prepare", "resolve", "warn_of_duplicates"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A plan with what it was made of.

    Attributes
    ----------
    refs
        The sources: the collection's datasets, where they are extended, and the inputs.
    annotations
        What the collection will say of genes and of itself; see :class:`annbatch_dask.etl.job.Job`.
    request
        Identity of the call.
    base
        Manifest of the collection that is extended.
    version
        Version of the collection's root document when it was planned.
    keep
        How many versions are to stay; see :class:`annbatch_dask.etl.request.Request`.
    is_done
        The last build of the collection was this very call, so there is nothing to run.
    """

    plan: Plan
    refs: tuple[SourceRef, ...]
    annotations: ad.AnnData | None
    request: str
    base: Manifest | None
    version: str | None
    keep: int | None = None
    is_done: bool = False

    def warn(self) -> None:
        """Say what the inputs have and the collection will not have, or will call otherwise."""
        n_inputs = sum(not ref.is_dataset for ref in self.refs)
        if left_out := self.plan.left_out:
            shown = ", ".join(f"{name} ({len(paths)} of {n_inputs} inputs)" for name, paths in left_out.items())
            warn(f"left out: {shown}; name them with a leading '-' in elements to confirm, or see merge")
        if not_found := self.plan.not_found:
            shown = first_few(map(repr, not_found))
            n_names = len(self.plan.options.var_subset or ())
            warn(f"{len(not_found):,} of the {n_names:,} names of var_subset are no genes: {shown}")
        if renamed := self.plan.renamed:
            warn(
                f"obs of {renamed[0]} ({len(renamed)} of {n_inputs} inputs) has a column {SRC_PATH}, which is "
                f"{INPUT_SRC_PATH} in the collection, whose own says where a row came from; rename it in load_adata, "
                f"or leave it out with elements=['-obs/{SRC_PATH}']"
            )


# --- what the collection has ---------------------------------------------------------------------------------------


def resolve(root: Root, request: Request) -> tuple[Extension | None, Options]:
    """Resolve the options of a build, given what the collection holds."""
    extension = _extension(root, request)
    options = _stored_as(root, request.options, request.layout, request.gene_order, extension)
    manifest = None if extension is None else root.manifest
    naming = resolve_naming(root.target, manifest, request.names, request.refs)
    return extension, _with_stats(root, replace(options, naming=naming), request, extension)


def _extension(root: Root, request: Request) -> Extension | None:
    mode, genes = request.mode, request.genes
    if mode not in ("extend", "append", "reshuffle") or genes not in ("collection", "union"):
        msg = f"mode is {mode!r} and genes {genes!r}; give 'extend', 'append' or 'reshuffle', 'collection' or 'union'"
        raise ValueError(msg)
    if root.is_empty:
        return None
    if mode == "append" and genes == "union":
        msg = "mode='append' leaves the datasets as they are, so genes='union' cannot add to them; use 'reshuffle'"
        raise ValueError(msg)
    if mode == "append" and (duplicates := request.options.duplicates) != "keep":
        msg = (
            f"mode='append' does not read the collection's cells, so duplicates={duplicates!r} cannot compare new "
            "ones with them; give mode='extend' or 'reshuffle', or duplicates='keep'"
        )
        raise ValueError(msg)
    names = root.names()
    last = max(map(dataset_number, names))
    if root.manifest is not None:
        last = max(last, root.manifest.last_dataset)
    return Extension(mode, len(names), last + 1, union=genes == "union")


def _stored_as(
    root: Root,
    options: Options,
    layout: MatrixLayout | None,
    gene_order: GeneOrder | None,
    extension: Extension | None,
) -> Options:
    """The options with the layout and the order of genes that were chosen, or that the collection has."""
    if layout not in (None, *get_args(MatrixLayout)) or gene_order not in (None, *get_args(GeneOrder)):
        msg = f"layout is {layout!r} and gene_order {gene_order!r}; give 'open' or 'packed', 'names' or 'abundance'"
        raise LayoutError(msg)
    manifest = None if extension is None else root.manifest
    was = options if manifest is None else manifest
    if extension is not None and gene_order not in (None, was.gene_order):
        msg = (
            f"{root.path} has its genes in the order of {was.gene_order}, and gene_order is {gene_order!r}; "
            "leave it out, or build a new collection"
        )
        raise LayoutError(msg)
    if extension is not None and extension.mode == "append" and layout not in (None, was.layout):
        msg = (
            f"{root.path} is stored in layout {was.layout!r}, and layout={layout!r} with mode='append' would leave "
            "it in two; leave it out, or give mode='extend', which writes all anew"
        )
        raise LayoutError(msg)
    return replace(options, layout=layout or was.layout, gene_order=gene_order or was.gene_order)


def _with_stats(root: Root, options: Options, request: Request, extension: Extension | None) -> Options:
    """The options with the statistics that were asked for, or that the collection has."""
    if request.stats is False and request.stats_by is not None:
        msg = f"stats is False and stats_by {request.stats_by!r}; leave one of them out"
        raise ValueError(msg)
    manifest = None if extension is None else root.manifest
    had, had_by = (False, "") if manifest is None else manifest.stats
    stats = (had or request.stats_by is not None) if request.stats is None else request.stats
    by = had_by if request.stats_by is None else request.stats_by
    return replace(options, stats=stats, stats_by=by if stats else "")


def is_done_already(root: Root, request: Request, options: Options, room: EngineChoice) -> bool:
    """True if this very call has succeeded already, and was the last to do so: it asks for the same of the same."""
    manifest, refs = root.manifest, request.refs
    if manifest is None or not manifest.builds or manifest.builds[-1].request != request.identity(options):
        return False
    known = known_inputs(root.target, manifest)[-len(refs) :]
    found = room.scanner.run("look", identity_of, [(ref,) for ref in refs], lambda *_: None, lambda i: refs[i].label)
    now = [Input.of(where_of(ref), identity) for ref, identity in zip(refs, found, strict=True)]
    for ref, was, is_now in zip(refs, known, now, strict=True):
        if was.where in ("", is_now.where) and not (was.content and is_now.content):
            msg = (
                f"{root.path} was built last by this very call, and whether {ref.label} is what it was then cannot "
                "be told: to add its cells again, give another seed; to replace them, build a new collection"
            )
            raise CollectionError(msg)
    return known == now


def warn_of_duplicates(root: Root, refs: Sequence[SourceRef], on_duplicate_source: OnDuplicate) -> None:
    """Refuse inputs that are in the collection; warn of those whose cells it has, or refuse these too."""
    if on_duplicate_source not in ("warn", "error"):
        msg = f"on_duplicate_source is {on_duplicate_source!r}; it must be 'warn' or 'error'"
        raise ValueError(msg)
    manifest, target = root.manifest, root.target
    own = where_of(SourceRef("", target.url, options=target.options))
    for ref in refs:
        if f"{where_of(ref)}/".startswith(f"{own}/"):
            msg = f"{ref.label} lies in the collection {root.path} itself, which has its cells; leave it out"
            raise CollectionError(msg)
    if manifest is None:
        return
    known = known_inputs(target, manifest)
    for ref in refs:
        where = Input.of(where_of(ref), "").where
        named = [k for k, s in enumerate(manifest.sources) if s.path == ref.label]
        same = [k for k, i in enumerate(known) if i.where and i.where == where]
        again = sorted({*same, *(k for k in named if not known[k].where or not where)})
        if again:
            n = sum(manifest.sources[k].n_obs for k in again)
            msg = f"{ref.label} is in {root.path} already, with {n:,} cells"
            if on_duplicate_source == "error":
                msg = f"{msg}; leave it out, or build a new collection"
                raise CollectionError(msg)
            warn(f"{msg}, and is added again; leave it out, or build a new collection, to have each cell once")
        elif named:
            warn(
                f"{root.path} has cells of another {ref.label}, which the column src_path will not tell apart; "
                "give whole paths to have different names"
            )


def dataset_refs(root: Root) -> list[SourceRef]:
    """The datasets as inputs of a build that extends them, or of a view; CollectionError where they are h5ad files."""
    if isinstance(root, H5adRoot):
        msg = f"{root.path} is a folder of h5ad files; open them with concat_lazy, or build a zarr collection of them"
        raise CollectionError(msg)
    if not root.has_folder:
        return [SourceRef(name, group, is_dataset=True) for name, group in zip(root.names(), root, strict=True)]
    folder, manifest = root.target, root.manifest
    recorded = {} if manifest is None else {d.name: f"{d.fingerprint}/{d.metadata}" for d in manifest.datasets}
    return [
        SourceRef(n, (folder / n).url, is_dataset=True, options=folder.options, known=recorded.get(n, ""))
        for n in root.names()
    ]


def _adopted(root: Root) -> Manifest:
    """A manifest for a collection that annbatch wrote: what its metadata say, no fingerprints."""
    first = next(iter(root))
    records = tuple(
        DatasetRecord(name, n_rows(group["obs"]), _nnz(group["X"]))
        for name, group in zip(root.names(), root, strict=True)
    )
    stored = describe_matrix("X", first["X"])
    dtype = "float32" if stored is None else stored.dtype
    kind = "dense" if stored is None else stored.kind
    return Manifest(
        n_obs=sum(r.n_obs for r in records),
        n_vars=len(ad.io.read_elem(first["var"])),
        matrices={"X": MatrixRecord(kind, dtype, dtype)},
        datasets=records,
        sources=(),
        builds=(),
        last_dataset=max(r.number for r in records),
    )


def _nnz(x: Any) -> int:
    return int(x["data"].shape[0]) if hasattr(x, "keys") else 0


# --- the plan ------------------------------------------------------------------------------------------------------


def prepare(root: Root, request: Request, room: EngineChoice, *, read_values: bool = False) -> Prepared:
    """Scan the inputs, and the datasets of a collection that is extended, and plan."""
    version = root.target.version(METADATA)
    extension, options = resolve(root, request)
    datasets = [] if extension is None else dataset_refs(root)
    refs = (*datasets, *keyed(request.refs, options.naming))
    scanned = room.scanner.run(
        "scan",
        scan,
        _scans(refs, len(datasets), request, options, extension, read_values=read_values),
        lambda *_: None,
        lambda i: refs[i].label,
    )
    check_any_kept([s.schema.kept for s in scanned[len(datasets) :]])
    check_versions([s.schema for s in scanned], options.naming)
    named = name_genes([s.schema for s in scanned], options.naming)
    chosen = [s if s.is_dataset else options.elements.select(s) for s in named]
    check_genes(chosen, options.naming)
    if request.names.mapping:
        warn_of_unused(named, request.names.mapping)
    found = _annotations(scanned, named, options)
    if extension is not None and not extension.union:
        found = found[:1]  # the collection's own
    annotations = merge_annotations(found, request.merge) if found else None
    if annotations is not None:
        _exclude(annotations, options.elements)

    def look_at(some: list[tuple[SourceRef, SourceSchema, frozenset[str]]]) -> list[dict[str, ValueRange]]:
        return room.scanner.run("look", look, some, lambda *_: None, lambda i: some[i][0].label)

    chosen = with_ranges(refs, chosen, look_at)
    if options.qc is not None:
        chosen = [s if s.is_dataset else options.qc.annotated(s) for s in chosen]
    is_local = root.target.is_local
    plan = build_plan(
        chosen,
        options,
        budget=replace(room.budget, block_nbytes=_block_nbytes(), upload_nbytes=0 if is_local else UPLOAD_NBYTES),
        var=None if annotations is None else annotations.var,
        annotated=_annotated(annotations),
        extension=extension,
    )
    check_shared(plan, chosen)
    try_frames(plan, annotations)
    base = None if extension is None else root.manifest or _adopted(root)
    return Prepared(plan, refs, annotations, request.identity(options), base, version, request.keep)


def _annotations(scanned: Sequence[Scanned], named: Sequence[SourceSchema], options: Options) -> list[ad.AnnData]:
    """What the sources say of genes, by the names that the collection has for these."""
    pairs = [(s.annotations, schema) for s, schema in zip(scanned, named, strict=True)]
    return [
        found if options.naming.is_plain or schema.is_dataset else renamed_annotations(found, schema)
        for found, schema in pairs
        if found is not None
    ]


def _scans(
    refs: Sequence[SourceRef],
    n_datasets: int,
    request: Request,
    options: Options,
    extension: Extension | None,
    *,
    read_values: bool,
) -> list[tuple[Any, ...]]:
    """Arguments of the scan of each source, the datasets of the collection first."""
    wanted = request.merge is not None or (extension is None and len(request.refs) == 1)
    first = extension is not None and (request.merge is not None or not extension.union)
    by_abundance = extension is None and options.gene_order == "abundance"
    tasks = [(ref, first and k == 0, False, False, False) for k, ref in enumerate(refs[:n_datasets])]
    return [*tasks, *((ref, wanted, read_values, False, by_abundance, options.qc) for ref in refs[n_datasets:])]


def _block_nbytes() -> int:
    """Size of a row block, from dask's configuration: ``annbatch_dask.block_size``."""
    return parse_nbytes("annbatch_dask.block_size", dask.config.get("annbatch_dask.block_size", BLOCK_NBYTES))


def _exclude(annotations: ad.AnnData, elements: Elements) -> None:
    """Drop what was not chosen."""
    for kind in ("varm", "varp", "uns"):
        mapping = getattr(annotations, kind)
        for key in [k for k in mapping if not elements.keeps(f"{kind}/{k}")]:
            del mapping[key]


def _annotated(annotations: ad.AnnData | None) -> frozenset[str]:
    if annotations is None:
        return frozenset()
    return frozenset(f"{kind}/{key}" for kind in ("varm", "varp", "uns") for key in getattr(annotations, kind))
