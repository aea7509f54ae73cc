"""find, collect, compare: the tasks of the stages between scatter and gather that find equal cells.

    scatter -> hashes of X, by block and bin
    find    -> a task a bin: cells whose hash another cell has too, by block
    collect -> a task a block: X of these cells out of the spill file, in as many pieces as memory asks for
    compare -> a task a piece: cells that are equal to an earlier one; with "drop", where they would be, by dataset

Cells count as earlier in the order of the inputs, and of the rows in each; the collection's own come first, and are
never duplicates. All tables are in the scratch folder, in the form of spill files, and each task leaves a receipt: a
resume goes on where the build stopped, and a table that was damaged is made anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl.cells import HASHES, comparable
from annbatch_dask.etl.job import Job, JobFile, forget_inputs, load_job, trim_memory
from annbatch_dask.etl.receipts import CollectReceipt, CompareReceipt, FindReceipt, decode, encode
from annbatch_dask.etl.rows import (
    FixedArrays,
    RaggedArrays,
    all_columns,
    array_name,
    ragged_arrays,
    row_hashes,
    sum_hashes,
)
from annbatch_dask.etl.scatter import scatter_again
from annbatch_dask.kernels.cells import compare_rows
from annbatch_dask.kernels.rows import offsets_of, take_rows
from annbatch_dask.plan.plan import Plan
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.scratch import find_receipt, forget_receipt, write_receipt
from annbatch_dask.storage.spill import SPILL, SpillError, SpillReader, write_spill

__all__ = ["Candidates", "LeftOut", "collect", "compare", "find", "left_out_of", "repair"]

logger = logging.getLogger(__name__)

_FOUND, _CELLS, _LEFT = "found", "cells", "left"
"""Kinds of the files of the three stages."""
_CANDIDATES = "candidates"
"""Name of the document that says what collect and compare work on."""

R = TypeVar("R", FindReceipt, CollectReceipt, CompareReceipt)


@dataclass(frozen=True)
class LeftOut:
    """What is left out of each dataset, or of each source: (n,) arrays.

    Attributes
    ----------
    n_rows, fingerprint
        Rows, and their fingerprint.
    nnz
        Stored values of each sparse matrix.
    """

    n_rows: NDArray[np.int64]
    fingerprint: NDArray[np.uint64]
    nnz: dict[str, NDArray[np.int64]]

    @classmethod
    def of(cls, encoded: Sequence[dict[str, str]], n: int, matrices: Sequence[str]) -> LeftOut:
        """The sum of what some receipts say."""
        out = cls(np.zeros(n, np.int64), np.zeros(n, np.uint64), {m: np.zeros(n, np.int64) for m in matrices})
        for found in encoded:
            out.n_rows[:] += decode(found["n_rows"])
            out.fingerprint[:] += decode(found["fingerprint"])
            for m in matrices:
                out.nnz[m][:] += decode(found[f"nnz/{m}"])
        return out

    def encoded(self) -> dict[str, str]:
        """The same as text, for a receipt."""
        nnz = {f"nnz/{m}": encode(n) for m, n in self.nnz.items()}
        return {"n_rows": encode(self.n_rows), "fingerprint": encode(self.fingerprint)} | nnz


@dataclass(frozen=True)
class Candidates:
    """Cells whose hash another cell has: the bins and blocks they are in, and how they are compared."""

    bins: tuple[int, ...]
    blocks: tuple[int, ...]
    n_pieces: int
    dtype: str

    def save(self, scratch: Folder) -> None:
        """Write them where the tasks find them."""
        write_receipt(scratch, _CANDIDATES, vars(self))

    @classmethod
    def load(cls, scratch: Folder) -> Candidates:
        """Read them again."""
        found = find_receipt(scratch, _CANDIDATES)
        if found is None:
            msg = f"{scratch.url}/{_CANDIDATES}.json is missing or damaged; call again to have it written anew"
            raise IntegrityError(msg)
        return cls(tuple(found["bins"]), tuple(found["blocks"]), found["n_pieces"], found["dtype"])


def find(file: JobFile, index: int) -> FindReceipt:
    """Run one find task, unless it was run before: cells whose hash is another's too, of one bin."""
    return _once(file, _FOUND, index, FindReceipt, _find)


