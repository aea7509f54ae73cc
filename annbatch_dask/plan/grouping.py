"""groupby: within each dataset, rows stand by group, and within a group in the order of the shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.layout import Layout

__all__ = ["GroupedLayout", "Groups", "group_layout"]


@dataclass(frozen=True)
class Groups:
    """The groups that there are, in their order.

    Attributes
    ----------
    values
        Sorted distinct values of each key.
    pairs
        For each key the sorted distinct int64 numbers ``rank of earlier keys * len(values) + rank in values``,
        of which the last key's are the groups. No product of many keys' sizes, which int64 might not hold.
    """

    values: tuple[NDArray, ...] = field(repr=False)
    pairs: tuple[NDArray[np.int64], ...] = field(repr=False)

    @classmethod
    def of(cls, keys: Sequence[NDArray]) -> Groups:
        """The groups of some rows, or of some distinct ones, from their values of each key, the first counting most."""
        values, pairs = tuple(np.unique(k) for k in keys), []
        place = np.zeros(len(keys[0]), np.int64)
        for known, key in zip(values, keys, strict=True):
            combined = place * len(known) + np.searchsorted(known, key)
            pairs.append(np.unique(combined))
            place = np.searchsorted(pairs[-1], combined)
        return cls(values, tuple(pairs))

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.pairs[-1])

    def codes(self, keys: Sequence[NDArray]) -> NDArray[np.int64]:
        """(n_rows,) number of each row's group."""
        place = np.zeros(len(keys[0]), np.int64)
        for known, pairs, key in zip(self.values, self.pairs, keys, strict=True):
            place = np.searchsorted(pairs, place * len(known) + np.searchsorted(known, key))
        return place


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """A layout whose parts are groups: small ones together, large ones in pieces, none of more than ``part_rows`` rows.

    A dataset's parts follow one another in its final order; a row's place in its part is known only to who has all of
    the part's rows.

    Attributes
    ----------
    first_keys
        (n_parts,) sorted int64 key of each part's first row, see :meth:`keys`.
    n_groups
        Number of groups.
    """

    n_groups: int = 1
    first_keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64), compare=False, repr=False)

    @property
    def n_pieces(self) -> int:
        """Pieces of ``part_rows`` positions that the largest dataset has."""
        return -(-max(self.sizes) // self.part_rows)

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.first_keys)

    @property
    def first_part(self) -> NDArray[np.int64]:
        """(n_datasets + 1,) first part of each dataset, and the number of parts."""
        keys = np.arange(self.n_datasets + 1) * (self.n_groups * self.n_pieces)
        return np.searchsorted(self.first_keys, keys)

    def locate(
        self, rows: NDArray[np.int64], groups: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Part of each output row, and its position in its dataset, by which a part's groups are sorted."""
        assert groups is not None  # a grouped build has them
        dataset = np.searchsorted(self.dataset_starts, rows, side="right") - 1
        position = rows - self.dataset_starts[dataset]
        keys = self.keys(dataset, groups, position // self.part_rows)
        return np.searchsorted(self.first_keys, keys, side="right") - 1, position.astype(np.uint32)

    def keys(
        self, dataset: NDArray[np.int64], group: NDArray[np.int64], piece: NDArray[np.int64] | int
    ) -> NDArray[np.int64]:
        """One number that sorts by dataset, group and piece."""
        return (dataset * self.n_groups + group) * self.n_pieces + piece


def group_layout(layout: Layout, n_groups: int, dataset: NDArray, group: NDArray, n_rows: NDArray) -> GroupedLayout:
    """Cut parts of datasets whose groups are counted.

    Parameters
    ----------
    layout
        Layout of the same datasets.
    n_groups
        Number of groups.
    dataset, group, n_rows
        (k,) each: how many rows of a group a dataset has.
    """
    out = GroupedLayout(layout.sizes, layout.part_rows, n_groups)
    total = np.zeros(layout.n_datasets * n_groups, np.int64)
    np.add.at(total, dataset * n_groups + group, n_rows)
    keys: list[int] = []
    room, last = 0, -1
    for cell in np.flatnonzero(total).tolist():
        n, start = int(total[cell]), cell * out.n_pieces
        if n > out.part_rows:  # a piece of so many positions holds no more rows than that
            keys += range(start, start + out.n_pieces)
            room = 0
        elif n > room or cell // n_groups != last:
            keys.append(start)
            room = out.part_rows - n
        else:
            room -= n
        last = cell // n_groups
    return GroupedLayout(layout.sizes, layout.part_rows, n_groups, np.array(keys, np.int64))
