"""Three small files that differ in all a join has to unite, and what anndata makes of them."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from annbatch_dask import concat_lazy

SPACE = [f"g{i:02d}" for i in range(30)]
TYPES = (("B", "T"), ("NK", "T", "mono"), ("B", "T"))


def make(k, n_obs=40):
    """Cells of one file: genes in no order, CSR, CSC or dense, columns that the others lack."""
    rng = np.random.default_rng(k)
    genes = [SPACE[i] for i in rng.permutation(30)[: 18 + 3 * k]]
    counts = rng.poisson(0.4, (n_obs, len(genes))).astype(np.float32)
    X = (sp.csr_matrix, sp.csc_matrix, np.asarray)[k](counts)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(TYPES[k], n_obs)),
            "batch": pd.Categorical(["x"] * n_obs),
            "score": rng.random(n_obs),
            "word": [f"w{i}" for i in range(n_obs)],
            "lots": pd.array(np.where(rng.random(n_obs) < 0.2, None, 7), dtype="Int64"),
        },
        index=[f"f{k}_{i}" for i in range(n_obs)],
    )
    if k == 1:
        obs["depth"] = rng.random(n_obs)
    out = ad.AnnData(X=X, obs=obs, var=pd.DataFrame({"n": np.arange(len(genes))}, index=genes))
    out.layers["twice"] = sp.csr_matrix(counts * 2)
    out.obsm["X_pca"] = rng.random((n_obs, 3))
    out.obsm["image"] = rng.integers(0, 9, (n_obs, 4, 3, 2))
    out.raw = ad.AnnData(X=sp.csr_matrix(counts), obs=obs[[]], var=out.var)
    return out


def write(folder, kind, n_obs=40):
    """The files, as h5ad with gzip or as zarr."""
    paths = [folder / f"part_{k}.{kind}" for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what anndata says of its next defaults
        for k, path in enumerate(paths):
            made = make(k, n_obs)
            made.write_h5ad(path, compression="gzip") if kind == "h5ad" else made.write_zarr(path)
    return paths


def read(path):
    """One file, in memory."""
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.io.read_zarr(path)


def assert_equal(found, expected):
    """Values, obs, categories, names and order are the same; both in memory."""
    assert found.var_names.tolist() == expected.var_names.tolist()
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert_same_frame(found.obs, expected.obs)
    assert set(found.obs.columns) == set(expected.obs.columns)
    for name, of in {"X": lambda a: a.X, "raw": lambda a: a.raw.X, "twice": lambda a: a.layers["twice"]}.items():
        assert sp.issparse(of(found)), name
        np.testing.assert_array_equal(dense(of(found)), dense(of(expected)), err_msg=name)
        assert of(found).dtype == np.float32
    for name in ("X_pca", "image"):
        np.testing.assert_array_equal(found.obsm[name], expected.obsm[name])


def assert_same_frame(found, expected):
    """Equal in all but the order of columns, which a Dataset2D has not, and the kind of plain strings."""
    strings = [c for c in expected if isinstance(expected[c].dtype, pd.StringDtype) or expected[c].dtype == object]
    pair = (f[expected.columns].astype(dict.fromkeys(strings, object)) for f in (found, expected))
    pd.testing.assert_frame_equal(*pair, check_index_type=False)


def dense(values):
    return values.toarray() if sp.issparse(values) else np.asarray(values)


def preprocess(adata):
    """What one does before training; the same code for both kinds of AnnData."""
    import scanpy as sc  # slow, and only these tests need it

    sc.pp.filter_cells(adata, min_genes=6)
    sc.pp.filter_genes(adata, min_cells=60)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def preprocessed(paths):
    """A view and what is expected of it, without raw, which keeps all genes."""
    found, expected = concat_lazy(paths, label="file"), ad.concat([read(p) for p in paths], join="outer")
    del found.raw, expected.raw
    return preprocess(found), preprocess(expected)


def assert_shuffled(collection, expected):
    """The collection holds the rows of an AnnData, in another order."""
    found = ad.concat([ad.io.read_zarr(group) for group in collection])
    assert found.obs_names.tolist() != expected.obs_names.tolist()
    assert sorted(found.obs_names) == sorted(expected.obs_names)
    found = found[expected.obs_names]
    assert found.var_names.tolist() == expected.var_names.tolist()
    np.testing.assert_array_equal(dense(found.X), dense(expected.X))
    assert_same_frame(found.obs.drop(columns=["src_path", "file"]), expected.obs)
