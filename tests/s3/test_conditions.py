"""Stores that do not write on a condition: said before a build does any work, and of two builds one still says so."""

import logging

import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.storage import conditions
from tests.s3.tools import At, build

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """Nothing is known of the store, nor was anything said of it."""
    monkeypatch.setattr(conditions, "_plain", set())
    conditions._warn.cache_clear()
    yield
    conditions._warn.cache_clear()


@pytest.mark.parametrize("how", ["refused", "ignored"])
def test_a_store_without_conditions_is_named_before_any_work(bucket, atlas, server, how, caplog):
    caplog.set_level(logging.WARNING)
    url = f"{bucket}/o.zarr"
    seen = []
    before = At("measure", lambda: seen.append(caplog.text))
    after = At("scatter", lambda: seen.append(caplog.text))
    with server.conditions(how):
        collection = build(url, atlas, server, callbacks=[before, after])
        assert caplog.text.count("s3://atlas does not write on the condition") == 1
        assert all("s3://atlas does not write on the condition" in text for text in seen)
        assert collection.verify().ok
        atlas.fs.copy(atlas.urls[0], f"{bucket}/a.h5ad")
        atlas.fs.copy(atlas.urls[0], f"{bucket}/b.h5ad")
        other = At("scatter", lambda: build(url, atlas, server, [f"{bucket}/a.h5ad"]))
        with pytest.raises(CollectionBusyError, match="was changed by another build"):
            build(url, atlas, server, [f"{bucket}/b.h5ad"], callbacks=[other])
    assert DatasetCollection(url, mode="r", storage_options=server.options).verify().ok


def test_a_store_that_minds_them_is_not_named(bucket, atlas, server, caplog):
    caplog.set_level(logging.WARNING)
    build(f"{bucket}/o.zarr", atlas, server)
    assert "condition" not in caplog.text
