"""Ranges of objects, which obstore reads with what s3fs knows of the store."""

from datetime import timedelta

import fsspec
import pytest

from annbatch_dask.storage import filesystems, objects
from annbatch_dask.storage.filesystems import RemoteRanges
from annbatch_dask.storage.transient import is_transient
from tests.s3.server import counts

pytestmark = pytest.mark.s3


@pytest.fixture
def path(atlas, bucket):
    """An object of ten bytes."""
    path = f"{bucket.removeprefix('s3://')}/blob"
    atlas.fs.pipe_file(path, b"0123456789")
    return path


def read(ranges, start, n, version=None):
    return bytes(ranges.get(start, start + n, version))


def test_ranges_are_read_by_obstore_and_compared_there(atlas, path, server, monkeypatch):
    monkeypatch.setattr(filesystems, "_get_version", None)
    monkeypatch.setattr(filesystems, "cat_range", None)
    ranges = RemoteRanges(atlas.fs, path)
    version = ranges.identity()
    with server.recorded() as asked:
        assert read(ranges, 2, 3) == b"234"
        assert read(ranges, 8, 5, version) == b"89"
        assert read(ranges, 10, 5) == b""
    assert counts(asked) == {"GET": 3}
    atlas.fs.pipe_file(path, b"abcdefghij")
    with pytest.raises(FileExistsError, match="blob"):
        read(ranges, 2, 3, version)
    atlas.fs.rm_file(path)
    with pytest.raises(FileNotFoundError, match="blob"):
        read(ranges, 2, 3, version)


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_what_passes_is_tried_again_and_then_said(atlas, path, server, monkeypatch, fault):
    pauses = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    monkeypatch.setattr(
        objects, "_RETRIES", {"max_retries": 3, "retry_timeout": timedelta(seconds=30), "backoff": pauses}
    )
    monkeypatch.setattr(objects, "_stores", {})
    ranges = RemoteRanges(atlas.fs, path)
    n_left = [2]

    def twice(_):
        n_left[0] -= 1
        return fault if n_left[0] >= 0 else None

    with server.failing(twice):
        assert read(ranges, 2, 3) == b"234"
    with server.failing(lambda _: fault), pytest.raises(OSError, match="after 3 retries") as caught:
        read(ranges, 2, 3)
    assert server.n_faults == 1 + 4
    assert is_transient(caught.value)
    assert caught.value.filename == path


def test_an_answer_that_stalls_is_asked_for_again(atlas, path, server, monkeypatch):
    monkeypatch.setattr(objects, "_PATIENCE", timedelta(milliseconds=300))
    monkeypatch.setattr(objects, "_stores", {})
    ranges = RemoteRanges(atlas.fs, path)
    assert read(ranges, 2, 3) == b"234"
    with server.recorded() as asked, server.slow(60, 2):  # the first is answered with the second
        assert read(ranges, 2, 3) == b"234"
    assert counts(asked) == {"GET": 2}


def test_credentials_of_the_environment(atlas, path, server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    fs = fsspec.filesystem("s3", client_kwargs=server.options["client_kwargs"], skip_instance_cache=True)
    found = objects.object_ranges(fs, path)
    assert found is not None
    assert read(RemoteRanges(fs, path), 2, 3) == b"234"
    assert objects._credentials_of(fs)()["access_key_id"] == "of-the-environment"


@pytest.mark.parametrize(
    "options",
    [
        {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256"}},
        {"config_kwargs": {"s3": {"addressing_style": "virtual"}}},
        {"client_kwargs": {"verify": False}},
        {"version_aware": True},
    ],
)
def test_options_that_only_s3fs_knows_are_left_to_it(path, server, options):
    fs = fsspec.filesystem("s3", **server.options | options)
    assert objects.object_ranges(fs, path) is None


def test_a_forked_process_has_none_of_obstores_threads(atlas, path, monkeypatch):
    monkeypatch.setattr(objects, "_forked", False)
    assert objects.object_ranges(atlas.fs, path) is not None
    objects._after_fork()
    assert objects.object_ranges(atlas.fs, path) is None
    assert read(RemoteRanges(atlas.fs, path), 2, 3) == b"234"
