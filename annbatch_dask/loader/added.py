"""The datasets that were added to a loader, with their obs and var."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.abc import CSRDataset
from typing_extensions import TypeVar

from annbatch_dask.chunks.cache import RangeCache
from annbatch_dask.loader.backing import RowSource, ValueBounds, make_source
from annbatch_dask.loader.casts import Recorded, recorded_values, values_of
from annbatch_dask.loader.contents import BatchSpec, Key
from annbatch_dask.loader.obs import Labels, ObsTable
from annbatch_dask.loader.obs_tables import JoinedTables
from annbatch_dask.loader.reading import Backed, Opening, load_dataset
from annbatch_dask.loader.selection import Selected, Where, select
from annbatch_dask.sizes import check_positive
from annbatch_dask.storage.frames import plainly_named
from annbatch_dask.storage.versions import Listing

if TYPE_CHECKING:
    import anndata as ad


__all__ = ["AddedData"]

BackingArray_T = TypeVar("BackingArray_T", default=Any)

_MAX_PLAIN_NAMES = 1_000_000
"""Obs names of a collection of more rows are kept compressed, which takes a millisecond of Python a window."""
_ACCEPTED = (zarr.Array, CSRDataset, sp.csr_matrix, sp.csr_array, np.ndarray)


class AddedData(Generic[BackingArray_T]):
    """The datasets of a loader, and what is known of their rows."""

    _wanted: BatchSpec
    _all_of: set[str]
    _where: Where | None
    _where_columns: Sequence[str]
    _cache: RangeCache | None
    _passes: set[object]

    def __init__(self) -> None:
        # Replaced, never changed in place: a shallow copy keeps what it was copied with.
        self._sources: tuple[RowSource, ...] = ()
        self._beside: dict[Key, tuple[RowSource, ...]] = {}
        self._named: frozenset[str] = frozenset()  # what was said to be left out
        self._dataset_type: type[Any] | None = None
        self._tables: tuple[ObsTable, ...] | None = None
        self._labels: Labels | None = None
        self._joined: JoinedTables | None = None
        self._var: pd.DataFrame | None = None
        self._collection_added = False
        self._lease: Any = None
        self._collection_digest = ""
        self._collection_version: int | None = None
        self._selected: Selected | None = None

    @property
    def dataset_type(self) -> type[Any]:
        """Type of the datasets; IndexError before any was added."""
        if self._dataset_type is None:
            msg = "No datasets added yet"
            raise IndexError(msg)
        return self._dataset_type

    @property
    def n_obs(self) -> int:
        """Rows of all datasets."""
        return sum(source.n_obs for source in self._sources)

    @property
    def n_selected(self) -> int:
        """Rows that take part in a pass: all, unless ``where`` was given."""
        selected = self._select()
        return self.n_obs if selected is None else len(selected)

    def _select(self) -> Selected | None:
        if self._where is not None and self._selected is None:
            self._selected = select(self._where, self._table, self.n_obs)
        return self._selected

    @property
    def _table(self) -> ObsTable | None:
        """Table of obs over all datasets, joined when it is used first; None without."""
        if self._tables is not None and len(self._tables) > 1:
            self._tables = (ObsTable.joined(self._tables),)
        return None if self._tables is None else self._tables[0]

    @property
    def _obs(self) -> list[pd.DataFrame] | None:
        """A frame for each dataset, made again each time; scvi-tools asks for it."""
        table = self._table
        return None if table is None else table.frames()

    def _label(self) -> Labels | None:
        """The label columns as codes, made once for all passes."""
        table = self._table
        if self._labels is None and table is not None and self._wanted.obs_codes:
            selected = self._select()
            self._labels = Labels(table, self._wanted.obs_codes, None if selected is None else selected.rows)
        return self._labels

    def _join(self) -> JoinedTables | None:
        """The rows of ``obs_tables``, looked up once for all passes."""
        table = self._table
        if self._joined is None and table is not None and self._wanted.obs_tables:
            selected = self._select()
            self._joined = JoinedTables(table, self._wanted.obs_tables, None if selected is None else selected.rows)
        return self._joined

    @property
    def n_vars(self) -> int:
        """Number of genes: columns of ``X`` in a batch."""
        self._check_filled()
        chosen = self._wanted.var_names
        return self._sources[0].shape[1] if chosen is None else len(chosen)

    @property
    def n_var(self) -> int:
        """Number of genes, by annbatch's name."""
        return self.n_vars

    def _check_filled(self) -> None:
        if not self._sources:
            msg = (
                "No datasets added yet: call use_collection, add_adatas or add_datasets first "
                "(as annbatch says it: Number of datasets must be greater than 1, got 0)"
            )
            raise ValueError(msg)

    @property
    def var(self) -> pd.DataFrame | None:
        """The ``var`` of every batch."""
        chosen = None if self._var is None else self._wanted.select(self._var)
        return self._var if self._var is None or chosen is None else self._var.iloc[chosen]

    @property
    def obs_categories(self) -> dict[str, pd.Index[Any]]:
        """Categories of each column of ``obs_codes``; grows when datasets are added.

        Those that were given; else the categories of all datasets in order of first appearance, False and True, or
        the sorted distinct values of any other column that is not categorical.
        """
        labels = self._label()
        return {} if labels is None else labels.categories

    # --- adding data

    def use_collection(self, collection: Any, *, load_adata: Callable[[zarr.Group], ad.AnnData] | None = None) -> Self:
        """Add all datasets of a collection, in its order.

        Parameters
        ----------
        collection
            A :class:`annbatch_dask.DatasetCollection` (annbatch's own works too).
        load_adata
            From a dataset's group to an AnnData whose matrices are backed; by default all that is asked for.

        Raises
        ------
        CollectionError
            If a dataset was edited since the build, and has another number of rows.
        IntegrityError
            If a file of the collection is missing or damaged. A damaged chunk of a matrix, which is found when it is
            read, ends the iteration with this error before any of its rows is delivered.
        CollectionChangedError
            If another collection stands at its path by now. A loader continues with the files that it opened, or an
            iteration ends with this error: every read compares the version of its file with that of now.
        """
        if not hasattr(collection, "is_empty"):
            msg = f"use_collection takes a DatasetCollection, got {collection!r}; open it: DatasetCollection(path)"
            raise TypeError(msg)
        if collection.is_empty:
            msg = (
                f"there is no collection at {getattr(collection, 'path', collection)}, or it has no cells; build it "
                "with add_adatas (as annbatch says it: DatasetCollection is empty)"
            )
            raise ValueError(msg)
        if self._collection_added:
            msg = (
                "You should not add multiple collections, nor one twice: each was shuffled on its own. Make a new "
                "Loader, shuffle them into one, or use add_adatas if rows of different collections need not be mixed"
            )
            raise RuntimeError(msg)
        names = self._wanted.obs_columns != ()
        needed = self._wanted.needed
        load = load_adata or partial(load_dataset, obs_columns=self._columns_to_read(), names=names, needed=needed)
        if is_ours := hasattr(collection, "lease"):  # annbatch's has none
            self._lease = collection.lease()
        opening = Opening.of(collection.groups() if is_ours else list(collection))
        edited = collection.check(None if load_adata is not None else self._columns_to_read()) if is_ours else {}
        if edited:
            opening = replace(opening, groups=tuple(collection.groups(edited)))
        manifest = getattr(collection, "manifest", None)  # annbatch's has none
        recorded = recorded_values(manifest)
        adatas = opening.load(load, in_threads=load_adata is None)
        with self._all_or_nothing():
            for adata, listing, group in zip(adatas, opening.listings, opening.groups, strict=True):
                is_edited = group.path.rpartition("/")[2] in edited  # then what is recorded of its values is of others
                self._add_adata(adata, {} if is_edited else recorded, listing, is_ours=True)
                if self._tables is not None and self.n_obs > _MAX_PLAIN_NAMES:
                    self._tables = tuple(table.packed() for table in self._tables)
        self._collection_added = True
        self._collection_digest = "" if manifest is None else manifest.identity
        self._collection_version = None if manifest is None else manifest.version
        _warn_of_ranks(self._tables or (), [name for name, given in self._wanted.obs_codes.items() if given is None])
        return self

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Let a call that fails leave the loader as it was: who mends it and calls again would have some rows twice."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    def _columns_to_read(self) -> tuple[str, ...] | None:
        """Columns of obs that batches or the selection need; None for all."""
        columns = self._wanted.columns
        return None if columns is None else tuple(dict.fromkeys((*columns, *self._where_columns)))

    def add_adatas(self, adatas: Sequence[ad.AnnData]) -> Self:
        """Add several AnnData objects; see :meth:`add_adata`."""
        check_positive("Number of adatas", len(adatas))
        with self._all_or_nothing():
            for adata in adatas:
                self._add_adata(adata, {})
        return self

    def add_adata(self, adata: ad.AnnData) -> Self:
        """Add the ``X``, ``obs``, ``var`` and what else is asked for; an ``obs`` without columns counts as none."""
        self._add_adata(adata, {})
        return self

    def _add_adata(
        self, adata: ad.AnnData | Backed, recorded: Recorded, listing: Listing | None = None, *, is_ours: bool = False
    ) -> None:
        """Add a dataset. If the loader alone holds its obs, columns that are not needed are dropped."""
        if not isinstance(adata.X, _ACCEPTED):
            msg = f"Cannot add an AnnData with X of type {type(adata.X)}; use one of {_names(_ACCEPTED)}"
            raise TypeError(msg)
        for kind in self._all_of:
            self._want_all(kind, adata)
        self._say_what_is_left_out(_left_out(adata, self._wanted))
        obs = adata.obs if adata.obs is not None and len(adata.obs.columns) else None
        beside = {key: _element(adata, key) for key in self._wanted.keys}
        has_names = not isinstance(adata, Backed) or adata.has_names
        table = self._compact(obs, has_names=has_names) if is_ours and obs is not None else None
        self._add(adata.X, obs, adata.var, beside, listing, values_of(adata.X, recorded), table)

    def _want_all(self, kind: str, adata: ad.AnnData | Backed) -> None:
        """Ask for everything of ``layers`` or ``obsm`` that the first AnnData has; the others must have the same."""
        there = tuple(sorted(k for k, v in getattr(adata, kind).items() if k is not None and isinstance(v, _ACCEPTED)))
        if not self._sources:
            only: dict[str, Any] = {kind: there}
            self._wanted = replace(self._wanted, **only)
        elif there != (asked := getattr(self._wanted, kind)):
            msg = (
                f"{kind}='all' needs the same {kind} in all datasets: the first has {list(asked)}, the new one "
                f"{list(there)}; name those to carry, {kind}=[...]"
            )
            raise ValueError(msg)

    def _say_what_is_left_out(self, names: frozenset[str]) -> None:
        """Warn of matrices that were not requested, each name once."""
        for name in sorted(names - self._named):
            kind, _, key = name.partition("/")
            msg = (
                f"Batches do not carry {name}. As annbatch has announced, a coming release carries what all AnnData "
                f"have alike; pass {kind}=[{key!r}] to the Loader to have it now, or {kind}=[] to do without"
            )
            # stacklevel: user -> add_adata(s) or use_collection -> _add_adata -> here
            warnings.warn(msg, FutureWarning, stacklevel=4)
        self._named |= names

    def add_datasets(
        self,
        datasets: Sequence[BackingArray_T],
        obs: Sequence[pd.DataFrame | None] | None = None,
        var: Sequence[pd.DataFrame | None] | None = None,
    ) -> Self:
        """Add several datasets, with one ``obs`` and ``var`` each or none at all."""
        check_positive("Number of datasets", len(datasets))
        all_obs = [None] * len(datasets) if obs is None else obs
        all_var = [None] * len(datasets) if var is None else var
        with self._all_or_nothing():
            for dataset, its_obs, its_var in zip(datasets, all_obs, all_var, strict=True):
                self._add(dataset, its_obs, its_var)
        return self

    def add_dataset(
        self, dataset: BackingArray_T, obs: pd.DataFrame | None = None, var: pd.DataFrame | None = None
    ) -> Self:
        """Add a dataset: a zarr array or CSR group, or an array or CSR matrix in memory."""
        self._add(dataset, obs, var)
        return self

    def _add(
        self,
        dataset: Any,
        obs: pd.DataFrame | None,
        var: pd.DataFrame | None,
        beside: Mapping[Key, Any] | None = None,
        listing: Listing | None = None,
        values: ValueBounds | None = None,
        table: ObsTable | None = None,
    ) -> None:
        if self._passes:
            msg = "Cannot add datasets while the loader is being iterated; finish or close the iterator first"
            raise RuntimeError(msg)
        if beside is None and self._wanted.keys:
            msg = f"{self._wanted.keys[0]} is asked for, but only X can be added this way; use add_adata"
            raise ValueError(msg)
        _check_dataset(dataset, obs, var)
        source = make_source(dataset, self._cache, listing, values)
        others = {key: make_source(element, self._cache, listing) for key, element in (beside or {}).items()}
        if obs is not None and len(obs) != source.n_obs:
            msg = f"obs has {len(obs)} rows, the dataset has {source.n_obs}"
            raise ValueError(msg)
        if self._sources:
            self._check_fits(dataset, source, obs, var)
            _check_alike(self._beside, others)
        self._wanted.check_data({Key("X"): source, **others}, obs, var)
        self._tables = None if obs is None else (*(self._tables or ()), table or ObsTable.of(obs, obs.index))
        if not self._sources:
            self._dataset_type = _family(dataset)
            self._var = var
        self._sources = (*self._sources, source)
        self._selected = self._labels = self._joined = None
        self._beside = {key: (*self._beside.get(key, ()), other) for key, other in others.items()}

    def _compact(self, obs: pd.DataFrame, *, has_names: bool) -> ObsTable:
        """The columns of an obs that batches need, as a copy."""
        needed = self._columns_to_read()
        columns = obs.columns if needed is None else [name for name in needed if name in obs.columns]
        return ObsTable.of(obs[columns], obs.index if has_names else None)

    def _check_fits(self, dataset: Any, source: RowSource, obs: pd.DataFrame | None, var: pd.DataFrame | None) -> None:
        """A dataset must be like those already there."""
        if not isinstance(dataset, self.dataset_type):
            msg = f"All datasets must be of the same type: {self.dataset_type}, got {type(dataset)}"
            raise ValueError(msg)
        for name, old, new in (("obs", self._tables, obs), ("var", self._var, var)):
            if old is None and new is not None:
                msg = f"Cannot add a dataset with {name} when datasets have already been added without {name}"
                raise ValueError(msg)
            if old is not None and new is None:
                msg = f"Cannot add a dataset without {name} when datasets have already been added with {name}"
                raise ValueError(msg)
        if source.shape[1:] != self._sources[0].shape[1:]:
            msg = (
                "All datasets must have the same shape along the var axis: "
                f"{self._sources[0].shape[1:]}, got {source.shape[1:]}"
            )
            raise ValueError(msg)
        if var is not None and self._var is not None and not plainly_named(var).equals(plainly_named(self._var)):
            msg = "All datasets must have identical var DataFrames: that of the new one differs"
            raise ValueError(msg)
        if source.dtype != self._sources[0].dtype:
            warnings.warn(
                f"Adding dataset with dtype {source.dtype} to a loader whose first has {self._sources[0].dtype}: "
                "batches get a dtype that holds both; pass dtype= to the Loader to fix one",
                stacklevel=4,
            )


