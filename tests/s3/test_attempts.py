"""Attempts at a dataset of a store: one that comes late and dies must not undo what another has finished."""

import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.etl import gather as gather_module
from annbatch_dask.etl.ours import dataset_attributes, first_document, write_first_document
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import METADATA
from tests.s3.tools import build, contents

pytestmark = pytest.mark.s3
OURS = dataset_attributes("a plan", "a collection")
FIRST, THEIRS = first_document(OURS), first_document(dataset_attributes("another", "another"))
WHOLE = FIRST.replace(b'"attributes"', b'"whole": true, "attributes"')


class CutError(Exception):
    """Ends an attempt."""


@pytest.fixture
def folder(bucket, server):
    """Of a dataset."""
    return Folder(f"{bucket}/dataset_0", server.options)


@pytest.mark.parametrize(
    ("found", "left"), [(None, FIRST), (b"damaged", FIRST), (THEIRS, FIRST), (FIRST, FIRST), (WHOLE, WHOLE)]
)
def test_a_document_of_the_same_build_stays(folder, found, left):
    if found is not None:
        folder.write(METADATA, found)
    write_first_document(folder, OURS)
    assert folder.read(METADATA) == left


@pytest.mark.parametrize("before", [None, THEIRS])
@pytest.mark.parametrize("meanwhile", [WHOLE, first_document(dataset_attributes("a third", "a third"))])
def test_an_attempt_that_was_first_while_another_waited_stays(folder, before, meanwhile, monkeypatch):
    """As when the request of a machine that is cut off arrives once the cut heals."""
    if before is not None:
        folder.write(METADATA, before)
    late = Folder.replace

    def replace(self, name, payload, *, version):
        self.write(METADATA, meanwhile)
        late(self, name, payload, version=version)

    monkeypatch.setattr(Folder, "replace", replace)
    if meanwhile == WHOLE:
        write_first_document(folder, OURS)
    else:
        with pytest.raises(CollectionBusyError):
            write_first_document(folder, OURS)
    assert folder.read(METADATA) == meanwhile


def test_a_late_attempt_that_dies_leaves_the_dataset(bucket, atlas, server, monkeypatch):
    url = f"{bucket}/o.zarr"
    fill, late = gather_module._fill_dataset, []

    def twice(job, task, dataset, folder):
        late.append((job, dataset))
        return fill(job, task, dataset, folder)

    monkeypatch.setattr(gather_module, "_fill_dataset", twice)
    build(url, atlas, server)
    before = contents(atlas.fs, url)
    for job, dataset in late:
        with pytest.raises(CutError), gather_module._new_dataset(job, dataset):
            raise CutError
    assert late
    assert contents(atlas.fs, url) == before
    assert DatasetCollection(url, mode="r", storage_options=server.options).verify().ok
