"""Readers of inputs: files of anndata, HDF5 or zarr, and AnnData objects."""
