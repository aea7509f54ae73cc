"""A store that fails, and one that is asked for little and told no secrets."""

import logging
import threading
import traceback

import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import AccessError
from tests.s3.server import SECRET, counts
from tests.s3.tools import At, CrashError, build, contents, crash, epoch

pytestmark = pytest.mark.s3


def test_errors_throttling_and_lost_connections_are_tried_again(bucket, atlas, server, local):
    url = f"{bucket}/o.zarr"
    with server.faults(share=0.06):
        collection = build(url, atlas, server)
        assert server.n_faults > 3
        rows = np.concatenate(epoch(collection))
    assert contents(atlas.fs, url) == local[1]
    np.testing.assert_array_equal(rows, np.concatenate(epoch(local[0])))


@pytest.mark.parametrize(
    "fault", [pytest.param("500", marks=pytest.mark.chaos), "503", pytest.param("reset", marks=pytest.mark.chaos)]
)
def test_a_store_that_never_answers_is_an_error_that_says_where(bucket, atlas, server, fault):
    options = server.options | {"config_kwargs": {"retries": {"max_attempts": 0}}}
    collection = DatasetCollection(f"{bucket}/o.zarr", storage_options=options)
    key = f"{bucket.removeprefix('s3://atlas/')}/o.zarr/dataset_0"

    def fail(request):
        return fault if request.method in ("PUT", "POST") and request.key.startswith(key) else None

    with server.failing(fail), pytest.raises(Exception, match="internal error|request rate|onnect") as caught:
        collection.add_adatas(atlas.urls, seed=0, storage_options=server.options)
    assert f"while writing {bucket}/o.zarr/dataset_0" in caught.value.__notes__
    assert not atlas.fs.exists(f"{bucket}/o.zarr/zarr.json")
    assert build(f"{bucket}/o.zarr", atlas, server, dataset_size="2GB").verify().ok  # and goes on


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("400", "HEAD"),
        ("403", "LIST"),
        ("400", "PUT"),
        pytest.param("403", "HEAD", marks=pytest.mark.chaos),
        pytest.param("400", "GET", marks=pytest.mark.chaos),
        pytest.param("403", "PUT", marks=pytest.mark.chaos),
    ],
)
def test_credentials_that_expire_are_told_with_the_place_and_cost_nothing(bucket, atlas, server, local, fault, kind):
    url, is_over = f"{bucket}/o.zarr", threading.Event()
    key = bucket.removeprefix("s3://atlas/")

    def fail(request):
        of_it = request.key.startswith(key) or request.query.get("prefix", "").startswith(key)
        return fault if is_over.is_set() and of_it and request.kind == kind else None

    with server.failing(fail), pytest.raises(AccessError, match=rf"s3://atlas/{key}/.*: the store refuses access \(.*"):
        build(url, atlas, server, callbacks=[At("scatter", is_over.set)])
    again = At()
    collection = build(url, atlas, server, callbacks=[again])
    assert again.reused["scatter"] == 2
    assert contents(atlas.fs, url) == local[1]
    assert collection.gc() == []


def test_few_requests_and_no_listing_of_the_bucket(bucket, atlas, server):
    root = bucket.removeprefix("s3://atlas/")
    with server.recorded() as requests:
        collection = build(f"{bucket}/o.zarr", atlas, server)
    lists = [r.query["prefix"] for r in requests if r.is_list]
    assert all(prefix.startswith((f"{root}/o.zarr/", f"{root}/o.zarr.scratch/", "in/part_")) for prefix in lists)
    n_blocks, n_datasets, n_inputs = 2, 2, 2
    n_files = sum(d.n_files for d in collection.manifest.datasets)
    # how far the build is, is written every ten seconds
    found = counts(r for r in requests if "/running-" not in r.key)
    # every file once; of each block a spill file and a receipt, of each dataset a receipt and whose it is at first;
    # whose the scratch folder is, job, claim and whether its store minds conditions, root, its inputs and log
    assert found["PUT"] == n_files + 2 * n_blocks + 2 * n_datasets + 7
    # by hand: what a task asks for, times the tasks; nothing depends on the number of files
    assert found["GET"] <= 4 * n_inputs + 3 * n_blocks + 8 * n_blocks * n_datasets + 3 * n_datasets + 4
    assert found["LIST"] <= 6 + 2 * n_inputs + 2 * n_blocks + 4 * n_datasets + 4
    assert found["HEAD"] <= 10 + 3 * n_inputs + 5 * n_blocks + 3 * n_datasets
    assert found["POST"] == 3  # removals: the scratch folder, what says whose it was, and the claim

    opened = DatasetCollection(f"{bucket}/o.zarr", mode="r", storage_options=server.options)
    loader_of = lambda: epoch(opened)  # noqa: E731
    loader_of()
    with server.recorded() as requests:
        loader_of()
    shards = [r for r in requests if "/X/" in r.key and "/c/" in r.key]
    assert {r.kind for r in shards} == {"GET"}


def test_secrets_are_written_nowhere(bucket, atlas, server, caplog):
    caplog.set_level(logging.INFO)
    url = f"{bucket}/o.zarr"
    said = []
    with pytest.raises(CrashError) as crashed:
        build(url, atlas, server, callbacks=[At("gather", crash)])
    collection = DatasetCollection(url, storage_options=server.options)
    plan = collection.plan_adatas(atlas.urls, seed=0, storage_options=server.options)
    with (
        server.failing(lambda r: "500" if r.method == "PUT" else None),
        pytest.raises(OSError, match="internal error") as failed,
    ):
        build(url, atlas, server, seed=1)
    for error in (crashed.value, failed.value):
        said += traceback.format_exception(error)
    left = contents(atlas.fs, bucket)
    assert any("/job-" in path for path in left)
    build(url, atlas, server)
    left |= contents(atlas.fs, bucket)
    said += [caplog.text, repr(plan), plan.summary(), repr(collection), str(collection.manifest)]
    for secret in (SECRET, "an-access-key"):
        assert not [path for path, content in left.items() if secret.encode() in content]
        assert not [text for text in said if secret in text]
