"""Frames as anndata stores them: a group of columns and an index."""

from __future__ import annotations

from typing import Any

__all__ = ["n_rows"]


def n_rows(frame: Any) -> int:
    """Rows of a stored frame."""
    index = frame[str(frame.attrs["_index"])]
    return int((index["values"] if hasattr(index, "keys") else index).shape[0])
