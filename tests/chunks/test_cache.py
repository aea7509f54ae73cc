"""What is kept of remote files equals the files, stays within its limit, and outlives crashes."""

import errno
import logging
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.chunks.cache import RangeCache, RemoteFile, Spans
from annbatch_dask.errors import StorageError

MB = 2**20
HOUR_S = 3600


class Remote:
    """A remote file that counts what is fetched of it."""

    def __init__(self, nbytes, seed=0, url="s3://bucket/file"):
        self.content = np.random.default_rng(seed).bytes(nbytes)
        self.file = RemoteFile(url, version=str(seed), nbytes=nbytes)
        self.fetched = []

    def fetch(self, start, out):
        self.fetched.append((start, start + len(out)))
        found = self.content[start : start + len(out)]
        out[: len(found)] = found
        return len(found)

    def read(self, cache, start, stop):
        out = bytearray(stop - start)
        n = cache.read_into(self.file, start, memoryview(out), self.fetch)
        return bytes(out[:n])


@pytest.fixture
def cache(tmp_path):
    return RangeCache(tmp_path / "cache", 64 * MB)


def again(cache):
    """The same folder, as another process sees it."""
    return pickle.loads(pickle.dumps(cache))


def disk_usage(cache):
    return sum(path.stat().st_blocks * 512 for path in cache.folder.iterdir())


def suffixes(cache):
    return sorted(path.suffix for path in cache.folder.iterdir() if path.name != ".lock")


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).filter(lambda s: s[0] < s[1]))


@given(spans, st.integers(0, 60), st.integers(0, 60))
def test_what_is_missing_of_a_run(added, start, stop):
    runs, there = Spans(), np.zeros(64, bool)
    for a, b in added:
        runs.add(a, b)
        there[a:b] = True
    holes = start + np.flatnonzero(~there[start:stop])
    expected = (holes[0], holes[-1] + 1) if len(holes) else None
    assert runs.missing(start, stop) == expected


@given(reads=st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 9_000)).map(sorted), max_size=30))
def test_any_reads_give_the_files_bytes_and_none_is_fetched_twice(tmp_path_factory, reads):
    cache, remote = RangeCache(tmp_path_factory.mktemp("cache"), 64 * MB), Remote(8_000)
    asked = np.zeros(9_000, bool)
    for start, stop in reads:
        remote.fetched.clear()
        assert remote.read(cache, start, stop) == remote.content[start:stop]
        new = np.flatnonzero(~asked[start : min(stop, 8_000)]) + start
        assert remote.fetched == ([(new[0], new[-1] + 1)] if len(new) else [])
        asked[start:stop] = True


def test_what_was_logged_is_there_for_the_next_process(cache):
    remote = Remote(100_000)
    remote.read(cache, 10_000, 30_000)
    remote.read(cache, 50_000, 60_000)
    cache.flush()
    remote.fetched.clear()
    later = again(cache)
    assert remote.read(later, 12_000, 58_000) == remote.content[12_000:58_000]
    assert remote.fetched == [(30_000, 50_000)]
    assert suffixes(cache) == [".bytes", ".spans"]


def test_what_was_not_logged_is_fetched_again(cache):
    remote = Remote(100_000)
    remote.read(cache, 0, 50_000)
    later = again(cache)
    remote.fetched.clear()
    assert remote.read(later, 0, 50_000) == remote.content[:50_000]
    assert remote.fetched == [(0, 50_000)]


def test_it_is_logged_by_the_way_when_much_has_come(cache):
    remote = Remote(12 * MB)
    for start in range(0, 12 * MB, MB):
        remote.read(cache, start, start + MB)
    remote.fetched.clear()
    later = again(cache)
    for start in range(0, 12 * MB, MB):
        remote.read(later, start, start + MB)
    assert 0 < len(remote.fetched) <= 8  # the limit's eighth, 8 MB, is logged at a time


def test_another_version_of_a_file_is_another_file(cache):
    old, new = Remote(5_000, seed=1), Remote(5_000, seed=2)
    old.read(cache, 0, 5_000)
    assert new.read(cache, 0, 5_000) == new.content
    assert old.read(cache, 0, 5_000) == old.content


