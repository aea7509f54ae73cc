"""Stores of zarr: of objects of S3, in which a whole file costs one request, and of web servers, which are checked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import FsspecStore

from annbatch_dask.storage.web import get_web_range, is_web

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["CheckedRangesStore", "WholeFileStore", "store_class"]

_FIRST_NBYTES = 32 * 2**20


class WholeFileStore(FsspecStore):
    """Asks for the first bytes of a file that is to be read whole, which are all of most.

    s3fs asks for its size before, and where there is no file, whether there is a folder of this name.
    """

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of a file, or None where there is none."""
        if byte_range is not None:
            return await super().get(key, prototype, byte_range)
        first = await super().get(key, prototype, RangeByteRequest(0, _FIRST_NBYTES))
        if first is None or len(first) < _FIRST_NBYTES:
            return first
        size = await self.fs._size(f"{self.path}/{key}")
        starts = range(_FIRST_NBYTES, size, _FIRST_NBYTES)
        ranges = [RangeByteRequest(start, min(start + _FIRST_NBYTES, size)) for start in starts]
        rest = await asyncio.gather(*(super(WholeFileStore, self).get(key, prototype, r) for r in ranges))
        whole = b"".join(part.to_bytes() for part in (first, *rest) if part is not None)
        if len(whole) != size:
            msg = f"{self.path}/{key} has {size:,} bytes, and {len(whole):,} came: it was changed while it was read"
            raise OSError(msg)
        return prototype.buffer.from_bytes(whole)


class CheckedRangesStore(FsspecStore):
    """Takes for a part of a file of a web server nothing else that it sends."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of a file, or None where there is none."""
        path = f"{self.path}/{key}"
        try:
            if isinstance(byte_range, SuffixByteRequest):
                size = await self.fs._size(path)
                byte_range = None if size is None else RangeByteRequest(max(0, size - byte_range.suffix), size)
            if not isinstance(byte_range, RangeByteRequest):
                return await super().get(key, prototype, byte_range)
            found = await get_web_range(self.fs, path, byte_range.start, byte_range.end)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(found)


def store_class(fs: Any) -> type[FsspecStore]:
    """The kind of store for a file system."""
    if "s3" in fs.protocol:
        return WholeFileStore
    return CheckedRangesStore if is_web(fs) else FsspecStore
