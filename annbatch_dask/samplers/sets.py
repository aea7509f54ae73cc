"""Sets of cells of one group, each beside a set of its controls: for models of populations of cells."""

from __future__ import annotations

from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annbatch_dask.errors import SelectionError
from annbatch_dask.flags import check_flag
from annbatch_dask.formatting import first_few
from annbatch_dask.order.epoch import Epoch
from annbatch_dask.order.keys import Key, Shuffled, generator
from annbatch_dask.order.rows import Blocks
from annbatch_dask.samplers.base import DRAW, ORDER, SeededSampler
from annbatch_dask.samplers.controls import Controls, number_groups
from annbatch_dask.seeds import Seed
from annbatch_dask.sizes import check_positive, check_whole

__all__ = ["CellSets"]

Ints = NDArray[np.int64]
_WINDOW = 16_384
"""Rows loaded together by default, about."""


class CellSets(SeededSampler):
    """Sets of ``set_size`` cells of one group, in random order, each followed by as many controls where there are any.

    Models of perturbations by sets of cells, such as Arc's State, learn from batches of these: the cells of a set have
    the same cell type and perturbation, say, and its controls the same cell type. With controls,
    ``X.reshape(-1, 2, set_size, n_vars)`` is what a batch holds: of each set its cells, then its controls, the k-th
    drawn for the k-th cell. Without, ``X.reshape(-1, set_size, n_vars)``.

    A pass has every cell that is no control once, but for what fills sets up: the last set of a group, which may be
    short, takes other cells of its group a second time, all alike, and repeats some only where there are not enough.

    Parameters
    ----------
    set_size
        Cells in a set.
    sets_per_batch
        Sets in a batch.
    groups
        (n_obs,) what the cells of a set have in common: a column of obs, or a frame of several.
    is_control
        (n_obs,) whether a row is a control, of which no sets are made; None for no controls.
    match
        (n_obs,) what a cell and its control have in common, given like ``groups``; each has one drawn from all that
        match, with replacement.
    small
        What to do with groups of fewer than ``min_cells`` cells, in sets of which cells would stand many times:
        ``"error"``, or ``"drop"`` to leave them out.
    min_cells
        See there.
    short
        ``"fill"`` sets up that are short, or ``"drop"`` them; then groups of less than a set are small, too.
    chunk_size
        Cells of a group that lie next to each other and are read together, where that is possible: more than 1 is fast
        on a collection that was built with ``groupby=``, and mixes less.
    preload_nsets
        Sets in one load window; by default of about 16,384 rows.
    drop_last
        Leave out the last batch if it is not full.
    seed
        Fixes the order: a non-negative integer, or a generator to draw one from; by default one is drawn from the
        system.
    rng
        annbatch's name of ``seed``: a generator.

    Raises
    ------
    SelectionError
        If a group is small, or has cells whose match has no control; if no group is left.

    References
    ----------
    Adduri et al. (2025), "Predicting cellular responses to perturbation across diverse contexts with State", bioRxiv
    2025.06.26.661135.

    Examples
    --------
    >>> obs = collection.obs(["cell_type", "donor"], names=False)
    >>> sampler = samplers.CellSets(8, 4, groups=obs, is_control=obs["cell_type"] == "T", match=obs["donor"])
    >>> batch = next(iter(Loader(batch_sampler=sampler).use_collection(collection)))
    >>> batch["X"].shape[0], batch["obs"]["cell_type"].iloc[:8].nunique(), set(batch["obs"]["cell_type"].iloc[8:16])
    (64, 1, {'T'})
    """

    _takes_mask = False

    def __init__(  # noqa: PLR0913
        self,
        set_size: int,
        sets_per_batch: int,
        *,
        groups: Any,
        is_control: ArrayLike | None = None,
        match: Any = None,
        small: Literal["error", "drop"] = "error",
        min_cells: int = 2,
        short: Literal["fill", "drop"] = "fill",
        chunk_size: int = 1,
        preload_nsets: int | None = None,
        drop_last: bool = False,
        rng: np.random.Generator | None = None,
        seed: Seed | None = None,
    ) -> None:
        for name, value in (("set_size", set_size), ("sets_per_batch", sets_per_batch), ("chunk_size", chunk_size)):
            check_positive(name, value)
        for name, chosen, known in (("small", small, ("error", "drop")), ("short", short, ("fill", "drop"))):
            if chosen not in known:
                msg = f"{name} must be {known[0]!r} or {known[1]!r}, got {chosen!r}"
                raise ValueError(msg)
        if (is_control is None) != (match is None):
            msg = "is_control says which cells are controls, and match which of them are a cell's: give both, or none"
            raise ValueError(msg)
        self._set_size, self._chunk_size, self._sets_per_batch = map(int, (set_size, chunk_size, sets_per_batch))
        self._drop_last, self._fills = check_flag("drop_last", drop_last), short == "fill"
        self._controls = None if is_control is None else Controls.of(is_control, match)
        self._preload_nsets = self._checked_preload(preload_nsets)
        codes, names = number_groups(groups)
        self._n_obs = len(codes)
        if self._controls is not None and len(self._controls.groups) != self._n_obs:
            msg = f"groups has {self._n_obs} rows, match {len(self._controls.groups)}; both need one value per row"
            raise SelectionError(msg)
        self._take_groups(codes, names, max(check_whole("min_cells", min_cells), 1 if self._fills else set_size), small)
        self._epochs = self.epoch_counter  # before any worker is started
        self.take_seed(seed, rng)

    def _checked_preload(self, preload_nsets: int | None) -> int:
        if preload_nsets is None:
            return max(1, _WINDOW // (self.n_together * self._sets_per_batch)) * self._sets_per_batch
        check_positive("preload_nsets", preload_nsets)
        if preload_nsets % self._sets_per_batch:
            msg = (
                f"preload_nsets must be divisible by sets_per_batch: {preload_nsets} % {self._sets_per_batch} = "
                f"{preload_nsets % self._sets_per_batch}"
            )
            raise ValueError(msg)
        return int(preload_nsets)

    def _take_groups(self, codes: Ints, names: Any, n_least: int, small: str) -> None:
        """Sort the cells by group; SelectionError if there are groups of too few."""
        rows = np.arange(self._n_obs) if self._controls is None else np.flatnonzero(~self._controls.is_control)
        n_each = np.bincount(codes[rows], minlength=len(names))
        is_small = (n_each > 0) & (n_each < n_least)
        if is_small.any() and small == "error":
            some = first_few(f"{names[g]!r} ({n_each[g]})" for g in np.flatnonzero(is_small).tolist())
            msg = (
                f"{int(is_small.sum())} of {int((n_each > 0).sum())} groups have fewer than {n_least} cells: {some}; "
                "leave them out with small='drop', or, where cells may stand in a set many times, with min_cells=1 let "
                "them fill sets"
            )
            raise SelectionError(msg)
        rows = rows[~is_small[codes[rows]]]
        if not len(rows):
            msg = f"no group has {n_least} cells or more, of {self._n_obs:,} rows; lower min_cells or set_size"
            raise SelectionError(msg)
        self._rows = rows[np.argsort(codes[rows], kind="stable")]
        n_cells = n_each[(n_each > 0) & ~is_small]
        n_sets = -(-n_cells // self._set_size) if self._fills else n_cells // self._set_size
        self._first_row = np.concatenate([[0], np.cumsum(n_cells)])
        self._first_set = np.concatenate([[0], np.cumsum(n_sets)])

    @property
    def batch_size(self) -> int:
        """Rows in a batch, controls counted."""
        return self._sets_per_batch * self.n_together

    @property
    def n_together(self) -> int:
        """Rows of a set, and of its controls."""
        return self._set_size * (1 if self._controls is None else 2)

    @property
    def n_sets(self) -> int:
        """Sets of a pass."""
        return int(self._first_set[-1])

    @property
    def shuffle(self) -> bool:
        """Always True."""
        return True

    def n_batches(self, n_obs: int) -> int:  # noqa: ARG002 - it was made for these rows
        """Batches of one pass."""
        return self.n_sets // self._sets_per_batch if self._drop_last else -(-self.n_sets // self._sets_per_batch)

    def validate(self, n_obs: int) -> None:
        """ValueError unless it was made for as many rows."""
        if n_obs != self._n_obs:
            msg = f"groups has {self._n_obs} rows, which does not match loader n_obs ({n_obs})"
            raise ValueError(msg)

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        own = (self._set_size, self._chunk_size, self._preload_nsets, self._drop_last, self._fills)
        return (*super().state_identity(), *own, self._digest)

    @cached_property
    def _digest(self) -> str:
        parts = [self._rows, self._first_row]
        if self._controls is not None:
            parts += [self._controls.rows, self._controls.groups]
        return blake2b(b"".join(part.tobytes() for part in parts), digest_size=8).hexdigest()

    def epoch(self, n_obs: int, key: Key) -> Epoch:  # noqa: ARG002
        """The pass with this key."""
        n_rows, window = self.n_sets * self.n_together, self._preload_nsets * self.n_together
        take = partial(self._take, key, Shuffled(self.n_sets, key))
        return Epoch(n_rows, window, self.batch_size, self._drop_last, take, _in_order)

    def _take(self, key: Key, order: Shuffled, k: int, start: int, stop: int) -> Ints:
        """The rows at these positions of the pass, whole sets with their controls."""
        sets = order.at(np.arange(start // self.n_together, stop // self.n_together))
        cells = np.concatenate([self._cells_of(key, number) for number in sets.tolist()])
        if self._controls is None:
            return cells
        drawn = self._controls.draw(generator(key, DRAW, k), cells)
        shape = (len(sets), 1, self._set_size)
        return np.concatenate([cells.reshape(shape), drawn.reshape(shape)], axis=1).ravel()

    def _cells_of(self, key: Key, number: int) -> Ints:
        """The rows of one set."""
        group = int(np.searchsorted(self._first_set, number, side="right")) - 1
        rows = self._rows[self._first_row[group] : self._first_row[group + 1]]
        own = int(generator(key, ORDER, group).integers(2**63))
        order = Blocks(len(rows), min(self._chunk_size, len(rows)), (own, key[1]))
        start = (number - int(self._first_set[group])) * self._set_size
        stop = min(start + self._set_size, len(rows))
        places = order.take(start, stop)
        n_missing = self._set_size - len(places)
        if n_missing:
            n_others = start or len(places)  # of a set alone, its own
            drawn = generator(key, DRAW, self.n_sets, number).choice(n_others, n_missing, n_missing > n_others)
            places = np.concatenate([places, np.concatenate([order.take(p, p + 1) for p in drawn.tolist()])])
        return rows[places]


def _in_order(_: int, n_rows: int) -> Ints:
    return np.arange(n_rows)