def test_a_store_that_tells_no_versions_apart_is_not_kept(cache):
    remote = Remote(5_000)
    remote.file = RemoteFile("http://host/file", version="", nbytes=5_000)
    for _ in range(2):
        assert remote.read(cache, 0, 5_000) == remote.content
    assert len(remote.fetched) == 2
    assert not cache.folder.exists()


def test_a_file_that_is_shorter_than_it_was(cache):
    remote = Remote(5_000)
    remote.file = RemoteFile("s3://bucket/file", version="1", nbytes=6_000)
    assert remote.read(cache, 4_000, 6_000) == remote.content[4_000:]  # the caller sees that it is short
    remote.fetched.clear()
    assert remote.read(cache, 4_000, 5_000) == remote.content[4_000:]
    assert remote.fetched == [(4_000, 5_000)]


def test_errors_of_the_store_are_the_callers(cache):
    def fetch(start, out):
        raise FileNotFoundError(errno.ENOENT, "gone", "s3://bucket/file")

    remote = Remote(5_000)
    with pytest.raises(FileNotFoundError, match="gone"):
        cache.read_into(remote.file, 0, memoryview(bytearray(10)), fetch)
    assert remote.read(cache, 0, 5_000) == remote.content
    assert remote.read(cache, 0, 5_000) == remote.content
    assert len(remote.fetched) == 1


class TestLimit:
    def test_it_is_never_passed_and_what_came_first_stays(self, tmp_path):
        cache, remote = RangeCache(tmp_path / "cache", MB), Remote(4 * MB)
        for start in range(0, 4 * MB, 100_000):
            remote.read(cache, start, min(start + 100_000, 4 * MB))
            assert disk_usage(cache) <= MB
        kept = disk_usage(cache)
        assert kept > 0.7 * MB
        for _ in range(2):  # an epoch in the same order would find nothing, if the last to come had stayed
            remote.fetched.clear()
            for start in range(0, 4 * MB, 100_000):
                stop = min(start + 100_000, 4 * MB)
                assert remote.read(cache, start, stop) == remote.content[start:stop]
            assert sum(b - a for a, b in remote.fetched) <= 4 * MB - 0.7 * MB

    def test_files_that_nobody_uses_give_way_the_oldest_first(self, tmp_path):
        cache = RangeCache(tmp_path / "cache", MB)
        remotes = [Remote(300_000, seed=i) for i in range(5)]
        for age, remote in zip((3, 2, 4), remotes, strict=False):
            each = again(cache)
            remote.read(each, 0, 300_000)
            each.flush()
            for path in cache.folder.glob(f"{remote.file.digest}*"):
                used = path.stat().st_mtime - age * HOUR_S
                os.utime(path, (used, used))
        for remote in remotes[3:]:
            each = again(cache)
            remote.read(each, 0, 300_000)
            each.flush()
            assert disk_usage(cache) <= MB
        names = {path.name.split("-")[0] for path in cache.folder.glob("*.bytes")}
        assert names == {remotes[i].file.digest for i in (1, 3, 4)}

    def test_files_in_use_stay(self, tmp_path):
        cache = RangeCache(tmp_path / "cache", MB)
        first, second = Remote(600_000, seed=1), Remote(600_000, seed=2)
        first.read(cache, 0, 600_000)
        cache.flush()
        second.read(again(cache), 0, 600_000)
        first.fetched.clear()
        first.read(cache, 0, 600_000)
        assert not first.fetched


