"""The Loader: what a user configures, fills with datasets and iterates over."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.abc import CSRDataset
from humanfriendly import InvalidSize, parse_size
from numpy.typing import DTypeLike

from annbatch_dask.chunks.cache import RangeCache
from annbatch_dask.loader.backing import Source, Values, make_source
from annbatch_dask.loader.casts import Recorded, recorded_values, values_of
from annbatch_dask.loader.contents import Casting, Codes, Dense, Key, Transform, Wanted
from annbatch_dask.loader.fetch import Pipeline, PipelineOptions
from annbatch_dask.loader.helpers import count_threads
from annbatch_dask.loader.iteration import Iteration
from annbatch_dask.loader.obs import Labels, ObsTable
from annbatch_dask.loader.output import Framework
from annbatch_dask.loader.reading import Backed, Opening, load_dataset
from annbatch_dask.loader.selection import Selected, Where, select
from annbatch_dask.loader.state import Progress, Resumable, State, digest
from annbatch_dask.samplers import DistributedSampler, RandomSampler, SequentialSampler
from annbatch_dask.samplers.distributed import DistInfo, EvenOrAuto, resolve_even
from annbatch_dask.samplers.sampler import Sampler
from annbatch_dask.storage.versions import Listing
from annbatch_dask.types import LoadRequest
from annbatch_dask.where import Condition

if TYPE_CHECKING:
    import os

    import anndata as ad

    class _Base:
        """torch's IterableDataset, or nothing."""

else:
    try:
        from torch.utils.data import IterableDataset as _Base
    except ImportError:

        class _Base:
            """Stands in for torch's IterableDataset."""


__all__ = ["Loader"]

BackingArray_T = TypeVar("BackingArray_T")
OutputInMemoryArray_T = TypeVar("OutputInMemoryArray_T")

_CHUNK_SIZE = 512
_PRELOAD_NCHUNKS = 32
_MAX_DEFAULT_PRELOAD = 4 * _PRELOAD_NCHUNKS
_PREFETCH_NBYTES = 1024**3
_MAX_PLAIN_NAMES = 1_000_000
"""Obs names of a collection of more rows are kept compressed, which takes a millisecond of Python a window."""
_ACCEPTED = (zarr.Array, CSRDataset, sp.csr_matrix, sp.csr_array, np.ndarray)


