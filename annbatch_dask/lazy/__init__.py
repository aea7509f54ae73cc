"""Files and collections to look at: AnnData whose X is a dask array and whose obs is an xarray dataset."""

from annbatch_dask.lazy.view import concat_lazy, read_lazy

__all__ = ["concat_lazy", "read_lazy"]
