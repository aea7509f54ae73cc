"""scan: what the inputs hold, from their metadata and row pointers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.kernels.values import range_of
from annbatch_dask.plan.dtypes import ValueRange, merge_ranges
from annbatch_dask.plan.layout import cut_blocks
from annbatch_dask.plan.schema import MatrixSchema, SourceSchema
from annbatch_dask.storage.matrices import CsrRows
from annbatch_dask.storage.sources import Source, SourceRef, open_source

__all__ = ["Scanned", "merge_var", "scan"]

_READ_NBYTES = 2**26


@dataclass(frozen=True)
class Scanned:
    """An input's schema, and its var frame where asked for."""

    schema: SourceSchema
    var: pd.DataFrame | None


def scan(ref: SourceRef, want_var: bool, read_values: bool = False) -> Scanned:  # noqa: FBT001, FBT002 - a task
    """Look at one input. ``read_values`` also reads every value of its matrices, which is as much work as a scatter.

    Raises
    ------
    SourceError
        If it cannot be read.
    SchemaError
        If it contradicts itself.
    """
    try:
        with open_source(ref) as source:
            schema = replace(source.schema(), tagged=ref.tagged)
            if read_values:
                found = tuple(replace(m, values=_range_of_matrix(source, schema, m)) for m in schema.matrices)
                schema = replace(schema, matrices=found)
            return Scanned(schema, source.var() if want_var else None)
    except Exception as e:
        e.add_note(f"while scanning {ref.label}")
        raise


def _range_of_matrix(source: Source, schema: SourceSchema, matrix: MatrixSchema) -> ValueRange:
    """Range of all values of a matrix, read in blocks."""
    ranges: list[ValueRange] = []

    def visit(_: int, piece: NDArray) -> None:
        ranges.append(ValueRange(*range_of(np.ascontiguousarray(piece))))

    only = replace(schema, matrices=(matrix,))
    for block in cut_blocks([only], block_nbytes=_READ_NBYTES, csc_nbytes=2**62, obs_nbytes=1):
        rows = source.matrix(matrix, block.start, block.stop)
        if isinstance(rows, CsrRows):
            rows.values(visit)
        else:
            visit(0, rows)
    return merge_ranges(ranges)


def merge_var(frames: Sequence[pd.DataFrame], merge: str | None) -> pd.DataFrame:
    """Var columns of the collection: all of a single input's; of several, what ``anndata.concat(merge=...)`` keeps."""
    if len(frames) == 1:
        return frames[0]
    empty = [ad.AnnData(obs=pd.DataFrame(index=pd.Index([], dtype=object)), var=v) for v in frames]
    frame: pd.DataFrame = ad.concat(empty, join="outer", merge=merge).var
    return frame
