"""Schemas of sources and of the collection: frozen descriptions of elements."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd

from annbatch_dask.plan.dtypes import ValueRange
from annbatch_dask.plan.kept import KeptRows

__all__ = [
    "INPUT_SRC_PATH",
    "OBS",
    "Categories",
    "ColumnSchema",
    "ColumnSpec",
    "Genes",
    "MatrixSchema",
    "MatrixSpec",
    "SourceSchema",
    "heaviest_at",
    "shared_names",
]

INPUT_SRC_PATH = "input_src_path"
"""What an input's own column of that name is called in the collection."""

OBS = "obs"
ColumnKind = Literal["numeric", "categorical", "string"]
MatrixKind = Literal["csr", "csc", "dense"]
Genes = Literal["var", "raw", ""]


@dataclass(frozen=True)
class Categories:
    """The values of a categorical column: in code order, with their dtype (``"str"`` or numpy's name)."""

    values: tuple[object, ...]
    dtype: str
    ordered: bool = False

    def index(self) -> pd.Index:
        """Convert to a pandas index; strings become an object index, which all versions of pandas read alike."""
        return pd.Index(list(self.values), dtype=object if self.dtype == "str" else self.dtype)


@dataclass(frozen=True)
class ColumnSchema:
    """A column of a source's obs, or of a frame in its obsm.

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
        Categories of a categorical column.
    frame
        ``"obs"`` or ``"obsm/<key>"``.
    stored
        Its name in the source, where that is another.
    values
        Range of the values, where the scan was asked to look.
    width
        Bytes of a string of the column, as far as a sample tells; 0 where not strings.
    """

    name: str
    kind: ColumnKind
    dtype: str = ""
    nullable: bool = False
    categories: Categories | None = None
    frame: str = OBS
    stored: str = ""
    values: ValueRange | None = field(default=None, compare=False, repr=False)
    width: int = field(default=0, compare=False, repr=False)

    @property
    def path(self) -> str:
        """Its name among all columns."""
        return f"{self.frame}/{self.name}"

    @property
    def source_name(self) -> str:
        """Its name in the source."""
        return self.stored or self.name


