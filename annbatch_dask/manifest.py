"""The contract on disk: what the root attributes of a collection say, as frozen values, and their JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

import google_crc32c

from annbatch_dask.errors import CollectionError
from annbatch_dask.records import DuplicatesRecord, NamingRecord

__all__ = [
    "ALL_WRITTEN",
    "ANNBATCH_ENCODING",
    "DATASET_NAME",
    "DATASET_PREFIX",
    "MANIFEST_KEY",
    "SOURCE_DTYPE",
    "SRC_PATH",
    "STATS",
    "TARGET_SUM",
    "DUPLICATES",
    "BuildRecord",
    "DatasetRecord",
    "DuplicatesRecord",
    "Manifest",
    "MatrixRecord",
    "NamingRecord",
    "SourceRecord",
    "dataset_names",
    "dataset_number",
]

ANNBATCH_ENCODING = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
"""The attributes by which annbatch knows a collection."""
MANIFEST_KEY = "annbatch_dask"
DATASET_PREFIX = "dataset"
"""What the names of a collection's datasets begin with."""
DATASET_NAME = re.compile(rf"{DATASET_PREFIX}_(\d+)")
SOURCE_DTYPE = "source-dtype"
"""Attribute of a matrix: the dtype its sources had, which the loader yields."""
ALL_WRITTEN = "all-chunks-written"
"""Attribute of an array of which every chunk was written: a file that is not there was lost, and is no fill value."""
SRC_PATH = "src_path"
"""Name of the obs column that tells a row's source, as annbatch has it."""
STATS = "annbatch_dask_stats"
"""Key of a dataset's uns with statistics of its genes. They say nothing of other cells: whatever is made of a dataset
goes without."""
DUPLICATES = "duplicates"
"""Rule by which a source's rows are dropped because an earlier cell has the same X."""
TARGET_SUM = 1e4
"""What statistics of genes scale every cell to before the logarithm, as ``scanpy`` users do."""
FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)
"""Version 1 held the checksums of all files itself; since 2, each dataset's own ``zarr.json`` holds them, so that a
collection of thousands of datasets opens at once."""


def _checksum(values: Mapping[str, Any]) -> str:
    return f"{google_crc32c.value(json.dumps(values, sort_keys=True).encode()):08x}"


