"""Files on their way to a store, so that who encodes waits for none: of S3 in parts, of others behind a thread."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import IO, Any

from fsspec.spec import AbstractBufferedFile

from annbatch_dask.storage.objects import is_s3

__all__ = ["N_BUFFERS", "UPLOAD_NBYTES", "Behind", "PartedUpload", "upload"]

_PART_NBYTES = 8 * 2**20
"""Bytes of an upload that go out at once, one after another, and are held until then."""
_WAITING_NBYTES = _PART_NBYTES // 2
_S3_PART_NBYTES = 5 * 2**20
"""The same for S3, where several go out at a time: it wants as much or more, and at most 10,000 of them."""
N_BUFFERS = 4
"""Such parts that an array on its way to S3 holds, filled or being sent."""
UPLOAD_NBYTES = max(2 * N_BUFFERS * _S3_PART_NBYTES, 3 * _PART_NBYTES + _WAITING_NBYTES)
"""What an array on its way holds: of S3 its parts, and the client's copies of them; elsewhere what waits, a part
that is filled, the same as it is sent, and the client's copy."""


@contextlib.contextmanager
def upload(fs: Any, path: str, room: threading.Semaphore | None = None) -> Iterator[IO[bytes]]:
    """A file on an object store, which appears when the block ends without an error; ``room`` as of its parts.

    fsspec's own ``transaction`` belongs to the file system, so to all threads at once.
    """
    file: Any = PartedUpload(fs, path, room) if is_s3(fs) else fs.open(path, "wb", block_size=_PART_NBYTES)
    try:
        yield file
        if isinstance(file, PartedUpload):
            file.end().result()
    except BaseException:
        if isinstance(file, PartedUpload):
            file.abandon()
        elif isinstance(file, AbstractBufferedFile):
            file.closed = True  # or its finalizer would publish half of it
            with contextlib.suppress(Exception):  # the error that brought us here says more
                file.discard()
        raise
    if not isinstance(file, PartedUpload):
        file.close()


