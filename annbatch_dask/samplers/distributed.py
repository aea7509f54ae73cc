"""One sampler on several ranks: its stream of load requests shared out."""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from annbatch_dask.errors import MissingPackageError, RankError
from annbatch_dask.flags import check_flag
from annbatch_dask.order.lanes import by_lane, count_lanes
from annbatch_dask.order.planned import Planned
from annbatch_dask.order.share import Even, by_rank, slice_batches
from annbatch_dask.samplers.base import SeededSampler
from annbatch_dask.samplers.runs import RandomSampler
from annbatch_dask.samplers.sampler import Sampler
from annbatch_dask.sizes import check_whole
from annbatch_dask.types import LoadRequest
from annbatch_dask.warn import warn

__all__ = ["DistInfo", "DistributedSampler", "EvenOrAuto", "resolve_even"]

DistInfo = Literal["torch", "jax", "env"] | tuple[int, int] | Callable[[], tuple[int, int]]


EvenOrAuto = Even | Literal["auto"] | None


def resolve_even(even: EvenOrAuto, sampler: Sampler) -> Even | None:
    """Resolve ``"auto"``: every row once for a pass in order that drops nothing, else equal numbers of batches."""
    if even not in ("auto", "drop", "pad", None):
        msg = f"even must be 'drop', 'pad', None or 'auto', got {even!r}"
        raise ValueError(msg)
    if even != "auto":
        return even
    is_in_order = getattr(sampler, "shuffle", None) is False  # some of the user's have none
    return None if is_in_order and not getattr(sampler, "drops_last", False) else "drop"