class Loader(Resumable, _Base, Generic[BackingArray_T, OutputInMemoryArray_T]):
    """Mini-batches from one or more datasets, loaded ahead in background threads.

    Iterating yields dictionaries with the keys ``X``, ``obs``, ``var`` and ``index``
    (:class:`annbatch_dask.types.LoaderOutput`), and ``layers``, ``obsm`` and ``obs_codes`` where they are asked for.
    A batch belongs to the user: its memory is used again only
    once nothing refers to it any more.

    What is delivered is what was opened. The files of each dataset are noted when it is added, before obs is read and
    once more afterwards, and every read compares its file with that: one that was replaced, overwritten or removed
    since ends the iteration with a CollectionChangedError, unless it is still open, and so is read as it was. Matrices
    that this package wrote, sparse or dense, and their row pointers have a crc32c for each chunk, compared at every
    read; obs and var have one for each file, compared before they are read, once. Of what others wrote only the file's
    version is compared, and a chunk must decode to its size (annbatch's shards have a checksum of their index).

    It is a ``torch.utils.data.IterableDataset`` where torch is installed, and works in a ``DataLoader``
    (``batch_size=None``) with any number of workers.

    Parameters
    ----------
    batch_sampler
        Decides which rows are loaded together and which make a batch. Excludes ``chunk_size``,
        ``preload_nchunks``, ``batch_size``, ``shuffle``, ``drop_last`` and ``rng``.
    chunk_size
        Rows read together; 512 by default.
    preload_nchunks
        Chunks in one load window, whose rows are mixed; by default 32, or the nearest number that makes the
        window a multiple of ``batch_size``.
    shuffle
        Random order instead of the stored one.
    return_index
        Whether batches carry the rows' global positions.
    batch_size
        Rows in a batch; 1 by default.
    preload_to_gpu
        Deliver batches on the GPU that is current where the iteration begins; needs cupy, and is on by default where
        cupy is installed. ``dense`` says where they are made.
    drop_last
        Leave out the last batch if it is not full.
    to
        ``"torch"`` or ``"jax"``; None delivers scipy and numpy (cupy with ``preload_to_gpu``).
    rng
        Source of randomness: a generator, or an int to seed one.
    dense
        Deliver sparse data as dense rows, in the same pass that picks them. ``"cpu"`` makes them in host memory (from
        where ``preload_to_gpu`` copies them). ``"gpu"`` copies the rows to the GPU as they are stored and makes them
        dense there, with everything asked for by ``dtype``, ``var_names`` and ``NormalizeLog1p``; batches are
        delivered there whatever ``preload_to_gpu`` says. It needs a CUDA device, and cupy or ``to="torch"``.
        True is ``"gpu"`` with ``preload_to_gpu``, else ``"cpu"``.
    dtype
        Deliver the values of ``X`` in this dtype: any of numpy's, ``"bfloat16"`` (with ``to="torch"``), or
        ``"stored"`` for what they are stored in, often small integers. By default the dtype the data had before it
        was stored compactly. Batches of datasets that differ have the dtype that holds all of them.
    casting
        By default a ``dtype`` is refused in which a value of ``X`` would wrap around, become infinite or lose its
        fraction; a collection records the range of its values, data in memory are looked through. That a float is
        rounded is no loss: to 24 bits in float32, 11 in float16, 8 in bfloat16. ``"unsafe"`` casts as numpy does.
    var_names
        Genes to deliver, in this order, picked in the same pass; by default all. ``var`` and ``n_var`` follow.
    transform
        What to do to a batch: :class:`annbatch_dask.transforms.NormalizeLog1p`, which is fused into the same pass,
        or a function that takes the batch and returns what is yielded in its place, or a list of both in this
        order. Functions are called one batch at a time, in order, in a background thread.
    layers, obsm
        Names of the matrices that batches carry beside ``X``, under ``batch["layers"]`` and ``batch["obsm"]``. They
        follow ``dense`` and ``to``, layers ``var_names`` as well; their dtype is that of the source. ``"all"`` is every
        array and CSR matrix, which all datasets must then have alike: what annbatch has announced to do by default. By
        default none, with a FutureWarning that names them; an empty list leaves them out on purpose.
    obs_columns
        Columns of ``obs`` that batches carry; only these are read. By default all. From a collection an empty list
        leaves out ``obs``, whose names are not read either.
    obs_codes
        Columns of ``obs`` to deliver as integers, under ``batch["obs_codes"]``: (n,) int64, -1 where a value is
        missing. ``loader.obs_categories[column]`` says what the codes mean, alike in all datasets. Codes of
        unordered categories stay the same when a collection is extended; text and numbers have their rank among the
        values there are, which an extension may shift: of a collection, a warning says so. A mapping fixes them:
        ``{"cell_type": ["B", "T"]}`` gives B the code 0 and T the code 1, and refuses another value in a row that
        takes part (see ``where``); with None at the end of the list, all other values have code -1.
    where
        Which rows take part: a condition on ``obs`` as :meth:`pandas.DataFrame.query` takes it, a mask over all rows,
        or indices. Samplers count the selected rows only, ``index`` stays the position among all. Only chunks that
        hold a selected row are read. A condition is data, never run as code: it is made of what
        :class:`annbatch_dask.where.Condition` lists, and reads the columns it names.
    dist_info
        Share the batches among ranks: where the ranks come from, see
        :class:`annbatch_dask.samplers.DistributedSampler`. None reads everything.
    even
        ``"drop"``, ``"pad"`` or None: how ranks come to equal numbers of batches, see there. By default None where
        rows come in their order and none is to be dropped, as in validation and inference: every row once on all ranks
        together, whose numbers of batches may differ by one. Shuffled passes have equal numbers, ``"drop"``.
    global_batch_size
        Instead of ``batch_size``: rows of the batches of all ranks together, which are then the same on any number
        of ranks.
    prefetch_bytes
        How many bytes of loaded windows (three quarters) and finished batches (one quarter) may lie ready or be under
        way. One of each is always allowed, however large. Batches the user holds, and buffers waiting to be used
        again, come on top. A batch made on a GPU counts, though it lies there.
    cache_dir
        A folder on a local disk where what is read from an object store is kept for later epochs and runs. Loaders
        and processes of one user share it while they run. It is made for that user alone, and a folder that others
        may write to is refused. What is damaged there is read from the store again. None keeps nothing.
    cache_bytes
        Room on the disk that the folder may take, such as ``"500GB"``. Once it is full, the rest is read from the
        store each time. Beyond the first process, each may pass it by 64 MiB.
    to_torch
        An older name: True is ``to="torch"``, False the default.

    Raises
    ------
    ImportError
        If ``to``, ``preload_to_gpu`` or ``dense`` need what is not installed.
    ValueError
        If both ``to`` and ``to_torch`` are given, or a ``batch_sampler`` and what it decides.
    DeviceError
        If dense batches are to be made on a GPU, and there is none.
    StorageError
        If others may write to ``cache_dir``.
    SchemaError
        When data are added whose values ``dtype`` does not hold.
    SelectionError
        If ``obs_codes`` gives categories and rows that take part have others, or ``where`` is a text that is no
        condition.

    Examples
    --------
    >>> loader = Loader(batch_size=64, chunk_size=16, preload_nchunks=8, shuffle=True)
    >>> for batch in loader.use_collection(collection):
    ...     X, labels = batch["X"], batch["obs"]["cell_type"]
    >>> X.shape[0] == len(labels)
    True
    """

    def __init__(  # noqa: PLR0913 - annbatch's interface
        self,
        *,
        batch_sampler: Sampler | None = None,
        chunk_size: int | None = None,
        preload_nchunks: int | None = None,
        shuffle: bool | None = None,
        return_index: bool = False,
        batch_size: int | None = None,
        preload_to_gpu: bool = find_spec("cupy") is not None,
        drop_last: bool | None = None,
        to: Framework | None = None,
        rng: np.random.Generator | int | None = None,
        dense: Dense = False,
        dtype: DTypeLike | None = None,
        casting: Casting | None = None,
        var_names: Sequence[str] | None = None,
        transform: Transform | Sequence[Transform] | None = None,
        layers: Sequence[str] | Literal["all"] | None = None,
        obsm: Sequence[str] | Literal["all"] | None = None,
        obs_columns: Sequence[str] | None = None,
        obs_codes: Codes | None = None,
        where: Where | None = None,
        dist_info: DistInfo | None = None,
        even: EvenOrAuto = "auto",
        global_batch_size: int | None = None,
        prefetch_bytes: int = _PREFETCH_NBYTES,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | str = "64GB",
        to_torch: bool | None = None,
    ) -> None:
        if to_torch is not None:
            to = _older_to(to, to_torch=to_torch)
        given = {
            "chunk_size": chunk_size,
            "preload_nchunks": preload_nchunks,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "shuffle": shuffle,
            "rng": rng,
            "global_batch_size": global_batch_size,
        }
        names = [name for name, value in given.items() if value is not None]
        if batch_sampler is not None and names:
            msg = f"Cannot specify {', '.join(names)} when providing a custom sampler: the sampler decides these"
            raise ValueError(msg)
        if batch_size is not None and global_batch_size is not None:
            msg = f"Cannot specify batch_size ({batch_size}) and global_batch_size ({global_batch_size}); give one"
            raise ValueError(msg)
        for name in ("chunk_size", "preload_nchunks", "batch_size", "global_batch_size"):
            _check_positive(name, given[name])
        _check_positive("prefetch_bytes", prefetch_bytes)
        self._wanted = Wanted.of(
            to=to,
            preload_to_gpu=preload_to_gpu,
            dense=dense,
            dtype=dtype,
            casting=casting,
            var_names=var_names,
            transform=transform,
            layers=None if layers == "all" else layers,
            obsm=None if obsm == "all" else obsm,
            obs_columns=obs_columns,
            obs_codes=obs_codes,
        )
        self._all_of = {kind for kind, names in (("layers", layers), ("obsm", obsm)) if names == "all"}
        size = global_batch_size or batch_size or 1
        self._batch_sampler: Sampler = batch_sampler or _default_sampler(
            chunk_size, preload_nchunks, size, shuffle=bool(shuffle), drop_last=bool(drop_last), rng=rng
        )
        if dist_info is not None or global_batch_size is not None:
            self._batch_sampler = DistributedSampler(
                self._batch_sampler,
                dist_info=dist_info or (0, 1),
                even=resolve_even(even, self._batch_sampler),
                global_batches=global_batch_size is not None,
            )
        self._where = where
        self._where_columns = Condition.parse(where).columns if isinstance(where, str) else ()
        self._selected: Selected | None = None
        self._return_index = return_index
        self._prefetch_nbytes = prefetch_bytes
        self._cache = None if cache_dir is None else RangeCache(Path(cache_dir).absolute(), _nbytes(cache_bytes))
        if self._cache is not None:
            self._cache.check_private()
        # Replaced, never changed in place: a shallow copy keeps what it was copied with.
        self._sources: tuple[Source, ...] = ()
        self._beside: dict[Key, tuple[Source, ...]] = {}
        self._named: frozenset[str] = frozenset()  # what was said to be left out
        self._dataset_type: type[Any] | None = None
        self._tables: tuple[ObsTable, ...] | None = None
        self._labels: Labels | None = None
        self._var: pd.DataFrame | None = None
        self._collection_added = False
        self._lease: Any = None
        self._collection_digest = ""
        self._progress = Progress()
        self._resume_from: State | None = None
        self._passes: set[object] = set()  # that are under way

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no iteration open, whatever the original is doing.
        return self.__dict__ | {"_passes": set(), "_progress": Progress()}

    def __len__(self) -> int:
        return self._batch_sampler.n_batches(self.n_selected)

    # --- properties

    @property
    def batch_sampler(self) -> Sampler:
        """The sampler in use."""
        return self._batch_sampler

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
        """A frame for each dataset, made anew each time; scvi-tools asks for it."""
        table = self._table
        return None if table is None else table.frames()

    def _label(self) -> Labels | None:
        """The label columns as codes, made once for all passes."""
        table = self._table
        if self._labels is None and table is not None and self._wanted.obs_codes:
            selected = self._select()
            self._labels = Labels(table, self._wanted.obs_codes, None if selected is None else selected.rows)
        return self._labels

    @property
    def n_var(self) -> int:
        """Columns of ``X`` in a batch."""
        if not self._sources:
            msg = "No datasets added yet"
            raise ValueError(msg)
        chosen = self._wanted.var_names
        return self._sources[0].shape[1] if chosen is None else len(chosen)

    @property
    def var(self) -> pd.DataFrame | None:
        """The ``var`` of every batch."""
        chosen = None if self._var is None else self._wanted.select(self._var)
        return self._var if self._var is None or chosen is None else self._var.iloc[chosen]

    @property
    def obs_categories(self) -> dict[str, pd.Index[Any]]:
        """What the codes of each column of ``obs_codes`` stand for; grows when datasets are added.

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
        IntegrityError
            If a file of the collection is missing or damaged. A damaged chunk of a matrix, which is found when it is
            read, ends the iteration with this error before any of its rows is delivered.
        CollectionChangedError
            If another collection stands at its path by now. A loader goes on with the files that it opened, or an
            iteration ends with this error: every read compares the version of its file with that of now.
        """
        if collection.is_empty:
            msg = "DatasetCollection is empty"
            raise ValueError(msg)
        if self._collection_added:
            msg = (
                "You should not add multiple collections: each was shuffled on its own. Shuffle them into one, or "
                "use add_adatas if rows of different collections need not be mixed"
            )
            raise RuntimeError(msg)
        names = self._wanted.obs_columns != ()
        load = load_adata or partial(load_dataset, obs_columns=self._columns_to_read(), names=names)
        if is_ours := hasattr(collection, "lease"):  # annbatch's has none
            self._lease = collection.lease()
        opening = Opening.of(collection.groups() if is_ours else list(collection))
        if is_ours:
            collection.check(None if load_adata is not None else self._columns_to_read())
        manifest = getattr(collection, "manifest", None)  # annbatch's has none
        recorded = recorded_values(manifest)
        adatas = opening.load(load, in_threads=load_adata is None)
        for adata, listing in zip(adatas, opening.listings, strict=True):
            self._add_adata(adata, recorded, listing, is_ours=True)
            if self._tables is not None and self.n_obs > _MAX_PLAIN_NAMES:
                self._tables = tuple(table.packed() for table in self._tables)
        self._collection_added = True
        self._collection_digest = "" if manifest is None else manifest.identity
        _warn_of_ranks(self._tables or (), [name for name, given in self._wanted.obs_codes.items() if given is None])
        return self

    def _columns_to_read(self) -> tuple[str, ...] | None:
        """Columns of obs that batches or the selection need; None for all."""
        columns = self._wanted.columns
        return None if columns is None else tuple(dict.fromkeys((*columns, *self._where_columns)))

    def add_adatas(self, adatas: Sequence[ad.AnnData]) -> Self:
        """Add several AnnData objects; see :meth:`add_adata`."""
        _check_positive("Number of adatas", len(adatas))
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
        """Add one; of ours, nobody else holds obs, and what is not needed is dropped."""
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
        """A warning that names what nobody asked for, each name once."""
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
        _check_positive("Number of datasets", len(datasets))
        all_obs = [None] * len(datasets) if obs is None else obs
        all_var = [None] * len(datasets) if var is None else var
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
        values: Values | None = None,
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
        self._selected = self._labels = None
        self._beside = {key: (*self._beside.get(key, ()), other) for key, other in others.items()}

    def _compact(self, obs: pd.DataFrame, *, has_names: bool) -> ObsTable:
        """What is needed of an obs that nobody else holds."""
        needed = self._columns_to_read()
        columns = obs.columns if needed is None else [name for name in needed if name in obs.columns]
        return ObsTable.of(obs[columns], obs.index if has_names else None)

    def _check_fits(self, dataset: Any, source: Source, obs: pd.DataFrame | None, var: pd.DataFrame | None) -> None:
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
        if var is not None and self._var is not None and not var.equals(self._var):
            msg = "All datasets must have identical var DataFrames: that of the new one differs"
            raise ValueError(msg)
        if source.dtype != self._sources[0].dtype:
            warnings.warn(
                f"Adding dataset with dtype {source.dtype} to a loader whose first has {self._sources[0].dtype}: "
                "batches get a dtype that holds both; pass dtype= to the Loader to fix one",
                stacklevel=4,
            )

    # --- iterating

    def __iter__(self) -> Iteration:
        """One pass. Close the iterator, or drop it, to stop its threads early."""
        _check_positive("Number of datasets", len(self._sources))
        self._progress = Progress()
        return Iteration(self._progress, self._begin_pass, self._passes)

    def _begin_pass(self, progress: Progress) -> tuple[Iterator[LoadRequest], Pipeline]:
        return self._open(progress), self._start()

    def _open(self, progress: Progress) -> Iterator[LoadRequest]:
        """The requests of the pass that begins, from where it was left if a state was loaded."""
        sampler, n_obs, selected = self._batch_sampler, self.n_selected, self._select()
        if isinstance(sampler, Sampler):
            requests = self._begin(progress, n_obs)
        else:  # annbatch's own: it numbers no epochs
            requests = sampler.sample(n_obs)
        return requests if selected is None else selected.translate(requests)

    def _data_digest(self) -> str:
        ends = [] if self._table is None else self._table.ends()
        selected = self._select()
        rows = None if selected is None else selected.digest
        return digest(([source.shape for source in self._sources], ends, self._collection_digest, rows))

    def _start(self) -> Pipeline:
        sources = {Key("X"): self._sources, **self._beside}
        contents = self._wanted.contents(sources, self._table, self._label(), self._var, with_index=self._return_index)
        read = tuple(chain.from_iterable(sources.values()))
        options = PipelineOptions(self._prefetch_nbytes, count_threads())
        return Pipeline(contents, options, partial(_let_go, read, self._cache))


