"""Writes a dataset's data frames with anndata: obs, frames in obsm, and annotations of genes."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.etl.scan import raw_var
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import OBS, ColumnSpec
from annbatch_dask.sources.columns import check_text, to_pandas
from annbatch_dask.storage.frames import plainly_named

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["annotation_frames", "is_plain", "make_frames", "try_frames", "write_elements", "write_frames"]

Rows = tuple[NDArray, NDArray[np.bool_] | None]
_settings_lock = threading.Lock()


def make_frames(
    index: pd.Index, columns: Iterable[ColumnSpec], rows: Callable[[ColumnSpec], Rows]
) -> dict[str, pd.DataFrame]:
    """obs, and the frames in obsm, by name, from each column's values and mask."""
    out = {OBS: pd.DataFrame(index=index)}
    for c in columns:
        values = to_pandas(c, *rows(c))
        frame = out.setdefault(c.frame, pd.DataFrame(index=index.rename(None)))
        frame[c.name] = pd.Series(values, index=frame.index, dtype=object) if _is_object(values) else values
    return out


def _is_object(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype == object


def annotation_frames(plan: Plan, found: AnnData | None) -> dict[str, Any]:
    """var, gene-wise elements in the order of the collection's genes, and uns, by name."""
    out: dict[str, Any] = {"var": plainly_named(plan.var)}
    if found is not None:
        ordered = found[:, plan.var.index]
        out |= {k: dict(getattr(ordered, k)) for k in ("varm", "varp", "uns") if len(getattr(ordered, k))}
    if "raw" in plan.genes:
        out["raw/var"] = plainly_named(plan.genes["raw"].frame(raw_var(plan.genes["raw"].genes, found)))
        out["raw/varm"] = {}
    return out


def write_frames(group: zarr.Group, elements: Mapping[str, Any]) -> None:
    """Write what is not sharded, and the mappings that hold nothing."""
    names = ("layers", "obsm", "obsp", "varm", "varp", "uns")
    write_elements(group, {name: {} for name in names if name not in group} | dict(elements))


def write_elements(group: zarr.Group, elements: Mapping[str, Any]) -> None:
    """Write elements by name.

    anndata's settings are the process's, so threads take turns: two that overlap would undo each other's.
    """
    import anndata as ad  # takes seconds; a local worker has it by now, see preload.py

    with _settings_lock, ad.settings.override(allow_write_nullable_strings=True, auto_shard_zarr_v3=False):
        with warnings.catch_warnings():  # scanpy's structured arrays in uns; anndata writes and reads them alike
            warnings.filterwarnings("ignore", ".* does not have a Zarr V3 specification")
            for name, value in elements.items():
                parent, _, key = name.rpartition("/")
                ad.io.write_elem(group[parent] if parent else group, key, value)


def try_frames(plan: Plan, annotations: AnnData | None) -> None:
    """Refuse what could not be written, before anything is read: write it to memory, obs without its rows.

    Raises
    ------
    SchemaError
        With the element's name.
    """
    for name, value in _pieces(plan, annotations):
        if is_plain(value):
            continue
        try:
            write_elements(zarr.create_group(zarr.storage.MemoryStore()), {name.partition("/")[2] or name: value})
        except Exception as e:  # anndata's and zarr's, of any kind
            msg = (
                f"{name} cannot be stored: {' '.join(str(e).split())[:300]}; convert or rename it in load_adata, or "
                f"leave it out with elements=['-{name}']"
            )
            raise SchemaError(msg) from e


def _pieces(plan: Plan, annotations: AnnData | None) -> Iterator[tuple[str, Any]]:
    """Elements that would be written, by name; of obs and of frames in obsm only the names of their columns."""
    index = pd.Index(np.zeros(0, object), name=plan.index_name)
    frames: dict[str, pd.DataFrame] = {}
    for c in (*plan.columns, plan.source_column):
        check_text(f"categories of {c.path}", () if c.categories is None else c.categories.values)
        empty = pd.DataFrame(index=index if c.frame == OBS else index.rename(None))
        frames.setdefault(c.frame, empty)[c.name] = np.zeros(0, np.int8)
    yield from frames.items()
    for name, value in annotation_frames(plan, annotations).items():
        if name in ("uns", "varm", "varp"):
            for key, inner in value.items():
                yield f"{name}/{key}", _slight(inner)
        else:
            yield name, value


_PLAIN = re.compile("[A-Za-z0-9][A-Za-z0-9_ -]*")
"""Names that any store takes; others are tried."""


def is_plain(value: Any) -> bool:
    """True if a frame can be stored for sure, as nearly all can. To try it takes a part of a small build's time."""
    if not isinstance(value, pd.DataFrame) or value.index.name in value.columns:
        return False
    names = [*value.columns, *([] if value.index.name is None else [value.index.name])]
    return (
        all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in names)
        and all(isinstance(d, np.dtype) and d.kind in "biuf" and d.isnative and d.itemsize <= 8 for d in value.dtypes)  # noqa: PLR2004
        and all(isinstance(row, str) and row.isascii() for row in value.index)
    )


def _slight(value: Any) -> Any:
    """A value that is written as another is, and is small: of large arrays of numbers no rows."""
    if isinstance(value, Mapping):
        return {k: _slight(v) for k, v in value.items()}
    is_numeric = isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.ndim
    return value[:0] if is_numeric or getattr(value, "format", "") in ("csr", "csc") else value
