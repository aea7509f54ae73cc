"""Compilation of kernels: cached per machine if numba finds a writable folder, else once per process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba

__all__ = ["compiled", "compiled_for_c"]

logger = logging.getLogger(__name__)


def compiled(fn: Callable[..., Any]) -> Any:
    """A function compiled at its first call for each combination of dtypes, which releases the GIL while it runs.

    What was compiled is kept in ``NUMBA_CACHE_DIR`` where that is set, else beside the package, else in the user's
    cache folder. In a container that another user runs none of them may be writable: then each process compiles again.
    """
    return _kept(lambda cache: numba.njit(nogil=True, cache=cache)(fn))


def compiled_for_c(signature: Any, fn: Callable[..., Any]) -> Any:
    """Compile a kernel for one combination of dtypes, to be called from C at its ``address``."""
    return _kept(lambda cache: numba.cfunc(signature, nopython=True, cache=cache)(fn))


def _kept(compile_it: Callable[[bool], Any]) -> Any:
    try:
        return compile_it(True)  # noqa: FBT003 - numba's own
    except RuntimeError as e:  # numba looks for a folder here, and has no other word for finding none
        _say_once()
        logger.debug("%s", e)
        return compile_it(False)  # noqa: FBT003


@lru_cache(1)
def _say_once() -> None:
    logger.warning(
        "no folder to keep compiled kernels in can be written, so each process compiles them anew, which takes "
        "seconds: set NUMBA_CACHE_DIR to one that can"
    )