def _older_to(to: Framework | None, *, to_torch: bool) -> Framework | None:
    """What ``to_torch`` means, annbatch's name for it before 0.3; scvi-tools 1.5 uses it."""
    if to is not None:
        msg = f"Cannot specify to={to!r} and to_torch={to_torch}; give to alone"
        raise ValueError(msg)
    # stacklevel: user -> __init__ -> here
    warnings.warn("to_torch is an older name, pass to='torch' (or None) to the Loader", FutureWarning, stacklevel=3)
    return "torch" if to_torch else None


def _let_go(sources: Iterable[Source], cache: RangeCache | None) -> None:
    """What is done when a pass reads nothing more."""
    for source in sources:
        source.close()
    if cache is not None:
        cache.flush()


def _default_sampler(
    chunk_size: int | None,
    preload_nchunks: int | None,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool,
    rng: np.random.Generator | int | None,
) -> Sampler:
    chunk_size = chunk_size or _CHUNK_SIZE
    preload_nchunks = preload_nchunks or _fitting_preload(chunk_size, batch_size)
    if not shuffle:
        return SequentialSampler(chunk_size, preload_nchunks, batch_size, drop_last=drop_last)
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        sampler = RandomSampler(
            chunk_size, preload_nchunks, batch_size, drop_last=drop_last, rng=np.random.default_rng(rng)
        )
        sampler.seed = sampler.seed  # a number: ranks are taken to have the same
        return sampler
    return RandomSampler(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, rng=rng)  # type: ignore[arg-type]


