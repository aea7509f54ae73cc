"""Shuffle many AnnData files into one sharded zarr collection with Dask, and stream it as mini-batches.

The public names are resolved at first use, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from annbatch_dask import (
        abc,
        errors,
        events,
        io,
        mixing,
        samplers,
        scdataset,
        testing,
        toml_splits,
        transforms,
        types,
        utils,
        where,
    )
    from annbatch_dask.as_annbatch import install_as_annbatch
    from annbatch_dask.collection import DatasetCollection
    from annbatch_dask.etl.status import CollectionStatus
    from annbatch_dask.etl.verify import Verification
    from annbatch_dask.etl.versions import CollectionVersion
    from annbatch_dask.io import create_anndata_collection, write_sharded
    from annbatch_dask.lazy import concat_lazy, read_lazy
    from annbatch_dask.loader import Loader
    from annbatch_dask.loader.legacy import ZarrSparseDataset
    from annbatch_dask.plan.qc import QC
    from annbatch_dask.planned import RunnablePlan
    from annbatch_dask.report import Report
    from annbatch_dask.splits import Splits

__all__ = [
    "CollectionStatus",
    "CollectionVersion",
    "DatasetCollection",
    "Loader",
    "QC",
    "Report",
    "RunnablePlan",
    "Splits",
    "Verification",
    "ZarrSparseDataset",
    "__version__",
    "abc",
    "concat_lazy",
    "create_anndata_collection",
    "errors",
    "events",
    "install_as_annbatch",
    "io",
    "mixing",
    "read_lazy",
    "samplers",
    "scdataset",
    "testing",
    "toml_splits",
    "transforms",
    "types",
    "utils",
    "where",
    "write_sharded",
]

__version__ = "0.2.0"

_HOMES = {
    "CollectionStatus": "annbatch_dask.etl.status",
    "CollectionVersion": "annbatch_dask.etl.versions",
    "DatasetCollection": "annbatch_dask.collection",
    "Loader": "annbatch_dask.loader",
    "QC": "annbatch_dask.plan.qc",
    "Report": "annbatch_dask.report",
    "RunnablePlan": "annbatch_dask.planned",
    "Splits": "annbatch_dask.splits",
    "Verification": "annbatch_dask.etl.verify",
    "ZarrSparseDataset": "annbatch_dask.loader.legacy",
    "concat_lazy": "annbatch_dask.lazy",
    "create_anndata_collection": "annbatch_dask.io",
    "install_as_annbatch": "annbatch_dask.as_annbatch",
    "read_lazy": "annbatch_dask.lazy",
    "write_sharded": "annbatch_dask.io",
}
_MODULES = (
    *("abc", "errors", "events", "io", "lightning", "mixing", "samplers", "scdataset", "testing"),
    *("toml_splits", "transforms", "types", "utils", "where"),
)
"""lightning needs Lightning, so ``from annbatch_dask import *`` leaves it out."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"annbatch_dask.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*__all__, "lightning"])
