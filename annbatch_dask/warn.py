"""Warnings that point at the line of the user's program, and some that are not heard."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["muted", "warn"]

_PACKAGE = str(Path(__file__).parent)
_turn = threading.Lock()


@contextlib.contextmanager
def muted(pattern: str = "") -> Iterator[None]:
    """Ignore warnings that begin so, one thread after another: filters are the process's, and each restores them."""
    with _turn, warnings.catch_warnings():
        warnings.filterwarnings("ignore", pattern)
        yield


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of what the first caller outside this package did."""
    level, frame = 0, sys._getframe(1)  # noqa: SLF001
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level + 2)
