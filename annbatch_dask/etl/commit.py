"""commit: one atomic write of the root's metadata turns finished datasets into a collection."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl.compare import LeftOut
from annbatch_dask.etl.duplicates import Duplicates
from annbatch_dask.etl.edits import look_at_files
from annbatch_dask.etl.files import recorded
from annbatch_dask.etl.genes import keep_gene_map
from annbatch_dask.etl.inputs import Input, known_inputs, record_inputs
from annbatch_dask.etl.job import GatherTask, Job
from annbatch_dask.etl.ours import remove_dataset
from annbatch_dask.etl.receipts import GatherReceipt, ScatterReceipt
from annbatch_dask.manifest import (
    ANNBATCH_ENCODING,
    DUPLICATES,
    MANIFEST_KEY,
    BuildRecord,
    DatasetRecord,
    Manifest,
    MatrixRecord,
    SourceRecord,
)
from annbatch_dask.plan.dtypes import ValueRange, merge_ranges
from annbatch_dask.plan.plan import Plan
from annbatch_dask.sources.identity import where_of
from annbatch_dask.storage.checksums import FileSums
from annbatch_dask.storage.folder import Folder, sync_path
from annbatch_dask.storage.history import save_version
from annbatch_dask.storage.lock import check_unchanged, keep_generation
from annbatch_dask.storage.metadata import (
    METADATA,
    copied_nodes,
    group_document,
    is_metadata,
    metadata_below,
    nodes_checksum,
)
from annbatch_dask.storage.packed import packs

__all__ = [
    "commit",
    "make_manifest",
    "merged_range",
    "record_of",
    "source_fingerprints",
    "write_root",
]

logger = logging.getLogger(__name__)

MAX_CONSOLIDATED_NBYTES = 8 * 2**20
"""Metadata of all datasets stand in the root document too, up to this size, so that opening it is one read. zarr takes
a second to read that much; a collection of thousands of datasets would take a minute, and gigabytes."""
_N_THREADS = 16
_MAX_OVERLAPS = 64
"""Sets of inputs whose shared genes the manifest counts, which keeps it small with a thousand different inputs."""


def commit(job: Job, manifest: Manifest, written: Mapping[str, str]) -> None:
    """Publish a collection, whose datasets exist and are invisible to readers until this returns.

    The root's ``zarr.json`` holds the attributes annbatch looks for, the manifest, and the metadata of all datasets.

    Parameters
    ----------
    written
        Folder of each new dataset, by the dataset's name.

    Raises
    ------
    CollectionBusyError
        If another build published something since this one began; what that published stays.
    IntegrityError
        If files of a dataset were removed since they were written.
    """
    check_unchanged(job.target, job.base_version)
    _put_in_place(job, written)
    keep_gene_map(job.target, job.plan.options.naming)
    if job.version - 1 in job.kept:
        save_version(job.target, job.version - 1, job.base_version)
    write_root(job.target, manifest, _inputs(job), dict(job.attributes), version=job.base_version)


def write_root(
    target: Folder, manifest: Manifest, inputs: Sequence[Input], attributes: dict[str, Any], *, version: str | None
) -> None:
    """Write the root document over finished datasets, in the place of a version of it.

    ``inputs``: of the manifest's sources; ``attributes``: of others.
    """
    with ThreadPoolExecutor(_N_THREADS) as pool:  # each asks an object store twice
        names = pool.submit(_sync_names, target)
        together = _together(pool.map(partial(_finished_nodes, target), manifest.datasets))
        manifest = replace(manifest, metadata="" if together is None else nodes_checksum(together))
        recorded = pool.submit(record_inputs, target, manifest, inputs)
        root = group_document(attributes | ANNBATCH_ENCODING | {MANIFEST_KEY: manifest.to_json()}, together)
        keep_generation(target)
        for done in (names, recorded):
            done.result()
    target.replace(METADATA, root, version=version)


def _together(found: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Metadata of all datasets; None where they are more than a root document holds, and then they are not kept."""
    nodes: dict[str, Any] | None = {}
    nbytes = 0
    for some in found:  # all are looked at, as that tells whether their files are there
        nbytes += len(json.dumps(some))  # with two braces for a comma and a space
        if nodes is None or nbytes > MAX_CONSOLIDATED_NBYTES:
            nodes = None
        else:
            nodes |= some
    return nodes


def _inputs(job: Job) -> list[Input]:
    """Location and content identity of every source in the manifest, in its order, where known."""
    before = [] if job.base is None else known_inputs(job.target, job.base)
    new = [(ref, source) for ref, source in zip(job.refs, job.plan.sources, strict=True) if not source.is_dataset]
    return [*before, *(Input.of(where_of(ref), source.identity) for ref, source in new)]


