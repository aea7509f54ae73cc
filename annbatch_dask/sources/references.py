"""The inputs that a user hands over, checked: paths, groups and lazy AnnData to references."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import cloudpickle
import h5py
import zarr

from annbatch_dask.errors import CollectionError, SourceError
from annbatch_dask.plan.naming import check_fit, first_fit
from annbatch_dask.sources.identity import function_identity, where_of
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.storage.folder import Folder, StorageOptions, folder_of
from annbatch_dask.storage.paths import is_path, located
from annbatch_dask.storage.secrets import shown, without_secrets

if TYPE_CHECKING:
    import anndata as ad

__all__ = ["by_path", "check_portable", "references"]


def references(
    paths: Iterable[Any],
    load_adata: Callable[[Any], ad.AnnData] | None,
    storage_options: Mapping[str, Any] | None = None,
    counts: str | Mapping[str, str] = "X",
) -> tuple[SourceRef, ...]:
    """The inputs, each named once, and the matrix of each that becomes X: of all, or by path or pattern of paths."""
    if isinstance(paths, str | os.PathLike):
        msg = f"adata_paths is one path, {os.fspath(paths)!r}; give a list of paths"
        raise TypeError(msg)
    if isinstance(paths, set | frozenset | dict):
        msg = f"adata_paths is a {type(paths).__name__}; give a list, whose order is the same each time: sorted(paths)"
        raise TypeError(msg)
    if not isinstance(counts, str | Mapping):
        msg = f"counts is {counts!r}; give the name of a matrix, such as 'raw/X', or names by path"
        raise TypeError(msg)
    options = StorageOptions(storage_options or {})
    loader = "" if load_adata is None else function_identity(load_adata)
    refs = tuple(_reference(p, load_adata, options) for p in paths)
    refs = tuple(replace(r, loader=r.loader or loader) for r in refs)
    if not refs:
        msg = "adata_paths is empty; give at least one AnnData file"
        raise SourceError(msg)
    _refuse_twice(refs)
    if isinstance(counts, str):
        return tuple(replace(r, counts=counts) for r in refs)
    pairs = by_path("counts", counts, refs)
    return tuple(replace(r, counts=first_fit(pairs, r.label) or "X") for r in refs)


def by_path(what: str, given: Mapping[Any, str], refs: Sequence[SourceRef]) -> tuple[tuple[str, str], ...]:
    """What was given by path or pattern of paths of inputs, for :func:`annbatch_dask.plan.naming.first_fit`.

    Raises
    ------
    SourceError
        If one stands for no input: it says which, and that the argument ``what`` names it.
    """
    pairs = tuple((shown(os.fspath(pattern)), said) for pattern, said in given.items())
    check_fit(what, pairs, [r.label for r in refs])
    return pairs


def _refuse_twice(refs: Sequence[SourceRef]) -> None:
    """Refuse an input that is given twice, however its place is spelled."""
    spelled: dict[str, list[str]] = {}
    for ref in refs:
        spelled.setdefault(where_of(ref) or ref.label, []).append(ref.label)
    labels = [r.label for r in refs]
    for names in (*spelled.values(), *([x] * labels.count(x) for x in dict.fromkeys(labels))):
        if len(names) > 1:
            others = ", ".join(dict.fromkeys(names[1:]))
            as_well = "" if others == names[0] else f", as {others} too"
            msg = f"{names[0]} is given {len(names)} times{as_well}; give each input once"
            raise SourceError(msg)


def _reference(item: Any, load_adata: Callable[[Any], ad.AnnData] | None, options: StorageOptions) -> SourceRef:
    if is_path(item):
        path, its_options = located(item, options)
        if not path:
            msg = "an input's path is empty, which would be the current folder; give its path, or '.'"
            raise SourceError(msg)
        folder = Folder(path, StorageOptions(its_options))
        if folder.is_local:
            return SourceRef(path, os.path.abspath(folder.path), load_adata)
        return SourceRef(shown(path), path, load_adata, options=folder.options)
    if isinstance(item, zarr.Group) and load_adata is None:
        try:
            folder = folder_of(item)
        except CollectionError:  # its store alone knows its files: in memory, in a zip file, of obstore or icechunk
            return SourceRef(_name_of(item), item)
        return SourceRef(without_secrets(str(item)), folder.url, options=folder.options)
    if isinstance(item, h5py.Group):
        return _inside_a_file(item, load_adata)
    if load_adata is not None:
        return SourceRef(_name_of(item), item, load_adata)
    if _is_lazy(item):
        own = item.copy() if item.is_view else item
        return SourceRef(_label(own), own, _given)
    msg = f"an input is a path, a URL, a zarr.Group or a lazy AnnData, not {type(item).__name__}; write it to a file"
    raise TypeError(msg)


def _inside_a_file(group: h5py.Group, load_adata: Callable[[Any], ad.AnnData] | None) -> SourceRef:
    """A group of an open HDF5 file, as a modality of an .h5mu is: a worker opens the file, and goes there."""
    path = os.fsdecode(group.file.filename)
    within = group.name.rstrip("/")
    load = partial(_load_inside, name=group.name, load=load_adata)
    return SourceRef(path + within, os.path.abspath(path), load, loader=function_identity(load), within=within)


def _load_inside(path: str, *, name: str, load: Callable[[Any], ad.AnnData] | None) -> ad.AnnData:
    from anndata.experimental import read_lazy

    group = h5py.File(path, "r")[name]  # what is lazy reads from it; the last of it closes it
    return (load or read_lazy)(group)


def check_portable(refs: Iterable[SourceRef]) -> None:
    """Refuse groups that no other process can open, and functions that cannot be sent there, as a build's have to be.

    Raises
    ------
    SourceError
        With the first of them.
    """
    refs = list(refs)
    for load in {id(r.load_adata): r.load_adata for r in refs if r.load_adata is not None}.values():
        try:
            cloudpickle.dumps(load)
        except Exception as e:  # of what the function refers to, of any kind
            msg = (
                f"load_adata cannot be sent to workers ({e}); let it make what it needs itself, rather than refer to "
                "locks, open files or connections outside of it"
            )
            raise SourceError(msg) from e
    for ref in refs:
        if isinstance(ref.item, zarr.Group):
            try:
                cloudpickle.dumps(ref.item)
            except Exception as e:  # a store's, of any kind
                msg = f"{ref.label} cannot be sent to workers ({e}); give its path or URL, or write it to a file"
                raise SourceError(msg) from e


def _name_of(item: Any) -> str:
    """Return a name for an input that is no path: its repr without the memory address."""
    return _ADDRESS.sub("", without_secrets(str(item)))


_ADDRESS = re.compile(r" object at 0x[0-9a-f]+|(?<=memory://)\d+/?")


def _is_lazy(item: Any) -> bool:
    """True if it is an AnnData whose X dask will compute, so that workers can."""
    return hasattr(item, "obs") and hasattr(getattr(item, "X", None), "dask")


def _given(adata: ad.AnnData) -> ad.AnnData:
    """Return an input that is already an AnnData: nothing to load."""
    return adata


def _label(adata: ad.AnnData) -> str:
    """A name of a lazy AnnData that tells it from others: the same for the same computation on the same obs."""
    import pandas as pd
    from dask.base import tokenize

    obs = adata.obs if isinstance(adata.obs, pd.DataFrame) else adata.obs.to_memory()
    hashed = pd.util.hash_pandas_object(obs).to_numpy().tobytes()
    values = [adata.X.name, *(tokenize(adata.layers[k]) for k in sorted(k for k in adata.layers if k is not None))]
    digest = blake2b(repr(values).encode() + hashed, digest_size=4).hexdigest()
    return f"AnnData({adata.n_obs} x {adata.n_vars}, {digest})"
