"""Receipts of finished tasks: JSON files in the scratch folder that a later call reads."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.dtypes import ValueRange
from annbatch_dask.storage.checksums import FileSums

__all__ = [
    "CollectReceipt",
    "CompareReceipt",
    "FindReceipt",
    "GatherReceipt",
    "ScatterReceipt",
    "decode",
    "encode",
]


def encode(values: NDArray) -> str:
    """An array as text, for a receipt."""
    if values.dtype == np.int64 and values.max(initial=0) < 2**32:
        values = values.astype(np.uint32)
    return f"{values.dtype.str} {base64.b64encode(values).decode()}"


def decode(text: str) -> NDArray:
    """The array again."""
    dtype, _, values = text.partition(" ")
    return np.frombuffer(base64.b64decode(values), dtype)


@dataclass(frozen=True)
class ScatterReceipt:
    """Receipt of a scatter task.

    Attributes
    ----------
    n_rows
        Rows of the block.
    n_bytes
        Bytes read, uncompressed.
    spilled
        Bytes of the spill file.
    ranges
        Range of each matrix's values.
    nnz
        Stored values of each sparse matrix.
    fingerprint
        Fingerprint of the rows, 16 hex digits. What goes to each dataset is said by the spill file, part by part: here
        it would be kept by the client for every pair of a block and a dataset.
    repeats
        Whether a row of X names a gene twice; False unless duplicates are looked for.
    reused
        Whether the task had been run before.
    """

    n_rows: int
    n_bytes: int
    spilled: int
    ranges: Mapping[str, ValueRange]
    nnz: Mapping[str, int]
    fingerprint: str
    repeats: bool = False
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        values = {**vars(self), "ranges": {name: asdict(found) for name, found in self.ranges.items()}}
        del values["reused"]
        if not self.repeats:
            del values["repeats"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The receipt of a task that was run before."""
        ranges = {name: ValueRange(**found) for name, found in values["ranges"].items()}
        return cls(**{**values, "ranges": ranges, "reused": True})


@dataclass(frozen=True)
class GatherReceipt:
    """Receipt of a gather task.

    Attributes
    ----------
    name
        Name of the dataset.
    files
        Size and checksum of each of its files.
    n_rows, nnz
        Rows, and stored values of X.
    fingerprint
        Fingerprint of the rows, 16 hex digits.
    n_bytes
        Bytes written, uncompressed.
    folder
        Where the files are until the commit; the dataset's name where that is their place.
    scattered_again
        Blocks whose spill files were damaged.
    reused
        Whether the task had been run before.
    """

    name: str
    files: FileSums
    n_rows: int
    nnz: int
    fingerprint: str
    n_bytes: int
    folder: str
    scattered_again: tuple[int, ...] = ()
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        values = {**vars(self), "scattered_again": list(self.scattered_again)}
        del values["reused"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The receipt of a task that was run before, in this release or an earlier one."""
        again = tuple(values.get("scattered_again", ()))
        return cls(**{"folder": values["name"], **values, "scattered_again": again, "reused": True})


@dataclass(frozen=True)
class _StageReceipt:
    """Receipt of a task of a stage between scatter and gather, whose fields are JSON values."""

    reused: bool = field(default=False, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {name: value for name, value in vars(self).items() if name != "reused"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The receipt of a task that was run before."""
        return cls(**values, reused=True)


@dataclass(frozen=True)
class FindReceipt(_StageReceipt):
    """Receipt of a find task: ``n_rows`` hashes were sorted; ``cells`` of each block share theirs, encoded."""

    n_rows: int
    cells: str = field(repr=False)


@dataclass(frozen=True)
class CollectReceipt(_StageReceipt):
    """Receipt of a collect task: ``n_rows`` cells of a block were written, ``n_bytes`` of them."""

    n_rows: int
    n_bytes: int


@dataclass(frozen=True)
class CompareReceipt(_StageReceipt):
    """Receipt of a compare task.

    Attributes
    ----------
    n_rows
        Cells that were compared.
    pairs
        ``[file, file of an earlier equal, cells]``, the files as codes of the source column.
    datasets, sources
        What is left out of each dataset and of each source: rows, fingerprint, stored values; encoded.
    """

    n_rows: int
    pairs: list[list[int]]
    datasets: dict[str, str] = field(repr=False)
    sources: dict[str, str] = field(repr=False)
