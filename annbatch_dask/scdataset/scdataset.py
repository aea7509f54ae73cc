"""scDataset: batches from anything that can be indexed, through four hooks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.flags import check_flag
from annbatch_dask.loader.iterable import IterableDataset
from annbatch_dask.loader.state import Progress, Resumable, State, digest
from annbatch_dask.order.planned import expand
from annbatch_dask.order.share import current_worker
from annbatch_dask.samplers.distributed import DistributedSampler, EvenOrAuto, resolve_even
from annbatch_dask.scdataset.sampler import StrategySampler
from annbatch_dask.scdataset.strategy import SamplingStrategy
from annbatch_dask.seeds import Seed, resolve_seed
from annbatch_dask.sizes import check_whole
from annbatch_dask.storage.hdf5_filters import register_filters
from annbatch_dask.types import LoadRequest

__all__ = ["scDataset", "take_rows"]

Ints = NDArray[np.integer[Any]]


class scDataset(Resumable, IterableDataset):  # noqa: N801 - scDataset's name
    """Batches of a collection in the order of a strategy.

    Rows are read ``batch_size * fetch_factor`` at a time, in ascending order, then cut into batches. Use it by
    itself, or in a ``DataLoader`` with ``batch_size=None``.

    Parameters
    ----------
    data_collection
        Anything with rows and ``[integer array]``, or anything at all with a ``fetch_callback``.
    strategy
        Which rows, in which order.
    batch_size
        Rows in a batch.
    fetch_factor
        Batches read together.
    drop_last
        Leave out the last batch of the epoch if it is not full.
    fetch_callback
        ``(collection, ascending int64 rows) -> chunk``; by default ``collection[rows]``.
    fetch_transform
        ``chunk -> chunk``, once per fetch. Keeps number and order of rows.
    batch_callback
        ``(chunk, positions) -> batch``; by default ``chunk[positions]``.
    batch_transform
        ``batch -> batch``.
    rank, world_size
        Rank of this process and number of ranks; by default of ``torch.distributed``, or 0 and 1.
    seed
        Fixes the order: a non-negative integer, or a generator to draw one from, alike on all ranks; by default one is
        drawn from torch's generator and sent to all ranks.
    even
        How ranks come to equal numbers of batches, see :class:`annbatch_dask.samplers.DistributedSampler`. By default
        :class:`Streaming` without ``drop_last`` yields every row once, and the ranks' numbers may differ by one.

    Raises
    ------
    TypeError
        If ``strategy`` is none.
    ValueError
        If a size is below 1, the rank is none of ``world_size``, or ``indices``, weights or labels do not fit the
        collection's length, where that is known.
    RuntimeError
        If there are several ranks, no seed, and no process group to agree on one.

    Examples
    --------
    >>> from annbatch_dask.scdataset import BlockShuffling, scDataset
    >>> data = np.arange(100)
    >>> batches = scDataset(data, BlockShuffling(block_size=4), batch_size=10, seed=0)
    >>> sorted(np.concatenate(list(batches)).tolist()) == list(range(100))
    True
    """

    def __init__(  # noqa: PLR0913, PLR0917 - scDataset's interface
        self,
        data_collection: Any,
        strategy: SamplingStrategy,
        batch_size: int,
        fetch_factor: int = 16,
        drop_last: bool = False,  # noqa: FBT001, FBT002
        fetch_callback: Callable[[Any, Ints], Any] | None = None,
        fetch_transform: Callable[[Any], Any] | None = None,
        batch_callback: Callable[[Any, Ints], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: Seed | None = None,
        *,
        even: EvenOrAuto = "auto",
    ) -> None:
        if not isinstance(strategy, SamplingStrategy):
            msg = f"strategy must be a SamplingStrategy, got {type(strategy).__name__}"
            raise TypeError(msg)
        self.collection = data_collection
        self.strategy = strategy
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self.fetch_factor = check_whole("fetch_factor", fetch_factor, 1)
        self.fetch_size = self.batch_size * self.fetch_factor
        self.drop_last = check_flag("drop_last", drop_last)
        _check_callable(
            fetch_callback=fetch_callback,
            fetch_transform=fetch_transform,
            batch_callback=batch_callback,
            batch_transform=batch_transform,
        )
        self.fetch_callback = fetch_callback
        self.fetch_transform = fetch_transform
        self.batch_callback = batch_callback
        self.batch_transform = batch_transform
        with contextlib.suppress(TypeError):  # its length is not known
            strategy._check_range(self._n_obs())  # noqa: SLF001
        self.rank, self.world_size = _resolve_ranks(rank, world_size)
        self.sort_before_fetch = True
        sampler = StrategySampler(
            strategy, self.batch_size, self.fetch_factor, drop_last=self.drop_last, rng=np.random.default_rng(0)
        )
        sampler.seed = _agree_on_seed(self.world_size) if seed is None else resolve_seed(seed)
        self._base_seed = sampler.seed
        self._lent = sampler.lent
        self._batch_sampler = DistributedSampler(
            sampler, dist_info=(self.rank, self.world_size), even=resolve_even(even, sampler)
        )
        self._progress = Progress()
        self._resume_from: State | None = None
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_progress": Progress(), "collection": _exchange(self.collection, _portable)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.collection = _exchange(self.collection, _opened)
        self._pid = os.getpid()

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        self._lent.collection = self.collection
        return self._batch_sampler.n_batches(self._n_obs())

    def __iter__(self) -> Iterator[Any]:
        """One epoch."""
        self._progress = Progress()
        return self._iterate(self._progress)

    def _iterate(self, progress: Progress) -> Iterator[Any]:
        if os.getpid() != self._pid:  # forked: HDF5 files must be opened again
            self.collection = _exchange(self.collection, lambda part: _opened(_portable(part)))
            self._pid = os.getpid()
        self._lent.collection = self.collection
        for request in self._begin(progress, self._n_obs()):
            for batch in self._batches(request):
                progress.n_batches += 1
                yield batch
        progress.is_over = True

    def _batches(self, request: LoadRequest) -> Iterator[Any]:
        rows = expand(request["requests"])
        fetch = self.fetch_callback or take_rows
        pick = self.batch_callback or take_rows
        chunk = fetch(self.collection, rows)
        if self.fetch_transform is not None:
            chunk = self.fetch_transform(chunk)
        if pick is take_rows and isinstance(chunk, tuple):
            msg = (
                f"a fetch of {len(rows)} rows is a tuple of {len(chunk)}, whose rows cannot be told from its parts; "
                "return a MultiIndexable of the parts, or give a batch_callback"
            )
            raise TypeError(msg)
        for positions in request["splits"]:
            batch = pick(chunk, positions)
            yield batch if self.batch_transform is None else self.batch_transform(batch)

    def _n_obs(self) -> int:
        """Rows of the collection; of those that are asked for where it cannot tell.

        What a callback reads from, a list of files or a dictionary, may have another length than rows.
        """
        n_rows = self.strategy._rows_of(self.collection)  # noqa: SLF001
        asked = self.strategy._rows_of(None) if self.fetch_callback and self.strategy._indices is not None else 0  # noqa: SLF001
        return max(n_rows, asked)

    def _data_digest(self) -> str:
        return digest((type(self.collection).__qualname__, self._n_obs()))

    @property
    def _epoch(self) -> int:
        return self._batch_sampler.epoch_counter.peek(current_worker())

    @_epoch.setter
    def _epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)


@dataclass(frozen=True)
class _BackedRows:
    """A backed AnnData on its way to another process."""

    path: str
    obs: Any

    def open(self) -> Any:
        """Reopen with a file handle of this process."""
        import anndata as ad

        register_filters()
        adata = ad.read_h5ad(self.path, backed="r")
        adata.obs = self.obs
        return adata


def _exchange(collection: Any, change: Callable[[Any], Any]) -> Any:
    """The collection with ``change`` made to it, or to the parts of an AnnCollection or a MultiIndexable."""
    changed = change(collection)
    name = next((name for name in ("adatas", "_members") if isinstance(getattr(collection, name, None), list)), None)
    if changed is not collection or name is None:
        return changed
    parts = getattr(collection, name)
    exchanged = [_exchange(part, change) for part in parts]
    if all(one is other for one, other in zip(parts, exchanged, strict=True)):
        return collection
    other = copy(collection)
    setattr(other, name, exchanged)
    return other


def _portable(collection: Any) -> Any:
    """A stand-in for what cannot be pickled: an AnnData that holds an open HDF5 file."""
    if getattr(collection, "isbacked", False) and not getattr(collection, "is_view", False):
        return _BackedRows(str(collection.filename), collection.obs)
    return collection


def _opened(collection: Any) -> Any:
    return collection.open() if isinstance(collection, _BackedRows) else collection


def take_rows(data: Any, rows: Ints) -> Any:
    """Rows of data by ``[]``; of pandas objects by position, of lists one by one; of a backed AnnData into memory."""
    if isinstance(data, list | tuple | range):
        return [data[row] for row in rows.tolist()]
    taken = data.iloc[rows] if hasattr(data, "iloc") else data[rows]
    return taken.to_memory() if getattr(taken, "isbacked", False) else taken


def _check_callable(**hooks: object) -> None:
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            msg = f"{name} must be a function, got {hook!r}"
            raise TypeError(msg)


def _resolve_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    found = (0, 1)
    dist = _process_group()
    if dist is not None:
        found = dist.get_rank(), dist.get_world_size()
    return found[0] if rank is None else rank, found[1] if world_size is None else world_size


def _process_group() -> Any:
    """torch.distributed where a process group is up, else None."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def _agree_on_seed(world_size: int) -> int:
    """A seed from torch's generator, the same on all ranks."""
    dist = _process_group()
    if world_size > 1 and dist is None:
        msg = f"{world_size} ranks need one seed, and there is no process group to send it through; give seed="
        raise RuntimeError(msg)
    torch: Any = sys.modules.get("torch")
    drawn = int(np.random.default_rng().integers(2**31) if torch is None else torch.randint(2**31, ()))
    if world_size == 1 or dist is None:
        return drawn
    agreed = [drawn]
    dist.broadcast_object_list(agreed, src=0)
    return agreed[0]
