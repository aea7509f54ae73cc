"""Tables with a row for each value of a column of obs, joined to batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SelectionError
from annbatch_dask.formatting import first_few
from annbatch_dask.loader.obs import ObsTable

__all__ = ["JoinedTables", "check_tables"]

Array = NDArray[Any]
Ints = NDArray[np.int64]


def check_tables(tables: Mapping[str, pd.DataFrame] | None) -> dict[str, pd.DataFrame]:
    """The tables by column; ValueError or TypeError where one has no numbers, or two rows for a value."""
    if tables is not None and not isinstance(tables, Mapping):
        msg = f"obs_tables must be a mapping from columns of obs to DataFrames, got {type(tables)}"
        raise TypeError(msg)
    found: dict[str, pd.DataFrame] = {}
    for name, table in (tables or {}).items():
        if not isinstance(table, pd.DataFrame):
            msg = f"obs_tables[{name!r}] must be a DataFrame indexed by the values of {name!r}, got {type(table)}"
            raise TypeError(msg)
        if not table.index.is_unique:
            twice = table.index[table.index.duplicated()][0]
            msg = f"obs_tables[{name!r}] has more than one row for {twice!r}; give each value one"
            raise ValueError(msg)
        plain = {str(column): getattr(dtype, "numpy_dtype", dtype) for column, dtype in table.dtypes.items()}
        if others := {column: str(dtype) for column, dtype in plain.items() if dtype.kind not in "biuf"}:
            msg = f"obs_tables[{name!r}] must hold numbers alone, and has {others}; leave such columns out"
            raise TypeError(msg)
        if not plain:
            msg = f"obs_tables[{name!r}] has no column; give it one, or leave it out"
            raise ValueError(msg)
        dtype = np.result_type(*plain.values())
        if dtype.kind != "f" and table.isna().to_numpy().any():
            msg = f"obs_tables[{name!r}] has missing values among {dtype.name}; fill them, or make its columns floats"
            raise ValueError(msg)
        found[str(name)] = table.astype(dtype)
    return found


class JoinedTables:
    """The row of each table that belongs to each row of the data.

    Parameters
    ----------
    obs
        obs of all datasets.
    tables
        By column of obs.
    rows
        The rows that take part; None for all.

    Raises
    ------
    SelectionError
        If a row that takes part has a value that its table does not have, or none.
    """

    def __init__(self, obs: ObsTable, tables: Mapping[str, pd.DataFrame], rows: Ints | None) -> None:
        self._values: dict[str, Array] = {}
        self._places: dict[str, NDArray[np.int32]] = {}
        for name, table in tables.items():
            codes, values = pd.factorize(obs.series(name), use_na_sentinel=False)
            places = table.index.get_indexer(pd.Index(values))[codes].astype(np.int32)
            own = np.arange(len(places)) if rows is None else rows
            lacking = own[places[own] < 0]
            if len(lacking):
                _refuse(name, table, obs.series(name), lacking)
            self._values[name], self._places[name] = np.ascontiguousarray(table.to_numpy()), places

    def take(self, rows: Ints) -> dict[str, Array]:
        """(n, n_columns) of each table, for some rows of all."""
        return {name: values[self._places[name][rows]] for name, values in self._values.items()}


def _refuse(name: str, table: pd.DataFrame, column: pd.Series, rows: Ints) -> None:
    counts = column.iloc[rows].astype(object).value_counts(dropna=False)
    some = first_few(f"{value!r} ({n:,} rows)" for value, n in counts.items())
    msg = (
        f"obs_tables[{name!r}] has {len(table):,} rows, and rows that take part have {len(counts):,} values that it "
        f"has not: {some}; add them, or leave such rows out with where="
    )
    raise SelectionError(msg)
