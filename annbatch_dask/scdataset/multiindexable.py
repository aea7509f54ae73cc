"""Several collections of the same rows, indexed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from annbatch_dask.scdataset.strategy import count_rows

__all__ = ["MultiIndexable"]


class MultiIndexable:
    """Collections of equal length side by side: ``m[rows]`` takes the rows of each.

    ``m[0]`` and ``m["X"]`` are members, ``m[rows]`` with a slice, an array, a list or a mask is a MultiIndexable of
    their rows. ``len(m)`` counts rows, iteration yields members.

    Parameters
    ----------
    indexables
        The members; or one dictionary of them by name.
    names
        Names for them.
    unstructured
        Whatever else shall travel along, unchanged.
    named
        The members by name, instead.

    Raises
    ------
    TypeError
        If there are no members, some with and some without names, or one without length.
    ValueError
        If lengths differ, or the number of names does, or a name comes twice.

    Examples
    --------
    >>> pairs = scdataset.MultiIndexable(rna=np.arange(10), protein=np.arange(10) * 100)
    >>> pairs[[1, 3]]["protein"].tolist()
    [100, 300]
    """

    def __init__(
        self,
        *indexables: Any,
        names: Sequence[str] | None = None,
        unstructured: dict[str, Any] | None = None,
        **named: Any,
    ) -> None:
        if unstructured is not None and not isinstance(unstructured, dict):
            msg = f"unstructured must be a dictionary, got {type(unstructured).__name__}"
            raise TypeError(msg)
        if indexables and named:
            msg = "give the members either in order or by name, not both"
            raise TypeError(msg)
        if len(indexables) == 1 and isinstance(indexables[0], dict) and names is None:
            named, indexables = indexables[0], ()
        members = list(named.values()) or list(indexables)
        if not members:
            msg = "a MultiIndexable needs at least one member"
            raise TypeError(msg)
        self._set(members, list(named) or (None if names is None else list(names)), dict(unstructured or {}))

    def _set(self, members: list[Any], names: list[Any] | None, unstructured: dict[str, Any]) -> None:
        lengths = [_length(member) for member in members]
        if len(set(lengths)) > 1:
            msg = f"all members must have the same length, got {lengths}"
            raise ValueError(msg)
        if names is not None and len(names) != len(members):
            msg = f"there are {len(names)} names for {len(members)} members"
            raise ValueError(msg)
        if names is not None and len(set(names)) < len(names):
            msg = f"every member needs a name of its own, got {names}"
            raise ValueError(msg)
        self._members, self._names, self._unstructured = members, names, unstructured

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Integral) and not isinstance(key, bool | np.bool_):
            return self._members[int(key)]
        if self._names is not None and isinstance(key, str):
            if key not in self._names:
                msg = f"no member is called {key!r}; there are {self._names}"
                raise KeyError(msg)
            return self._members[self._names.index(key)]
        if isinstance(key, str):
            msg = f"members have no names, so none is called {key!r}"
            raise KeyError(msg)
        if np.ndim(key) > 1 or key is None or isinstance(key, tuple | bool | np.bool_) or key is Ellipsis:
            msg = f"rows are given by a slice, a list, a mask or an array of one dimension, got {key!r}"
            raise IndexError(msg)
        try:
            return self._with([_take(member, key) for member in self._members])
        except (IndexError, TypeError) as error:
            msg = f"cannot take rows {key!r} of every member: {error}"
            raise IndexError(msg) from error

    def _with(self, members: list[Any]) -> MultiIndexable:
        """Other members under the same names."""
        other = MultiIndexable.__new__(MultiIndexable)
        other._set(members, self._names, self._unstructured)
        return other

    def __len__(self) -> int:
        return _length(self._members[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members)

    def __repr__(self) -> str:
        members = f"count={self.count}" if self._names is None else f"names={self._names}"
        extra = f", unstructured_keys={self.unstructured_keys}" if self._unstructured else ""
        return f"MultiIndexable({members}, samples={len(self)}{extra})"

    @property
    def names(self) -> list[Any] | None:
        """Names of the members, or None."""
        return None if self._names is None else list(self._names)

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self._members)

    @property
    def unstructured(self) -> dict[str, Any]:
        """Values that are carried unchanged."""
        return self._unstructured

    @property
    def unstructured_keys(self) -> list[str]:
        """Its keys."""
        return list(self._unstructured)

    def keys(self) -> list[Any]:
        """Names of the members, or their numbers."""
        return list(range(self.count)) if self._names is None else list(self._names)

    def values(self) -> list[Any]:
        """The members."""
        return list(self._members)

    def items(self) -> list[tuple[Any, Any]]:
        """Names, or numbers, and members."""
        return list(zip(self.keys(), self._members, strict=True))

    def to(self, *args: Any, **kwargs: Any) -> MultiIndexable:
        """The members that have a ``to``, as tensors do, moved; the others as they are."""
        return self._with([m.to(*args, **kwargs) if hasattr(m, "to") else m for m in self._members])

    def pin_memory(self) -> MultiIndexable:
        """The members that can be pinned, pinned; what a DataLoader with ``pin_memory=True`` calls."""
        return self._with([m.pin_memory() if hasattr(m, "pin_memory") else m for m in self._members])


def _length(member: Any) -> int:
    try:
        return count_rows(member)
    except TypeError:
        msg = f"a member of type {type(member).__name__} has no length"
        raise TypeError(msg) from None


def _take(member: Any, key: Any) -> Any:
    if hasattr(member, "iloc"):
        return member.iloc[key]
    if isinstance(member, list | tuple) and not isinstance(key, slice):
        rows = np.asarray(key)
        if rows.dtype == bool and len(rows) != len(member):
            msg = f"a mask of {len(rows)} rows does not fit a member of {len(member)}"
            raise IndexError(msg)
        return [member[i] for i in (np.flatnonzero(rows) if rows.dtype == bool else rows).tolist()]
    return member[key]
