"""Templates of pages and notebook outputs, and the rows of their tables."""

from annbatch_dask.html.genes import OverlapRow, overlap_rows
from annbatch_dask.html.moments import MomentGrid, moment_grid
from annbatch_dask.html.pages import render
from annbatch_dask.html.pairs import PairMatrix, pair_matrix

__all__ = ["MomentGrid", "OverlapRow", "PairMatrix", "moment_grid", "overlap_rows", "pair_matrix", "render"]
