"""One pass over the values of cells: their sum, how many are not 0, and the sums of sets of genes."""

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled

__all__ = ["measure_dense", "measure_sparse"]


@compiled
def measure_sparse(offsets, values, sets, n_counts, n_genes, in_sets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Measure rows of a sparse matrix, each value in its place, so that sums do not depend on how rows are cut.

    ``sets``: for each entry the sets that its gene is in, a bit each; empty where there is none.
    """
    for r in range(offsets.shape[0] - 1):
        total, n = 0.0, 0
        for k in range(offsets[r], offsets[r + 1]):
            total += np.float64(values[k])
            n += values[k] != 0
        n_counts[r], n_genes[r] = total, n
        if sets.shape[0]:
            for k in range(offsets[r], offsets[r + 1]):
                if sets[k]:
                    for j in range(in_sets.shape[1]):
                        if (sets[k] >> sets.dtype.type(j)) & sets.dtype.type(1):
                            in_sets[r, j] += np.float64(values[k])


@compiled
def _measure_dense(values, sets, n_counts, n_genes, in_sets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for r in range(values.shape[0]):
        total, n = 0.0, 0
        for c in range(values.shape[1]):
            total += np.float64(values[r, c])
            n += values[r, c] != 0
            if sets[c]:
                for j in range(in_sets.shape[1]):
                    if (sets[c] >> sets.dtype.type(j)) & sets.dtype.type(1):
                        in_sets[r, j] += np.float64(values[r, c])
        n_counts[r], n_genes[r] = total, n


def measure_dense(
    values: NDArray,
    sets: NDArray[np.unsignedinteger],
    n_counts: NDArray[np.float64],
    n_genes: NDArray[np.int32],
    in_sets: NDArray[np.float64],
) -> None:
    """Measure rows of a dense matrix; ``sets``: for each column the sets that it is in, a bit each."""
    _measure_dense(np.ascontiguousarray(values), sets, n_counts, n_genes, in_sets)
