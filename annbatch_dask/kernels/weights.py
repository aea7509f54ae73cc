"""Weighted draws: the row that a share of the sum of all weights falls on."""

import numpy as np

from annbatch_dask.kernels.compiled import compiled

__all__ = ["find_rows", "sum_spans"]


@compiled
def sum_spans(weights: np.ndarray, span: int) -> np.ndarray:
    """(n_spans + 1,) float64, the sum of all weights before each ``span`` of the (n,) float64 weights."""
    n_spans = (weights.shape[0] + span - 1) // span
    bounds = np.zeros(n_spans + 1)
    for s in range(n_spans):
        total = 0.0
        for i in range(s * span, min((s + 1) * span, weights.shape[0])):
            total += weights[i]
        bounds[s + 1] = bounds[s] + total
    return bounds


@compiled
def find_rows(weights: np.ndarray, span: int, bounds: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(k,) int64, the row at which the running sum of weights exceeds each of the (k,) targets; never one of weight 0.

    Parameters
    ----------
    weights, span, bounds
        As for, and from, :func:`sum_spans`; the sum is positive.
    targets
        (k,) float64 from 0 to the sum.
    """
    rows = np.empty(targets.shape[0], np.int64)
    for t in range(targets.shape[0]):
        s = np.searchsorted(bounds, targets[t], side="right") - 1
        s = min(s, bounds.shape[0] - 2)
        while bounds[s + 1] == bounds[s]:  # only where the target is the sum itself
            s -= 1
        reached = bounds[s]
        row = -1
        for i in range(s * span, min((s + 1) * span, weights.shape[0])):
            if weights[i] > 0:
                row = i  # rounding may leave the target beyond the last one
                reached += weights[i]
                if reached > targets[t]:
                    break
        rows[t] = row
    return rows
