"""Filters of HDF5 that are not part of it: those of hdf5plugin, such as Zstandard and Blosc."""

from __future__ import annotations

import contextlib
import functools

import h5py

__all__ = ["missing_filter", "register_filters"]


@functools.cache
def register_filters() -> None:
    """Have HDF5 know the filters of hdf5plugin in this process, if that is installed.

    It registers them when it is imported. Who writes files by it has done so in a process of their own, not in the
    workers that read these files.
    """
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401


def missing_filter(group: h5py.Group) -> str:
    """A dataset of a group and the filter it is stored with, if HDF5 does not know that; "" if all can be read."""

    def look(name: str, found: h5py.Group | h5py.Dataset) -> str | None:
        if not isinstance(found, h5py.Dataset):
            return None
        stored = found.id.get_create_plist()
        for code, *_, what in map(stored.get_filter, range(stored.get_nfilters())):
            if not h5py.h5z.filter_avail(code):
                return f"{name} is stored with filter {code} ({what.decode(errors='replace') or 'without a name'})"
        return None

    return group.visititems(look) or ""
