"""Selection of rows: a condition on ``obs``, a mask, or indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annbatch_dask.errors import SelectionError
from annbatch_dask.loader.obs import ObsTable
from annbatch_dask.loader.requests import resolve_rows
from annbatch_dask.storage.threads import unlocked_property
from annbatch_dask.types import LoadRequest
from annbatch_dask.where import Condition

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Selected", "Where", "select"]

Ints = NDArray[np.int64]
Where = str | ArrayLike


@dataclass(frozen=True)
class Selected:
    """The rows that take part, ascending; samplers count only these."""

    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    @unlocked_property
    def digest(self) -> str:
        """Differs where the rows do."""
        return blake2b(self.rows.tobytes(), digest_size=8).hexdigest()

    def translate(self, requests: Iterator[LoadRequest]) -> Iterator[LoadRequest]:
        """Translate requests for the n-th selected row to requests for rows of the data."""
        for request in requests:
            yield request | {"requests": self.rows[resolve_rows(request, len(self))]}


def select(where: Where, table: ObsTable | None, n_obs: int) -> Selected:
    """The selected rows; SelectionError where ``where`` is not about these data or selects nothing."""
    rows = _query(where, table) if isinstance(where, str) else _given(_as_array(where), n_obs)
    if not len(rows):
        msg = f"where selects none of {n_obs} rows: {where!r}"
        raise SelectionError(msg)
    return Selected(rows)


def _query(where: str, table: ObsTable | None) -> Ints:
    if table is None:
        msg = f"where={where!r} asks for obs, and the datasets were added without; give a mask or indices"
        raise SelectionError(msg)
    return np.flatnonzero(Condition.parse(where).mask(partial(_column, where, table), table.n_rows))


def _column(where: str, table: ObsTable, name: str) -> pd.Series:
    """A column of obs; by ``index``, or by its own name, the obs names."""
    if name in table.columns:
        return table.series(name)
    if name == "index" or name in table.index_names:
        return table.names()
    msg = f"where={where!r}: {name!r} is not a column of obs, which has {', '.join(map(repr, table.columns))}"
    raise SelectionError(msg)


def _as_array(where: Any) -> NDArray[Any]:
    """A mask or indices; where pandas cannot say whether a row meets a condition, it does not, as in pandas itself."""
    if str(getattr(where, "dtype", "")) == "boolean":
        mask: NDArray[np.bool_] = where.to_numpy(bool, na_value=False)
        return mask
    return np.asarray(where)


def _given(where: NDArray[Any], n_obs: int) -> Ints:
    if where.dtype == bool:
        if where.shape != (n_obs,):
            msg = f"where is a mask of shape {where.shape}, the data has {n_obs} rows"
            raise SelectionError(msg)
        return np.flatnonzero(where)
    if where.ndim != 1 or (where.dtype.kind not in "iu" and len(where)):
        msg = f"where must be a condition, a mask or indices, got an array of {where.dtype} of shape {where.shape}"
        raise SelectionError(msg)
    rows = np.unique(where.astype(np.int64))
    if len(rows) < len(where):
        msg = f"where names {len(where) - len(rows)} rows more than once; a sampler with replacement repeats rows"
        raise SelectionError(msg)
    if len(rows) and (rows[0] < 0 or rows[-1] >= n_obs):
        msg = f"where names rows {rows[0]} to {rows[-1]}, the data has rows 0 to {n_obs - 1}"
        raise SelectionError(msg)
    return rows
