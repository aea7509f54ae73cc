"""Cells chosen, genes joined, cells dropped that are there twice, statistics: all at once, beside pandas."""

from __future__ import annotations

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask import QC, DatasetCollection

N_OBS = 300
IDS = [f"ENSG{i:011d}" for i in range(50)]


def make(genes, seed, name):
    """Cells with symbols as index and ids in a column; the sixth is the fifth, the eighth is empty."""
    rng = np.random.default_rng(seed)
    x = sp.random(N_OBS, len(genes), 0.3, "lil", random_state=seed, data_rvs=lambda k: rng.integers(1, 9, k))
    x[5], x[7, :] = x[4], 0
    obs = pd.DataFrame(
        {"type": pd.Categorical(rng.choice(list("abc"), N_OBS)), "ok": rng.random(N_OBS) < 0.8},
        index=[f"{name}{i}" for i in range(N_OBS)],
    )
    var = pd.DataFrame(
        {"id": [IDS[g] for g in genes], "mt": [g % 7 == 0 for g in genes]}, index=[f"S{g}" for g in genes]
    )
    return ad.AnnData(x.tocsr().astype(np.float32), obs, var)


def good(adata):
    """The rows that meet all rules, genes by id."""
    x = adata.X.toarray()
    total, share = x.sum(axis=1), x[:, adata.var["mt"].to_numpy()].sum(axis=1) / np.maximum(x.sum(axis=1), 1)
    keep = adata.obs["ok"].to_numpy() & (total >= 40) & ((x > 0).sum(axis=1) >= 8) & (share <= 0.2)
    return pd.DataFrame(x[keep], index=adata.obs_names[keep], columns=adata.var["id"].to_numpy())


@pytest.mark.parametrize("layout", ["open", "packed"])
def test_all_that_is_done_on_the_way_goes_together(tmp_path, layout):
    files, inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"], [make(range(35), 1, "a"), make(range(15, 50), 2, "b")]
    for adata, path in zip(inputs, files, strict=True):
        adata.write_h5ad(path)
    both = pd.concat(map(good, inputs)).fillna(0).sort_index(axis=1)
    wanted = both[~both.duplicated()]
    assert 0 < len(wanted) < len(both) < 2 * N_OBS
    types = pd.concat(a.obs["type"] for a in inputs)[wanted.index]

    with dask.config.set(scheduler="synchronous"):
        qc = QC(min_counts=40, min_genes=8, max_fraction={"m": 0.2}, gene_sets={"m": "mt"}, annotate=True)
        collection = DatasetCollection(tmp_path / "c.zarr").add_adatas(
            files, where="ok", qc=qc, var_key="id", duplicates="drop", stats_by="type", groupby="type", layout=layout,
            dataset_size=100,
        )  # fmt: skip
        whole = [ad.io.read_elem(group) for group in collection]
        found = pd.concat(a.to_df() for a in whole)
        pd.testing.assert_frame_equal(found.loc[wanted.index, wanted.columns], wanted, check_dtype=False)
        assert len(found) == len(wanted)
        assert all(a.obs["type"].cat.codes.is_monotonic_increasing for a in whole)
        assert collection.obs()["n_counts"][wanted.index].tolist() == wanted.sum(axis=1).tolist()
        assert collection.verify(against=files).ok

        stats, by_type = collection.gene_stats().loc[wanted.columns], collection.gene_stats("type")
        assert stats["sum"].tolist() == wanted.sum().tolist()
        assert stats["n_nonzero"].tolist() == (wanted > 0).sum().tolist()
        sums = wanted.groupby(types, observed=True).sum()
        np.testing.assert_array_equal(by_type["sum"].unstack().loc[sums.index, sums.columns], sums)

        with pytest.warns(UserWarning, match="is in .* already"):
            collection.add_adatas(files[:1], where="not ok", qc=QC(min_counts=60), seed=1)
        assert collection.verify().ok
        assert collection.gene_stats()["n_cells"].iloc[0] == collection.n_obs > len(wanted)