def _finished_nodes(target: Folder, record: DatasetRecord) -> dict[str, Any]:
    """Metadata of a dataset's groups and arrays, by path within the collection; all its files must be there."""
    folder = target / record.name
    sizes, document = folder.sizes(), folder.find(METADATA)
    was = recorded(target, record, document)
    is_edited = was.is_edited
    if was.files and sizes != {name: size for name, (size, _) in was.files.items()}:
        if look_at_files(target, record, is_metadata).damage:
            msg = (
                f"{target.url}/{record.name} has {len(sizes):,} files, {sum(sizes.values()):,} bytes, and "
                f"{record.n_files:,} files, {record.n_bytes:,} bytes were written; "
                "do not remove files while a build runs, and call again"
            )
            raise IntegrityError(msg)
        is_edited = True
    copied = copied_nodes(document, record.name) if document and not is_edited else {}
    return copied or metadata_below(folder, record.name)


def _sync_names(target: Folder) -> None:
    """Make the names of datasets outlast a power cut, before the root document that names them is there."""
    if target.is_local:
        sync_path(target.path)


def _put_in_place(job: Job, written: Mapping[str, str]) -> None:
    """Give new datasets their names. This process alone does: it holds the collection's lock."""
    target = job.target
    moved = {name: folder for name, folder in written.items() if folder != name}
    for name, folder in moved.items():
        remove_dataset(target, name, [job.plan.fingerprint, *_plans(job)])
        os.rename(f"{target.path}/{folder}", f"{target.path}/{name}")


def _plans(job: Job) -> list[str]:
    """Plans of interrupted builds, whose datasets may have been given names before."""
    return [] if job.claim is None else [w.plan for w in job.claim.works]


# --- what the manifest says ----------------------------------------------------------------------------------------


def make_manifest(
    job: Job,
    scattered: Sequence[ScatterReceipt],
    gathered: Sequence[GatherReceipt],
    tasks: Sequence[GatherTask],
    duplicates: Duplicates | None = None,
) -> Manifest:
    """The manifest of the collection after the build."""
    plan, base, extension = job.plan, job.base, job.plan.extension
    build = BuildRecord(
        mode="create" if extension is None else extension.mode,
        seed=plan.seed,
        permutation={"name": plan.placement.name, "version": plan.placement.version},
        plan=plan.fingerprint,
        sources=tuple(s.path for s in plan.sources if not s.is_dataset),
        elements=plan.options.elements.names,
        groupby=plan.options.groupby,
        genes=_gene_overlaps(plan),
        request=job.request,
        layout=plan.options.layout,
        gene_order=plan.options.gene_order,
        qc={} if plan.options.qc is None else plan.options.qc.to_json(),
        naming=plan.naming,
        duplicates=None if duplicates is None else duplicates.record,
        stats=plan.options.stats,
        stats_by=plan.options.stats_by,
        n_raw_vars=len(plan.genes["raw"].genes) if "raw" in plan.genes else 0,
    )
    written = tuple(record_of(r.name, r.files, n_obs=r.n_rows, nnz=r.nnz, fingerprint=r.fingerprint) for r in gathered)
    sources = _sources(plan, scattered, None if duplicates is None else duplicates.sources)
    matrices = _matrices(plan, scattered, tasks)
    last = job.first_dataset + plan.n_datasets - 1
    if base is None:
        return Manifest(
            sum(d.n_obs for d in written),
            plan.n_vars,
            matrices,
            written,
            sources,
            (build,),
            last,
            id=job.collection_id,
            inherited=job.inherited,
            earlier=job.version - 1,
            keep=job.keep,
            kept=job.kept,
        )
    kept = base.datasets if extension is not None and extension.n_kept else ()
    if kept:
        matrices = {name: _united(base.matrices.get(name), m) for name, m in matrices.items()}
    return Manifest(
        n_obs=sum(d.n_obs for d in (*kept, *written)),
        n_vars=plan.n_vars,
        matrices=matrices,
        datasets=(*kept, *written),
        sources=(*base.sources, *sources),
        builds=(*base.builds, build),
        last_dataset=last,
        id=job.collection_id,
        inherited=job.inherited,
        earlier=base.earlier,
        keep=job.keep,
        kept=job.kept,
    )