class PartedUpload:
    """A file of S3 to write, by one thread, whose parts go out several at a time; it appears when all are there.

    s3fs's own files send one part after another. Here all parts but the last have one size, and a file of no more
    bytes goes in one request. Requests are tried again as often as s3fs does.

    Parameters
    ----------
    fs, path
        s3fs's file system, and where.
    room
        As many buffers as may be there at once, of several files if they share it: who writes waits for the next.
    """

    def __init__(self, fs: Any, path: str, room: threading.Semaphore | None = None) -> None:
        bucket, key, _ = fs.split_path(path)
        self._fs, self._path, self._place = fs, path, {"Bucket": bucket, "Key": key}
        self._room = room or threading.Semaphore(N_BUFFERS - 1)
        self._buffer: io.BytesIO | None = None
        self._sent: list[Future[dict[str, Any]]] = []
        self._n_settled = 0
        self._begun: asyncio.Task[Any] | None = None
        self._end: Future[Any] | None = None

    def write(self, payload: bytes | memoryview) -> int:
        """Take some bytes; raises the error of a part that could not be sent."""
        nbytes = memoryview(payload).nbytes
        left = memoryview(payload).cast("B") if nbytes else memoryview(b"")
        while left:
            if self._buffer is not None and self._buffer.tell() == _S3_PART_NBYTES:  # and more follows
                self._send_part()
            if self._buffer is None:
                self._raise_first()
                self._room.acquire()
                self._buffer = io.BytesIO()
            left = left[self._buffer.write(left[: _S3_PART_NBYTES - self._buffer.tell()]) :]
        return nbytes

    def end(self) -> Future[Any]:
        """Let it be made whole, and do not wait: the future says when it is there, or that it could not be."""
        if self._end is None and self._sent:
            self._send_part()
            self._end = self._run(self._complete())
        elif self._end is None:
            if self._buffer is None:  # of an empty file
                self._room.acquire()
                self._buffer = io.BytesIO()
            self._end = self._send(self._put)
        return self._end

    def abandon(self) -> None:
        """Leave nothing of it, unless its end was begun; waits for what is on its way."""
        if self._end is not None:
            wait([self._end])
            return
        if self._buffer is not None:
            self._buffer = None
            self._room.release()
        wait(self._sent)
        if self._begun is not None:
            self._run(self._abort()).result()

    def _raise_first(self) -> None:
        """Raise the error of a part that was sent, of those that are done by now."""
        while self._n_settled < len(self._sent) and self._sent[self._n_settled].done():
            self._sent[self._n_settled].result()
            self._n_settled += 1

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._fs.loop)

    def _send_part(self) -> None:
        number = len(self._sent) + 1
        self._sent.append(self._send(lambda payload: self._put_part(number, payload)))

    def _send(self, put: Callable[[bytes], Coroutine[Any, Any, Any]]) -> Future[Any]:
        """Send what is in the buffer, and make room for another when it is there."""
        assert self._buffer is not None
        sent = self._run(put(self._buffer.getvalue()))
        sent.add_done_callback(lambda _: self._room.release())
        self._buffer = None
        return sent

    async def _put_part(self, number: int, payload: bytes) -> dict[str, Any]:
        where = self._place | {"UploadId": await self._upload_id(), "PartNumber": number}
        answer = await self._fs._call_s3("upload_part", Body=payload, **where)
        kept = ("ETag", "ChecksumSHA256")  # as s3fs
        return {"PartNumber": number} | {name: answer[name] for name in kept if name in answer}

    async def _upload_id(self) -> str:
        if self._begun is None:
            self._begun = asyncio.ensure_future(self._fs._call_s3("create_multipart_upload", **self._place))
        upload_id: str = (await self._begun)["UploadId"]
        return upload_id

    async def _put(self, payload: bytes) -> None:
        await self._fs._call_s3("put_object", Body=payload, **self._place)
        self._fs.invalidate_cache(self._path)

    async def _complete(self) -> None:
        try:
            parts = [await asyncio.wrap_future(part) for part in self._sent]
            where = self._place | {"UploadId": await self._upload_id(), "MultipartUpload": {"Parts": parts}}
            await self._fs._call_s3("complete_multipart_upload", **where)
        except BaseException:
            await asyncio.wait([asyncio.wrap_future(part) for part in self._sent])
            await self._abort()
            raise
        self._fs.invalidate_cache(self._path)

    async def _abort(self) -> None:
        """Have the parts removed; the error that brought us here says more than one of this."""
        with contextlib.suppress(Exception):
            await self._fs._call_s3("abort_multipart_upload", UploadId=await self._upload_id(), **self._place)


class Behind:
    """Makes calls one after another in a thread, whose caller waits only while too many bytes are on their way.

    After one that failed none is made; its error is raised by the next :meth:`call`, or by :meth:`wait`. To be ended by
    :meth:`wait` or :meth:`abandon`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shuffle-upload")
        self._made: deque[tuple[Future[None], int]] = deque()
        self._nbytes, self._has_failed = 0, False

    def call(self, fn: Callable[..., object], *args: Any, nbytes: int = 0) -> None:
        """Let a call be made, which holds so many bytes until then."""
        while self._made and (self._made[0][0].done() or self._nbytes + nbytes > _WAITING_NBYTES):
            self._settle()
        self._made.append((self._thread.submit(self._make, fn, *args), nbytes))
        self._nbytes += nbytes

    def wait(self) -> None:
        """Wait until all were made, and end the thread."""
        while self._made:
            self._settle()
        self._thread.shutdown()

    def abandon(self) -> None:
        """Make none that has not begun, wait for the one that has, and end the thread."""
        self._has_failed = True
        self._thread.shutdown(cancel_futures=True)
        self._made.clear()

    def _make(self, fn: Callable[..., object], *args: Any) -> None:
        if self._has_failed:  # what follows on half a file would be taken for all of it
            return
        try:
            fn(*args)
        except BaseException:
            self._has_failed = True
            raise

    def _settle(self) -> None:
        future, nbytes = self._made.popleft()
        self._nbytes -= nbytes
        future.result()
