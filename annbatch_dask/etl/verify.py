"""verify: what is on disk, against the manifest and, if asked, against the files it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from annbatch_dask.engines.base import Engine, run_stage
from annbatch_dask.errors import AnnbatchDaskError, CollectionError, IntegrityError
from annbatch_dask.etl.blocks import hash_block, read_block
from annbatch_dask.etl.edits import Problem, look_at_files
from annbatch_dask.etl.genes import keyed, naming_of
from annbatch_dask.etl.measure import decide
from annbatch_dask.etl.rows import array_name, sum_hashes
from annbatch_dask.etl.scan import look, scan, with_ranges
from annbatch_dask.etl.sweep import leftovers
from annbatch_dask.events import Callback
from annbatch_dask.formatting import first_few, plural
from annbatch_dask.manifest import DUPLICATES, DatasetRecord, Manifest, SourceRecord
from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.memory import Budget
from annbatch_dask.plan.naming import Naming, name_genes
from annbatch_dask.plan.options import Extension, Options
from annbatch_dask.plan.qc import QC
from annbatch_dask.sources.open import SourceRef, open_source
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import is_metadata, metadata_below, nodes_below

__all__ = ["CheckResult", "Problem", "Verification", "check_dataset", "verify"]

_ALL, _BY_INDEX = Elements(), Naming()
_N_THREADS = 16
_RENEW = "zarr.consolidate_metadata() of the collection renews it for those who read that by zarr alone"
_RESTORE = "restore these files, or build it again"
_GIVE = "give these files too, or build it again from the given ones alone if its cells should be no others"
_BUDGET = Budget(2**40)
"""No limit: rows are read in blocks of the default size."""


@dataclass(frozen=True)
class Verification:
    """Result of :meth:`annbatch_dask.DatasetCollection.verify`.

    Attributes
    ----------
    path
        Path of the collection.
    problems
        Empty where all is as it was written. Those that ``is_edit`` is true of are no damage: see :attr:`edited`.
    leftovers
        Names in the collection's folder that do not belong to it; harmless, ``gc()`` removes them.
    n_datasets, n_obs, n_bytes
        Datasets and rows that were read, and bytes of their files.
    against
        Paths of the sources whose rows were compared.

    Examples
    --------
    >>> found = collection.verify(against=["a.h5ad", "b.h5ad"])
    >>> found.ok, found.problems
    (True, ())
    """

    path: str
    problems: tuple[Problem, ...]
    leftovers: tuple[str, ...]
    n_datasets: int
    n_obs: int
    n_bytes: int
    against: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if no problem was found."""
        return not self.problems

    @property
    def edited(self) -> tuple[str, ...]:
        """What somebody wrote, added or removed since the build, by path: ``dataset_0/X``. Loaders read it so."""
        return tuple(p.where for p in self.problems if p.is_edit)

    def raise_for_problems(self) -> None:
        """Raise if there is a problem.

        Raises
        ------
        IntegrityError
            With the first ones.
        """
        if not self.problems:
            return
        damage = [p for p in self.problems if not p.is_edit]
        shown = "; ".join(map(str, (damage or self.problems)[:3]))
        problems = plural(len(self.problems), "problem")
        remedy = _RESTORE if damage else f"if these edits are not yours, {_RESTORE}"
        if damage and all(p.is_not_given for p in damage):
            remedy = _GIVE
        msg = f"{self.path} has {problems}: {shown}; {remedy}"
        raise IntegrityError(msg)


@dataclass(frozen=True)
class CheckResult:
    """Result of a check.

    Attributes
    ----------
    problems
        All of them.
    n_rows, n_bytes
        Rows that were compared, and bytes read.
    matched
        Indices of the sources that an input was found to be.
    """

    problems: tuple[Problem, ...]
    n_rows: int
    n_bytes: int
    matched: tuple[int, ...] = ()


