"""Locks and leases, also as network file systems have them."""

import errno
import fcntl
import logging
import os
import re

import dask
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError, StorageError
from annbatch_dask.storage import folder as folder_module
from annbatch_dask.storage import lock
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import Lease, exclusive, is_held, keep_generation
from annbatch_dask.testing import make_adata

FLOCK = fcntl.flock


def nfs(fd, operation):
    """As flock(2) says of NFS: an exclusive lock needs a file that is open for writing."""
    fd = fd if isinstance(fd, int) else fd.fileno()
    if operation & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    FLOCK(fd, operation)


def no_locks(fd, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture
def folder(tmp_path):
    """A folder with a root document."""
    (tmp_path / "zarr.json").write_text("{}")
    return Folder(str(tmp_path))


@pytest.fixture
def build(tmp_path):
    """Builds from the k-th of some files."""
    for i in range(4):
        make_adata(60, ["a", "b", "c"], seed=i).write_h5ad(tmp_path / f"{i}.h5ad")

    def add(k, **options):
        with dask.config.set(scheduler="synchronous"):
            options = {"dataset_size": 40} | options
            return DatasetCollection(tmp_path / "o.zarr").add_adatas([tmp_path / f"{k}.h5ad"], **options)

    return add


def names(tmp_path):
    return {p.name for p in (tmp_path / "o.zarr").iterdir()}


def named(collection):
    return {d.name for d in collection.manifest.datasets} | {"zarr.json"}


def test_on_nfs_replaced_datasets_go_when_their_readers_have_gone(tmp_path, build, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", nfs)
    build(0)
    extended = build(1)
    assert names(tmp_path) == named(extended)
    lease = DatasetCollection(tmp_path / "o.zarr", mode="r").lease()
    collection = build(2)
    assert len(names(tmp_path)) > len(named(collection))
    assert collection.gc() == []
    lease.close()
    assert collection.gc()
    assert names(tmp_path) == named(collection)


def test_where_it_cannot_be_known_whether_they_have_gone_they_stay(tmp_path, build, monkeypatch, caplog):
    """On NFS, with a root document that somebody else wrote and that may not be written."""
    monkeypatch.setattr(fcntl, "flock", nfs)
    build(0)
    os_open = os.open

    def forbidden(path, flags, *args):
        if flags & os.O_ACCMODE == os.O_RDWR and ".generation-" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return os_open(path, flags, *args)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "open", forbidden)
        collection = build(1)
        assert collection.gc() == []
    assert "is in use cannot be known" in caplog.text
    assert {"dataset_0", "dataset_1"} < names(tmp_path)
    assert collection.gc()


def test_where_there_are_no_locks_replaced_datasets_go_with_the_next_build(tmp_path, build, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    build(0)
    first = build(1)
    assert named(first) | {"dataset_0", "dataset_1"} == names(tmp_path)
    second = build(2)
    assert named(second) | named(first) == names(tmp_path)
    assert set(second.gc()) == named(first) - {"zarr.json"}


def test_a_file_that_is_only_read_can_be_asked_about(folder, monkeypatch):
    path = f"{folder.path}/zarr.json"
    os_open = os.open
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))

    def on_a_read_only_disk(path, flags, *args):
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise read_only
        return os_open(path, flags, *args)

    monkeypatch.setattr(lock.os, "open", on_a_read_only_disk)
    assert is_held(path) is False
    lease = Lease(folder)
    assert is_held(path) is True
    lease.close()
    assert is_held(f"{folder.path}/none") is False
    read_only.errno = errno.EIO
    with pytest.raises(OSError, match="Read-only"):
        is_held(path)


def test_a_lease_is_of_a_document_that_is_there_once_it_is_locked(folder, monkeypatch):
    """One that is replaced between its opening and its lock was looked at by whoever removes what it names."""
    replaced = []

    def late(fd, operation):
        if not replaced:
            replaced.append(1)
            keep_generation(folder)
            folder.replace("zarr.json", b'{"new": 1}', version=None)
        FLOCK(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    lease = Lease(folder)
    assert lease.document() == b'{"new": 1}'
    lease.close()


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_lock_whose_file_cannot_be_removed_is_released(tmp_path, monkeypatch, error, caplog):
    """What ended the build is what is raised, and the next call of this process is not told to wait for this process."""
    folder = Folder(str(tmp_path / "o"))

    def refused(path):
        raise error(path)

    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError), exclusive(folder):
        m.setattr(os, "unlink", refused)
        raise ZeroDivisionError
    assert "o.lock cannot be removed" in caplog.text
    assert (tmp_path / "o.lock").read_text() == ""
    with exclusive(folder):
        pass


def test_a_lock_is_released_if_it_cannot_be_written(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path / "o"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"), exclusive(folder):
            pass
    with exclusive(folder):
        pass


def test_a_lock_is_released_and_a_strangers_file_of_its_name_stays(tmp_path):
    folder = Folder(str(tmp_path / "o"))
    with exclusive(folder), pytest.raises(CollectionError, match="is being built by process"), exclusive(folder):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "o.lock").write_text("process 12 on node-7")  # of a process that was killed
    with exclusive(folder):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "o.lock").write_text("process 12 on node-7 and so on")
    with pytest.raises(CollectionError, match="is another file"), exclusive(folder):
        pass
    assert (tmp_path / "o.lock").read_text() == "process 12 on node-7 and so on"


@pytest.mark.parametrize("refused", ["o.zarr.lock", ".claim-", "scratch"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_that_may_not_be_written_is_named_with_whose_it_is(tmp_path, build, monkeypatch, refused, number):
    os_open, os_mkdir = os.open, os.mkdir

    def checked(call, flag):
        def forbidden(path, *args, **options):
            if refused in str(path) and (not flag or args[0] & flag):
                raise OSError(number, os.strerror(number), path)
            return call(path, *args, **options)

        return forbidden

    def opened(file, *args, **options):
        if refused in str(file):
            raise OSError(number, os.strerror(number), file)
        return open(file, *args, **options)

    build(0)
    whose = rf"belongs to user {os.geteuid()} and has mode .*, and this process runs as {os.geteuid()}\)"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", checked(os_open, os.O_CREAT))
        patch.setattr(os, "mkdir", checked(os_mkdir, 0))
        patch.setattr(folder_module, "open", opened, raising=False)
        with pytest.raises(StorageError, match=rf"{re.escape(refused)}.* cannot be written: .*{whose}; give a path"):
            build(1, scratch=tmp_path / "scratch" / "s")
    assert DatasetCollection(tmp_path / "o.zarr").n_obs == 60
    assert build(1).n_obs == 120
