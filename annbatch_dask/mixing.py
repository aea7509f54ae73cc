"""Measures how well batches are mixed: the entropy of their classes relative to uniformly random batches.

Drawing ``n`` rows without replacement from ``N`` rows, of which ``K_c`` are of class ``c``, gives counts
``k_c`` that are multivariate hypergeometric. The entropy of the batch's class shares, in bits, is

    H = log2(n) - (1 / n) * sum_c k_c * log2(k_c)

and because each ``k_c`` alone is hypergeometric, its mean is exact by linearity of expectation:

    E[H] = log2(n) - (1 / n) * sum_c sum_k P(k | N, K_c, n) * k * log2(k)

No simulation and no bias correction is needed; the bias of the plug-in estimate is the same on both sides.
(Definition of entropy: C. E. Shannon, A Mathematical Theory of Communication, 1948, section 6.)

Examples
--------
>>> codes = collection.obs(["cell_type"], names=False)["cell_type"].cat.codes.to_numpy()
>>> batches = mixing.sampled_batches(samplers.RandomSampler(16, 8, 64, seed=0), codes)
>>> mixing.measure_mixing(batches).share > 0.9
True
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from annbatch_dask.errors import MissingPackageError, StorageError
from annbatch_dask.order.planned import expand
from annbatch_dask.storage.filesystems import check_parent

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from annbatch_dask.samplers.sampler import Sampler

__all__ = ["Mixing", "batch_entropy", "expected_entropy", "measure_mixing", "plot_mixing", "sampled_batches"]


@dataclass(frozen=True)
class Mixing:
    """Result of :func:`measure_mixing`.

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
    entropies
        Entropy of each batch, in bits, in their order.
    """

    n_batches: int
    mean_classes: float
    mean_entropy: float
    ideal_entropy: float
    entropies: tuple[float, ...]

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
    population: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    n_classes, entropies = 0, []
    for batch in batches:
        if len(batch):
            classes, counts = np.unique(np.asarray(batch), return_counts=True)
            population.update(dict(zip(classes.tolist(), counts.tolist(), strict=True)))
            sizes[len(batch)] += 1
            n_classes += len(classes)
            entropies.append(_plug_in(counts))
    if not entropies:
        return Mixing(0, 0.0, 0.0, 0.0, ())
    class_counts = np.array(list(population.values()))
    ideal = sum(n_alike * expected_entropy(class_counts, size) for size, n_alike in sizes.items())
    n = len(entropies)
    return Mixing(n, n_classes / n, float(np.mean(entropies)), ideal / n, tuple(entropies))


def sampled_batches(sampler: Sampler, codes: NDArray[np.integer[Any]], *, epoch: int = 0) -> Iterator[NDArray[Any]]:
    """Yield the classes in each batch that a sampler would make in an epoch; no data is read.

    Parameters
    ----------
    sampler
        Any; ``loader.batch_sampler`` is that of a loader. It is not moved on to its next epoch.
    codes
        (n_obs,) class of each row, any integers.
    epoch
        Which epoch.
    """
    sampler.validate(len(codes))
    for planned in sampler.plan_requests(len(codes), epoch):
        request = planned.make()
        rows = expand(request["requests"])
        yield from (codes[rows[split]] for split in request["splits"])


def load_figure() -> Any:
    """Matplotlib's ``Figure``; MissingPackageError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = f"pictures are drawn by matplotlib, which cannot be imported ({error}): pip install matplotlib"
        raise MissingPackageError(msg) from error
    return Figure


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse the path of a picture that could not be drawn, before what is to be in it is worked out.

    Raises
    ------
    StorageError
        If it is a folder, or in none, or its suffix is no format that matplotlib writes.
    MissingPackageError
        Without matplotlib.
    """
    check_parent(str(path))
    formats = load_figure()().canvas.get_supported_filetypes()
    if (suffix := PurePath(path).suffix) and suffix[1:].lower() in formats:
        return
    known = ", ".join(f".{name}" for name in formats)
    msg = f"{path} cannot be drawn: {suffix!r} is no format of a picture; end it in one of {known}"
    raise StorageError(msg)


def plot_mixing(mixing: Mixing, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw the entropy of each batch, and the ideal as a line.

    Parameters
    ----------
    mixing
        What :func:`measure_mixing` found.
    path
        Where to; its suffix is the format.
    title
        Title of the figure.

    Raises
    ------
    MissingPackageError
        Without matplotlib.
    ValueError
        If matplotlib cannot write that format.
    """
    figure = load_figure()(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(mixing.entropies, ".", label=f"batches, {mixing.mean_entropy:.3f} bits on average")
    axes.axhline(mixing.ideal_entropy, color="black", label=f"drawn at random, {mixing.ideal_entropy:.3f} bits")
    axes.set(title=title, xlabel="batch", ylabel="entropy, bits", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _plug_in(counts: NDArray[np.integer[Any]]) -> float:
    n = counts.sum()
    return max(float(np.log2(n) - (counts * np.log2(counts)).sum() / n), 0.0)


def _mean_k_log_k(total: int, n_class: int, n_drawn: int) -> float:
    """Return E[k log2 k] for k hypergeometric; k = 0 and k = 1 add nothing."""
    from scipy.stats import hypergeom  # takes more than a second, which every import of a collection would pay

    k = np.arange(2, min(n_class, n_drawn) + 1)
    return float((hypergeom.pmf(k, total, n_class, n_drawn) * k * np.log2(k)).sum())
