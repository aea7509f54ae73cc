"""How well batches are mixed: the entropy of their classes against that of a uniformly random batch.

Drawing ``n`` rows without replacement from ``N`` rows, of which ``K_c`` are of class ``c``, gives counts
``k_c`` that are multivariate hypergeometric. The entropy of the batch's class shares, in bits, is

    H = log2(n) - (1 / n) * sum_c k_c * log2(k_c)

and because each ``k_c`` alone is hypergeometric, its mean is exact by linearity of expectation:

    E[H] = log2(n) - (1 / n) * sum_c sum_k P(k | N, K_c, n) * k * log2(k)

No simulation and no bias correction is needed; the bias of the plug-in estimate is the same on both sides.
(Definition of entropy: C. E. Shannon, A Mathematical Theory of Communication, 1948, section 6.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import hypergeom

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["Mixing", "batch_entropy", "expected_entropy", "measure_mixing"]


@dataclass(frozen=True)
class Mixing:
    """What :func:`measure_mixing` found.

    Attributes
    ----------
    n_batches
        Batches counted; empty ones are not.
    mean_classes
        Mean number of distinct classes in a batch.
    mean_entropy
        Mean entropy of a batch's class shares, in bits.
    ideal_entropy
        What the mean would be if each batch of that size were drawn uniformly at random, in bits.
    """

    n_batches: int
    mean_classes: float
    mean_entropy: float
    ideal_entropy: float

    @property
    def share(self) -> float:
        """``mean_entropy / ideal_entropy``; 1.0 where there is one class only and so nothing to mix."""
        return self.mean_entropy / self.ideal_entropy if self.ideal_entropy > 0 else 1.0


def batch_entropy(codes: NDArray[np.integer[Any]]) -> float:
    """Entropy of the class shares of one batch, in bits.

    Parameters
    ----------
    codes
        (n,) class of each row, any integers. An empty batch has entropy 0.
    """
    if not len(codes):
        return 0.0
    counts = np.unique(codes, return_counts=True)[1]
    return _plug_in(counts)


def expected_entropy(class_counts: NDArray[np.integer[Any]], batch_size: int) -> float:
    """Mean entropy, in bits, of ``batch_size`` rows drawn uniformly without replacement.

    Parameters
    ----------
    class_counts
        (n_classes,) rows of each class in the whole.
    batch_size
        Rows drawn; more than there are counts as all of them.
    """
    counts = np.asarray(class_counts, dtype=np.int64)
    counts = counts[counts > 0]
    total = int(counts.sum())
    n = min(batch_size, total)
    if n <= 0 or len(counts) == 1:
        return 0.0
    sizes, n_alike = np.unique(counts, return_counts=True)  # classes of one size have one expectation
    terms = sum(m * _mean_k_log_k(total, int(k), n) for k, m in zip(sizes, n_alike, strict=True))
    return max(float(np.log2(n) - terms / n), 0.0)


def measure_mixing(batches: Iterable[NDArray[np.integer[Any]]]) -> Mixing:
    """Compare the batches of one epoch with uniformly random batches of the same rows.

    Parameters
    ----------
    batches
        The class of each row, batch by batch. Together they are the population the ideal is drawn from.
    """
    kept = [np.asarray(b) for b in batches if len(b)]
    if not kept:
        return Mixing(0, 0.0, 0.0, 0.0)
    counts = np.unique(np.concatenate(kept), return_counts=True)[1]
    sizes, n_alike = np.unique([len(b) for b in kept], return_counts=True)
    ideal = sum(m * expected_entropy(counts, int(n)) for n, m in zip(sizes, n_alike, strict=True))
    return Mixing(
        n_batches=len(kept),
        mean_classes=float(np.mean([len(np.unique(b)) for b in kept])),
        mean_entropy=float(np.mean([batch_entropy(b) for b in kept])),
        ideal_entropy=float(ideal) / len(kept),
    )


def _plug_in(counts: NDArray[np.integer[Any]]) -> float:
    n = counts.sum()
    return max(float(np.log2(n) - (counts * np.log2(counts)).sum() / n), 0.0)


def _mean_k_log_k(total: int, n_class: int, n_drawn: int) -> float:
    """Return E[k log2 k] for k hypergeometric; k = 0 and k = 1 add nothing."""
    k = np.arange(2, min(n_class, n_drawn) + 1)
    return float((hypergeom.pmf(k, total, n_class, n_drawn) * k * np.log2(k)).sum())
