"""Files of 10x Genomics' Cell Ranger: ``.h5`` files of a matrix, and folders with a ``matrix.mtx``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import h5py

from annbatch_dask.errors import MissingPackageError
from annbatch_dask.warn import muted

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["is_tenx_file", "is_tenx_folder", "read_tenx"]

_MATRIX, _ENDINGS = "matrix.mtx", ("", ".gz")


def is_tenx_file(group: h5py.Group) -> bool:
    """True if an HDF5 file is one of Cell Ranger's: a group, one a genome before version 3, holds barcodes."""
    return any(isinstance(g, h5py.Group) and {"barcodes", "indptr"} <= g.keys() for g in group.values())


def is_tenx_folder(path: str) -> bool:
    """True if a local folder is one of Cell Ranger's."""
    return any(os.path.isfile(os.path.join(path, _MATRIX + ending)) for ending in _ENDINGS)


def read_tenx(path: str) -> AnnData:
    """A file or folder in memory, as scanpy reads it: gene expression alone, genes by their symbols made unique.

    Raises
    ------
    MissingPackageError
        Without scanpy.
    """
    try:
        import scanpy as sc
    except ImportError as e:
        msg = f"{path} is 10x Genomics' output, which scanpy reads, and that is not installed: pip install scanpy"
        raise MissingPackageError(msg) from e
    with muted("Variable names are not unique"):  # they will be
        found: AnnData = sc.read_10x_mtx(path) if os.path.isdir(path) else sc.read_10x_h5(path)
    found.var_names_make_unique()
    return found
