"""What the tests of remote stores share."""

from collections import Counter

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.events import Callback


def build(url, atlas, server, inputs=None, **options):
    """A collection of the inputs at a URL."""
    collection = DatasetCollection(url, storage_options=server.options)
    options = {"seed": 0, "dataset_size": 300, "storage_options": server.options} | options
    return collection.add_adatas(atlas.urls if inputs is None else inputs, **options)


def contents(fs, url):
    """Every file below a URL or folder, by its path within."""
    root = fs._strip_protocol(url)
    return {path.split(root)[1]: fs.cat_file(path) for path in fs.find(root)}


def names(fs, url):
    """First parts of all paths below."""
    return {path.split("/")[1] for path in contents(fs, url)}


def batches(collection):
    loader = Loader(batch_size=40, chunk_size=10, preload_nchunks=12, shuffle=True, seed=3, dense=True)
    return (batch["X"].copy() for batch in loader.use_collection(collection))


def epoch(collection):
    return list(batches(collection))


class At(Callback):
    """Calls a function at the end of a stage, and counts tasks that were done before."""

    def __init__(self, stage="", then=lambda: None):
        self.stage, self.then, self.reused = stage, then, Counter()

    def on_task_end(self, event):
        self.reused[event.stage] += event.reused

    def on_stage_end(self, event):
        if event.stage == self.stage:
            self.then()


class CrashError(Exception):
    """Stands for a crash of the client."""


def crash():
    raise CrashError