def _names(types: Iterable[type]) -> str:
    return ", ".join(kind.__name__ for kind in types)


def _family(dataset: Any) -> type[Any]:
    """The accepted type a dataset belongs to."""
    return next(kind for kind in _ACCEPTED if isinstance(dataset, kind))


def _check_dataset(dataset: Any, obs: Any, var: Any) -> None:
    if not isinstance(dataset, _ACCEPTED):
        msg = f"Cannot add dataset of type {type(dataset)}; use one of {_names(_ACCEPTED)}"
        raise TypeError(msg)
    if isinstance(dataset, CSRDataset) and not isinstance(dataset.group, zarr.Group):
        msg = "Cannot add CSRDataset backed by h5ad; shuffle the file into a collection first, or read it into memory"
        raise TypeError(msg)
    for name, frame in (("obs", obs), ("var", var)):
        if frame is not None and not isinstance(frame, pd.DataFrame):
            msg = f"{name} must be a pandas DataFrame, got {type(frame)}"
            raise TypeError(msg)


def _element(adata: ad.AnnData | Backed, key: Key) -> Any:
    """A layer or an entry of obsm; an error where it is absent or cannot be read row by row."""
    there = getattr(adata, key.kind)
    if key.name not in there:
        names = ", ".join(sorted(k for k in there if k is not None)) or "none"
        msg = f"{key} is asked for, the AnnData has of {key.kind}: {names}"
        raise ValueError(msg)
    if not isinstance(there[key.name], _ACCEPTED):
        msg = f"Cannot add {key} of type {type(there[key.name])}; use one of {_names(_ACCEPTED)}"
        raise TypeError(msg)
    return there[key.name]