def collect(file: JobFile, index: int) -> CollectReceipt:
    """Run one collect task, unless it was run before: the cells of a block that are to be compared."""
    return _once(file, _CELLS, index, CollectReceipt, _collect)


def compare(file: JobFile, index: int) -> CompareReceipt:
    """Run one compare task, unless it was run before: the cells of one piece."""
    return _once(file, _LEFT, index, CompareReceipt, _compare)


def _once(file: JobFile, kind: str, index: int, of: type[R], work: Callable[[Job, int], R]) -> R:
    task = f"{kind}-{index:06d}"
    forget_inputs()  # all of them have been scattered
    job = load_job(file)
    if (found := find_receipt(job.scratch, task)) is not None:
        return of.from_json(found)
    repaired: list[tuple[str, int]] = []
    while True:
        try:
            receipt = work(job, index)
        except SpillError as e:
            repair(file, e, repaired)
        else:
            break
    write_receipt(job.scratch, task, receipt.to_json())
    trim_memory()
    return receipt


def repair(file: JobFile, error: SpillError, repaired: list[tuple[str, int]]) -> None:
    """Write a file of the scratch folder anew that turned out to be damaged: once, and no file twice.

    Raises
    ------
    IntegrityError
        If it was written anew before.
    """
    what = error.kind, error.block
    if what in repaired:
        msg = f"{error}, and so it was after it was written anew; check the disk under the scratch folder"
        raise IntegrityError(msg) from error
    logger.warning("%s: it is written again", error)
    repaired.append(what)
    if error.kind in (SPILL, HASHES):
        scatter_again(file, error.block)
        forget_inputs()  # that block's too
    else:
        forget_receipt(file.scratch, f"{error.kind}-{error.block:06d}")
        {_FOUND: find, _CELLS: collect, _LEFT: compare}[error.kind](file, error.block)


def _find(job: Job, index: int) -> FindReceipt:
    plan, scratch = job.plan, job.scratch
    tables = []
    for b in range(len(plan.blocks)):
        with SpillReader(scratch, b, range(index, index + 1), kind=HASHES) as reader:
            tables.append(reader.read_fixed(index))
    n_rows = np.array([len(t["hash"]) for t in tables], np.int64)
    is_new = np.repeat([not plan.sources[b.source].is_dataset for b in plan.blocks], n_rows)
    hashes = np.concatenate([t["hash"] for t in tables])
    shared = _shared(hashes, is_new)
    if not len(shared):
        return FindReceipt(len(hashes), "")
    ends = np.searchsorted(shared, offsets_of(n_rows))
    fixed = {"hash": hashes[shared]}
    for name in ("row", "at"):
        fixed[name] = np.concatenate([t[name] for t in tables])[shared]
    write_spill(scratch, index, order=np.arange(len(shared)), rows=ends, fixed=fixed, ragged={}, kind=_FOUND)
    return FindReceipt(len(hashes), encode(np.diff(ends)))


