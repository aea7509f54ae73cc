"""Identities of records: digests that mean the same in every release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from hashlib import blake2b

import numpy as np

__all__ = ["canonical", "digest"]


def canonical(value: object) -> object:
    """A record as JSON values, by the names of its fields, for digests that mean the same in every release.

    Fields that say nothing of its identity (``compare=False``), or have their default, are left out: so one that a
    later release adds changes no digest. A default must never be changed.
    """
    if is_dataclass(value):
        there = ((f, getattr(value, f.name)) for f in fields(value) if f.compare)
        return {f.name: canonical(v) for f, v in there if f.default is MISSING or v != f.default}
    if isinstance(value, tuple | list):
        return value if all(type(v) is str for v in value) else [canonical(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def digest(*parts: bytes) -> str:
    """32 hex digits."""
    h = blake2b(digest_size=16)
    for part in parts:
        h.update(part)
    return h.hexdigest()
