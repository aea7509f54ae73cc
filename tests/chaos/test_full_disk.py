"""Disks that are full or fail: one clear error, the old collection stays whole, and the same call goes on afterwards."""

import errno
import io
import itertools
import os
import resource
import subprocess

import dask
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import StorageError
from annbatch_dask.testing import make_adata
from tests.tools import At, Counter, tree_digest

GENES = [f"g{i}" for i in range(40)]
N_CELLS = 800


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    out = [folder / f"{i}.h5ad" for i in range(2)]
    for i, path in enumerate(out):
        make_adata(N_CELLS, GENES, seed=i).write_h5ad(path)
    return out


def add(out, paths, **options):
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setitem(dask.config.config, "annbatch_dask", {"block_size": 40_000})
        given = {"seed": 2, "dataset_size": 200, "zarr_compressor": (), "progress": False}
        return DatasetCollection(out).add_adatas(paths, **given | options)


@pytest.fixture(scope="module")
def undisturbed(paths, tmp_path_factory):
    """Digests after the first and the second file."""
    out = tmp_path_factory.mktemp("undisturbed") / "o.zarr"
    add(out, paths[:1])
    first = tree_digest(out)
    add(out, paths[1:])
    return first, tree_digest(out)


@pytest.fixture
def small(tmp_path):
    """A function that mounts a disk of so many bytes, or resizes it."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(n_bytes):
        remount = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={n_bytes}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_scratch_disk(paths, undisturbed, tmp_path, small):
    out, scratch = tmp_path / "o.zarr", small(60_000)
    with pytest.raises(StorageError, match=rf"{scratch}/.*/.* cannot be written: .* bytes are free on the disk of"):
        add(out, paths[:1], scratch=scratch)
    assert DatasetCollection(out).is_empty
    small(10_000_000)
    seen = Counter()
    add(out, paths[:1], scratch=scratch, callbacks=[seen])
    assert 0 < seen.reused < seen.tasks["scatter"]
    assert tree_digest(out) == undisturbed[0]


def test_a_scratch_disk_that_becomes_read_only(paths, undisturbed, tmp_path, small):
    """As the system does with one that fails."""
    out, scratch = tmp_path / "o.zarr", small(10_000_000)

    def mount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(scratch)], check=True)

    with pytest.raises(StorageError, match=rf"{scratch}/.*/.* cannot be written: .*[Rr]ead-only file system"):
        add(out, paths[:1], scratch=scratch, callbacks=[At("scatter", 2, lambda: mount("ro"))])
    mount("rw")
    add(out, paths[:1], scratch=scratch)
    assert tree_digest(out) == undisturbed[0]


def test_files_that_may_not_be_so_large(paths, undisturbed, tmp_path):
    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    try:
        with pytest.raises(StorageError, match=r"cannot be written: no file may be so large; raise the limit"):
            add(tmp_path / "o.zarr", paths[:1], callbacks=[At("scatter", 1, lambda: limit(5000))])
    finally:
        limit(resource.RLIM_INFINITY)
    add(tmp_path / "o.zarr", paths[:1])
    assert tree_digest(tmp_path / "o.zarr") == undisturbed[0]


@pytest.mark.chaos
def test_a_full_disk_under_the_collection(paths, undisturbed, tmp_path, small):
    """In an extension, which writes all anew beside the old datasets, and wherever the disk becomes full."""
    disk = small(10_000_000)
    out, scratch = disk / "o.zarr", tmp_path / "scratch"
    add(out, paths[:1], scratch=scratch)
    used = 4096 * sum(-(-p.stat().st_size // 4096) for p in disk.rglob("*") if p.is_file())
    for more in (20_000, 300_000, 600_000):
        small(used + more)
        with pytest.raises(StorageError, match=rf"{out}/.* cannot be written: .* bytes are free on the disk of"):
            add(out, paths[1:], scratch=scratch)
        assert DatasetCollection(out, mode="r").n_obs == N_CELLS
        assert DatasetCollection(out, mode="r").verify().ok
    small(20_000_000)
    add(out, paths[1:], scratch=scratch)
    assert tree_digest(out) == undisturbed[1]


def fails_to_sync(countdown):
    """From some time on: what fails once is tried again."""
    fsync = os.fsync

    def fail(fd):
        if next(countdown) <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    return "os.fsync", fail


def fails_to_close(countdown):
    """As network disks do, which write only then."""

    class File(io.BufferedWriter):
        def close(self):
            is_first = not self.closed
            super().close()
            if is_first and next(countdown) <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opens(path, mode, buffering, opener):
        return File(io.FileIO(path, mode, opener=opener), buffering)

    return "annbatch_dask.storage.folder.open", opens


@pytest.mark.parametrize(
    ("how", "at"),
    [
        (fails_to_sync, 30),
        (fails_to_close, 20),
        pytest.param(fails_to_close, 1, marks=pytest.mark.chaos),
        pytest.param(fails_to_sync, 200, marks=pytest.mark.chaos),
        pytest.param(fails_to_close, 60, marks=pytest.mark.chaos),
    ],
)
def test_a_disk_that_fails(paths, undisturbed, tmp_path, monkeypatch, how, at):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    with monkeypatch.context() as patch, pytest.raises(OSError, match=rf"Input/output error: '.*{tmp_path}/"):
        patch.setattr(*how(itertools.count(at, -1)), raising=False)
        add(out, paths[1:])
    assert DatasetCollection(out, mode="r").verify().ok
    assert (
        tree_digest(out, only=lambda p: p.parts[0] in {*(f"dataset_{k}" for k in range(4)), "zarr.json"})
        == undisturbed[0]
    )
    add(out, paths[1:])
    assert tree_digest(out) == undisturbed[1]


class FailingFile(MemoryFile):
    """Takes bytes until the store has had enough."""

    def write(self, data):
        FailingStore.left -= len(data)
        if FailingStore.left < 0:
            raise OSError(FailingStore.error, os.strerror(FailingStore.error))
        return super().write(data)


class FailingStore(MemoryFileSystem):
    """Memory that fails after so many bytes."""

    protocol = "failing"
    store: dict = {}
    pseudo_dirs = [""]
    left = 0
    error = errno.EIO

    def _open(self, path, mode="rb", **kwargs):
        file = super()._open(path, mode, **kwargs)
        if mode == "wb":
            file.__class__ = FailingFile
        return file


@pytest.fixture
def failing():
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    yield FailingStore
    FailingStore.store.clear()


@pytest.mark.parametrize(
    ("error", "kind", "match"),
    [
        (errno.EIO, OSError, "Input/output error: 'failing://scratch/.*"),
        (errno.ENOSPC, StorageError, "failing://scratch/.* cannot be written: no space is left on the store"),
    ],
)
def test_a_scratch_store_that_fails_after_some_bytes(paths, undisturbed, tmp_path, failing, error, kind, match):
    out = tmp_path / "o.zarr"
    failing.error = error
    for n_bytes in (10, 25_000):
        failing.left = n_bytes
        with pytest.raises(kind, match=match):
            add(out, paths[:1], scratch="failing://scratch")
        assert DatasetCollection(out).is_empty
    failing.left = 2**30
    seen = Counter()
    add(out, paths[:1], scratch="failing://scratch", callbacks=[seen])
    assert seen.reused
    assert tree_digest(out) == undisturbed[0]