def verify(
    target: Folder, manifest: Manifest, refs: Sequence[SourceRef], *, engine: Engine, callback: Callback, document: str
) -> Verification:
    """Compare a collection with its manifest, in this document, and the rows of inputs with those that builds read."""
    size = (manifest.n_obs, sum(d.n_bytes for d in manifest.datasets))
    problems = _check_root(target, manifest, document)
    tasks = [(target, d, manifest.n_vars) for d in manifest.datasets]
    results = _run_check(engine, "verify", check_dataset, tasks, callback, size, [d.name for d in manifest.datasets])
    problems += [problem for r in results for problem in r.problems]
    if refs:
        damaged = [
            d.name for d, r in zip(manifest.datasets, results, strict=True) if not all(p.is_edit for p in r.problems)
        ]
        problems += _compare(target, manifest, refs, engine, callback, damaged)
    return Verification(
        path=target.url,
        problems=tuple(problems),
        leftovers=tuple(leftovers(target)),
        n_datasets=len(manifest.datasets),
        n_obs=manifest.n_obs,
        n_bytes=size[1],
        against=tuple(r.label for r in refs),
    )


def _compare(
    target: Folder,
    manifest: Manifest,
    refs: Sequence[SourceRef],
    engine: Engine,
    callback: Callback,
    damaged: Sequence[str],
) -> list[Problem]:
    """Compare inputs with what the manifest says of them, as a dataset that is whole has them."""
    candidates = _match_sources([r.label for r in refs], target, manifest)
    names = [d.name for d in manifest.datasets]
    name = next((n for n in names if n not in damaged), names[0])
    first = SourceRef(name, (target / name).url, is_dataset=True, options=target.options)
    tasks = [(ref, some, first) for ref, some in zip(refs, candidates, strict=True)]
    size = (sum(some[0].record.n_obs for some in candidates), 0)
    try:
        results = _run_check(engine, "compare", _check_source, tasks, callback, size, [r.label for r in refs])
    except AnnbatchDaskError as e:
        if name not in damaged:
            raise
        return [Problem(r.label, f"was not compared, for lack of a dataset that can be read: {e}") for r in refs]
    return [*_not_compared(manifest, candidates, results), *(p for r in results for p in r.problems)]


def _check_root(target: Folder, manifest: Manifest, document: str) -> list[Problem]:
    """Compare the manifest with itself and with the consolidated metadata beside it."""
    problems = []
    for name, rows in (("datasets", manifest.datasets), ("sources", manifest.sources)):
        if (n := sum(r.n_obs for r in rows)) != manifest.n_obs and (name == "datasets" or _recorded(manifest)):
            problems.append(Problem(document, f"the {name} have {n:,} rows and the collection {manifest.n_obs:,}"))
    if _recorded(manifest):
        one, two = (sum(int(r.fingerprint, 16) for r in rows) % 2**64 for rows in (manifest.datasets, manifest.sources))
        if one != two:
            what = f"rows of the datasets have fingerprint {one:016x} and rows of the sources {two:016x}"
            problems.append(Problem(document, what))
    copied, records = nodes_below(target, document), manifest.datasets if manifest.metadata else ()
    with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="check") as pool:
        return sum(pool.map(lambda record: _check_copy(target, record, copied, document), records), problems)


def _check_copy(target: Folder, record: DatasetRecord, copied: dict[str, Any], document: str) -> list[Problem]:
    """Compare the metadata of a dataset with the copy of them beside the manifest."""
    try:
        nodes = metadata_below(target / record.name, record.name)
    except ValueError:
        return []  # its checksum tells which of them is damaged
    copy = {k: v for k, v in copied.items() if k.split("/")[0] == record.name}
    different = sorted(k for k in nodes.keys() | copy.keys() if nodes.get(k) != copy.get(k))
    if different and look_at_files(target, record, is_metadata).edits:
        what = f"its copy of the metadata of {record.name} is older than the edits; {_RENEW}"
        return [Problem(document, what, is_edit=True)]
    return [Problem(document, f"its copy of the metadata of {name} differs") for name in different]


def _recorded(manifest: Manifest) -> bool:
    """True if every row's origin is recorded; it is not where annbatch wrote some, in these datasets or before them."""
    return manifest.builds[0].mode == "create" and all(d.fingerprint for d in manifest.datasets)


