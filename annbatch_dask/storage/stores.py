"""A zarr store of objects of S3, in which a whole file costs one request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.storage import FsspecStore

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["WholeFileStore"]

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