class TestDamage:
    @pytest.fixture
    def kept(self, cache):
        remote = Remote(100_000)
        for start in (0, 20_000, 60_000):
            remote.read(cache, start, start + 10_000)
            cache.flush()
        remote.fetched.clear()
        return SimpleNamespace(
            remote=remote, log=next(cache.folder.glob("*.spans")), bytes=next(cache.folder.glob("*.bytes"))
        )

    def assert_sound(self, cache, kept, fetched):
        kept.remote.fetched.clear()
        for start in (0, 20_000, 60_000):
            assert kept.remote.read(cache, start, start + 10_000) == kept.remote.content[start : start + 10_000]
        assert [a for a, _ in kept.remote.fetched] == fetched

    @pytest.mark.parametrize("n_lost", [1, 19, 21])
    def test_a_log_that_was_cut_short(self, cache, kept, n_lost):
        os.truncate(kept.log, kept.log.stat().st_size - n_lost)
        self.assert_sound(again(cache), kept, [60_000] if n_lost < 20 else [20_000, 60_000])

    def test_a_log_with_half_a_record_within(self, cache, kept):
        raw = kept.log.read_bytes()
        kept.log.write_bytes(raw[:27] + raw[20:])
        self.assert_sound(again(cache), kept, [20_000, 60_000])

    def test_bytes_that_were_cut_short(self, cache, kept):
        os.truncate(kept.bytes, 25_000)
        self.assert_sound(again(cache), kept, [20_000, 60_000])

    @pytest.mark.parametrize("in_the_same_process", [True, False])
    def test_bytes_that_another_process_removed(self, cache, kept, in_the_same_process):
        kept.bytes.unlink()
        later = cache if in_the_same_process else again(cache)
        self.assert_sound(later, kept, [0, 20_000, 60_000])
        self.assert_sound(later, kept, [])

    def test_files_that_were_removed_and_made_again_by_another_process(self, cache, kept):
        for path in (kept.log, kept.bytes):
            path.unlink()
        other = again(cache)
        kept.remote.read(other, 90_000, 95_000)
        other.flush()
        self.assert_sound(cache, kept, [0, 20_000, 60_000])

    def test_a_folder_that_was_emptied(self, cache, kept):
        for path in cache.folder.iterdir():
            path.unlink()
        self.assert_sound(cache, kept, [0, 20_000, 60_000])

    def test_what_is_forgotten_is_fetched_and_kept_anew(self, cache, kept, caplog):
        other = again(cache)
        self.assert_sound(other, kept, [])
        cache.forget(kept.remote.file)
        assert "is damaged: what it holds of s3://bucket/file is read again" in caplog.text
        self.assert_sound(cache, kept, [0, 20_000, 60_000])
        cache.flush()
        self.assert_sound(other, kept, [])

    @pytest.mark.parametrize("call", ["pwrite", "fsync", "preadv"])
    def test_a_disk_that_fails_ends_the_use_of_the_cache_alone(self, cache, kept, monkeypatch, caplog, call):
        def fail(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(f"annbatch_dask.chunks.cache.os.{call}", fail)
        with caplog.at_level(logging.WARNING):
            for start in (0, 90_000, 30_000):
                assert kept.remote.read(cache, start, start + 10_000) == kept.remote.content[start : start + 10_000]
                cache.flush()
        assert [record.getMessage().split(",")[0] for record in caplog.records] == [
            f"{cache.folder} is not used as a cache any more"
        ]


@pytest.mark.parametrize(("listing", "n_fetched"), [("iterdir", 1), ("glob", 2)])
def test_what_another_process_forgets_meanwhile_does_not_end_its_use(cache, monkeypatch, listing, n_fetched):
    """As room is made for another file, and as the file itself is opened."""
    other, old = again(cache), Remote(MB, seed=1)
    old.read(other, 0, MB)
    other.flush()
    listed, are_there = getattr(Path, listing), [True]

    def forgotten_then(folder, *pattern):
        names = list(listed(folder, *pattern))
        if are_there and names:
            are_there.clear()
            other.forget(old.file)
        return iter(names)

    monkeypatch.setattr(Path, listing, forgotten_then)
    remote = Remote(MB, seed=2) if listing == "iterdir" else Remote(MB, seed=1)
    for _ in range(3):
        assert remote.read(cache, 0, MB) == remote.content
    assert not are_there
    assert len(remote.fetched) == n_fetched


def test_threads_share_one(tmp_path):
    cache, remote = RangeCache(tmp_path / "cache", 4 * MB), Remote(6 * MB)
    starts = np.random.default_rng(0).permutation(np.repeat(np.arange(0, 6 * MB, 50_000), 3)).tolist()

    def is_right(start):
        stop = min(start + 60_000, 6 * MB)
        return remote.read(cache, start, stop) == remote.content[start:stop]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(is_right, starts))
    cache.flush()
    assert disk_usage(cache) <= 4 * MB
    later = again(cache)
    assert all(remote.read(later, s, s + 40_000) == remote.content[s : s + 40_000] for s in starts)


