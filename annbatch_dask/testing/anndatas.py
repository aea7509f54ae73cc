"""Small AnnData objects and files with made-up counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

__all__ = ["make_adata", "write_h5ad_pair"]

CELL_TYPES = ("B", "NK", "T", "mono")


def make_adata(n_obs: int, genes: Sequence[str] | int = 45, *, seed: int = 0) -> ad.AnnData:
    """Make up counts of a few cell types; cells are in order of their type, as in real files.

    Parameters
    ----------
    n_obs
        Number of cells.
    genes
        Names of the genes, or their number.
    seed
        Equal seeds give equal data. It is part of the cells' names, so that files of different seeds share none.

    Returns
    -------
    AnnData
        ``X``: (n_obs, n_vars) CSR of float32 whole numbers. ``obs``: ``cell_type`` (categorical), ``n_counts``
        (float32) and ``passed`` (bool), named ``s<seed>_<row>``.

    Examples
    --------
    >>> adata = testing.make_adata(100, ["CD3E", "CD19", "NKG7"])
    >>> adata.shape, adata.obs["cell_type"].cat.categories.tolist()
    ((100, 3), ['B', 'NK', 'T', 'mono'])
    """
    names = [f"gene_{i}" for i in range(genes)] if isinstance(genes, int) else list(genes)
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.integers(0, len(CELL_TYPES), n_obs))
    profile = rng.gamma(0.3, 2.0, (len(CELL_TYPES), len(names)))
    counts = rng.poisson(profile[codes]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(codes, pd.Index(CELL_TYPES)),
            "n_counts": counts.sum(1),
            "passed": rng.random(n_obs) < 0.9,
        },
        index=[f"s{seed}_{i}" for i in range(n_obs)],
    )
    return ad.AnnData(X=sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names))


def write_h5ad_pair(folder: str | Path) -> list[Path]:
    """Write two gzip-compressed files of 300 and 200 cells, with 45 and 40 genes out of 60.

    Parameters
    ----------
    folder
        An existing folder; ``part_0.h5ad`` and ``part_1.h5ad`` are written to it.

    Returns
    -------
    list of Path
        The two files.

    Examples
    --------
    >>> [path.name for path in testing.write_h5ad_pair(".")]
    ['part_0.h5ad', 'part_1.h5ad']
    """
    space = [f"gene_{i}" for i in range(60)]
    rng = np.random.default_rng(0)
    paths = []
    for seed, (n_obs, n_genes) in enumerate([(300, 45), (200, 40)]):
        genes = [space[i] for i in np.sort(rng.choice(len(space), n_genes, replace=False))]
        paths.append(Path(folder, f"part_{seed}.h5ad"))
        make_adata(n_obs, genes, seed=seed).write_h5ad(paths[-1], compression="gzip")
    return paths
