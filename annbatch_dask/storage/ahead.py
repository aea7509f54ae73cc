"""A remote file for who reads one range after another and waits for each, as h5py does: it is read in blocks, ahead.

HDF5 has one lock, under which it reads: however many threads, one request at a time. Those who know what they will read
say so here first; its blocks then come at the same time.
"""

from __future__ import annotations

import io
import itertools
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakValueDictionary

from annbatch_dask.errors import StorageError
from annbatch_dask.storage.filesystems import RemoteRanges
from annbatch_dask.storage.objects import is_s3
from annbatch_dask.storage.secrets import shown

__all__ = ["AheadFile", "ahead_file"]

_BLOCK_NBYTES = 4 * 2**20
_N_BLOCKS, _N_AHEAD = 12, 6
"""Blocks that are kept, those on their way among them, and how many of these there may be."""
_numbers = itertools.count()
_open: WeakValueDictionary[str, AheadFile] = WeakValueDictionary()


class AheadFile(io.RawIOBase):
    """One version of a remote file, for reads here and there by one thread at a time.

    Parameters
    ----------
    ranges
        The file.
    version
        As its ``identity`` gives it.

    Raises
    ------
    FileExistsError
        From reads, if S3 has another version of it by now.
    StorageError
        From reads, if it ends before it should.
    """

    def __init__(self, ranges: RemoteRanges, version: tuple[str, int]) -> None:
        super().__init__()
        self._ranges, self._version, self._nbytes = ranges, version, version[1]
        self._at = 0
        self._name = f"ahead-{next(_numbers)}"
        self._blocks: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._wanted = range(0)
        self._threads = ThreadPoolExecutor(_N_AHEAD, thread_name_prefix="ahead")
        _open[self._name] = self

    def __repr__(self) -> str:
        """Its name in this process: what h5py takes for the name of its file."""
        return self._name

    def close(self) -> None:
        """Let go of what is held, and wait for what is on its way."""
        if not self.closed:
            _open.pop(self._name, None)
            self._threads.shutdown(cancel_futures=True)
            self._blocks.clear()
        super().close()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Begin the next read elsewhere."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        return self._at

    def readinto(self, out: memoryview) -> int:  # type: ignore[override]
        """Fill ``out``; returns the bytes there were."""
        view = memoryview(out).cast("B")
        start, stop = self._at, max(self._at, min(self._at + len(view), self._nbytes))
        while self._at < stop:
            k, first = divmod(self._at, _BLOCK_NBYTES)
            found = self._block(k)[first : first + stop - self._at]
            if not len(found):  # h5py would take what its buffer held before
                ends = f"{shown(self._ranges.path)} ends at byte {self._at:,}"
                msg = f"{ends}, and had {self._nbytes:,} bytes when it was opened"
                raise StorageError(msg)
            view[self._at - start : self._at - start + len(found)] = found
            self._at += len(found)
        return self._at - start

    def expect(self, start: int, stop: int) -> None:
        """Say that bytes [start, stop) will be read next, about in their order."""
        self._wanted = range(start // _BLOCK_NBYTES, -(-min(stop, self._nbytes) // _BLOCK_NBYTES))
        self._read_ahead(self._wanted.start)

    def _block(self, k: int) -> memoryview:
        found = self._blocks.get(k) or self._start(k)
        self._blocks.move_to_end(k)
        if k in self._wanted:
            self._read_ahead(k + 1)
        while len(self._blocks) > _N_BLOCKS:
            self._blocks.popitem(last=False)
        try:
            return found.result()
        except BaseException:
            self._blocks.pop(k, None)  # the next read tries again
            raise

    def _read_ahead(self, first: int) -> None:
        for k in range(first, min(first + _N_AHEAD, self._wanted.stop)):
            if k not in self._blocks:
                self._start(k)
            self._blocks.move_to_end(k)  # those that were read make room, not those to come

    def _start(self, k: int) -> Future[memoryview]:
        self._blocks[k] = self._threads.submit(self._read, k)
        return self._blocks[k]

    def _read(self, k: int) -> memoryview:
        start, stop = k * _BLOCK_NBYTES, min((k + 1) * _BLOCK_NBYTES, self._nbytes)
        is_compared = is_s3(self._ranges.fs) and self._version[0].startswith('"')  # which it does in the same request
        return self._ranges.get(start, stop, self._version if is_compared else None)


def ahead_file(name: str) -> AheadFile | None:
    """The open file that h5py has this name for; None for one of another kind."""
    return _open.get(name)
