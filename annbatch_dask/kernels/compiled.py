"""Compilation of kernels: cached per machine if numba finds a writable folder, else once per process."""

from __future__ import annotations

import logging
import os
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
    return _kept(lambda cache: _of_these_sources(numba.njit(nogil=True, cache=cache)(fn)))


def compiled_for_c(signature: Any, fn: Callable[..., Any]) -> Any:
    """Compile a kernel for one combination of dtypes, to be called from C at its ``address``."""
    return _kept(lambda cache: numba.cfunc(signature, nopython=True, cache=cache)(fn))


def _of_these_sources(kernel: Any) -> Any:
    """The kernel, which is compiled anew after any file of kernels has changed: numba looks at its own alone."""
    kept: Any = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if kept is not None:
        kept._source_stamp = (kept._source_stamp, _stamp())  # noqa: SLF001
    return kernel


@lru_cache(1)
def _stamp() -> tuple[int, int]:
    """The last change of the files that hold kernels, and their bytes."""
    here = os.path.dirname(__file__)
    folders = (here, os.path.join(os.path.dirname(here), "chunks"))
    found = [entry.stat() for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".py")]
    return max(f.st_mtime_ns for f in found), sum(f.st_size for f in found)


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
