"""Write a small AnnData with the anndata at hand, as ``<folder>/<version>.h5ad`` and ``.zarr``.

python tests/peers/make_old_files.py FOLDER     (any anndata from 0.7 on; imports nothing of ours, runs on Python 3.7)

``old_files.zip`` holds what 0.7.0, 0.7.8, 0.8.0, 0.9.2, 0.10.9, 0.11.4, 0.12.19 and 0.13.4 wrote.
"""

import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

N_OBS, N_VAR = 20, 10


def make(X_type=sp.csr_matrix):
    """An AnnData whose content is the same whatever the versions."""
    i, j = np.indices((N_OBS, N_VAR))
    X = np.where((i + j) % 3 == 0, (7 * i + 3 * j) % 5, 0).astype(np.float32)
    rows = np.arange(N_OBS)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.array(["b", "a", "c"])[rows % 3]),
            "stage": pd.Categorical(np.array(["early", "late"])[rows % 2], ["late", "early"], ordered=True),
            "text": np.array(["", "x", "long text"], object)[rows % 3],
            "whole": rows - 3,
            "real": np.where(rows % 4 == 0, np.nan, rows / 3),
            "flag": rows % 2 == 0,
        },
        index=["cell_%d" % r for r in rows],  # noqa: UP031
    )
    var = pd.DataFrame({"length": np.arange(N_VAR) * 100}, index=["gene_%d" % c for c in range(N_VAR)])  # noqa: UP031
    adata = ad.AnnData(X_type(X), obs=obs, var=var)
    adata.raw = adata
    adata.layers["spliced"] = X.astype(np.int64) * 2
    adata.obsm["X_pca"] = np.stack([rows, rows / 7], axis=1)
    adata.uns["note"] = "made by hand"
    return adata


def main(folder):
    warnings.simplefilter("ignore")
    for name, X_type in (("csr", sp.csr_matrix), ("csc", sp.csc_matrix), ("dense", np.asarray)):
        path = "{}/{}-{}".format(folder, ad.__version__, name)  # noqa: UP032
        adata = make(X_type)
        adata.write_h5ad(path + ".h5ad", compression="gzip")
        if name == "csr":
            adata.write_zarr(path + ".zarr")


if __name__ == "__main__":
    main(sys.argv[1])
