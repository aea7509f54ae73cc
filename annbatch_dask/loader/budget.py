"""Bytes that the windows and batches of an iteration may take, as its threads reserve them and give them back."""

from __future__ import annotations

from queue import SimpleQueue

from annbatch_dask.loader.helpers import Closed

__all__ = ["END", "ByteLimit", "End"]


class End:
    """Nothing follows."""


END = End()


class ByteLimit:
    """Bytes that may exist at a time, as one thread reserves them; a few reservations are granted whatever they ask."""

    def __init__(self, limit_nbytes: int, n_granted: int = 1) -> None:
        self._limit = limit_nbytes
        self._n_granted = n_granted
        self._used = 0
        self._n_held = 0
        self._returned: SimpleQueue[int | End] = SimpleQueue()

    def reserve(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more fit; raises Closed when the iteration ends meanwhile."""
        while not self.has_room(nbytes):
            self._take_back()
        self._used += nbytes
        self._n_held += 1

    def has_room(self, nbytes: int) -> bool:
        """True if ``nbytes`` more fit now; raises Closed when the iteration ends."""
        while not self._returned.empty():
            self._take_back()
        return self._n_held < self._n_granted or self._used + nbytes <= self._limit

    def _take_back(self) -> None:
        returned = self._returned.get()
        if isinstance(returned, End):
            raise Closed
        self._used -= returned
        self._n_held -= 1

    def shrink(self, nbytes: int) -> None:
        """Give back a part of a reservation, in the thread that reserves."""
        self._used -= nbytes

    def release(self, nbytes: int) -> None:
        """Give back a reservation, in any thread."""
        self._returned.put(nbytes)

    def close(self) -> None:
        """Wake the thread that waits. Takes no lock."""
        self._returned.put(END)
