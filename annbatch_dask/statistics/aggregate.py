"""Sums over the cells of each group: pseudobulk, as ``scanpy.get.aggregate`` has it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.errors import CollectionError
from annbatch_dask.etl.prepare import dataset_refs
from annbatch_dask.lazy.blocks import lazy_matrix
from annbatch_dask.lazy.view import View
from annbatch_dask.statistics.passes import column_of, sum_blocks
from annbatch_dask.storage.root import Root

__all__ = ["Aggregation", "aggregate"]

logger = logging.getLogger(__name__)

Aggregation = Literal["sum", "mean", "count_nonzero"]


def aggregate(
    root: Root, var: pd.DataFrame, by: str | Iterable[str], func: str | Iterable[str], layer: str | None
) -> ad.AnnData:
    """See :meth:`annbatch_dask.DatasetCollection.aggregate`."""
    names = [by] if isinstance(by, str) else list(by)
    functions = [func] if isinstance(func, str) else list(func)
    if unknown := [f for f in functions if f not in get_args(Aggregation)]:
        msg = f"func is {unknown[0]!r}; give any of {', '.join(map(repr, get_args(Aggregation)))}"
        raise ValueError(msg)
    if not names or not functions:
        msg = f"by is {names} and func {functions}; name at least one column of obs, and one function"
        raise ValueError(msg)
    with root.as_opened():
        codes, obs = _groups(root, names)
        view = View.of(tuple(dataset_refs(root)), merge="first")
        wanted = "X" if layer is None else f"layers/{layer}"
        spec = next((m for m in view.plan.matrices if m.name == wanted), None)
        if spec is None:
            there = ", ".join(
                repr(m.name.partition("/")[2]) for m in view.plan.matrices if m.name.startswith("layers/")
            )
            msg = f"{root.path} has no layer {layer!r}; it has {there or 'none'}"
            raise CollectionError(msg)
        matrix = lazy_matrix(view.plan, view.refs, view.identities, spec)
        kinds = [k for k in ("sum", "count_nonzero") if k in functions or (k == "sum" and "mean" in functions)]
        found = sum_blocks(matrix, codes, _sums_of_block, _add_all, len(obs), kinds)
    sums: dict[str, NDArray[np.float64]] = {kind: _dense(total) for kind, total in zip(kinds, found, strict=True)}
    if "mean" in functions:
        sums["mean"] = sums["sum"] / obs["n_obs_aggregated"].to_numpy()[:, None]
    return ad.AnnData(layers={f: sums[f] for f in dict.fromkeys(functions)}, obs=obs, var=var)


def _groups(root: Root, names: Sequence[str]) -> tuple[NDArray[np.int64], pd.DataFrame]:
    """(n_obs,) group of each cell, -1 where a column has no value, and the groups' obs: those that have a cell."""
    columns = {name: column_of(root, name).remove_unused_categories() for name in names}
    shape = tuple(len(c.categories) for c in columns.values())
    there = np.all([c.codes >= 0 for c in columns.values()], axis=0)
    if n_missing := int((~there).sum()):
        logger.info("%s: %d cells have no %s and are in no group", root.path, n_missing, " or ".join(names))
    combined = np.full(len(there), -1, np.int64)
    if there.any():
        combined[there] = np.ravel_multi_index([c.codes[there] for c in columns.values()], shape)
    present, codes, counts = np.unique(combined[there], return_inverse=True, return_counts=True)
    out = np.full(len(there), -1, np.int64)
    out[there] = codes
    places = np.unravel_index(present, shape) if len(present) else [np.zeros(0, int)] * len(shape)
    obs = pd.DataFrame(
        {
            name: pd.Categorical.from_codes(at, c.categories)
            for (name, c), at in zip(columns.items(), places, strict=True)
        }
    )
    labels = ["_".join(map(str, row)) for row in zip(*(obs[name] for name in names), strict=True)]
    obs.index = pd.Index(labels, dtype=object)
    obs["n_obs_aggregated"] = counts
    return out, obs


def _sums_of_block(block: Any, codes: NDArray[np.int64], n_groups: int, kinds: Sequence[str]) -> list[Any]:
    """(n_groups, n_vars) float64 for each kind."""
    rows = np.flatnonzero(codes >= 0)
    of_group = sp.csr_matrix((np.ones(len(rows)), (codes[rows], rows)), shape=(n_groups, len(codes)))
    made = {"sum": lambda: block, "count_nonzero": lambda: block != 0}
    return [of_group @ made[kind]().astype(np.float64) for kind in kinds]


def _add_all(found: Sequence[list[Any]]) -> list[Any]:
    return [reduce(add, parts) for parts in zip(*found, strict=True)]


def _dense(total: Any) -> NDArray[np.float64]:
    return total.toarray() if sp.issparse(total) else np.asarray(total)
