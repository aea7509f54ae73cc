"""What pages and notebooks show: templates, and rows of tables made for them."""

from annbatch_dask.html.genes import OverlapRow, overlap_rows
from annbatch_dask.html.pages import render

__all__ = ["OverlapRow", "overlap_rows", "render"]
