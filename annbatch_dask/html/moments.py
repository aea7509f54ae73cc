"""Mean against variance of genes, as the points of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MomentGrid", "moment_grid"]

_STEPS = 8
"""Cells of the grid by power of ten."""


@dataclass(frozen=True)
class MomentGrid:
    """Genes by mean and variance of their counts, both in logarithmic steps.

    Attributes
    ----------
    n_genes, n_silent
        Genes, and how many of them do not vary or have no finite mean: these are in no cell of the grid.
    mean, variance
        Least and greatest power of ten of each.
    cells
        (x, y, genes) of each cell that has some, x and y as shares of the axes, from the least.
    """

    n_genes: int
    n_silent: int
    mean: tuple[int, int]
    variance: tuple[int, int]
    cells: tuple[tuple[float, float, int], ...]

    @property
    def most(self) -> int:
        """Genes of the fullest cell."""
        return max((n for _, _, n in self.cells), default=1)

    @property
    def poisson(self) -> tuple[float, float, float, float] | None:
        """Ends (x, y, x, y) of the line on which the variance is the mean, as where counts vary by chance alone."""
        low, high = max(self.mean[0], self.variance[0]), min(self.mean[1], self.variance[1])
        if low >= high:
            return None
        place = [(_share(at, self.mean), _share(at, self.variance)) for at in (low, high)]
        return (*place[0], *place[1])


def _share(at: float, ends: tuple[int, int]) -> float:
    return (at - ends[0]) / (ends[1] - ends[0])


def moment_grid(mean: NDArray[np.float64], variance: NDArray[np.float64]) -> MomentGrid:
    """Sort genes into the grid."""
    with np.errstate(invalid="ignore"):
        varies = (mean > 0) & (variance > 0) & np.isfinite(mean) & np.isfinite(variance)
    logs = [np.log10(values[varies]) for values in (mean, variance)]
    ends = [(int(np.floor(x.min())), int(np.floor(x.max())) + 1) if len(x) else (0, 1) for x in logs]
    steps = [np.floor((x - low) * _STEPS).astype(int) for x, (low, _) in zip(logs, ends, strict=True)]
    found, counts = np.unique(np.stack(steps), axis=1, return_counts=True)
    sizes = [(high - low) * _STEPS for low, high in ends]
    cells = tuple(
        ((x + 0.5) / sizes[0], (y + 0.5) / sizes[1], n)
        for (x, y), n in zip(found.T.tolist(), counts.tolist(), strict=True)
    )
    return MomentGrid(len(mean), int((~varies).sum()), ends[0], ends[1], cells)
