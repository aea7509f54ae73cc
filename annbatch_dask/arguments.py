"""What a user hands to a collection, checked and resolved: paths to sources, sizes and switches to numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import zarr
from humanfriendly import InvalidSize, parse_size

from annbatch_dask.errors import CollectionError, LayoutError, SourceError
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.options import Options
from annbatch_dask.sources.identity import function_identity, where_of
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.storage.folder import Folder, StorageOptions, folder_of
from annbatch_dask.storage.secrets import shown, without_secrets
from annbatch_dask.storage.shards import compressor_json

if TYPE_CHECKING:
    import anndata as ad

__all__ = [
    "absolute",
    "check_portable",
    "folder_at",
    "groupby_columns",
    "references",
    "resolve_options",
    "resolve_seed",
]


def folder_at(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> Folder:
    """The folder at a path or URL, which must hold no credentials."""
    url = os.fspath(path)
    if shown(url) != url:
        msg = f"{shown(url)} was given with a user, a password or a query; give credentials in storage_options"
        raise CollectionError(msg)
    return Folder(url, StorageOptions(storage_options or {}))


def absolute(folder: Folder) -> Folder:
    """A folder by a path that other processes can open; a local one's only one, so that its lock is only one."""
    return Folder(os.path.realpath(folder.path)) if folder.is_local else folder


def references(
    paths: Iterable[Any],
    load_adata: Callable[[Any], ad.AnnData] | None,
    storage_options: Mapping[str, Any] | None = None,
    counts: str | Mapping[str, str] = "X",
) -> tuple[SourceRef, ...]:
    """The inputs, each named once, and the matrix of each that becomes X."""
    if isinstance(paths, str | os.PathLike):
        msg = f"adata_paths is one path, {os.fspath(paths)!r}; give a list of paths"
        raise TypeError(msg)
    options = StorageOptions(storage_options or {})
    loader = "" if load_adata is None else function_identity(load_adata)
    refs = tuple(replace(_reference(p, load_adata, options), loader=loader) for p in paths)
    if not refs:
        msg = "adata_paths is empty; give at least one AnnData file"
        raise SourceError(msg)
    labels = [r.label for r in refs]
    _refuse_twice(refs)
    chosen = (
        dict.fromkeys(labels, counts)
        if isinstance(counts, str)
        else {shown(os.fspath(k)): v for k, v in counts.items()}
    )
    if unknown := chosen.keys() - set(labels):
        msg = f"counts names {min(unknown)}, which is none of the {len(labels)} inputs; give their paths"
        raise SourceError(msg)
    return tuple(replace(r, counts=chosen.get(r.label, "X")) for r in refs)


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
    if isinstance(item, str | os.PathLike):
        path = os.fspath(item)
        folder = Folder(path, options)
        if folder.is_local:
            return SourceRef(path, os.path.abspath(folder.path), load_adata)
        return SourceRef(shown(path), path, load_adata, options=options)
    if isinstance(item, zarr.Group) and load_adata is None:
        try:
            folder = folder_of(item)
        except CollectionError:  # its store alone knows its files: in memory, in a zip file, of obstore or icechunk
            return SourceRef(_name_of(item), item)
        return SourceRef(without_secrets(str(item)), folder.url, options=folder.options)
    if load_adata is not None:
        return SourceRef(_name_of(item), item, load_adata)
    if _is_lazy(item):
        own = item.copy() if item.is_view else item
        return SourceRef(_label(own), own, _given)
    msg = f"an input is a path, a URL, a zarr.Group or a lazy AnnData, not {type(item).__name__}; write it to a file"
    raise TypeError(msg)


def check_portable(refs: Iterable[SourceRef]) -> None:
    """Refuse groups that no other process can open, which a build's workers would have to.

    Raises
    ------
    SourceError
        With the first of them.
    """
    for ref in refs:
        if isinstance(ref.item, zarr.Group):
            try:
                cloudpickle.dumps(ref.item)
            except Exception as e:  # a store's, of any kind
                msg = f"{ref.label} cannot be sent to workers ({e}); give its path or URL, or write it to a file"
                raise SourceError(msg) from e


def _name_of(item: Any) -> str:
    """What an input that is no path calls itself, without its address in memory, which says nothing tomorrow."""
    return _ADDRESS.sub("", without_secrets(str(item)))


_ADDRESS = re.compile(r" object at 0x[0-9a-f]+|(?<=memory://)\d+/?")


def _is_lazy(item: Any) -> bool:
    """Whether it is an AnnData whose X dask will compute, so that workers can."""
    return hasattr(item, "obs") and hasattr(getattr(item, "X", None), "dask")


def _given(adata: ad.AnnData) -> ad.AnnData:
    """What loads an input that is no file: nothing to do."""
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


def resolve_seed(seed: int | None, rng: np.random.Generator | None) -> int:
    """The seed given, or drawn from the generator given, or 0: the same call again is the same build."""
    if seed is not None and rng is not None:
        msg = f"seed={seed} and rng are both given; give one"
        raise ValueError(msg)
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        return int(rng)
    if rng is not None and not isinstance(rng, np.random.Generator):
        msg = f"rng must be a numpy.random.Generator, not {type(rng).__name__}"
        raise TypeError(msg)
    if rng is not None:
        return int(rng.integers(2**63))
    return 0 if seed is None else int(seed)


def resolve_options(  # noqa: PLR0913 - all of them are numbers of a plan
    var_subset: Iterable[str] | None,
    n_obs_per_chunk: int,
    shard_size: int | str,
    zarr_compressor: Any,
    dataset_size: int | str,
    *,
    shuffle: bool,
    seed: int,
    groupby: tuple[str, ...],
    elements: Elements,
    allow_mixed_counts: bool,
) -> Options:
    """Sizes in rows or bytes, and switches, as the plan takes them."""
    if n_obs_per_chunk < 1:
        msg = f"n_obs_per_chunk is {n_obs_per_chunk}; it must be 1 or more"
        raise LayoutError(msg)
    dataset_rows, dataset_nbytes = _size("dataset_size", dataset_size)
    shard_rows, shard_nbytes = _size("shard_size", shard_size)
    return Options(
        seed=seed,
        shuffle=shuffle,
        dataset_rows=dataset_rows,
        dataset_nbytes=dataset_nbytes,
        n_obs_per_chunk=n_obs_per_chunk,
        shard_rows=shard_rows,
        shard_nbytes=shard_nbytes,
        compressor=compressor_json(zarr_compressor),
        var_subset=None if var_subset is None else tuple(map(str, var_subset)),
        groupby=groupby,
        elements=elements,
        allow_mixed_counts=allow_mixed_counts,
    )


def groupby_columns(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of columns, each once."""
    if names is None:
        return ()
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found:
        msg = "groupby must contain at least one column; None sorts by none"
        raise ValueError(msg)
    if len(set(found)) < len(found):
        msg = f"groupby columns must be unique; got {list(found)}"
        raise ValueError(msg)
    return found


def _size(name: str, value: int | str) -> tuple[int | None, int | None]:
    """Rows, or bytes of a string in annbatch's units: powers of 1024."""
    if isinstance(value, str):
        try:
            return None, int(parse_size(value, binary=True))
        except InvalidSize as e:
            msg = f"{name} is {value!r}; give a number of cells, or a size such as '2GB'"
            raise LayoutError(msg) from e
    if value < 1:
        msg = f"{name} is {value}; it must be 1 or more"
        raise LayoutError(msg)
    return int(value), None