def _check_alike(old: Mapping[Key, tuple[RowSource, ...]], new: Mapping[Key, RowSource]) -> None:
    """A matrix beside X must be of one kind and width in all datasets."""
    for key, source in new.items():
        first = old[key][0]
        if (source.is_sparse, source.shape[1:]) != (first.is_sparse, first.shape[1:]):
            kinds = [
                f"{'sparse' if s.is_sparse else 'dense'} with rows of shape {s.shape[1:]}" for s in (first, source)
            ]
            msg = f"{key} must be alike in all datasets: it was {kinds[0]}, and is {kinds[1]} in the new one"
            raise ValueError(msg)


def _warn_of_ranks(tables: Sequence[ObsTable], names: Sequence[str]) -> None:
    """Say which codes would mean something else after the collection was extended."""
    some = [name for name in names if any(name in table.columns and table.shifts(name) for table in tables)]
    if some:
        msg = (
            f"obs_codes of {', '.join(map(repr, some))} are ranks of the values there are, and may mean others when "
            f"the collection is extended: fix them with obs_codes={{{some[0]!r}: [...]}}, or make the column "
            "categorical before it is built"
        )
        warnings.warn(msg, UserWarning, stacklevel=3)


def _left_out(adata: ad.AnnData | Backed, wanted: BatchSpec) -> frozenset[str]:
    """Names of matrices that batches will not carry and that the user did not exclude."""
    return frozenset(
        f"{kind}/{key}"
        for kind, asked in (("layers", wanted.layers), ("obsm", wanted.obsm))
        if asked is None
        for key in getattr(adata, kind)
        if key is not None  # anndata 0.13 lists X as layer None
    )
