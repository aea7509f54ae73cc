"""What a collection says of its genes: statistics, those that vary most, sums over groups of cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import anndata as ad
import pandas as pd

from annbatch_dask.errors import CollectionError
from annbatch_dask.etl.readable import check_there
from annbatch_dask.storage.root import H5adRoot, Root

if TYPE_CHECKING:
    from annbatch_dask.etl.stats import GeneSums
    from annbatch_dask.statistics.variable import Flavor

__all__ = ["WithStatistics"]


class WithStatistics:
    """The part of a collection that reads its genes."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def _check_there(self, element: str = "", n_datasets: int | None = None) -> None:
        """Refuse to read an element of which a file is missing: zarr would give zeros."""
        if (manifest := self._root.manifest) is not None and self._root.has_folder:
            check_there(self._root.target, manifest.datasets[:n_datasets], element)

    @property
    def var(self) -> pd.DataFrame:
        """Frame of the genes, the same for all datasets."""
        with self._root.as_opened():
            self._check_there("var", 1)  # of the first dataset, the only one that is read
            for group in self._root.readable():
                frame: pd.DataFrame = ad.io.read_elem(group["var"])
                return frame
        return pd.DataFrame()

    def gene_stats(self, by: str | None = None) -> pd.DataFrame:
        """Statistics of each gene over all cells, or over those of each category of a column of obs.

        A collection that was built with ``stats=True``, and ``stats_by`` of this column, has them. Otherwise X is read
        once, on the scheduler that dask is set to use, which the log says.

        Parameters
        ----------
        by
            A column of obs; cells without a value in it are in no group. None is all cells.

        Returns
        -------
        Frame indexed by gene, or by group and gene: ``n_cells``; ``n_nonzero`` of them; ``sum``, ``sum_of_squares``,
        ``mean`` and (unbiased) ``variance`` of X; the same with ``normalized_``, of X scaled to 10,000 a cell, and with
        ``log_``, of log(1 + x) of that. What a cell is scaled by is the sum over all genes of the collection.

        Examples
        --------
        >>> stats = collection.gene_stats()
        >>> bool(stats["n_nonzero"].max() <= collection.n_obs)
        True
        """
        from annbatch_dask.statistics.genes import gene_stats, gene_sums  # imports xarray, which takes a while

        self._check_has_x()
        return gene_stats(gene_sums(self._root, by), self.var.index)

    def highly_variable(
        self,
        n_top: int = 2000,
        *,
        flavor: Flavor = "seurat",
        batch_key: str | None = None,
        span: float = 0.3,
        n_bins: int = 20,
        details: bool = False,
    ) -> Any:
        """Genes that vary most, the same as scanpy finds.

        Out of :meth:`gene_stats`, which builds with ``stats=True`` store, and which otherwise read X once.

        Parameters
        ----------
        n_top
            How many. Where several are equal to the last one, scanpy and this return them too.
        flavor
            ``"seurat"`` and ``"cell_ranger"``: as :func:`scanpy.pp.highly_variable_genes` on X that was normalised to
            10,000 a cell and logarithmised. ``"seurat_v3"``: as it does on X itself, which are counts; that reads X
            once (more), on Dask, and needs scikit-misc.
        batch_key
            Column of obs: find genes in each of its groups, and then those that most have.
        span, n_bins
            As in scanpy.
        details
            Return scanpy's frame of all genes instead: its column ``highly_variable``, and what that is made of.

        Returns
        -------
        Index of gene names, in the collection's order.

        Examples
        --------
        >>> genes = collection.highly_variable(10)
        >>> len(genes)
        10
        >>> loader = Loader(batch_size=64, chunk_size=16, preload_nchunks=8, var_names=genes)
        """
        from annbatch_dask.statistics.variable import variable_genes

        self._check_has_x()
        genes = self.var.index
        found = variable_genes(self._root, genes, n_top, flavor=flavor, batch_key=batch_key, span=span, n_bins=n_bins)
        return found if details else genes[found["highly_variable"].to_numpy()]

    def aggregate(
        self, by: str | Iterable[str], func: str | Iterable[str] = "sum", *, layer: str | None = None
    ) -> ad.AnnData:
        """Sum up the cells of each group, on Dask: pseudobulk.

        Parameters
        ----------
        by
            Column of obs, or several, whose combinations are the groups. Cells without a value are in none.
        func
            ``"sum"``, ``"mean"`` or ``"count_nonzero"``, or several.
        layer
            Of this layer instead of X.

        Returns
        -------
        AnnData as :func:`scanpy.get.aggregate` makes it of all cells in memory: (n_groups, n_vars), a layer for each
        function, float64, and obs with the columns and ``n_obs_aggregated``.

        Examples
        --------
        >>> bulk = collection.aggregate(["src_path", "cell_type"], ["sum", "mean"])
        >>> float(bulk.layers["sum"].sum()) == float(collection.gene_stats()["sum"].sum())
        True
        """
        from annbatch_dask.statistics.aggregate import aggregate

        self._check_has_x()
        return aggregate(self._root, self.var, by, func, layer)

    def _check_has_x(self) -> None:
        if isinstance(self._root, H5adRoot) or self._root.is_empty:
            msg = f"{self._root.path} holds no zarr datasets to read genes of; build it with add_adatas"
            raise CollectionError(msg)

    def _stored_sums(self) -> GeneSums | None:
        """Sums of all cells that builds have stored, which reads no X; None where a dataset has none."""
        if (manifest := self._root.manifest) is None or not manifest.stats[0]:
            return None
        from annbatch_dask.statistics.genes import stored_gene_sums

        return stored_gene_sums(self._root)
