"""Inputs, scratch and collection on an S3 server, over real HTTP on loopback."""

import json
from collections import Counter

import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionBusyError, CollectionError
from tests.s3.tools import At, CrashError, batches, build, contents, crash, epoch, names

pytestmark = pytest.mark.s3


def test_a_collection_has_the_bytes_it_has_on_a_disk(bucket, atlas, server, local):
    collection = build(f"{bucket}/o.zarr", atlas, server)
    assert contents(atlas.fs, f"{bucket}/o.zarr") == local[1]
    assert {path.split("/")[2] for path in atlas.fs.find(bucket)} == {"o.zarr", "o.zarr.log"}  # no scratch, no claim
    opened = DatasetCollection(f"{bucket}/o.zarr", mode="r", storage_options=server.options)
    assert opened.verify(against=atlas.urls, storage_options=server.options).ok
    np.testing.assert_array_equal(np.concatenate(epoch(opened)), np.concatenate(epoch(local[0])))
    assert len(collection) == 2


# --- commit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "extends"),
    [
        ("scatter", False),
        pytest.param("gather", True, marks=pytest.mark.chaos),
        pytest.param("scatter", True, marks=pytest.mark.chaos),
        pytest.param("gather", False, marks=pytest.mark.chaos),
    ],
)
def test_of_two_builds_at_once_the_second_to_commit_is_refused(bucket, atlas, server, stage, extends):
    url = f"{bucket}/o.zarr"
    first, second, base = atlas.urls[0], atlas.urls[1], f"{bucket}/base.h5ad"
    atlas.fs.copy(first, base)
    if extends:
        build(url, atlas, server, [base])
    other = At(stage, lambda: build(url, atlas, server, [first]))
    with pytest.raises(
        CollectionBusyError, match="was changed by another build .*, and stays; call again to add to it"
    ):
        build(url, atlas, server, [second], callbacks=[other])
    collection = DatasetCollection(url, mode="r", storage_options=server.options)
    assert [b.sources for b in collection.manifest.builds] == [(base,), (first,)][not extends :]
    assert collection.verify(storage_options=server.options).ok
    held = {d.name for d in collection.manifest.datasets}
    replaced = {"dataset_0"} if extends else set()  # stay for their readers until the next build
    assert names(atlas.fs, url) == held | replaced | {"zarr.json"}
    again = build(url, atlas, server, [second])
    assert again.verify(against=[*[base] * extends, first, second], storage_options=server.options).ok
    assert not [path for path in atlas.fs.find(bucket) if ".scratch" in path or ".claim" in path]


def test_a_commit_whose_answer_was_lost_is_no_conflict(bucket, atlas, server):
    url = f"{bucket}/o.zarr"
    key = f"{bucket.removeprefix('s3://atlas/')}/o.zarr/zarr.json"
    lost = []

    def lose(request):
        if request.method == "PUT" and request.key == key and not lost:
            return lost.append(request) or "lost"
        return None

    with server.failing(lose), server.recorded() as requests:
        collection = build(url, atlas, server)
    assert [r.method for r in requests if r.key == key and r.method == "PUT"] == ["PUT", "PUT"]
    assert collection.verify().ok


def test_a_build_that_was_interrupted_goes_on(bucket, atlas, server, local):
    url = f"{bucket}/o.zarr"
    for stage in ("scatter", "gather"):
        with pytest.raises(CrashError):
            build(url, atlas, server, callbacks=[At(stage, crash)])
        assert not atlas.fs.exists(f"{url}/zarr.json")
    seen = At()
    build(url, atlas, server, callbacks=[seen])
    assert seen.reused == Counter(scatter=2, gather=2, commit=0)
    assert contents(atlas.fs, url) == local[1]
    assert {path.split("/")[2] for path in atlas.fs.find(bucket)} == {"o.zarr", "o.zarr.log"}


def test_numbers_of_an_interrupted_build_are_left_to_it_until_another_is_published(bucket, atlas, server):
    url = f"{bucket}/o.zarr"
    with pytest.raises(CrashError):
        build(url, atlas, server, callbacks=[At("gather", crash)])
    collection = build(url, atlas, server, seed=1)
    assert [d.name for d in collection.manifest.datasets] == [f"dataset_{k}" for k in range(2, 4)]
    assert names(atlas.fs, url) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    assert not [path for path in atlas.fs.find(bucket) if ".scratch" in path]
    assert collection.gc() == []
    assert collection.verify().ok


def elsewhere(atlas, url):
    """Let the claim in a folder be that of another machine's process."""
    (path,) = [path for path in atlas.fs.find(url) if ".claim-" in path]
    claim = json.loads(atlas.fs.cat_file(path))
    claim |= {"has_ended": False, "owner": claim["owner"] | {"host": "node-7", "pid": 12}}
    atlas.fs.pipe_file(path, json.dumps(claim).encode())


