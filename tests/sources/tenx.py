"""Files and folders as Cell Ranger writes them."""

from __future__ import annotations

import gzip

import h5py
import numpy as np
import scipy.io


def write_h5(path, found, *, ids, symbols, kinds, barcodes, version=3):
    """A ``.h5`` file of cells by features, in sparse rows; one of version 2 has genes alone."""
    with h5py.File(path, "w") as f:
        f.attrs["chemistry_description"] = "Single Cell 3' v3"
        group = f.create_group("matrix" if version == 3 else "GRCh38")
        group["barcodes"] = np.array(barcodes, "S")
        for name, values in (("data", found.data), ("indices", found.indices), ("indptr", found.indptr)):
            group[name] = values
        group["shape"] = np.array(found.shape[::-1], np.int32)  # features by cells, column-compressed: cells in rows
        if version == 3:
            features = {"id": np.array(ids, "S"), "name": np.array(symbols, "S"), "feature_type": np.array(kinds, "S")}
            for name, values in (features | {"genome": np.array(["GRCh38"] * len(ids), "S")}).items():
                group[f"features/{name}"] = values
        else:
            group["genes"], group["gene_names"] = np.array(ids, "S"), np.array(symbols, "S")
    return path


def write_mtx(path, found, *, ids, symbols, kinds, barcodes):
    """A folder with a ``matrix.mtx.gz``."""
    path.mkdir()
    with gzip.open(path / "matrix.mtx.gz", "wb") as f:
        scipy.io.mmwrite(f, found.T)
    features = ["\t".join(row) for row in zip(ids, symbols, kinds, strict=True)]
    for name, lines in (("features", features), ("barcodes", barcodes)):
        (path / f"{name}.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return path
