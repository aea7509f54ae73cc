"""Write ``annbatch_collection.zip``: a small collection made by annbatch itself, for tests on machines without it.

python tests/peers/make_fixture.py        (needs annbatch 0.3.1, on Python 3.12 or later)
"""

import shutil
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from annbatch import DatasetCollection

warnings.simplefilter("ignore")
HERE = Path(__file__).parent


def main():
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as tmp:
        paths = []
        for k, genes in enumerate((["a", "b", "c", "d"], ["e", "c", "a"])):
            X = sp.csr_matrix(rng.poisson(1.0, (30, len(genes))).astype(np.float32))
            obs = pd.DataFrame(
                {"row": np.arange(30) + 30 * k, "kind": pd.Categorical(rng.choice(["x", "y"], 30))},
                index=[f"cell{k}_{i}" for i in range(30)],
            )
            paths.append(f"{tmp}/in{k}.h5ad")
            ad.AnnData(X, obs, pd.DataFrame(index=genes)).write_h5ad(paths[-1])
        out = zarr.open(f"{tmp}/c/annbatch.zarr", mode="w")
        DatasetCollection(out).add_adatas(
            paths, shuffle_chunk_size=5, dataset_size=25, shuffle=True, rng=np.random.default_rng(0)
        )
        rows = ad.concat([ad.io.read_h5ad(p) for p in paths], join="outer")
        want = pd.DataFrame(rows.X.toarray(), index=rows.obs_names, columns=rows.var_names)
        want.insert(0, "row", rows.obs["row"].to_numpy())
        want.to_csv(f"{tmp}/c/rows.csv")
        shutil.make_archive(str(HERE / "annbatch_collection"), "zip", f"{tmp}/c")


if __name__ == "__main__":
    main()
