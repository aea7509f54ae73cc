"""Checks that the values of a dataset fit the requested dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from anndata.abc import CSRDataset

from annbatch_dask.errors import SchemaError
from annbatch_dask.loader.backing import ArraySource, CsrSource, RowSource, ValueBounds
from annbatch_dask.manifest import DATASET_NAME, MatrixRecord
from annbatch_dask.warn import warn

__all__ = ["Recorded", "check_cast", "recorded_values", "values_of", "warn_of_negatives"]

Recorded = Mapping[str, ValueBounds]
"""What a collection knows of the values of its matrices, by their names in a dataset."""


def recorded_values(manifest: Any) -> Recorded:
    """Bounds recorded in a manifest, for matrices whose range it has."""
    matrices: Mapping[str, MatrixRecord] = {} if manifest is None else manifest.matrices
    return {
        name: ValueBounds(m.low, m.high, is_whole=bool(m.integral))
        for name, m in matrices.items()
        if m.low is not None and m.high is not None
    }


def values_of(dataset: Any, recorded: Recorded) -> ValueBounds | None:
    """Recorded range of values of a matrix of the collection."""
    element = dataset.group if isinstance(dataset, CSRDataset) else dataset
    if not isinstance(element, zarr.Group | zarr.Array):
        return None
    parts = element.path.split("/")
    names = [k for k, part in enumerate(parts) if DATASET_NAME.fullmatch(part)]
    return recorded.get("/".join(parts[names[0] + 1 :])) if names else None


def check_cast(name: str, source: RowSource, dtype: Any) -> None:
    """SchemaError where values would wrap around, become infinite or lose their fraction.

    That a float is rounded is no loss. bfloat16 has the range of float32 but for its last 0.2 %, not looked at here.
    """
    asked = np.dtype(np.float32) if dtype == "bfloat16" else np.dtype(dtype)
    stored = source.stored_dtype
    is_real = stored.kind != "c" or asked.kind == "c"
    if stored == asked or (is_real and _fits(_values_of_dtype(stored), asked)):
        return
    known = source.values() if is_real else None
    if known is not None and _fits(known, asked):
        return
    holds = _values_of_dtype(asked)
    if known is None:
        found = f"are stored in {stored}, and no range of them is recorded"
    else:
        found = f"lie between {known.low:g} and {known.high:g}" + (
            ", not all of them whole" if holds.is_whole and not known.is_whole else ""
        )
    kind = "whole numbers" if holds.is_whole else "numbers"
    msg = (
        f"dtype={str(dtype)!r} may not hold the values of {name}, which {found}: it holds {kind} from {holds.low:g} to "
        f"{holds.high:g}; ask for a wider dtype, or pass casting='unsafe' to cast them as numpy does"
    )
    raise SchemaError(msg)


def warn_of_negatives(source: RowSource) -> None:
    """Warn of a collection whose values may have no logarithm, as scaled ones; arrays in memory are not read for it."""
    if source.stored_dtype.kind not in "if" or isinstance(source, CsrSource | ArraySource):
        return
    if (known := source.values()) is not None and known.low < 0:
        warn(
            f"NormalizeLog1p is for counts, and the least value of X is {known.low:g}: log(1 + x) may be NaN; "
            "build the collection from what has the counts, counts='raw/X' or 'layers/<key>'"
        )


def _fits(values: ValueBounds, dtype: np.dtype[Any]) -> bool:
    holds = _values_of_dtype(dtype)
    return holds.low <= values.low and values.high <= holds.high and (values.is_whole or not holds.is_whole)


def _values_of_dtype(dtype: np.dtype[Any]) -> ValueBounds:
    if dtype.kind == "b":
        return ValueBounds(0, 1, is_whole=True)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return ValueBounds(int(info.min), int(info.max), is_whole=True)
    top = float(np.finfo(dtype).max)
    return ValueBounds(-top, top, is_whole=False)