def check_dataset(target: Folder, record: DatasetRecord, n_vars: int) -> CheckResult:
    """Compare a dataset's files and rows with its record."""
    folder = target / record.name
    found = look_at_files(target, record, lambda _: True)
    problems = found.problems
    if not found.damage:
        ref = SourceRef(record.name, folder.url, is_dataset=True, options=folder.options)
        problems += _check_rows(ref, record, n_vars=n_vars, is_edited=bool(found.edits))
    return CheckResult(tuple(problems), record.n_obs, record.n_bytes)


def _check_rows(ref: SourceRef, record: DatasetRecord, *, n_vars: int, is_edited: bool) -> list[Problem]:
    try:
        n_obs, nnz, fingerprint, found_vars = _fingerprint(ref, None)
    except (AnnbatchDaskError, OSError, ValueError, KeyError, RuntimeError) as e:
        return [Problem(record.name, f"cannot be read: {type(e).__name__}: {e}")]
    problems = []
    if found_vars != n_vars:
        problems.append(Problem(record.name, f"has {found_vars:,} genes and the collection {n_vars:,}"))
    if is_edited:
        if n_obs != record.n_obs:
            problems.append(Problem(record.name, f"has {n_obs:,} rows and was written with {record.n_obs:,}"))
    elif (n_obs, nnz) != (record.n_obs, record.nnz):
        what = f"has {n_obs:,} rows with {nnz:,} values and was written with {record.n_obs:,} and {record.nnz:,}"
        problems.append(Problem(record.name, what))
    elif record.fingerprint not in ("", fingerprint):
        what = f"its rows have fingerprint {fingerprint} and were written with {record.fingerprint}"
        problems.append(Problem(record.name, what))
    return problems


def _check_source(ref: SourceRef, candidates: Sequence[Candidate], dataset: SourceRef) -> CheckResult:
    """Compare the rows of an input, as the collection of ``dataset`` would hold them, with what builds read.

    One of the candidates must agree: a file may have been added twice, or have the name of another. Those that do are
    ``matched``.
    """
    seen: dict[tuple[Any, ...], tuple[int, str]] = {}
    for c in candidates:
        if c.asked not in seen:
            named = replace(ref, label=c.record.path, counts=c.record.counts, where=c.record.where)
            chosen = Elements.parse(c.elements), c.naming, QC.of(c.qc or None), c.n_genes
            n_obs, _, fingerprint, _ = _fingerprint(named, dataset, *chosen)
            seen[c.asked] = n_obs, fingerprint
    found = [seen[c.asked] for c in candidates]
    pairs = list(zip(candidates, found, strict=True))
    matched = [c.index for c, is_now in pairs if is_now == c.record.as_chosen]
    where = ref.label if len(candidates) > 1 else candidates[0].record.path
    problems = () if matched else (Problem(where, _difference(candidates, *found[0])),)
    return CheckResult(problems, found[0][0], 0, tuple(matched))


def _difference(candidates: Sequence[Candidate], n_obs: int, fingerprint: str) -> str:
    record = candidates[0].record
    if len(candidates) > 1:
        return f"its {n_obs:,} rows are those of none of the {len(candidates)} sources of this name"
    n_read, read = record.as_chosen
    n_dropped = record.dropped.get(DUPLICATES, 0)
    dropped = f", {n_dropped:,} of them dropped as duplicates" if n_dropped else ""
    if n_obs != n_read:
        return f"has {n_obs:,} rows and the collection has {n_read:,} of it{dropped}"
    return f"its rows have fingerprint {fingerprint} and those in the collection {read}{dropped}"


