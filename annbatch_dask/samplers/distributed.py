"""One sampler on several ranks: its stream of load requests shared out."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

from annbatch_dask.abc import Sampler
from annbatch_dask.order.planned import Planned
from annbatch_dask.order.share import Even, by_rank, slice_batches
from annbatch_dask.samplers.base import SeededSampler
from annbatch_dask.types import LoadRequest

__all__ = ["DistInfo", "DistributedSampler"]

DistInfo = Literal["torch", "jax", "env"] | tuple[int, int] | Callable[[], tuple[int, int]]


class DistributedSampler(Sampler):
    """The part of a rank in what a sampler draws.

    Load requests go to the ranks in turn, so that any row may come to any rank, in every epoch to another one, and
    the wrapped sampler may be of any kind. All ranks must wrap samplers of the same seed; one that was given no
    ``rng`` gets seed 0.

    Parameters
    ----------
    sampler
        What is shared out. A copy is used.
    dist_info
        ``"torch"`` (``torch.distributed``), ``"jax"``, ``"env"`` (``RANK`` and ``WORLD_SIZE``, as torchrun sets
        them), a pair (rank, world size), or a function that returns one. Asked once, here.
    enforce_equal_batches
        annbatch's word; False means ``even=None``.
    even
        ``"drop"``: every rank yields as many batches of the same sizes, and up to ``world_size`` batches are left
        out. ``"pad"``: they are filled up with rows from the start of the epoch instead. None: every row once; the
        last batches differ.
    global_batches
        The sampler's batches are those of all ranks together, and each rank yields its slice of every one. They
        are then the same on any number of ranks, and a saved state goes on on any number. Each rank decodes the
        chunks of all.

    Raises
    ------
    ValueError
        With ``global_batches``, where ``world_size`` does not divide the batch size.
    RuntimeError
        If torch or JAX is asked and is not initialised.

    Examples
    --------
    >>> sampler = samplers.RandomSampler(16, 8, 64, rng=np.random.default_rng(0))
    >>> first, second = (samplers.DistributedSampler(sampler, dist_info=lambda k=k: (k, 2)) for k in range(2))
    >>> first.n_batches(500), second.n_batches(500)
    (3, 3)
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        dist_info: DistInfo,
        enforce_equal_batches: bool = True,
        even: Even | None = "drop",
        global_batches: bool = False,
    ) -> None:
        self._rank, self._world_size = _resolve(dist_info)
        self._sampler = copy.deepcopy(sampler)
        if isinstance(self._sampler, SeededSampler) and not self._sampler.seed_is_given:
            self._sampler.seed = 0
        if even not in ("drop", "pad", None):
            msg = f"even must be 'drop', 'pad' or None, got {even!r}"
            raise ValueError(msg)
        self._even: Even | None = even if enforce_equal_batches else None
        self._global_batches = global_batches
        self._epochs = self.epoch_counter  # before any worker is started
        size = sampler.batch_size or self._world_size
        if global_batches and size % self._world_size:
            msg = f"a global batch of {size} rows cannot be cut evenly for {self._world_size} ranks; change its size"
            raise ValueError(msg)
        self._n_batches: tuple[int, int] = (-1, -1)

    @property
    def rank(self) -> int:
        """The own rank, from 0 on."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def batch_size(self) -> int | None:
        """Rows in a batch of this rank."""
        size = self._sampler.batch_size
        return size // self._world_size if size and self._global_batches else size

    @property
    def shuffle(self) -> bool | None:
        """The wrapped sampler's."""
        return self._sampler.shuffle

    @property
    def sampler(self) -> Sampler:
        """The copy that is shared out."""
        return self._sampler

    @property
    def is_elastic(self) -> bool:
        """Whether a saved state goes on on another number of ranks."""
        return self._global_batches

    def validate(self, n_obs: int) -> None:
        """As the wrapped sampler does."""
        self._sampler.validate(n_obs)

    def n_batches(self, n_obs: int) -> int:
        """Batches of this rank in one pass over ``n_obs`` rows."""
        if self._n_batches[0] != n_obs:
            # What the ranks get depends on the sizes of all batches: they are counted, on a copy. None is made.
            planned = copy.deepcopy(self).plan_requests(n_obs, 0)
            self._n_batches = n_obs, sum(len(item.sizes) for item in planned)
        return self._n_batches[1]

    def state_identity(self) -> tuple[object, ...]:
        """What a saved state must have in common with the sampler that goes on from it."""
        # Not the rank: all ranks are equally far, and one of them may save for all.
        where = () if self._global_batches else (self._world_size,)
        return (*self._sampler.state_identity(), self._even, self._global_batches, *where)

    def plan_requests(self, n_obs: int, epoch: int) -> Iterator[Planned]:
        """The rank's load requests of one epoch."""
        share = slice_batches if self._global_batches else by_rank
        return share(self._sampler.plan_requests(n_obs, epoch), self._rank, self._world_size, even=self._even)

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        for planned in self.plan_requests(n_obs, self.epoch_counter.start(None)):
            yield planned.make()


def _resolve(dist_info: DistInfo) -> tuple[int, int]:
    if isinstance(dist_info, tuple):
        rank, world_size = dist_info
    elif callable(dist_info):
        rank, world_size = dist_info()
    elif dist_info in _ASK:
        rank, world_size = _ASK[dist_info]()
    else:
        msg = f"Unknown dist_info {dist_info!r}: give 'torch', 'jax', 'env', a pair (rank, world size), or a function"
        raise ValueError(msg)
    if not 0 <= rank < world_size:
        msg = f"rank {rank} of {world_size}: the rank must be 0 or more and below the number of ranks"
        raise ValueError(msg)
    return rank, world_size


def _ask_torch() -> tuple[int, int]:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        msg = "torch.distributed is not initialized; call torch.distributed.init_process_group first"
        raise RuntimeError(msg)
    return dist.get_rank(), dist.get_world_size()


def _ask_jax() -> tuple[int, int]:
    import jax

    if not jax.distributed.is_initialized():
        msg = "JAX distributed is not initialized; call jax.distributed.initialize first"
        raise RuntimeError(msg)
    return jax.process_index(), jax.process_count()


def _ask_environment() -> tuple[int, int]:
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as missing:
        msg = f"the environment variable {missing} is not set; start with torchrun, or give (rank, world size)"
        raise RuntimeError(msg) from None


_ASK: dict[Any, Callable[[], tuple[int, int]]] = {"torch": _ask_torch, "jax": _ask_jax, "env": _ask_environment}
