"""scan: what the inputs hold, from their metadata and row pointers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import pandas as pd

from annbatch_dask.plan.schema import SourceSchema
from annbatch_dask.storage.sources import SourceRef, open_source

__all__ = ["Scanned", "merge_var", "scan"]


@dataclass(frozen=True)
class Scanned:
    """An input's schema, and its var frame where asked for."""

    schema: SourceSchema
    var: pd.DataFrame | None


def scan(ref: SourceRef, want_var: bool) -> Scanned:
    """Look at one input.

    Raises
    ------
    SourceError
        If it cannot be read.
    SchemaError
        If it contradicts itself.
    """
    try:
        with open_source(ref) as source:
            return Scanned(source.schema(), source.var() if want_var else None)
    except Exception as e:
        e.add_note(f"while scanning {ref.label}")
        raise


def merge_var(frames: Sequence[pd.DataFrame], merge: str | None) -> pd.DataFrame:
    """Var columns of the collection: all of a single input's; of several, what ``anndata.concat(merge=...)`` keeps."""
    if len(frames) == 1:
        return frames[0]
    empty = [ad.AnnData(obs=pd.DataFrame(index=pd.Index([], dtype=object)), var=v) for v in frames]
    return ad.concat(empty, join="outer", merge=merge).var