@dataclass(frozen=True)
class SourceRecord:
    """An input.

    Attributes
    ----------
    path
        Path as the user gave it.
    n_obs, nnz
        Rows and stored values of X that it gave.
    fingerprint
        Fingerprint of its rows, 16 hex digits.
    counts
        Which of its matrices became X.
    n_vars
        Genes of the collection that it had; None where not recorded.
    where
        The condition on its obs that these rows meet; "" if there was none.
    dropped
        How many of its other rows each rule dropped: a row counts for the first that it did not meet, and those dropped
        by ``duplicates`` were met by all.
    duplicates
        Fingerprint of the rows that were dropped as duplicates, 16 hex digits; "" if there were none.
    """

    path: str
    n_obs: int
    nnz: int
    fingerprint: str
    counts: str = "X"
    n_vars: int | None = None
    where: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    duplicates: str = ""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without the defaults of fields that earlier releases do not know."""
        values = asdict(self)
        return {k: v for k, v in values.items() if v or k not in ("where", "dropped", "duplicates")}

    @property
    def n_dropped(self) -> int:
        """Rows that it had besides."""
        return sum(self.dropped.values())

    @property
    def as_chosen(self) -> tuple[int, str]:
        """Rows before duplicates were dropped, and their fingerprint."""
        total = int(self.fingerprint, 16) + int(self.duplicates or "0", 16)
        return self.n_obs + self.dropped.get(DUPLICATES, 0), f"{total % 2**64:016x}"


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset.

    Attributes
    ----------
    name
        Name of its group.
    n_obs, nnz
        Rows, and stored values of X.
    fingerprint
        Fingerprint of its rows, 16 hex digits; "" if not recorded (a dataset that annbatch wrote).
    metadata
        Bytes and crc32c (8 hex digits) of its ``zarr.json``, which lists its other files; None where not recorded.
    n_files, n_bytes
        Files, and bytes of all of them; 0 where not recorded.
    files
        Bytes and crc32c of every file, by path within the dataset; empty but in collections of format version 1.
    """

    name: str
    n_obs: int
    nnz: int
    fingerprint: str = ""
    metadata: tuple[int, str] | None = None
    n_files: int = 0
    n_bytes: int = 0
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        values = asdict(self) | {"metadata": None if self.metadata is None else list(self.metadata)}
        files = {name: list(sums) for name, sums in values.pop("files").items()}
        return values | ({"files": files} if files else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DatasetRecord:
        """Read from JSON values."""
        files = {name: (int(n), str(crc)) for name, (n, crc) in values.get("files", {}).items()}
        counted = {"n_files": len(files), "n_bytes": sum(n for n, _ in files.values())} if files else {}
        metadata = values.get("metadata")
        return cls(**{**values, "files": files, "metadata": None if metadata is None else tuple(metadata), **counted})

    @property
    def number(self) -> int:
        """The number in its name."""
        return dataset_number(self.name)


@dataclass(frozen=True)
class MatrixRecord:
    """A matrix, over all datasets.

    Attributes
    ----------
    kind
        ``"csr"`` or ``"dense"``.
    dtype, source_dtype
        Dtype of the stored values, and of those of the sources.
    n_nan, n_inf
        How many values are NaN and infinite.
    integral
        Whether all values are whole numbers: no NaN, infinity or negative zero. None where an earlier release, or
        annbatch, wrote the collection, which recorded none of the last three.
    low, high
        Least and greatest of the finite values and 0; None likewise.
    """

    kind: str
    dtype: str
    source_dtype: str
    n_nan: int = 0
    n_inf: int = 0
    integral: bool | None = None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without what is not recorded."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class BuildRecord:
    """One build: ``"create"``, ``"extend"``, ``"append"`` or ``"reshuffle"``; or a ``"repack"``, which has no inputs.

    Attributes
    ----------
    seed, permutation
        Seed of the shuffle, and ``{"name", "version"}`` of its permutation.
    plan
        Fingerprint of the plan.
    sources
        Paths of its inputs.
    elements
        Which of their elements were chosen, and excluded (with a leading ``-``); empty for all that can be carried.
    groupby
        Columns of obs by which the rows of each dataset it wrote are sorted.
    genes
        How many genes exactly the same inputs had, by a hexadecimal bit mask of them (bit k is the k-th); the 64 most
        frequent masks, all others together under "".
    request
        Identity of the call: of its arguments, but not of what the inputs held; "" where not recorded.
    layout
        How it stored sparse matrices: ``"open"`` or ``"packed"``.
    gene_order
        In which order the collection's genes are: ``"names"`` or ``"abundance"``.
    qc
        The rules on counts of its inputs' cells, as :class:`annbatch_dask.QC` takes them; empty if there were none.
    naming
        How its inputs' genes were named; None by their indices.
    duplicates
        What it found of them; None where it did not look.
    stats, stats_by
        Whether the datasets it wrote have statistics of genes, and the column of obs by which; "" for none.
    n_raw_vars
        Genes that ``raw`` of the collection had after it; 0 where there is none, or not recorded.
    """

    mode: str
    seed: int
    permutation: Mapping[str, Any]
    plan: str
    sources: tuple[str, ...]
    elements: tuple[str, ...] = ()
    groupby: tuple[str, ...] = ()
    genes: Mapping[str, int] = field(default_factory=dict, repr=False)
    request: str = field(default="", repr=False)
    layout: str = "open"
    gene_order: str = "names"
    qc: Mapping[str, Any] = field(default_factory=dict)
    naming: NamingRecord | None = None
    duplicates: DuplicatesRecord | None = None
    stats: bool = False
    stats_by: str = ""
    n_raw_vars: int = 0

    @property
    def n_vars(self) -> int:
        """Genes that the collection had after it; 0 where not recorded."""
        return sum(self.genes.values())

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without the defaults of earlier releases, which do not know these fields."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        defaults: dict[str, Any] = {
            "layout": "open",
            "gene_order": "names",
            "qc": {},
            "naming": None,
            "duplicates": None,
        }
        defaults |= {"stats": False, "stats_by": "", "n_raw_vars": 0}
        return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BuildRecord:
        """Read from JSON values, whose lists become tuples."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if (naming := plain.get("naming")) is not None:
            plain["naming"] = NamingRecord.from_json(naming)
        if (duplicates := plain.get("duplicates")) is not None:
            plain["duplicates"] = DuplicatesRecord.from_json(duplicates)
        return cls(**plain)


@dataclass(frozen=True)
class Manifest:
    """Record of a collection's builds and contents. Equal builds have equal manifests.

    Attributes
    ----------
    n_obs, n_vars
        Cells and genes.
    matrices
        By name.
    datasets
        In their order.
    sources
        Every input of every build.
    builds
        From the first to the last.
    last_dataset
        The highest number a dataset ever had: names are not used twice.
    metadata
        crc32c (8 hex digits) of the datasets' consolidated metadata beside the manifest; "" where there are none.
    inherited
        Datasets of an earlier collection in this folder, which this one replaced, or adopted of annbatch's: what is
        left of them may be removed, though they do not say that they are this collection's.
    id
        16 hex digits that the build which created the collection gave it, and every later build keeps; "" where not
        recorded.
    earlier
        Versions that other collections had in this folder, which this one replaced.
    keep, kept
        How many versions the last build was told to keep, with its own, and the numbers of the earlier ones among them.
    """

    n_obs: int
    n_vars: int
    matrices: Mapping[str, MatrixRecord]
    datasets: tuple[DatasetRecord, ...]
    sources: tuple[SourceRecord, ...]
    builds: tuple[BuildRecord, ...]
    last_dataset: int
    metadata: str = ""
    id: str = ""
    inherited: tuple[str, ...] = ()
    earlier: int = 0
    keep: int = 1
    kept: tuple[int, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def version(self) -> int:
        """Number of this version: 1 for the first commit in the folder, and one more for each later one."""
        return self.earlier + len(self.builds)

    @property
    def identity(self) -> str:
        """Identity of the cells and their order, 16 hex digits: alike for equal contents, whatever release reads them.

        A digest of named fields: a field that a later release adds does not change it.
        """
        datasets = [[d.name, d.n_obs, d.nnz, d.fingerprint] for d in self.datasets]
        payload = {"id": self.id, "n_obs": self.n_obs, "n_vars": self.n_vars, "datasets": datasets}
        return blake2b(json.dumps(payload, sort_keys=True).encode(), digest_size=8).hexdigest()

    def is_shard(self, name: str) -> bool:
        """True if a file of a dataset is a shard of a matrix, whose chunks have checksums of their own."""
        return any(name.startswith(f"{matrix}/") and "/c/" in name for matrix in self.matrices)

    @property
    def seed(self) -> int:
        """Seed of the last build."""
        return self.builds[-1].seed

    @property
    def layout(self) -> str:
        """Storage of sparse matrices, kept by every build: ``"open"`` or ``"packed"``."""
        return self.builds[-1].layout if self.builds else "open"

    @property
    def gene_order(self) -> str:
        """Order of genes, kept by every build: ``"names"`` or ``"abundance"``."""
        return self.builds[-1].gene_order if self.builds else "names"

    @property
    def naming(self) -> NamingRecord | None:
        """Naming of the last build that had one: what an extension does unless it is asked for something else."""
        return next((b.naming for b in reversed(self.builds) if b.naming is not None), None)

    @property
    def stats(self) -> tuple[bool, str]:
        """Whether the last build made statistics of genes, and the column of obs by which, "" for none."""
        return (self.builds[-1].stats, self.builds[-1].stats_by) if self.builds else (False, "")

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, with their checksum."""
        values = asdict(self) | {
            "matrices": {name: matrix.to_json() for name, matrix in self.matrices.items()},
            "datasets": [d.to_json() for d in self.datasets],
            "sources": [s.to_json() for s in self.sources],
            "inherited": list(self.inherited),
            "builds": [b.to_json() for b in self.builds],
            "kept": list(self.kept),
        }
        plain: dict[str, Any] = {"earlier": 0, "keep": 1, "kept": []}  # what earlier releases do not know
        values = {k: v for k, v in values.items() if k not in plain or v != plain[k]}
        return values | {"crc32c": _checksum(values)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Read from JSON values.

        Raises
        ------
        CollectionError
            If a newer release wrote it, or it is damaged.
        """
        version = values.get("format_version")
        if version not in _READABLE:
            msg = (
                f"the collection has format version {version} and this release reads {FORMAT_VERSION}; "
                "upgrade annbatch-dask"
            )
            raise CollectionError(msg)
        values = dict(values)
        if (written := values.pop("crc32c", None)) != (found := _checksum(values)):
            msg = f"the collection's manifest has crc32c {found} and was written with {written}; restore zarr.json"
            raise CollectionError(msg)
        try:
            records = {
                "matrices": {name: MatrixRecord(**m) for name, m in values["matrices"].items()},
                "datasets": tuple(map(DatasetRecord.from_json, values["datasets"])),
                "sources": tuple(SourceRecord(**s) for s in values["sources"]),
                "builds": tuple(BuildRecord.from_json(b) for b in values["builds"]),
            }
            return cls(
                **{
                    **values,
                    **records,
                    "format_version": FORMAT_VERSION,
                    "inherited": tuple(values.get("inherited", ())),
                    "kept": tuple(values.get("kept", ())),
                }
            )
        except (KeyError, TypeError, ValueError) as e:
            msg = f"the collection's manifest is damaged ({e}); build it again"
            raise CollectionError(msg) from e


def dataset_number(name: str) -> int:
    """The number in a dataset's name."""
    return int(name.rsplit("_", 1)[1])


def dataset_names(document: bytes) -> set[str]:
    """Names of the datasets that a root document's manifest has, or its consolidated metadata where there is none."""
    root = json.loads(document) if document else {}
    if (manifest := root.get("attributes", {}).get(MANIFEST_KEY)) is not None:
        return {record["name"] for record in manifest["datasets"]}
    nodes = (root.get("consolidated_metadata") or {}).get("metadata", {})
    return {path for path in nodes if "/" not in path}
