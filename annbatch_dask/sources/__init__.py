"""What a user hands in, read as it lies there: files of anndata, HDF5 or zarr, and AnnData objects."""