def test_what_another_machine_may_still_write_stays(bucket, atlas, server):
    """A job that was retried while the first one may still run: its scattered work is taken over, its numbers are not."""
    url = f"{bucket}/o.zarr"
    with pytest.raises(CrashError):
        build(url, atlas, server, callbacks=[At("gather", crash)])
    elsewhere(atlas, url)
    before = contents(atlas.fs, url)
    with pytest.raises(CollectionBusyError, match=r"may be being built by process 12 on node-7.*--abandoned"):
        DatasetCollection(url, storage_options=server.options).gc()
    seen = At()
    collection = build(url, atlas, server, callbacks=[seen])
    assert seen.reused == Counter(scatter=2, gather=0, commit=0)
    assert [d.name for d in collection.manifest.datasets] == ["dataset_2", "dataset_3"]
    assert before.items() <= contents(atlas.fs, url).items()
    assert set(collection.gc(abandoned=True, dry_run=True)) == {".claim-0", "dataset_0", "dataset_1"}
    assert before.items() <= contents(atlas.fs, url).items()
    assert set(collection.gc(abandoned=True)) == {".claim-0", "dataset_0", "dataset_1"}
    assert collection.verify(against=atlas.urls, storage_options=server.options).ok


@pytest.mark.parametrize("stage", ["scatter", "gather"])
@pytest.mark.parametrize("extends", [False, pytest.param(True, marks=pytest.mark.chaos)])
def test_of_two_runs_of_one_build_the_slower_one_removes_nothing_of_the_other(bucket, atlas, server, stage, extends):
    url = f"{bucket}/o.zarr"
    base = f"{bucket}/base.h5ad"
    atlas.fs.copy(atlas.urls[0], base)
    if extends:
        build(url, atlas, server, [base])
    other = At(stage, lambda: build(url, atlas, server))
    collection = build(url, atlas, server, callbacks=[other])
    assert len(collection.manifest.builds) == 1 + extends
    found = collection.verify(against=[*[base] * extends, *atlas.urls], storage_options=server.options)
    assert found.ok, found.problems
    held = {d.name for d in collection.manifest.datasets}
    assert names(atlas.fs, url) == held | {"zarr.json"} | ({"dataset_0"} if extends else set())
    assert not [path for path in atlas.fs.find(bucket) if ".scratch" in path or ".claim" in path]


@pytest.mark.parametrize(
    "mode", ["extend", *(pytest.param(m, marks=pytest.mark.chaos) for m in ("append", "reshuffle"))]
)
def test_a_collection_is_extended_under_its_readers(bucket, atlas, server, mode):
    url = f"{bucket}/o.zarr"
    build(url, atlas, server, atlas.urls[:1])
    reader = DatasetCollection(url, mode="r", storage_options=server.options)
    before, during = epoch(reader), batches(reader)
    first = next(during)
    collection = build(url, atlas, server, atlas.urls[1:], mode=mode)
    np.testing.assert_array_equal(np.concatenate([first, *during]), np.concatenate(before))
    if mode != "append":
        with pytest.raises(CollectionError, match="was changed since it was opened"):
            epoch(reader)
    assert collection.verify(against=atlas.urls, storage_options=server.options).ok
    assert sum(map(len, epoch(collection))) == 500
    removed = collection.gc()
    assert removed == ([] if mode == "append" else ["dataset_0"])
    assert collection.verify().ok
    with server.recorded() as requests:
        again = build(url, atlas, server, atlas.urls[1:], mode=mode)
    assert again.manifest == collection.manifest
    assert not [r for r in requests if r.method == "PUT"]


# --- status --------------------------------------------------------------------------------------------------------


def test_how_far_a_build_is_can_be_seen_from_elsewhere(bucket, atlas, server):
    """While it runs, after a crash, of another machine, and without a word of how to get at the store."""
    url, seen = f"{bucket}/o.zarr", []

    def look():
        seen.append(DatasetCollection(url, storage_options=server.options).status())

    with pytest.raises(CrashError):
        build(url, atlas, server, callbacks=[At("scatter", lambda: (look(), crash()))])
    (running,) = seen
    assert (running.state, running.holder, running.n_obs) == ("running", None, None)
    assert running.builds[0].progress.stages[0].n_obs_done == 500
    found = DatasetCollection(url, storage_options=server.options).status()
    assert found.state == "interrupted"
    assert "CrashError" in str(found)
    (written,) = [path for path in atlas.fs.find(f"{url}.log") if "running" in path]
    told = atlas.fs.cat_file(written).decode() + json.dumps(found.to_json())
    assert not [value for value in server.options.values() if isinstance(value, str) and value in told]
    build(url, atlas, server)
    found = DatasetCollection(url, storage_options=server.options).status()
    assert (found.state, found.builds, len(found.last)) == ("idle", (), 1)
    assert not [path for path in atlas.fs.find(f"{url}.log") if "running" in path]