def read_at_random(cache, seed):
    remote = Remote(2 * MB)
    for start in np.random.default_rng(seed).integers(0, 2 * MB - 30_000, 300).tolist():
        assert remote.read(cache, start, start + 30_000) == remote.content[start : start + 30_000]
    cache.flush()


def test_processes_share_one(cache):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=read_at_random, args=(cache, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert suffixes(cache) == [".bytes", ".spans"]
    remote, later = Remote(2 * MB), again(cache)
    pieces = [remote.read(later, start, start + 8_192) for start in range(0, 2 * MB, 8_192)]
    assert b"".join(pieces) == remote.content
    assert sum(b - a for a, b in remote.fetched) < 0.2 * MB


def read_shares(cache, rank, barrier, shares):
    """A fourth of a file an epoch, another one each time; which share of it came from the store."""
    remote, step, order = Remote(8 * MB), 100_000, np.random.default_rng(0).permutation(80)
    for epoch in range(3):
        remote.fetched.clear()
        mine = np.roll(order, 20 * epoch)[rank::4]
        for k in mine.tolist():
            assert remote.read(cache, k * step, (k + 1) * step) == remote.content[k * step : (k + 1) * step]
        cache.flush()
        shares.put((epoch, sum(b - a for a, b in remote.fetched) / (len(mine) * step)))
        barrier.wait(60)


def test_processes_find_what_others_fetch_while_they_run(cache):
    context = multiprocessing.get_context("fork")
    barrier, shares = context.Barrier(4), context.Queue()
    processes = [context.Process(target=read_shares, args=(cache, rank, barrier, shares)) for rank in range(4)]
    for process in processes:
        process.start()
    found = sorted(shares.get(timeout=60) for _ in range(12))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    shares.close()
    assert [share for _, share in found] == [1.0] * 4 + [0.0] * 8


class TestPrivate:
    """What is kept is for its owner alone."""

    @pytest.fixture(autouse=True)
    def _open_umask(self):
        before = os.umask(0)
        yield
        os.umask(before)

    def test_nobody_else_may_read_it(self, cache):
        Remote(5_000).read(cache, 0, 5_000)
        cache.flush()
        assert cache.folder.stat().st_mode & 0o777 == 0o700
        assert {p.stat().st_mode & 0o777 for p in cache.folder.iterdir()} == {0o600}

    def test_what_an_earlier_release_left_open_is_closed(self, cache):
        remote = Remote(5_000)
        remote.read(cache, 0, 5_000)
        cache.flush()
        for path in cache.folder.iterdir():
            path.chmod(0o644)
        remote.fetched.clear()
        assert remote.read(again(cache), 0, 5_000) == remote.content
        assert not remote.fetched
        assert {p.stat().st_mode & 0o777 for p in cache.folder.glob("*.*s")} == {0o600}

    @pytest.mark.parametrize("whose", ["others", "mine, which others may write to"])
    def test_a_folder_of_others_is_refused(self, cache, whose, monkeypatch):
        cache.folder.mkdir(mode=0o700 if whose == "others" else 0o770)
        if whose == "others":
            monkeypatch.setattr(os, "geteuid", lambda: cache.folder.stat().st_uid + 1)
        with pytest.raises(StorageError, match="others could change what is read from it; give a folder of your own"):
            cache.check_private()

    def test_a_folder_of_the_users_own_stays_as_it_is(self, cache):
        cache.folder.mkdir(mode=0o755)
        cache.check_private()
        assert cache.folder.stat().st_mode & 0o777 == 0o755
