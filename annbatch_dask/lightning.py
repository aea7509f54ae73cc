"""A LightningDataModule over a collection: parts by name, ranks from the trainer, exact resume within an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from annbatch_dask.errors import MissingPackageError
from annbatch_dask.loader import Loader
from annbatch_dask.loader.selection import Where

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    msg = "annbatch_dask.lightning needs Lightning; install it with `pip install 'annbatch-dask[lightning]'`"
    raise MissingPackageError(msg) from error

__all__ = ["DataModule"]

# How ranks come to equal numbers of batches: nothing repeats in training, nothing is left out of an evaluation, and
# predictions come once a row.
_EVEN = {"train": "drop", "val": "pad", "test": "pad", "predict": None}
_SAMPLER_DECIDES = ("batch_size", "chunk_size", "drop_last", "preload_nchunks", "rng", "seed", "shuffle")


class DataModule(LightningDataModule):  # type: ignore[misc] # Lightning's types are not followed
    """Hands a trainer one :class:`annbatch_dask.Loader` for each part of a collection.

    Training is shuffled, in another order each epoch; the other parts come in stored order. Ranks are the trainer's:
    they share the batches, training leaves out what does not go round, validation and test fill up with rows that
    come twice. A checkpoint holds how far the training loader is, to the batch, as Lightning asks it; with
    ``Trainer.fit(..., ckpt_path=...)`` the next batch is the one that would have come.

    A ``Loader`` may also be handed to ``Trainer.fit`` itself, on one process.

    Parameters
    ----------
    collection
        What :meth:`annbatch_dask.Loader.use_collection` takes.
    parts
        The rows of ``"train"``, ``"val"``, ``"test"`` and ``"predict"``, or of some of them: anything that ``where``
        of the Loader takes, None for all. What ``collection.split({"train": ..., "val": ...})`` returns is such a
        mapping.
    train_options
        Arguments of the Loader that differ in training. A ``batch_sampler`` here takes the place of the options it
        decides.
    **options
        Arguments of all Loaders; ``to="torch"`` unless given. Give ``rng`` a number, so that the epochs that follow a
        resume are those that would have come as well.

    Raises
    ------
    ValueError
        If a part has another name.

    Examples
    --------
    >>> from annbatch_dask.lightning import DataModule
    >>> splits = collection.split({"train": 0.8, "val": 0.2}, seed=0)
    >>> data = DataModule(collection, splits, batch_size=16, chunk_size=4, preload_nchunks=8, dense=True, seed=0)
    >>> len(data.train_dataloader()), len(data.val_dataloader())
    (25, 7)
    """

    def __init__(
        self,
        collection: Any,
        parts: Mapping[str, Where | None],
        *,
        train_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(parts) - set(_EVEN))
        if unknown:
            msg = f"parts are named {', '.join(_EVEN)}; got {', '.join(map(repr, unknown))}"
            raise ValueError(msg)
        self._collection = collection
        self._parts = parts
        self._options = {"to": "torch", **options}
        self._train_options = {"shuffle": True, **(train_options or {})}
        self._loaders: dict[tuple[str, int, int], Loader[Any, Any]] = {}

    def train_dataloader(self) -> Loader[Any, Any]:
        """Shuffled batches."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Batches in stored order; none where no part is called so."""
        return self._loader("val") if "val" in self._parts else []

    def test_dataloader(self) -> Loader[Any, Any]:
        """Batches in stored order."""
        return self._loader("test")

    def predict_dataloader(self) -> Loader[Any, Any]:
        """Batches in stored order, each row once."""
        return self._loader("predict")

    def _loader(self, part: str) -> Loader[Any, Any]:
        """The loader of a part, on the rank of the trainer; the same one each time, since its passes are counted."""
        if part not in self._parts:
            msg = f"no part is called {part!r}; there are {', '.join(self._parts) or 'none'}"
            raise ValueError(msg)
        trainer = self.trainer
        # Not the trainer's rank: peers that hold parts of one model (tensor parallel) need the same batches.
        ranks = None if trainer is None else trainer.distributed_sampler_kwargs
        rank, world_size = (0, 1) if ranks is None else (ranks["rank"], ranks["num_replicas"])
        place = (part, rank, world_size)
        if place not in self._loaders:
            options = self._options_of(part)
            if world_size > 1:
                options = {"dist_info": (rank, world_size), "even": _EVEN[part], **options}
            loader = _WholeEpochs(where=self._parts[part], **options)
            loader.trainer = trainer if part == "train" else None
            self._loaders[place] = loader.use_collection(self._collection)
        return self._loaders[place]

    def _options_of(self, part: str) -> dict[str, Any]:
        if part != "train":
            return self._options
        if "batch_sampler" not in self._train_options:
            return self._options | self._train_options
        rest = {name: value for name, value in self._options.items() if name not in _SAMPLER_DECIDES}
        return rest | {name: value for name, value in self._train_options.items() if name != "shuffle"}


class _WholeEpochs(Loader[Any, Any]):
    """A loader whose epoch is over with the last batch that Lightning wants: it, which counts, asks for no more."""

    trainer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"trainer": None}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        n_batches = min(len(self), getattr(self.trainer, "num_training_batches", len(self)))
        return state | {"is_over": state["is_over"] or state["batch"] >= n_batches}
