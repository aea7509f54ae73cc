"""Sources of a view, which must be what they were when the view was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from annbatch_dask.errors import CollectionChangedError, SourceNotFoundError
from annbatch_dask.sources.identity import identity_of
from annbatch_dask.sources.open import Source, SourceRef, open_source

__all__ = ["look_at", "open_as_opened"]


def look_at(ref: SourceRef) -> str:
    """Identity of a source's files, as they are now; empty where that cannot be known."""
    return identity_of(replace(ref, known=""))


@contextlib.contextmanager
def open_as_opened(ref: SourceRef, identity: str) -> Iterator[Source]:
    """Open a source whose identity was looked at when the view was made, and refuse what is read of another one.

    Raises
    ------
    CollectionChangedError
        If it was replaced since, or a dataset removed, in place of any other error.
    """
    try:
        with open_source(ref) as source:
            yield source
    except Exception as e:
        is_gone = isinstance(e, SourceNotFoundError) and not ref.is_dataset  # a file, of which that says enough
        if not is_gone and look_at(ref) != identity:
            raise _changed(ref) from e
        raise
    if look_at(ref) != identity:
        raise _changed(ref)


def _changed(ref: SourceRef) -> CollectionChangedError:
    what = "is not what it was when the view was opened: it was replaced or removed since"
    return CollectionChangedError(f"{ref.label} {what}; open the view again")
