"""Batches of tokens out of a load window: rows picked, ranked or binned, and filled up in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.chunks.dealing import Task
from annbatch_dask.errors import SchemaError
from annbatch_dask.kernels.assemble import SparseRows
from annbatch_dask.kernels.bins import Bins, bin_rows
from annbatch_dask.kernels.tokens import Counts, Frame, Picked, ordered, rank_rows
from annbatch_dask.loader.backing import RowSource
from annbatch_dask.loader.batch import RunTasks, Selection, check_columns, count_parts
from annbatch_dask.loader.blocks import BatchRows, Block, DenseBlock, Loaded, SparseBlock
from annbatch_dask.loader.pool import BufferPool
from annbatch_dask.transforms import BinnedExpression, RankTokens

__all__ = ["TokenBuilder", "TokenForm", "check_counts", "deliver_each"]

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenForm:
    """How rows become tokens.

    Attributes
    ----------
    transform
        What was asked for.
    tokens
        (n_columns,) int32 token of each column of the data; -1 for one that is left out.
    scales
        (n_columns,) what counts are divided by before they are ranked.
    key
        What is drawn depends on it, and on the row.
    """

    transform: RankTokens | BinnedExpression
    tokens: NDArray[np.int32]
    scales: NDArray[np.float64]
    key: int

    @classmethod
    def of(
        cls, transform: RankTokens | BinnedExpression, genes: pd.Index, chosen: Ints | None, epoch: int = 0
    ) -> TokenForm:
        """Look the genes of the data up, or the chosen ones alone; SchemaError where the transform does not know them.

        Parameters
        ----------
        genes
            Names of the columns of the data.
        chosen
            Positions of those to deliver; None for all.
        epoch
            Number of the pass.
        """
        places = np.arange(len(genes)) if chosen is None else chosen
        found = transform.find(genes[places])
        tokens, scales = np.full(len(genes), -1, np.int32), np.ones(len(genes))
        tokens[places] = found
        seed = 0
        if isinstance(transform, RankTokens):
            scales[places] = transform.scales(genes[places], found)
        else:
            seed = transform.seed
        key = int.from_bytes(blake2b(f"tokens/{seed}/{epoch}".encode(), digest_size=8).digest(), "little")
        return cls(transform, tokens, scales, key)

    @property
    def selection(self) -> Selection | None:
        """The columns that are looked at; None for all."""
        kept = np.flatnonzero(self.tokens >= 0)
        return None if len(kept) == len(self.tokens) else Selection.of(kept, len(self.tokens))

    @property
    def frame(self) -> Frame:
        """Tokens around those of the genes."""
        of, eos = self.transform, getattr(self.transform, "eos", None)
        return Frame(of.token(of.cls), of.token(eos), of.token(of.pad))


@dataclass(frozen=True)
class TokenBuilder:
    """Makes batches of tokens of one matrix; see :class:`annbatch_dask.loader.batch.BatchBuilder`."""

    form: TokenForm
    pool: BufferPool
    n_parts: int

    def nbytes(self, loaded: Loaded, rows: BatchRows) -> int:  # noqa: ARG002 - a row has its length whatever is in it
        """Memory the batch will take."""
        *names, _ = self.form.transform.names
        return len(rows) * self.form.transform.max_length * (len(names) * self._dtype.itemsize + 1)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.form.transform.dtype)

    def build(self, loaded: Loaded, rows: BatchRows, run: RunTasks) -> dict[str, Array]:
        """Make one batch; the work is handed to ``run`` in independent pieces."""
        *names, mask = self.form.transform.names
        shape = (len(rows), self.form.transform.max_length)
        out = {name: self.pool.empty(shape, self._dtype) for name in names}
        out[mask] = self.pool.empty(shape, np.bool_)
        numbers = loaded.numbers[rows.rows]
        pieces = rows.pieces(count_parts(self.n_parts, self.nbytes(loaded, rows)))
        tasks: list[Task] = []
        if loaded.blocks and isinstance(loaded.blocks[0], DenseBlock):
            positions = loaded.dense_rows[rows.rows]
            for k, part in pieces:
                picked = _dense_rows(loaded.blocks[k], positions[part])
                tasks.append(partial(_fill, self.form, picked, numbers[part], out, rows.slots[part]))
        else:
            starts, lengths, *_ = loaded.sparse_rows.run(rows)
            for k, part in pieces:
                picked = _sparse_rows(loaded.blocks[k], starts[part], lengths[part])
                tasks.append(partial(_fill, self.form, picked, numbers[part], out, rows.slots[part]))
        run(tasks)
        return out


def check_counts(source: RowSource, transform: RankTokens | BinnedExpression) -> None:
    """SchemaError where values are known to be no counts: negative, or no real numbers."""
    name = type(transform).__name__
    if source.stored_dtype.kind not in "biuf":
        msg = f"{name} needs counts, X is of {source.stored_dtype}"
        raise SchemaError(msg)
    if source.stored_dtype.kind in "if" and (known := source.values()) is not None and known.low < 0:
        _refuse(name, f"the least value of X is {known.low:g}")


def deliver_each(deliver: Callable[[Any], Any], batch: dict[str, Array]) -> dict[str, Any]:
    """Each array as what is yielded."""
    return {name: deliver(part) for name, part in batch.items()}


def _refuse(name: str, what: str) -> None:
    msg = (
        f"{name} needs counts, which are 0 or more, and {what}: scaled or otherwise centred values have no such ranks; "
        "build the collection from the layer that has the counts, counts='layers/<key>'"
    )
    raise SchemaError(msg)


def _fill(form: TokenForm, picked: Picked, numbers: Ints, out: dict[str, Array], places: Ints) -> None:
    """Write some rows of a block to a batch. Few have to be put in order first: those of others' making."""
    counts, disordered = _write(form, picked, numbers, out, places)
    if len(disordered):
        sparse, starts, lengths = picked
        some = sparse, starts[disordered], lengths[disordered]
        more, _ = _write(form, ordered(some), numbers[disordered], out, places[disordered])
        counts = Counts(counts.n_outside + more.n_outside, counts.n_bad + more.n_bad)
    check_columns(counts.n_outside, len(form.tokens))
    if counts.n_bad:
        found = f"{counts.n_bad:,} values of a batch are negative, infinite or no number"
        _refuse(type(form.transform).__name__, found)


def _write(form: TokenForm, picked: Picked, numbers: Ints, out: dict[str, Array], places: Ints) -> tuple[Counts, Ints]:
    transform, genes, arrays = form.transform, (form.tokens, form.scales), tuple(out.values())
    if isinstance(transform, RankTokens):
        return rank_rows(picked, genes, form.frame, (arrays[0], arrays[1]), places)
    bins = Bins(transform.quantiles, transform.ties == "draw", transform.sample, form.key, numbers)
    return bin_rows(picked, genes, form.frame, bins, (arrays[0], arrays[1], arrays[2]), places)


def _sparse_rows(block: Block, starts: Ints, lengths: Ints) -> Picked:
    assert isinstance(block, SparseBlock)  # noqa: S101
    return SparseRows(block.values, block.columns), starts, lengths


def _dense_rows(block: Block, positions: Ints) -> Picked:
    """Rows of a dense block as sparse ones that have all columns."""
    assert isinstance(block, DenseBlock)  # noqa: S101
    width = block.values.shape[1]
    columns, starts = np.arange(width, dtype=np.int32), np.zeros(len(positions), np.int64)
    sparse = SparseRows(block.values.reshape(-1), columns, positions * width)
    return sparse, starts, np.full(len(positions), width, np.int64)
