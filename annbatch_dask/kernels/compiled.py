"""How kernels are compiled: once a machine where numba finds a folder to keep them in, else once a process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba

__all__ = ["compiled"]

logger = logging.getLogger(__name__)


def compiled(fn: Callable[..., Any]) -> Any:
    """A function compiled at its first call for each combination of dtypes, which releases the GIL while it runs.

    What was compiled is kept in ``NUMBA_CACHE_DIR`` where that is set, else beside the package, else in the user's
    cache folder. In a container that another user runs none of them may be writable: then each process compiles anew.
    """
    try:
        return numba.njit(nogil=True, cache=True)(fn)
    except RuntimeError as e:  # numba looks for a folder here, and has no other word for finding none
        _say_once()
        logger.debug("%s", e)
        return numba.njit(nogil=True)(fn)


@lru_cache(1)
def _say_once() -> None:
    logger.warning(
        "no folder to keep compiled kernels in can be written, so each process compiles them anew, which takes "
        "seconds: set NUMBA_CACHE_DIR to one that can"
    )
