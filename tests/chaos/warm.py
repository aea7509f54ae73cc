"""Imported by the fork server before its first fork: after one build, kernels and imports are there for all."""

import tempfile
from pathlib import Path

from annbatch_dask.testing import make_adata
from tests.chaos import victim

with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "a.h5ad"
    make_adata(20, ["a", "b"], seed=0).write_h5ad(path)
    victim.add(Path(tmp) / "o.zarr", [path], {"memory_limit": "1GB"}, Path(tmp) / "reports", None, "synchronous")
