"""The errors a user can meet: one small tree, each also the built-in a caller would expect.

A message says what, where, the two numbers or values that clash, and the remedy.

Examples
--------
>>> try:
...     DatasetCollection("small.zarr").plan_adatas(["a.h5ad", "b.h5ad"], memory_limit="100MB")
... except errors.MemoryBudgetError as error:
...     print(isinstance(error, errors.AnnbatchDaskError), isinstance(error, MemoryError))
True True
"""

__all__ = [
    "AccessError",
    "AnnbatchDaskError",
    "CollectionBusyError",
    "CollectionChangedError",
    "CollectionError",
    "DeviceError",
    "DuplicateCellsError",
    "ForeignScratchError",
    "IntegrityError",
    "LayoutError",
    "MemoryBudgetError",
    "MissingPackageError",
    "RankError",
    "SchedulerError",
    "SchemaError",
    "SelectionError",
    "SourceError",
    "SourceNotFoundError",
    "StateError",
    "StorageError",
    "VersionNotFoundError",
    "WorkersDiedError",
]


class AnnbatchDaskError(Exception):
    """Base of every error this package raises on purpose."""


class SourceError(AnnbatchDaskError, ValueError):
    """An input file cannot be read, or is not an AnnData file."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """An input path does not exist."""


class SchemaError(AnnbatchDaskError, ValueError):
    """Inputs contradict each other or themselves: genes, categories, dtypes, shapes."""


class LayoutError(AnnbatchDaskError, ValueError):
    """Sizes that cannot be laid out on disk: dataset, chunk or shard size, compressor."""


class MemoryBudgetError(AnnbatchDaskError, MemoryError):
    """A task would need more memory than a worker thread has."""


class DuplicateCellsError(AnnbatchDaskError, ValueError):
    """Cells have the X of an earlier cell, and ``duplicates="error"`` refuses them."""


class CollectionError(AnnbatchDaskError, ValueError):
    """The target path is not a collection, or not one this call can work on."""


class CollectionBusyError(CollectionError, BlockingIOError):
    """Another build works on the collection."""


class VersionNotFoundError(CollectionError, LookupError):
    """A collection has no version of this number, or does not keep it."""


class IntegrityError(AnnbatchDaskError, RuntimeError):
    """Written data differ from the data that were read, or a file is damaged."""


class CollectionChangedError(CollectionError, IntegrityError):
    """A collection was replaced or changed while it was open."""


class StorageError(AnnbatchDaskError, OSError):
    """A disk is full, a quota used up, a place not to be written or open to others, or a store silent for minutes."""


class AccessError(StorageError, PermissionError):
    """A store refuses access: credentials are wrong, have expired, or do not suffice."""


class MissingPackageError(AnnbatchDaskError, ImportError):
    """A package that only some paths or options need is not installed."""


class ForeignScratchError(StorageError, PermissionError):
    """A scratch folder belongs to another user, who could change what is in it."""


class SchedulerError(AnnbatchDaskError, ConnectionError):
    """A Dask cluster cannot be used: no scheduler answers, no worker joins, or its client cannot wait for results."""


class WorkersDiedError(AnnbatchDaskError, RuntimeError):
    """All workers that worked on a task died, as those do that run out of memory."""


class RankError(AnnbatchDaskError, ValueError):
    """Ranks cannot share the rows: they draw from different seeds, or there is not a batch for each."""


class StateError(AnnbatchDaskError, ValueError):
    """A saved state belongs to another sampler, other data, or another place among workers and ranks."""


class SelectionError(AnnbatchDaskError, ValueError):
    """A selection or split of rows does not fit the data."""


class DeviceError(AnnbatchDaskError, RuntimeError):
    """Batches are to be made on a GPU, and there is none."""
