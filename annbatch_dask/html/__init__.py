"""Templates of pages and notebook outputs, and the rows of their tables."""

from annbatch_dask.html.genes import OverlapRow, overlap_rows
from annbatch_dask.html.pages import render

__all__ = ["OverlapRow", "overlap_rows", "render"]
