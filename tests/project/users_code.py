"""What users write, for mypy alone, which `make lint` runs: it asks for no annotation of theirs."""

from __future__ import annotations

from torch.utils.data.dataset import IterableDataset

from annbatch_dask import DatasetCollection, Loader, Splits
from annbatch_dask.samplers import RandomSampler
from annbatch_dask.scdataset import BlockShuffling, scDataset
from annbatch_dask.transforms import NormalizeLog1p
from annbatch_dask.types import LoaderOutput

collection = DatasetCollection("atlas.zarr").add_adatas(["a.h5ad"], seed=1)
splits: Splits = collection.split({"train": 0.8, "test": 0.2}, by="donor")
loader = Loader(batch_size=100, transform=NormalizeLog1p(), where=splits["train"]).use_collection(collection)
batches: list[LoaderOutput] = list(loader)
loader.load_state_dict(loader.state_dict())
chosen = Loader(batch_sampler=RandomSampler(512, 32, 4096), var_names=collection.highly_variable(2000))
for batch in chosen.use_collection(collection):
    print(batch["X"].shape, batch["obs_codes"]["cell_type"].dtype)
for given in (loader, scDataset(collection, BlockShuffling(16), batch_size=64)):
    assert isinstance(given, IterableDataset)
