"""Datasets of a collection as AnnData objects whose matrices stay on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import anndata as ad
import pandas as pd
import zarr

from annbatch_dask.errors import CollectionError
from annbatch_dask.formatting import first_few
from annbatch_dask.storage.folder import Folder, folder_of
from annbatch_dask.storage.frames import read_obs
from annbatch_dask.storage.versions import Listing, list_all

__all__ = ["Backed", "Opening", "load_all_aligned", "load_dataset", "refuse_missing"]

T = TypeVar("T")
_N_THREADS = 16


@dataclass(frozen=True)
class Opening:
    """Datasets that are being opened, and their files as they were when that began.

    What is read of them at once and what is read later are of one version: the files are looked at before and after,
    and again at each later read.
    """

    groups: tuple[zarr.Group, ...]
    folders: tuple[Folder, ...]
    before: tuple[Listing | None, ...]

    @classmethod
    def of(cls, groups: Sequence[zarr.Group]) -> Opening:
        """Begin; groups whose files only their store knows have none."""
        try:
            folders = tuple(map(folder_of, groups))
        except CollectionError:
            folders = ()
        return cls(tuple(groups), folders, tuple(list_all(folders)))

    def load(self, load: Callable[[zarr.Group], T], *, in_threads: bool) -> list[T]:
        """Read what is read at once.

        Raises
        ------
        CollectionChangedError
            If a file was replaced meanwhile.
        """
        n_threads = _N_THREADS if in_threads and self.folders and not self.folders[0].is_local else 1
        try:
            with ThreadPoolExecutor(n_threads, thread_name_prefix="open") as pool:
                found = list(pool.map(load, self.groups)) if n_threads > 1 else list(map(load, self.groups))
        except Exception:
            self._check()
            raise
        self._check()
        return found

    def _check(self) -> None:
        for before, after in zip(self.before, list_all(self.folders), strict=True):
            if before is not None and after is not None:
                before.check(after)

    @property
    def listings(self) -> tuple[Listing | None, ...]:
        """Files of each dataset."""
        return self.before or (None,) * len(self.groups)


def load_all_aligned(group: zarr.Group) -> ad.AnnData:
    """A dataset of a collection: ``X``, ``layers`` and ``obsm`` left on disk, all of ``obs``, the index of ``var``.

    Entries of ``layers`` and ``obsm`` that are neither dense arrays nor CSR matrices are left out; TypeError where
    ``X`` is neither.

    Examples
    --------
    >>> utils.load_all_aligned(next(iter(collection))).obs.columns.tolist()
    ['cell_type', 'n_counts', 'passed', 'donor', 'src_path']
    """
    found = load_dataset(group, None, names=True)
    return ad.AnnData(X=found.X, obs=found.obs, var=found.var, layers=found.layers, obsm=found.obsm)


@dataclass(frozen=True)
class Backed:
    """The requested elements of a dataset, with matrices on disk: like an AnnData, which always has names.

    Attributes
    ----------
    obs
        Numbered through where ``has_names`` is false.
    """

    X: Any
    obs: pd.DataFrame
    var: pd.DataFrame
    layers: Mapping[str, Any]
    obsm: Mapping[str, Any]
    has_names: bool


def load_dataset(
    group: zarr.Group, obs_columns: Sequence[str] | None, *, names: bool, needed: Sequence[str] = ()
) -> Backed:
    """Load some columns of ``obs``, of which ``needed`` must be there; None reads all. Names are read on request.

    That is by ``names``, or by a column that is none: the names may be called so.
    """
    frame = group["obs"]
    order: Any = frame.attrs["column-order"]
    refuse_missing("obs", [name for name in needed if name not in order], order)
    names = names or not set(obs_columns or ()) <= set(map(str, order))
    return Backed(
        _backed(group["X"]),
        read_obs(frame, obs_columns, names=names),
        pd.DataFrame(index=ad.io.read_elem(group["var"]).index),
        dict(_backed_entries(group, "layers")),
        dict(_backed_entries(group, "obsm")),
        has_names=names,
    )


def _backed_entries(group: zarr.Group, kind: str) -> Iterator[tuple[str, Any]]:
    parent = group.get(kind)
    for name, element in parent.members() if isinstance(parent, zarr.Group) else ():
        try:
            yield name, _backed(element)
        except TypeError:  # a data frame, say: it has no rows that could be read one by one
            continue


def _backed(element: Any) -> Any:
    encoding = element.attrs.get("encoding-type")
    if isinstance(element, zarr.Group) and encoding == "csr_matrix":
        return ad.io.sparse_dataset(element)
    if isinstance(element, zarr.Array) and encoding in (None, "array"):
        return element
    msg = f"Unrecognized encoding type {encoding} for {element.name}"
    raise TypeError(msg)


def refuse_missing(where: str, missing: Sequence[str], there: Sequence[str] | pd.Index) -> None:
    """ValueError for names that are not there, with those that are."""
    if missing:
        some, known = (first_few(map(repr, names)) for names in (missing, there))
        msg = f"{len(missing)} of the names asked for are not among the {len(there)} of {where}: {some}; it has {known}"
        raise ValueError(msg)
