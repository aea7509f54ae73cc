"""scDataset, for its own tests: this package's interface under its name."""

import sys
from importlib import import_module

for _name in (
    "",
    ".strategy",
    ".transforms",
    ".multiindexable",
    ".scdataset",
    ".experimental",
    ".experimental.auto_config",
):
    sys.modules[f"scdataset{_name}"] = import_module(f"annbatch_dask.scdataset{_name}")
