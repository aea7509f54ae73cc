"""What the scan found in a source, and what the collection will hold: frozen descriptions of elements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from annbatch_dask.plan.dtypes import ValueRange

__all__ = [
    "SOURCE_DTYPE",
    "SRC_PATH",
    "Categories",
    "ColumnSchema",
    "ColumnSpec",
    "MatrixSchema",
    "MatrixSpec",
    "SourceSchema",
]

SOURCE_DTYPE = "source-dtype"
"""Attribute of a matrix on disk: the dtype its sources had, which the loader yields."""
SRC_PATH = "src_path"
"""Name of the obs column that tells a row's source, as annbatch has it."""

ColumnKind = Literal["numeric", "categorical", "string"]
MatrixKind = Literal["csr", "csc", "dense"]


@dataclass(frozen=True)
class Categories:
    """The values of a categorical column: in code order, with their dtype (``"str"`` or numpy's name)."""

    values: tuple[object, ...]
    dtype: str
    ordered: bool = False

    def index(self) -> pd.Index:
        """As a pandas index; strings stand in an object index, which every pandas reads alike."""
        return pd.Index(list(self.values), dtype=object if self.dtype == "str" else self.dtype)


@dataclass(frozen=True)
class ColumnSchema:
    """An obs column of one source.

    Attributes
    ----------
    name
        Column name.
    kind
        ``"numeric"`` (numbers and booleans), ``"categorical"`` or ``"string"``.
    dtype
        numpy's name of a numeric column's dtype; ``""`` otherwise.
    nullable
        The column may hold missing values beside its dtype's own (a mask is stored).
    categories
        Of a categorical column.
    """

    name: str
    kind: ColumnKind
    dtype: str = ""
    nullable: bool = False
    categories: Categories | None = None


@dataclass(frozen=True)
class MatrixSchema:
    """A row-aligned matrix of one source.

    Attributes
    ----------
    name
        ``"X"``, ``"layers/<key>"`` or ``"obsm/<key>"``.
    kind
        Layout in the source.
    dtype, index_dtype
        Of its values, and of its column indices (``""`` where dense).
    n_cols
        Width.
    row_step, nnz
        Stored values before row ``k * row_step``, for each k, and before the end: (n_steps + 1,) int64.
        Empty where dense.
    exact
        False where ``nnz`` is extrapolated from a sample (lazy arrays).
    values
        Range of the values, where the scan was asked to read them all.
    """

    name: str
    kind: MatrixKind
    dtype: str
    index_dtype: str
    n_cols: int
    row_step: int = 1
    nnz: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)
    exact: bool = True
    values: ValueRange | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SourceSchema:
    """Everything the plan needs to know of one source.

    Attributes
    ----------
    path
        As the user wrote it; the category of ``src_path``.
    var_names
        (n_vars,) gene names, object dtype.
    index_name
        Name of the obs index, or None.
    left_out
        Elements the build does not carry, by name.
    identity
        Size and modification time (or the store's equivalent) at the time of the scan: a resume must see the same.
    tagged
        A dataset of a collection: its rows say in ``src_path`` where they came from.
    """

    path: str
    n_obs: int
    var_names: np.ndarray = field(compare=False, repr=False)
    matrices: tuple[MatrixSchema, ...]
    columns: tuple[ColumnSchema, ...]
    index_name: str | None = None
    left_out: tuple[str, ...] = ()
    identity: str = ""
    tagged: bool = False


@dataclass(frozen=True)
class ColumnSpec:
    """An obs column of the collection.

    ``code_maps[s]`` maps the codes of source s to the united ones, None where it has none
    (a numeric or string column, or a source without the column).
    """

    name: str
    kind: ColumnKind
    dtype: str = ""
    nullable: bool = False
    categories: Categories | None = None
    present: tuple[bool, ...] = ()
    code_maps: tuple[np.ndarray | None, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class MatrixSpec:
    """A row-aligned matrix of the collection.

    Attributes
    ----------
    name
        As in :class:`MatrixSchema`.
    kind
        ``"csr"`` or ``"dense"``: dense only where every source is dense.
    source_dtype
        The sources' dtypes promoted; what the loader yields.
    n_cols
        Width in the collection.
    mapped
        Its columns are genes: they go through each source's gene map.
    """

    name: str
    kind: Literal["csr", "dense"]
    source_dtype: str
    n_cols: int
    mapped: bool
