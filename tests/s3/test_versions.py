"""Versions on a store that compares and writes in one step, and has no locks."""

import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionBusyError, VersionNotFoundError
from tests.s3.tools import At, build, names

pytestmark = pytest.mark.s3


def test_versions_are_kept_opened_and_removed(bucket, atlas, server):
    url = f"{bucket}/o.zarr"
    first, second = atlas.urls
    build(url, atlas, server, [first])
    collection = build(url, atlas, server, [second], keep=2)
    old = DatasetCollection(url, version=1, storage_options=server.options)
    assert old.verify(against=[first], storage_options=server.options).ok
    assert [(v.number, v.is_kept) for v in collection.versions] == [(1, True), (2, True)]
    assert "versions" in names(atlas.fs, url)
    collection.gc(keep_last=1)
    with pytest.raises(VersionNotFoundError, match=r"does not keep version 1 any more: .* opened at 2$"):
        DatasetCollection(url, version=1, storage_options=server.options)
    assert names(atlas.fs, url) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    assert collection.verify(storage_options=server.options).ok


def test_the_winner_of_two_builds_decides_what_is_kept(bucket, atlas, server):
    url = f"{bucket}/o.zarr"
    first, second = atlas.urls
    base = f"{bucket}/base.h5ad"
    atlas.fs.copy(first, base)
    build(url, atlas, server, [base])
    other = At("gather", lambda: build(url, atlas, server, [first], keep=2))
    with pytest.raises(CollectionBusyError, match="was changed by another build"):
        build(url, atlas, server, [second], keep=1, callbacks=[other])
    old = DatasetCollection(url, version=1, storage_options=server.options)
    assert old.verify(against=[base], storage_options=server.options).ok
    assert [v.is_kept for v in old.versions] == [True, True]
