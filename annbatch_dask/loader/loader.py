"""The Loader: what a user configures, fills with datasets and iterates over."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal

import numpy as np
from numpy.typing import DTypeLike
from typing_extensions import TypeVar

from annbatch_dask.chunks.cache import RangeCache
from annbatch_dask.flags import check_flag
from annbatch_dask.loader.added import AddedData, BackingArray_T
from annbatch_dask.loader.backing import RowSource
from annbatch_dask.loader.contents import BatchSpec, Casting, Codes, Dense, Key
from annbatch_dask.loader.fetch import Pipeline, PipelineOptions
from annbatch_dask.loader.helpers import count_threads
from annbatch_dask.loader.iterable import IterableDataset
from annbatch_dask.loader.iteration import Iteration
from annbatch_dask.loader.output import Framework
from annbatch_dask.loader.pool import spare_pool
from annbatch_dask.loader.selection import Where
from annbatch_dask.loader.state import Progress, Resumable, State, digest
from annbatch_dask.loader.steps import Transform
from annbatch_dask.order.planned import copy_request
from annbatch_dask.samplers import DistributedSampler
from annbatch_dask.samplers.distributed import DistInfo, EvenOrAuto, resolve_even
from annbatch_dask.samplers.runs import default_sampler
from annbatch_dask.samplers.sampler import Sampler
from annbatch_dask.seeds import Seed
from annbatch_dask.sizes import check_positive, check_whole, parse_nbytes
from annbatch_dask.types import LoadRequest
from annbatch_dask.where import Condition

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["Loader"]

OutputInMemoryArray_T = TypeVar("OutputInMemoryArray_T", default=Any)


class Loader(Resumable, AddedData[BackingArray_T], IterableDataset, Generic[BackingArray_T, OutputInMemoryArray_T]):
    """Mini-batches from one or more datasets, loaded ahead in background threads.

    Iterating yields dictionaries with the keys ``X``, ``obs``, ``var`` and ``index``
    (:class:`annbatch_dask.types.LoaderOutput`), and ``layers``, ``obsm`` and ``obs_codes`` if requested.
    A batch belongs to the user: its memory is reused only when no reference to it is left.

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
    batch_size
        Rows in a batch; 1 by default.
    shuffle
        Random order instead of the stored one.
    seed
        Fixes the order of all epochs: a non-negative integer, or a generator to draw one from; by default one is drawn
        from the system.
    drop_last
        Drop the last batch if it is not full.
    dense
        Deliver sparse data as dense rows, in the same pass that picks them. ``"cpu"`` makes them in host memory (from
        where ``preload_to_gpu`` copies them). ``"gpu"`` copies the rows to the GPU as they are stored and makes them
        dense there, with everything asked for by ``dtype``, ``var_names`` and ``NormalizeLog1p``; batches are
        delivered there whatever ``preload_to_gpu`` says. It needs a CUDA device, and cupy or ``to="torch"``.
        True is ``"gpu"`` with ``preload_to_gpu``, else ``"cpu"``.
    to
        ``"torch"`` or ``"jax"``; None delivers scipy and numpy (cupy with ``preload_to_gpu``).
    dtype
        Deliver the values of ``X`` in this dtype: any of numpy's, ``"bfloat16"`` (with ``to="torch"``), or
        ``"stored"`` for what they are stored in, often small integers. By default the dtype the data had before it
        was stored compactly. Batches of datasets that differ have the dtype that holds all of them.
    casting
        By default a ``dtype`` is refused in which a value of ``X`` would wrap around, become infinite or lose its
        fraction; a collection records the range of its values, data in memory are looked through. That a float is
        rounded is no loss: to 24 bits in float32, 11 in float16, 8 in bfloat16. ``"unsafe"`` casts as numpy does.
    var_names
        Genes to deliver, in this order, picked in the same pass; by default all. ``var`` and ``n_vars`` follow.
    transform
        What to do to a batch: :class:`annbatch_dask.transforms.NormalizeLog1p`, which is fused into the same pass, as
        are :class:`annbatch_dask.transforms.RankTokens` and ``BinnedExpression``, which make tokens of ``X``;
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
    obs_tables
        For columns of ``obs`` a frame of numbers with a row for each value, by its index: embeddings of perturbations,
        say. Batches carry the rows of their cells, under ``batch["obs_tables"]``: (n, n_columns) in the frame's dtype.
        A row that takes part (see ``where``) and whose value is not in the frame is refused when a pass begins.
    where
        Rows to select: a condition on ``obs`` as in :meth:`pandas.DataFrame.query`, a mask over all rows, or indices.
        Samplers count the selected rows only, ``index`` stays the position among all. Only chunks that
        hold a selected row are read. A condition is data, never run as code: it is made of what
        :class:`annbatch_dask.where.Condition` lists, and reads the columns it names.
    return_index
        Add the rows' global positions to batches, under ``batch["index"]``.
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
    chunk_size
        Neighbouring rows that are read together; 512 by default.
    preload_nchunks
        Chunks in a load window, whose rows are mixed; by default 32, or the nearest number that makes the window a
        multiple of ``batch_size``.
    batch_sampler
        Chooses the rows that are loaded together and those that make a batch. Excludes ``chunk_size``,
        ``preload_nchunks``, ``batch_size``, ``shuffle``, ``drop_last``, ``seed`` and ``rng``.
    preload_to_gpu
        Deliver batches on the GPU that is current where the iteration begins; needs cupy, and is on by default where
        cupy is installed. ``dense`` says where they are made.
    prefetch_bytes
        Limit in bytes, such as ``"1GiB"``, of windows (three quarters) and batches (one quarter) that are ready or in
        flight. One of each is always allowed, however large. Batches the user holds, and idle buffers, come on top.
        Batches on a GPU count. Between passes as much stays for the next one, of any loader of the process; the kernel
        takes it where memory is short.
    max_requests
        Requests to an object store that may be under way at a time, for up to six windows within ``prefetch_bytes``.
        Each takes a thread and what it reads, 2 MiB or so at most. Ranks and torch's workers have as many each.
    cache_dir
        A folder on a local disk where what is read from an object store is kept for later epochs and runs. Loaders
        and processes of one user share it while they run. It is made for that user alone, and a folder that others
        may write to is refused. What is damaged there is read from the store again. None keeps nothing.
    cache_bytes
        Disk space that the folder may use, such as ``"500GB"``. When it is full, the rest is read from the store each
        time. Each process beyond the first may exceed it by 64 MiB.
    rng
        annbatch's name of ``seed``: a generator.
    to_torch
        Older name: True is ``to="torch"``, False the default.

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
        batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: Seed | None = None,
        drop_last: bool | None = None,
        dense: Dense = False,
        to: Framework | None = None,
        dtype: DTypeLike | None = None,
        casting: Casting | None = None,
        var_names: Sequence[str] | None = None,
        transform: Transform | Sequence[Transform] | None = None,
        layers: Sequence[str] | Literal["all"] | None = None,
        obsm: Sequence[str] | Literal["all"] | None = None,
        obs_columns: Sequence[str] | None = None,
        obs_codes: Codes | None = None,
        obs_tables: Mapping[str, pd.DataFrame] | None = None,
        where: Where | None = None,
        return_index: bool = False,
        dist_info: DistInfo | None = None,
        even: EvenOrAuto = "auto",
        global_batch_size: int | None = None,
        chunk_size: int | None = None,
        preload_nchunks: int | None = None,
        batch_sampler: Sampler | None = None,
        preload_to_gpu: bool = find_spec("cupy") is not None,
        prefetch_bytes: int | str = "1GiB",
        max_requests: int = 128,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | str = "64GiB",
        rng: np.random.Generator | None = None,
        to_torch: bool | None = None,
    ) -> None:
        if to_torch is not None:
            to = _older_to(to, to_torch=check_flag("to_torch", to_torch))
        given: dict[str, Any] = {
            "chunk_size": chunk_size,
            "preload_nchunks": preload_nchunks,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "shuffle": shuffle,
            "rng": rng,
            "seed": seed,
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
            check_positive(name, given[name])
        for name in ("shuffle", "drop_last"):
            given[name] = given[name] is not None and check_flag(name, given[name])
        if batch_sampler is not None and (isinstance(batch_sampler, type) or not hasattr(batch_sampler, "sample")):
            msg = f"batch_sampler must be a Sampler, such as a RandomSampler, got {batch_sampler!r}"
            raise TypeError(msg)
        self._wanted = BatchSpec.of(
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
            obs_tables=obs_tables,
        )
        self._all_of = {kind for kind, names in (("layers", layers), ("obsm", obsm)) if names == "all"}
        size = global_batch_size or batch_size or 1
        if batch_sampler is None:
            batch_sampler = default_sampler(
                *(chunk_size, preload_nchunks, size),
                shuffle=given["shuffle"],
                drop_last=given["drop_last"],
                rng=rng,
                seed=seed,
            )
        even = resolve_even(even, batch_sampler)
        self._batch_sampler: Sampler = batch_sampler
        if dist_info is not None or global_batch_size is not None:
            self._batch_sampler = DistributedSampler(
                self._batch_sampler,
                dist_info=dist_info or (0, 1),
                even=even,
                global_batches=global_batch_size is not None,
            )
        AddedData.__init__(self)
        self._where = where
        self._where_columns = Condition.parse(where).columns if isinstance(where, str) else ()
        self._return_index = check_flag("return_index", return_index)
        self._prefetch_nbytes = parse_nbytes("prefetch_bytes", prefetch_bytes)
        self._max_requests = check_whole("max_requests", max_requests, 1)
        cache_nbytes = parse_nbytes("cache_bytes", cache_bytes)
        self._cache = None if cache_dir is None else RangeCache(_cache_path(cache_dir), cache_nbytes)
        if self._cache is not None:
            self._cache.check_private()
        self._progress = Progress()
        self._resume_from: State | None = None
        self._passes: set[object] = set()  # that are under way
        self._spare = spare_pool()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no iteration open, whatever the original is doing.
        return self.__dict__ | {"_passes": set(), "_progress": Progress()}

    def __len__(self) -> int:
        self._check_filled()
        return self._batch_sampler.n_batches(self.n_selected)

    def __repr__(self) -> str:
        """Rows, genes, and what makes batches of them."""
        if not self._sources:
            return f"<{type(self).__name__} without data: use_collection or add_adatas adds some>"
        chosen, sampler = ", of which where= chooses" * (self._where is not None), self._batch_sampler
        batches = f"{type(sampler).__name__} of batches of {sampler.batch_size}"
        return f"<{type(self).__name__} of {self.n_obs:,} cells{chosen} x {self.n_vars:,} columns, {batches}>"

    # --- properties

    @property
    def batch_sampler(self) -> Sampler:
        """The sampler in use."""
        return self._batch_sampler

    # --- iterating

    def __iter__(self) -> Iteration:
        """One pass. Close the iterator, or drop it, to stop its threads early."""
        self._check_filled()
        self._progress = Progress()
        return Iteration(self._progress, self._begin_pass, self._passes)

    def _begin_pass(self, progress: Progress) -> tuple[Iterator[LoadRequest], Pipeline]:
        return self._open(progress), self._start(progress.epoch or 0)

    def _open(self, progress: Progress) -> Iterator[LoadRequest]:
        """The requests of the pass that begins, from where it was left if a state was loaded."""
        sampler, n_obs, selected = self._batch_sampler, self.n_selected, self._select()
        if isinstance(sampler, Sampler):
            requests = self._begin(progress, n_obs)
        else:  # annbatch's own: it numbers no epochs
            requests = map(copy_request, sampler.sample(n_obs))
        return requests if selected is None else selected.translate(requests)

    def _data_digest(self) -> str:
        ends = [] if self._table is None else self._table.ends()
        selected = self._select()
        rows = None if selected is None else selected.digest
        return digest(([source.shape for source in self._sources], ends, self._collection_digest, rows))

    def _start(self, epoch: int) -> Pipeline:
        sources = {Key("X"): self._sources, **self._beside}
        contents = self._wanted.contents(
            sources,
            self._table,
            self._label(),
            self._join(),
            self._var,
            with_index=self._return_index,
            epoch=epoch,
        )
        read = tuple(chain.from_iterable(sources.values()))
        options = PipelineOptions(self._prefetch_nbytes, count_threads(), self._max_requests)
        return Pipeline(contents, options, partial(_let_go, read, self._cache), self._spare)


def _older_to(to: Framework | None, *, to_torch: bool) -> Framework | None:
    """Translate ``to_torch``, annbatch's name before 0.3, which scvi-tools 1.5 uses."""
    if to is not None:
        msg = f"Cannot specify to={to!r} and to_torch={to_torch}; give to alone"
        raise ValueError(msg)
    # stacklevel: user -> __init__ -> here
    warnings.warn("to_torch is an older name, pass to='torch' (or None) to the Loader", FutureWarning, stacklevel=3)
    return "torch" if to_torch else None


def _cache_path(cache_dir: str | os.PathLike[str]) -> Path:
    """The folder as an absolute path. An empty text would be the folder of the moment."""
    if not isinstance(cache_dir, str | os.PathLike) or not os.fspath(cache_dir):
        msg = f"cache_dir is {cache_dir!r}; give the path of a folder, or None"
        raise TypeError(msg)
    return Path(cache_dir).absolute()


def _let_go(sources: Iterable[RowSource], cache: RangeCache | None) -> None:
    """Release the resources of a finished pass."""
    for source in sources:
        source.close()
    if cache is not None:
        cache.flush()