@dataclass(frozen=True)
class MatrixSchema:
    """A row-aligned matrix of one source.

    Attributes
    ----------
    name
        ``"X"``, ``"raw/X"``, ``"layers/<key>"`` or ``"obsm/<key>"``: what it is in the collection.
    kind
        Layout in the source.
    dtype, index_dtype
        Dtype of its values, and of its column indices (``""`` if dense).
    n_cols
        Width.
    row_step, nnz
        Stored values before row ``k * row_step``, for each k, and before the end: (n_steps + 1,) int64.
        Empty where dense.
    exact
        False where ``nnz`` is extrapolated from a sample (lazy arrays).
    values
        Range of the values, where the scan was asked to read them all.
    genes
        What its columns are: genes of ``"var"`` or of ``"raw"``, or ``""``, something else.
    stored
        What it is in the source, where that is another name.
    integral
        Whether a sample of its values are whole numbers; None where there is no value.
    heaviest
        Stored values of the rows that have the most, at :func:`heaviest_at`. Empty where dense.
    in_flight_nbytes
        What reading any rows holds beside these: chunks, which are decoded whole.
    row_shape
        Shape of a row that is no vector, such as an image; its product is ``n_cols``. Empty for a vector.
    n_stored
        Entries in the file, those of rows that are not kept among them; 0 where that is not column-compressed.
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
    genes: Genes = "var"
    stored: str = ""
    integral: bool | None = field(default=None, compare=False, repr=False)
    heaviest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)
    in_flight_nbytes: int = field(default=0, compare=False, repr=False)
    row_shape: tuple[int, ...] = ()
    n_stored: int = field(default=0, compare=False, repr=False)

    @property
    def source_name(self) -> str:
        """Name of the element in the source."""
        return self.stored or self.name

    @property
    def is_by_columns(self) -> bool:
        """True if all of it is read for any of its rows."""
        return self.n_stored > 0


def heaviest_at(n: int) -> np.ndarray:
    """Positions at which a running sum over ``n`` rows, the heaviest first, is kept: of 1, 2, 4, ... and of all."""
    at = np.unique(np.append(2 ** np.arange(n.bit_length()), n)).astype(np.int64)
    return at[at > 0] - 1


_NAMES = ("var_names", "raw_names", "index_names", "raw_index_names")


_lists: WeakValueDictionary[bytes, np.ndarray] = WeakValueDictionary()
"""Lists of names in this process, by a digest of them."""


def shared_names(names: np.ndarray | list[str]) -> np.ndarray:
    """Intern names, and lists of them: a thousand files have mostly the same ones. No list may be changed in place."""
    found = np.array([sys.intern(str(n)) for n in names] or [], object)
    return _lists.setdefault(_digest(found.tobytes()), found)  # the addresses of what is interned


def _digest(found: bytes) -> bytes:
    return blake2b(found, digest_size=16).digest()


def _names_of(text: bytes) -> np.ndarray:
    """The list of names that another process sent; read once, where it is one that is there."""
    key = _digest(text)
    if (found := _lists.get(key)) is None:
        found = _lists[key] = shared_names(json.loads(text))
    return found


@dataclass(frozen=True)
class SourceSchema:
    """Everything the plan needs to know of one source.

    Attributes
    ----------
    path
        Path as the user wrote it; the category of ``src_path``.
    var_names
        (n_vars,) gene names, object dtype.
    index_name
        Name of the obs index, or None.
    left_out
        Elements the build does not carry, by name.
    unsupported
        Row-aligned elements it could not carry: the plan refuses them unless the user excludes them.
    identity
        What tells this content of it from another, as the scan found it: a resume must see the same.
    is_dataset
        A dataset of a collection: its rows say in ``src_path`` where they came from.
    cuts
        (n_blocks + 1,) rows at which its row blocks may be cut, where not everywhere: those of a lazy array's blocks.
    raw_names
        (n_raw_vars,) gene names of ``raw``, object dtype; None where there is no ``raw``.
    name_width
        Bytes of an obs name, as far as a sample tells.
    resident_nbytes
        What it holds in memory as long as it is open: all of it, where ``load_adata`` loads it or its format is old.
    abundance
        (n_genes,) float64, about how many cells have a value of each gene of X; None if it was not counted.
    kept
        Which of its rows these are, where rows were chosen: all numbers of rows, here and elsewhere, are of these.
    gene_sets
        Numbers of the genes of X that are in each of the sets of the rules on counts.
    index_names, raw_index_names
        What the indices of var and of ``raw.var`` call the genes, where a build names them by other rules; else None.
    n_mapped
        Genes of X that a map of names has.
    unnamed
        Why genes of ``"var"`` or ``"raw"`` cannot be named by the column that was asked for.
    """

    path: str
    n_obs: int
    var_names: np.ndarray = field(compare=False, repr=False)
    matrices: tuple[MatrixSchema, ...]
    columns: tuple[ColumnSchema, ...]
    index_name: str | None = None
    left_out: tuple[str, ...] = ()
    identity: str = ""
    is_dataset: bool = False
    unsupported: tuple[str, ...] = ()
    raw_names: np.ndarray | None = field(default=None, compare=False, repr=False)
    cuts: np.ndarray | None = field(default=None, compare=False, repr=False)
    name_width: int = field(default=0, compare=False, repr=False)
    resident_nbytes: int = field(default=0, compare=False, repr=False)
    abundance: np.ndarray | None = field(default=None, compare=False, repr=False)
    kept: KeptRows | None = None
    gene_sets: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)
    index_names: np.ndarray | None = field(default=None, compare=False, repr=False)
    raw_index_names: np.ndarray | None = field(default=None, compare=False, repr=False)
    n_mapped: int = field(default=0, compare=False, repr=False)
    unnamed: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Names as text, which tells equal lists by one digest."""
        state = self.__dict__
        names = {k: json.dumps(state[k].tolist()).encode() for k in _NAMES if state.get(k) is not None}
        return state | names

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with shared names."""
        names = {k: _names_of(state[k]) for k in _NAMES if state.get(k) is not None}
        self.__dict__.update(state | names)

    @property
    def x(self) -> MatrixSchema:
        """The matrix that becomes X."""
        return next(m for m in self.matrices if m.name == "X")

    def genes_of(self, matrix: MatrixSchema) -> np.ndarray:
        """Gene names of a matrix's columns."""
        return self.names_in(matrix.genes)[0]

    def names_in(self, frame: str) -> tuple[np.ndarray, np.ndarray]:
        """Names of the genes of ``"var"`` or ``"raw"``, and what the index there calls them."""
        pair = (self.var_names, self.index_names)
        if frame == "raw":
            assert self.raw_names is not None  # there is such a matrix
            pair = (self.raw_names, self.raw_index_names)
        names, were = pair
        return names, names if were is None else were

    def with_first_genes(self, n_vars: int, n_raw_vars: int) -> SourceSchema:
        """The same with so many of its first genes; 0 for all."""
        stops = dict(zip(_NAMES, (n_vars, n_raw_vars, n_vars, n_raw_vars), strict=True))
        lists = {name: getattr(self, name) for name in _NAMES if stops[name]}
        return replace(self, **{k: v[: stops[k]] for k, v in lists.items() if v is not None})


@dataclass(frozen=True)
class ColumnSpec:
    """A column of the collection's obs, or of a frame in its obsm.

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
    frame: str = OBS

    @property
    def path(self) -> str:
        """Its name among all columns."""
        return f"{self.frame}/{self.name}"


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
    genes
        What its columns are: the collection's genes (``"var"``), those of its ``raw``, or ``""``, something else.
    row_shape
        As in :class:`MatrixSchema`.
    """

    name: str
    kind: Literal["csr", "dense"]
    source_dtype: str
    n_cols: int
    genes: Genes
    row_shape: tuple[int, ...] = ()

    def shape(self, n_rows: int) -> tuple[int, ...]:
        """Shape of the matrix with a number of rows."""
        return (n_rows, *(self.row_shape or (self.n_cols,)))