def _fingerprint(
    ref: SourceRef,
    dataset: SourceRef | None,
    elements: Elements = _ALL,
    naming: Naming = _BY_INDEX,
    qc: QC | None = None,
    n_genes: tuple[int, int] = (0, 0),
) -> tuple[int, int, str, int]:
    """Rows, stored values of X, fingerprint and genes of an input, in the form it has in a dataset's collection.

    ``n_genes``: of var and raw, so many genes, behind which later builds have put theirs.
    """
    refs = keyed([r for r in (dataset, ref) if r is not None], naming)
    schemas = name_genes([scan(r, want_annotations=False, qc=qc).schema for r in refs], naming)
    if not schemas[-1].n_obs:
        return 0, 0, "0" * 16, 0
    if dataset is not None:
        schemas[0] = schemas[0].with_first_genes(*n_genes)
    schemas = [s if s.is_dataset else elements.select(s) for s in schemas]
    schemas = with_ranges(refs, schemas, lambda some: [look(*args) for args in some])
    if qc is not None:
        schemas[-1] = qc.annotated(schemas[-1])
    extension = None if dataset is None else Extension("append", 1, 0)
    options = Options(seed=0, shuffle=False, elements=elements, allow_mixed_counts=True, naming=naming, qc=qc)
    plan = build_plan(schemas, options, budget=_BUDGET, extension=extension, transposes=False)
    total, nnz = 0, 0
    x = array_name("X", "indices")
    with open_source(ref) as whole:
        if (decided := decide(plan, whole)) is None:
            return 0, 0, "0" * 16, 0
        plan, opened = decided
        for block in plan.blocks:
            rows = read_block(plan, block, plan.sources[block.source], opened(block))
            nnz += len(rows.ragged[x][0]) if x in rows.ragged else 0
            total += sum_hashes(hash_block(plan, block, rows))
    return plan.n_obs, nnz, f"{total % 2**64:016x}", plan.n_vars


@dataclass(frozen=True)
class Candidate:
    """A source that an input may be: its place in the manifest, its record, and what its build chose of it."""

    index: int
    record: SourceRecord
    elements: tuple[str, ...]
    naming: Naming
    qc: Mapping[str, Any]
    n_genes: tuple[int, int]

    @property
    def asked(self) -> tuple[Any, ...]:
        """What was asked for of the input: rows of equal candidates are compared once."""
        record = self.record
        how = self.elements, self.naming, json.dumps(self.qc), self.n_genes
        return record.path, record.counts, record.where, *how


def _match_sources(paths: Sequence[str], target: Folder, manifest: Manifest) -> list[tuple[Candidate, ...]]:
    """Match each path with source records: by the whole path, or else by its last part.

    Raises
    ------
    CollectionError
        For a path that stands for none.
    """
    named = [(b, naming_of(target, b.naming)) for b in manifest.builds]
    how = [(b.elements, naming, b.qc, (b.n_vars, b.n_raw_vars)) for b, naming in named for _ in b.sources]
    known = [Candidate(k, s, *h) for k, (s, h) in enumerate(zip(manifest.sources, how, strict=True))]
    out = []
    for path in paths:
        found = [c for c in known if c.record.path == path]
        found = found or [c for c in known if PurePath(c.record.path).name == PurePath(path).name]
        if not found:
            names = first_few(dict.fromkeys(s.path for s in manifest.sources))
            msg = f"{path} is none of the {len(known):,} sources of the collection ({names}); leave it out"
            raise CollectionError(msg)
        out.append(tuple(found))
    return out


def _not_compared(
    manifest: Manifest, candidates: Sequence[Sequence[Candidate]], results: Sequence[CheckResult]
) -> list[Problem]:
    """Sources that no input was found to be, nor may have been."""
    accounted = {k for r in results for k in r.matched}
    accounted |= {c.index for some, r in zip(candidates, results, strict=True) if not r.matched for c in some}
    missing = [s for k, s in enumerate(manifest.sources) if k not in accounted]
    return [
        Problem(s.path, f"was not given: {s.n_obs:,} cells were not compared", is_not_given=True)
        for s in sorted(missing, key=lambda s: s.path)
    ]


def _run_check(
    engine: Engine,
    stage: str,
    fn: Callable[..., CheckResult],
    tasks: Sequence[tuple[Any, ...]],
    callback: Callback,
    size: tuple[int, int],
    names: Sequence[str],
) -> list[CheckResult]:
    """Run checks of what has these names."""
    return run_stage(
        engine,
        stage,
        fn,
        tasks,
        callback,
        size=size,
        measure=lambda _, r: (r.n_rows, r.n_bytes),
        describe=names.__getitem__,
    )
