"""choose: which rows of an input take part, by a condition on its obs. No matrix is read."""

from __future__ import annotations

import numpy as np
import pandas as pd

from annbatch_dask.errors import SelectionError
from annbatch_dask.formatting import plural
from annbatch_dask.plan.kept import KeptRows
from annbatch_dask.plan.schema import ColumnSchema
from annbatch_dask.sources.columns import to_pandas
from annbatch_dask.sources.open import WholeSource
from annbatch_dask.where import Condition

__all__ = ["WHERE", "check_any_kept", "rows_where"]

WHERE = "where"
"""The rule that drops rows which do not meet the condition on obs."""
_STEP = 2**20
"""Rows whose columns are held at a time."""


def rows_where(source: WholeSource, label: str, text: str) -> KeptRows | None:
    """The rows of an input that meet a condition on its obs; None for all, without one.

    Raises
    ------
    SelectionError
        If obs has no such column, or its values cannot be compared so.
    """
    if not text:
        return None
    condition, n_obs = Condition.parse(text), source.n_obs
    known = {c.name: c for c in source.obs_columns()}
    if missing := [name for name in condition.columns if name not in known]:
        shown = ", ".join(sorted(known)) or "none"
        msg = (
            f"where={text!r}: obs of {label} has no column {missing[0]!r}; it has {shown}; give where by path, as in "
            "where={'*.h5ad': '...'}, or add the column in load_adata"
        )
        raise SelectionError(msg)
    mask = np.zeros(n_obs, bool)
    for a in range(0, n_obs, _STEP):  # whether a row meets it depends on no other row
        b = min(a + _STEP, n_obs)
        columns = {name: _series(source, known[name], a, b) for name in condition.columns}
        mask[a:b] = condition.mask(columns.__getitem__, b - a)
    return KeptRows.of(mask, where=text, dropped={WHERE: n_obs - int(np.count_nonzero(mask))})


def _series(source: WholeSource, column: ColumnSchema, start: int, stop: int) -> pd.Series:
    rows = source.column(column, start, stop)
    return pd.Series(to_pandas(column, rows.values, rows.mask))


def check_any_kept(kept: list[KeptRows | None]) -> None:
    """Refuse a choice that leaves nothing of any input.

    Raises
    ------
    SelectionError
        With the number of rows that there are.
    """
    chosen = [k for k in kept if k is not None]
    n_rows = sum(k.n_rows for k in chosen)
    if len(chosen) == len(kept) and n_rows and not any(k.n_kept for k in chosen):
        texts = " and ".join(repr(text) for text in dict.fromkeys(k.where for k in chosen))
        msg = (
            f"where={texts} is met by none of the {plural(n_rows, 'cell')} of {plural(len(kept), 'input')}; compare it "
            "with the values in obs"
        )
        raise SelectionError(msg)
