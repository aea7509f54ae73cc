"""Other packages' ``import annbatch`` answered with this one."""

from __future__ import annotations

import importlib
import sys

__all__ = ["install_as_annbatch"]

_MODULES = ("abc", "io", "loader", "samplers", "types", "utils")


def install_as_annbatch() -> None:
    """Let ``import annbatch`` find this package, in this process: for packages that use annbatch, such as scvi-tools.

    Call it before they import it. Processes that are started again need it too, but for DataLoader workers.

    Raises
    ------
    ImportError
        If annbatch itself was imported already: what uses it then would have some names of each.

    Examples
    --------
    >>> annbatch_dask.install_as_annbatch()  # doctest: +SKIP
    >>> data = scvi.model.SCVI.setup_annbatch(paths=["a.h5ad", "b.h5ad"], batch_key="donor")  # doctest: +SKIP
    """
    ours = importlib.import_module("annbatch_dask")
    there = sys.modules.get("annbatch")
    # A package of that name that is being imported, and calls this, is no annbatch yet.
    if there is not None and there is not ours and hasattr(there, "Loader"):
        msg = "annbatch is imported already; call install_as_annbatch before anything imports it"
        raise ImportError(msg)
    sys.modules["annbatch"] = ours
    for name in _MODULES:
        sys.modules[f"annbatch.{name}"] = importlib.import_module(f"annbatch_dask.{name}")
