"""Paths and URLs that users give, as text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeGuard

__all__ = ["is_path", "located"]


def is_path(place: object) -> TypeGuard[str | os.PathLike[str]]:
    """True for paths, URLs, and a ``UPath`` of universal_pathlib, which is no ``os.PathLike`` where it is remote."""
    return isinstance(place, str | os.PathLike) or hasattr(place, "storage_options")


def located(path: str | os.PathLike[str], options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """A path or URL as text, and fsspec's options for it: those of a ``UPath``, and before these those given."""
    of_path = getattr(path, "storage_options", None)
    return os.fspath(path) if of_path is None else str(path), {**(of_path or {}), **(options or {})}
