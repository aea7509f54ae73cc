"""Options of a build, resolved to numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from annbatch_dask.plan.digest import canonical, digest
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.naming import Naming
from annbatch_dask.plan.qc import QC

__all__ = ["Extension", "Options"]


@dataclass(frozen=True)
class Options:
    """Options of a build, resolved to numbers.

    Attributes
    ----------
    dataset_size
        Rows of a dataset, or bytes of one uncompressed: exactly one of ``dataset_rows`` and ``dataset_nbytes`` is set.
    shard_rows, shard_nbytes
        Size of a shard, likewise.
    compressor
        Zarr v3 metadata of the bytes-to-bytes codec of the sharded arrays, None for none.
    groupby
        Columns of obs by which the rows of each dataset are sorted.
    elements
        Which elements to carry.
    allow_mixed_counts
        Do not mind where some inputs have whole numbers in X and others have not.
    layout
        How sparse matrices are stored: ``"open"``, by the compressor, or ``"packed"``, integers by our own codec.
    gene_order
        Order of a new collection's genes: ``"names"``, as anndata joins them, or ``"abundance"``, those most cells have
        first.
    qc
        Rules on the counts of the inputs' cells.
    naming
        How genes are named, where not by the index.
    duplicates
        What becomes of cells whose X is equal to that of an earlier one: ``"keep"`` (nobody looks), ``"report"``,
        ``"drop"`` or ``"error"``.
    stats, stats_by
        Sum up statistics of genes, by the categories of this column of obs too; "" for none.
    """

    seed: int
    shuffle: bool = True
    dataset_rows: int | None = None
    dataset_nbytes: int | None = None
    n_obs_per_chunk: int = 64
    shard_rows: int | None = None
    shard_nbytes: int | None = None
    compressor: str | None = None
    var_subset: tuple[str, ...] | None = None
    groupby: tuple[str, ...] = ()
    elements: Elements = Elements()
    allow_mixed_counts: bool = False
    layout: str = "open"
    gene_order: str = "names"
    qc: QC | None = None
    naming: Naming = Naming()
    duplicates: str = "keep"
    stats: bool = False
    stats_by: str = ""

    def request(self, inputs: Sequence[tuple[str, ...]], mode: str, genes: str, merge: str | None) -> str:
        """Identity of a call: everything that a user asks for, 32 hex digits. What the inputs hold is not in it.

        ``inputs``: each one's label, which of its matrices becomes X, and the condition on its obs, if there is one.
        """
        payload = {"options": canonical(self), "inputs": inputs, "mode": mode, "genes": genes, "merge": merge}
        return digest(json.dumps(payload, sort_keys=True).encode())


@dataclass(frozen=True)
class Extension:
    """A build on top of a collection, whose datasets are the plan's first sources.

    Attributes
    ----------
    mode
        ``"extend"``: new rows are dealt into the existing datasets. ``"append"``: new rows make new datasets, the
        existing ones stay. ``"reshuffle"``: all rows are shuffled again.
    n_datasets
        Datasets the collection has.
    first_dataset
        Number of the first dataset to write: names are never used twice.
    union
        Add the genes the collection lacks behind its own; else leave them out.
    """

    mode: Literal["extend", "append", "reshuffle"]
    n_datasets: int
    first_dataset: int
    union: bool = False

    @property
    def n_kept(self) -> int:
        """Sources whose rows stay where they are."""
        return self.n_datasets if self.mode == "append" else 0