def _fitting_preload(chunk_size: int, batch_size: int) -> int:
    """The number of chunks near the default whose rows make whole batches, unless that needs far more."""
    step = batch_size // math.gcd(chunk_size, batch_size)
    if step > _MAX_DEFAULT_PRELOAD:
        return _PRELOAD_NCHUNKS
    return max(1, round(_PRELOAD_NCHUNKS / step)) * step


def _nbytes(size: int | str) -> int:
    """A size in bytes, which may be written as in ``"64GB"``."""
    try:
        nbytes = int(parse_size(size, binary=True)) if isinstance(size, str) else size
    except InvalidSize:
        msg = f"cache_bytes is {size!r}; give a number of bytes, or a size such as '64GB'"
        raise ValueError(msg) from None
    _check_positive("cache_bytes", nbytes)
    return nbytes


def _check_positive(name: str, value: Any) -> None:
    if value is not None and value < 1:
        msg = f"{name} must be greater than 1, got {value}"
        raise ValueError(msg)


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


def _check_alike(old: Mapping[Key, tuple[Source, ...]], new: Mapping[Key, Source]) -> None:
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


def _left_out(adata: ad.AnnData | Backed, wanted: Wanted) -> frozenset[str]:
    """What batches will not carry because nobody asked for it, nor left it out on purpose."""
    return frozenset(
        f"{kind}/{key}"
        for kind, asked in (("layers", wanted.layers), ("obsm", wanted.obsm))
        if asked is None
        for key in getattr(adata, kind)
        if key is not None  # anndata 0.13 lists X as layer None
    )