def record_of(name: str, files: FileSums, *, n_obs: int, nnz: int, fingerprint: str) -> DatasetRecord:
    """Make the manifest record of a dataset with these files."""
    return DatasetRecord(
        name,
        n_obs,
        nnz,
        fingerprint,
        metadata=(files[METADATA][0], files[METADATA][1]),
        n_files=len(files),
        n_bytes=sum(size for size, _ in files.values()),
    )


def _united(old: MatrixRecord | None, new: MatrixRecord) -> MatrixRecord:
    """A matrix over datasets that stay and datasets that come: dtypes promoted, counts added."""
    if old is None:
        return new
    merged = replace(
        new,
        dtype=np.promote_types(old.dtype, new.dtype).name,
        source_dtype=np.promote_types(old.source_dtype, new.source_dtype).name,
        n_nan=old.n_nan + new.n_nan,
        n_inf=old.n_inf + new.n_inf,
    )
    if old.low is None or old.high is None or new.low is None or new.high is None:  # an earlier release had none
        return replace(merged, integral=None, low=None, high=None)
    return replace(
        merged,
        integral=old.integral and new.integral,
        low=min(old.low, new.low),
        high=max(old.high, new.high),
    )


def source_fingerprints(plan: Plan, scattered: Sequence[ScatterReceipt]) -> list[str]:
    """Fingerprint of each source's rows, as they were read."""
    totals = [0] * len(plan.sources)
    for block, receipt in zip(plan.blocks, scattered, strict=True):
        totals[block.source] += int(receipt.fingerprint, 16)
    return [f"{total % 2**64:016x}" for total in totals]


def _sources(plan: Plan, scattered: Sequence[ScatterReceipt], left_out: LeftOut | None) -> tuple[SourceRecord, ...]:
    nnz = np.zeros(len(plan.sources), np.int64)
    for block, receipt in zip(plan.blocks, scattered, strict=True):
        nnz[block.source] += receipt.nnz.get("X", 0)
    fingerprints = source_fingerprints(plan, scattered)
    records = [
        SourceRecord(
            s.path,
            s.n_obs,
            int(nnz[k]),
            fingerprints[k],
            s.x.source_name,
            plan.n_genes_of(k),
            where="" if s.kept is None else s.kept.where,
            dropped={} if s.kept is None else dict(s.kept.dropped),
        )
        for k, s in enumerate(plan.sources)
    ]
    if left_out is not None:
        records = [_without(r, left_out, k) for k, r in enumerate(records)]
    return tuple(r for r, s in zip(records, plan.sources, strict=True) if not s.is_dataset)


def _without(record: SourceRecord, left_out: LeftOut, k: int) -> SourceRecord:
    """The record of the k-th source, whose rows are those that stay."""
    n, fingerprint = int(left_out.n_rows[k]), int(left_out.fingerprint[k])
    if not n:
        return record
    return replace(
        record,
        n_obs=record.n_obs - n,
        nnz=record.nnz - int(left_out.nnz["X"][k] if "X" in left_out.nnz else 0),
        fingerprint=f"{(int(record.fingerprint, 16) - fingerprint) % 2**64:016x}",
        dropped={**record.dropped, DUPLICATES: n},
        duplicates=f"{fingerprint:016x}",
    )


def _gene_overlaps(plan: Plan) -> dict[str, int]:
    found = list(plan.gene_overlaps.items())
    rest = sum(n for _, n in found[_MAX_OVERLAPS:])
    return {f"{mask:x}": n for mask, n in found[:_MAX_OVERLAPS]} | ({"": rest} if rest else {})


def merged_range(scattered: Sequence[ScatterReceipt], matrix: str) -> ValueRange:
    """Range of a matrix's values over all blocks."""
    return merge_ranges(r.ranges[matrix] for r in scattered)


def _matrices(plan: Plan, scattered: Sequence[ScatterReceipt], tasks: Sequence[GatherTask]) -> dict[str, MatrixRecord]:
    out: dict[str, MatrixRecord] = {}
    for m in plan.matrices:
        found = merged_range(scattered, m.name)
        if found.n_nan or found.n_inf:
            logger.warning("%s: %d NaN and %d infinite values, kept as they are", m.name, found.n_nan, found.n_inf)
        dtype = tasks[0].dtypes[m.name]
        if plan.options.layout == "packed" and not (m.kind == "csr" and packs(np.dtype(dtype))):
            logger.info("%s: %s %s values are not packed, but stored as in layout 'open'", m.name, m.kind, dtype)
        out[m.name] = MatrixRecord(
            kind=m.kind,
            dtype=dtype,
            source_dtype=m.source_dtype,
            n_nan=found.n_nan,
            n_inf=found.n_inf,
            integral=found.integral,
            low=found.low,
            high=found.high,
        )
    return out
