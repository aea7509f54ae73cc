"""Shuffled mini-batches from collections, files and arrays."""

from annbatch_dask.loader.loader import Loader

__all__ = ["Loader"]
