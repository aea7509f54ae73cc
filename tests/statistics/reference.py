"""Statistics of genes, worked out plainly from matrices in memory."""

import numpy as np

NAMES = (
    *("n_nonzero", "sum", "sum_of_squares"),
    *("normalized_sum", "normalized_sum_of_squares", "log_sum", "log_sum_of_squares"),
)


def sums_of(X):
    """(n_vars, 7) sums over the rows of a dense float64 matrix, in the order of ``NAMES``."""
    with np.errstate(all="ignore"):
        total = X.sum(1, keepdims=True)
        scaled = np.where(X == 0, 0, X * (1e4 / np.where(total == 0, 1, total)))  # as of a sparse matrix
        logged = np.log1p(scaled)
        parts = (X != 0, X, X**2, scaled, scaled**2, logged, logged**2)
        return np.stack([p.sum(0, dtype=np.float64) for p in parts], axis=-1)


def sums_by(X, labels):
    """The same by label; those without one are None."""
    there = [None if label is None or label != label else label for label in labels]
    return {k: sums_of(X[[t == k for t in there]]) for k in dict.fromkeys(there)}