class DistributedSampler(Sampler):
    """The part of a rank in what a sampler draws.

    Load requests go to the ranks in turn, so that any row may come to any rank, in every epoch to another one, and
    the wrapped sampler may be of any kind. All ranks must wrap samplers of the same seed, unlike annbatch's, which
    gives each rank rows of its own: seeds that differ would lose some rows and repeat others. A sampler that was given
    no ``rng`` gets seed 0. Seeds are compared where ``torch.distributed`` or JAX connects the ranks.

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
        The sampler's batches are those of all ranks together, and each rank yields its part of every one. They
        are then the same on any number of ranks, and a saved state continues on any number. Batches of a RandomSampler
        take as many rows of each of up to 64 lanes, and a rank reads its lanes alone, if the number of ranks divides
        theirs (:attr:`n_lanes`); else, and with other samplers, each rank reads what all of them do.

    Raises
    ------
    ValueError
        With ``global_batches``, where ``world_size`` does not divide the batch size; or would cut rows that belong
        together, those of a set or a cell and its controls.
    RankError
        If the ranks' seeds differ; when a pass begins, where ``even="drop"`` would leave every rank without a batch.
    RuntimeError
        If torch or JAX is asked and is not initialised.

    Warns
    -----
    UserWarning
        Where the seed comes from a generator and cannot be compared.

    Examples
    --------
    >>> sampler = samplers.RandomSampler(16, 8, 64)
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
        if not hasattr(sampler, "batch_size") or isinstance(sampler, type):
            msg = f"sampler must be a Sampler, such as a RandomSampler, got {sampler!r}"
            raise TypeError(msg)
        enforce_equal_batches = check_flag("enforce_equal_batches", enforce_equal_batches)
        global_batches = check_flag("global_batches", global_batches)
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
        n_together = self.n_together
        if global_batches and n_together > 1 and (even is None or size // n_together % self._world_size):
            msg = (
                f"a global batch of {size} rows, of which {n_together} belong together each, cannot be cut between "
                f"these for {self._world_size} ranks with even={even!r}; take a multiple of {self._world_size}, and "
                "even='drop' or 'pad'"
            )
            raise ValueError(msg)
        self._n_batches: dict[tuple[int | None, ...], int] = {}
        if isinstance(self._sampler, SeededSampler) and self._world_size > 1:
            _check_seed(self._sampler, dist_info, self._rank, self._world_size)

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
    def n_together(self) -> int:
        """The wrapped sampler's."""
        return getattr(self._sampler, "n_together", 1)  # annbatch's own has none

    @property
    def shuffle(self) -> bool | None:
        """The wrapped sampler's."""
        return self._sampler.shuffle

    @property
    def mask(self) -> slice:
        """The wrapped sampler's."""
        return self._sampler.mask

    @mask.setter
    def mask(self, value: slice) -> None:
        self._sampler.mask = value

    @property
    def rng(self) -> np.random.Generator | None:
        """The wrapped sampler's, which is set before it is wrapped: ranks then compare their seeds."""
        return self._sampler.rng

    @rng.setter
    def rng(self, value: np.random.Generator | None) -> None:  # noqa: ARG002
        msg = "give rng, or seed, to the sampler that is shared out, before it is: then ranks compare their seeds"
        raise ValueError(msg)

    @property
    def sampler(self) -> Sampler:
        """The copy that is shared out."""
        return self._sampler

    @property
    def n_lanes(self) -> int | None:
        """Into how many parts global batches are dealt; None where each rank reads all of a batch to yield its part."""
        size = self._sampler.batch_size
        if not self._global_batches or not isinstance(self._sampler, RandomSampler) or size is None:
            return None
        return count_lanes(size)

    @property
    def is_elastic(self) -> bool:
        """True if a saved state can be resumed on another number of ranks."""
        return self._global_batches

    def validate(self, n_obs: int) -> None:
        """Validate the wrapped sampler; RankError if no batch is left for any rank."""
        self._sampler.validate(n_obs)
        if self._even == "drop" and isinstance(self._sampler, SeededSampler) and not self.n_batches(n_obs):
            n_batches = self._sampler.n_batches(n_obs)
            if n_batches:
                msg = (
                    f"{n_batches} batches of up to {self._sampler.batch_size} rows do not go round among "
                    f"{self._world_size} ranks, and even='drop' leaves them out: no rank would have any; use "
                    "even='pad' or None, smaller batches, or fewer ranks"
                )
                raise RankError(msg)

    def n_batches(self, n_obs: int) -> int:
        """Batches of this rank in one pass over ``n_obs`` rows."""
        of = n_obs, self.mask.start, self.mask.stop
        if of not in self._n_batches:
            # What the ranks get depends on the sizes of all batches: they are counted, on a copy. None is made.
            planned = copy.deepcopy(self).plan_requests(n_obs, 0)
            self._n_batches = {of: sum(len(item.sizes) for item in planned)}
        return self._n_batches[of]

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        # Not the rank: all ranks are equally far, and one of them may save for all.
        where = (self.n_lanes,) if self._global_batches else (self._world_size,)
        return (*self._sampler.state_identity(), self._even, self._global_batches, *where)

    def plan_requests(self, n_obs: int, epoch: int) -> Iterator[Planned]:
        """The rank's load requests of one epoch."""
        stream, where = self._sampler.plan_requests(n_obs, epoch), (self._rank, self._world_size)
        if not self._global_batches:
            return by_rank(stream, *where, even=self._even)
        if self.n_lanes is None or not isinstance(self._sampler, RandomSampler):
            return slice_batches(stream, *where, even=self._even, n_together=self.n_together)
        n_together = -(-self.n_lanes // self._sampler.preload_nchunks)  # a chunk for each lane, or more
        return by_lane(stream, self._sampler.batch_size, n_together, *where, even=self._even)

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        for planned in self.plan_requests(n_obs, self.epoch_counter.start(None)):
            yield planned.make()


def _check_seed(sampler: SeededSampler, dist_info: DistInfo, rank: int, world_size: int) -> None:
    """Raise RankError if another rank has another seed; warn if that cannot be determined."""
    common = _ask_jax_seed(sampler.seed) if dist_info == "jax" else _ask_torch_seed(sampler, world_size)
    if common is not None and common != sampler.seed:
        msg = (
            f"rank {rank} of {world_size} has seed {sampler.seed}, another one {common}: some rows would come twice "
            "and others not at all; give all ranks the same rng, such as default_rng(0) without the rank, or none"
        )
        raise RankError(msg)
    if common is None and sampler.seed_is_given and not sampler.seed_is_number:
        msg = (
            f"rank {rank} of {world_size} draws its seed from a generator, and ranks of other seeds would lose and "
            "repeat rows. Give a number, the same on all ranks (Loader(seed=0), or sampler.seed = 0), or no rng, or "
            "dist_info='torch', which compares the seeds"
        )
        warn(msg)


def _ask_torch_seed(sampler: SeededSampler, world_size: int) -> int | None:
    """The seed of the rank that asked first, without waiting for any other; None without a group of so many ranks.

    Samplers that are alike are told apart by their turn: all ranks make them in the same order.
    """
    torch: Any = sys.modules.get("torch")
    dist = None if torch is None else torch.distributed
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() != world_size:
        return None
    what = blake2b(repr(sampler.state_identity()).encode(), digest_size=8).hexdigest()
    _N_ASKED[what] += 1
    key = f"annbatch_dask/seed/{what}/{_N_ASKED[what]}"
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - nothing public hands it out
    try:
        if store.add(f"{key}/n", 1) == 1:
            store.set(key, str(sampler.seed))
        found = store.get(key)
    except RuntimeError:  # the rank that keeps the store has ended: it was that much faster, or whatever follows fails
        return None
    return int(found) if isinstance(found, bytes) else None  # a stand-in in somebody's tests has no seed


_N_ASKED: Counter[str] = Counter()


def _ask_jax_seed(seed: int) -> int | None:
    """The seed of process 0, its lower 64 bits; None where JAX cannot tell."""
    try:
        from jax.experimental import multihost_utils
    except ImportError:  # a build, or a stand-in, without it
        return None

    halves = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    high, low = (int(half) for half in multihost_utils.broadcast_one_to_all(halves))
    common = high << 32 | low
    return seed if common == seed % 2**64 else common


def _resolve(dist_info: DistInfo) -> tuple[int, int]:
    given: Any = dist_info
    if callable(dist_info):
        given = dist_info()
    elif isinstance(dist_info, str) and dist_info in _ASK:
        try:
            given = _ASK[dist_info]()
        except ModuleNotFoundError as error:
            msg = f"dist_info={dist_info!r} needs {dist_info} ({error}): pip install 'annbatch-dask[{dist_info}]'"
            raise MissingPackageError(msg) from error
    elif not isinstance(dist_info, tuple):
        msg = f"Unknown dist_info {dist_info!r}: give 'torch', 'jax', 'env', a pair (rank, world size), or a function"
        raise ValueError(msg)
    try:
        rank, world_size = (check_whole("a rank", number) for number in given)
    except (TypeError, ValueError) as error:
        msg = f"dist_info says {given!r}; it must be a pair of whole numbers, (rank, world size)"
        raise TypeError(msg) from error
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
