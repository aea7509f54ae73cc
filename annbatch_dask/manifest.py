"""The contract on disk: what the root attributes of a collection say, as frozen values, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from annbatch_dask.errors import CollectionError

__all__ = ["ANNBATCH_ENCODING", "DATASET_PREFIX", "MANIFEST_KEY", "DatasetRecord", "Manifest", "SourceRecord"]

ANNBATCH_ENCODING = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
"""The attributes by which annbatch knows a collection."""
MANIFEST_KEY = "annbatch_dask"
DATASET_PREFIX = "dataset"
SOURCE_DTYPE = "source-dtype"
"""Attribute of a matrix: the dtype its sources had, which the loader yields."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """An input of the build, and how many rows and stored values of X it gave."""

    path: str
    n_obs: int
    nnz: int


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset: its name, rows, stored values of X, and the fingerprint of its rows (16 hex digits)."""

    name: str
    n_obs: int
    nnz: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """What a build was, and what it wrote. Nothing in it varies between two runs of the same build.

    Attributes
    ----------
    permutation
        ``{"name", "version"}`` of the shuffle.
    plan
        Fingerprint of the plan.
    matrices
        Name -> ``{"kind", "dtype", "source_dtype", "n_nan", "n_inf"}``: the last two count values.
    """

    seed: int
    permutation: Mapping[str, Any]
    plan: str
    n_obs: int
    n_vars: int
    matrices: Mapping[str, Mapping[str, Any]]
    datasets: tuple[DatasetRecord, ...]
    sources: tuple[SourceRecord, ...]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {
            "datasets": [asdict(d) for d in self.datasets],
            "sources": [asdict(s) for s in self.sources],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """From JSON values.

        Raises
        ------
        CollectionError
            If a newer release wrote it, or it is damaged.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            msg = (
                f"the collection has format version {version} and this release reads {FORMAT_VERSION}; "
                "upgrade annbatch-dask"
            )
            raise CollectionError(msg)
        try:
            records = {
                "datasets": tuple(DatasetRecord(**d) for d in values["datasets"]),
                "sources": tuple(SourceRecord(**s) for s in values["sources"]),
            }
            return cls(**{**values, **records})
        except (KeyError, TypeError) as e:
            msg = f"the collection's manifest is damaged ({e}); build it again"
            raise CollectionError(msg) from e