def _shared(hashes: NDArray[np.uint64], is_new: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(k,) ascending places of hashes that stand at another place too, one of which is new."""
    ordered = np.sort(hashes)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return np.zeros(0, np.int64)
    again = again[np.append(True, again[1:] != again[:-1])]
    at = np.minimum(np.searchsorted(again, hashes), len(again) - 1)
    places = np.flatnonzero(again[at] == hashes)
    has_new = np.zeros(len(again), bool)
    has_new[at[places[is_new[places]]]] = True
    return places[has_new[at[places]]]


def _collect(job: Job, index: int) -> CollectReceipt:
    plan, candidates = job.plan, Candidates.load(job.scratch)
    found = _found_in(job.scratch, candidates, index)
    order = np.argsort(found["at"])
    found = {name: values[order] for name, values in found.items()}  # as they stand in the spill file
    fixed, ragged = _read_cells(job, index, found["at"])
    x = comparable(plan.x, np.dtype(candidates.dtype), fixed, ragged)
    table = {"row": found["row"], "hash": found["hash"], "length": np.diff(x["values"][1]).astype(np.uint32)}
    table["source"] = fixed[array_name(plan.source_column.path)]
    if plan.options.duplicates == "drop":
        table["row_hash"] = row_hashes(len(order), plan.matrices, all_columns(plan), fixed, ragged)
        table |= {f"nnz/{m.name}": fixed[array_name(m.name, "length")] for m in plan.matrices if m.kind == "csr"}
    n = candidates.n_pieces
    piece = ((found["hash"] & np.uint64(2**32 - 1)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)
    by_piece = np.lexsort((found["row"], piece))
    ends = np.searchsorted(piece[by_piece], np.arange(n + 1))
    n_bytes = write_spill(job.scratch, index, order=by_piece, rows=ends, fixed=table, ragged=x, kind=_CELLS)
    return CollectReceipt(len(order), n_bytes)


def _found_in(scratch: Folder, candidates: Candidates, block: int) -> FixedArrays:
    """Hash, row and place in the spill file of the cells of a block that are to be compared."""
    tables = []
    for k in candidates.bins:
        with SpillReader(scratch, k, range(block, block + 1), kind=_FOUND) as reader:
            tables.append(reader.read_fixed(block))
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


def _read_cells(job: Job, block: int, at: NDArray[np.uint32]) -> tuple[FixedArrays, RaggedArrays]:
    """Rows of a block by their places in its spill file, which ascend."""
    plan = job.plan
    pieces: list[tuple[FixedArrays, RaggedArrays]] = []
    with SpillReader(job.scratch, block, range(plan.layout.n_parts)) as reader:
        starts = offsets_of(np.array([reader.n_rows(p) for p in range(plan.layout.n_parts)]))
        ends = np.searchsorted(at, starts)
        for part in np.flatnonzero(np.diff(ends)).tolist():
            rows = at[ends[part] : ends[part + 1]] - starts[part]
            pieces.append(_read_some(plan, reader, part, rows.astype(np.int64)))
    return _joined(pieces)


def _read_some(plan: Plan, reader: SpillReader, part: int, rows: NDArray[np.int64]) -> tuple[FixedArrays, RaggedArrays]:
    """Some rows of a part of a spill file."""
    whole = reader.read_fixed(part)
    found = reader.read_ragged(part, np.empty(reader.ragged_nbytes(part), np.uint8))
    fixed, ragged = {name: values[rows] for name, values in whole.items()}, {}
    for name, _, length in ragged_arrays(plan, {m.name: m.source_dtype for m in plan.matrices}):
        counts = whole[length] if isinstance(length, str) else np.full(reader.n_rows(part), length)
        ragged[name] = take_rows(found[name][:], offsets_of(counts), rows)
    for m in plan.matrices:
        if m.kind == "dense":
            name = array_name(m.name, "dense")
            fixed[name] = ragged.pop(name)[0].reshape(len(rows), m.n_cols)
    return fixed, ragged


def _compare(job: Job, index: int) -> CompareReceipt:
    plan = job.plan
    pairs: Counter[tuple[int, int]] = Counter()
    tables: list[FixedArrays] = []
    firsts: tuple[FixedArrays, RaggedArrays] | None = None
    n_rows = 0
    for batch in _batches(job, index):
        table, cells = batch if firsts is None else _joined([firsts, batch])
        n_known = 0 if firsts is None else len(firsts[0]["hash"])
        n_rows += len(table["hash"]) - n_known
        first = _first_equal(table["hash"], cells)
        again = np.flatnonzero((first < np.arange(len(first))) & table["is_new"])
        sources = zip(table["source"][again].tolist(), table["source"][first[again]].tolist(), strict=True)
        pairs.update(sources)
        tables.append({name: values[again] for name, values in table.items()})
        kept = np.flatnonzero(first == np.arange(len(first)))
        firsts = {n: v[kept] for n, v in table.items()}, {n: take_rows(*rows, kept) for n, rows in cells.items()}
    left = _left_out(job, index, tables) if plan.options.duplicates == "drop" else ({}, {})
    return CompareReceipt(n_rows, [[a, b, n] for (a, b), n in sorted(pairs.items())], *left)


def _batches(job: Job, index: int) -> Iterator[tuple[FixedArrays, RaggedArrays]]:
    """The cells of a piece in the order of the input, of some blocks at a time: many may be equal, in one piece."""
    plan = job.plan
    limit = max(b.n_bytes for b in plan.blocks)
    found: list[tuple[FixedArrays, RaggedArrays]] = []
    nbytes = 0
    blocks = Candidates.load(job.scratch).blocks
    for b in blocks:
        with SpillReader(job.scratch, b, range(index, index + 1), kind=_CELLS) as reader:
            table = reader.read_fixed(index)
            entries = reader.read_ragged(index, np.empty(reader.ragged_nbytes(index), np.uint8))
        cells = {name: values[:] for name, values in entries.items()}
        n, offsets = len(table["row"]), offsets_of(table["length"])
        is_new = not plan.sources[plan.blocks[b].source].is_dataset
        table |= {"block": np.full(n, b), "is_new": np.full(n, is_new)}
        found.append((table, {name: (v.view(np.uint8), offsets * v.itemsize) for name, v in cells.items()}))
        nbytes += sum(v.nbytes for v in cells.values())
        if nbytes >= limit or b == blocks[-1]:
            yield _joined(found)
            found, nbytes = [], 0


def _joined(pieces: Sequence[tuple[FixedArrays, RaggedArrays]]) -> tuple[FixedArrays, RaggedArrays]:
    """Rows of all pieces, one after another."""
    fixed = {name: np.concatenate([f[name] for f, _ in pieces]) for name in pieces[0][0]}
    ragged = {}
    for name in pieces[0][1]:
        counts = np.concatenate([np.diff(r[name][1]) for _, r in pieces])
        ragged[name] = np.concatenate([r[name][0] for _, r in pieces]), offsets_of(counts)
    return fixed, ragged


def _first_equal(hashes: NDArray[np.uint64], cells: RaggedArrays) -> NDArray[np.int64]:
    """(n,) place of the first cell that equals each: its own where none does before it.

    Cells of a hash are compared with the first of them; those that differ, which a hash of 64 bits all but never lets
    happen, with the first of those, and so on.
    """
    out = np.arange(len(hashes))
    order = np.argsort(hashes, kind="stable")
    while len(order):
        ordered = hashes[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        first = np.repeat(order[starts], np.diff(starts, append=len(order)))
        equal = np.ones(len(order), bool)
        for raw, offsets in cells.values():
            compare_rows(raw, offsets, order, first, equal)
        out[order[equal]] = first[equal]
        order = order[~equal]
    return out


def _left_out(job: Job, index: int, tables: Sequence[FixedArrays]) -> tuple[dict[str, str], dict[str, str]]:
    """Write down which rows are left out of each dataset; returns sums over datasets and over sources."""
    plan = job.plan
    table = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
    first = np.array([b.first for b in plan.blocks], np.int64)
    dest = plan.placement.forward(first[table["block"]] + table["row"])
    starts = plan.layout.dataset_starts
    dataset = np.searchsorted(starts, dest, side="right") - 1
    order = np.argsort(dest)
    ends = np.searchsorted(dest[order], starts)
    place = (dest - starts[dataset]).astype(np.uint32)
    write_spill(job.scratch, index, order=order, rows=ends, fixed={"place": place}, ragged={}, kind=_LEFT)
    source = np.array([b.source for b in plan.blocks], np.int64)[table["block"]]
    return _sums(table, dataset, plan.n_datasets), _sums(table, source, len(plan.sources))


def _sums(table: FixedArrays, of: NDArray[np.int64], n: int) -> dict[str, str]:
    """What is left out of each of ``n`` things, given which each row is of."""
    order = np.argsort(of, kind="stable")
    ends = np.searchsorted(of[order], np.arange(n + 1))
    hashes = table["row_hash"][order]
    nnz = {
        name.removeprefix("nnz/"): np.diff(offsets_of(counts[order])[ends])
        for name, counts in table.items()
        if name.startswith("nnz/")
    }
    fingerprint = np.array([sum_hashes(hashes[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)], np.uint64)
    return LeftOut(np.diff(ends), fingerprint, nnz).encoded()


def left_out_of(job: Job, dataset: int) -> NDArray[np.bool_]:
    """(n_rows,) True for places in a dataset whose rows are left out, of the rows that the plan gives it."""
    start, stop = job.plan.layout.dataset_bounds(dataset)
    out = np.zeros(stop - start, bool)
    for k in range(Candidates.load(job.scratch).n_pieces):
        with SpillReader(job.scratch, k, range(dataset, dataset + 1), kind=_LEFT) as reader:
            out[reader.read_fixed(dataset)["place"]] = True
    return out
