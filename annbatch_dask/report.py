"""Report of a collection's content and builds, as one self-contained page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from annbatch_dask.etl.files import recorded_files
from annbatch_dask.etl.log import BuildLog, read_log
from annbatch_dask.etl.stats import GeneSums
from annbatch_dask.formatting import format_bytes
from annbatch_dask.html import MomentGrid, OverlapRow, PairMatrix, moment_grid, overlap_rows, pair_matrix, render
from annbatch_dask.manifest import (
    SOURCE_DTYPE,
    BuildRecord,
    DuplicatesRecord,
    Manifest,
    NamingRecord,
    SourceRecord,
)
from annbatch_dask.mixing import Mixing, measure_mixing
from annbatch_dask.storage.filesystems import name_errors
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.frames import n_rows, unite_categories
from annbatch_dask.storage.metadata import METADATA

__all__ = ["CategoryCounts", "Element", "Report", "ValueSummary", "describe_element", "element_names", "make_report"]

_MAX_ROWS = 40
"""Rows of a table on the page; what is beyond is summed."""
_MAX_CLASSES = 1000
"""A column of more categories than these names cells rather than classes: no mixing is measured by it."""
_MIXING_ROWS = 512
_N_BINS = 48
_NESTED = ("layers", "obsm", "obsp", "raw", "varm", "varp")


@dataclass(frozen=True)
class CategoryCounts:
    """A categorical column of obs.

    Attributes
    ----------
    column
        Its name.
    counts
        Cells of each category, the most frequent first; the category None counts cells without one.
    """

    column: str
    counts: tuple[tuple[str | None, int], ...]


@dataclass(frozen=True)
class ValueSummary:
    """Stored values of X by cell.

    Attributes
    ----------
    min, median, mean, max
        Over all cells.
    bins
        Cells in bins from ``min`` on, each of as many whole numbers; the last may go beyond ``max``.
    """

    min: int
    median: float
    mean: float
    max: int
    bins: tuple[int, ...]


@dataclass(frozen=True)
class Element:
    """An element of the datasets.

    Attributes
    ----------
    name
        Such as ``"X"`` or ``"layers/counts"``.
    kind
        How it is stored, in words; "" where it is no matrix.
    n_bytes
        Its arrays decoded, in their stored dtypes; None where it is no matrix.
    n_bytes_stored
        Its files.
    """

    name: str
    kind: str
    n_bytes: int | None
    n_bytes_stored: int


@dataclass(frozen=True)
class Report:
    """Result of :meth:`annbatch_dask.DatasetCollection.report`. A notebook shows it as a page.

    Attributes
    ----------
    path
        Path of the collection.
    n_obs, n_vars, n_datasets
        Cells, genes and datasets.
    sources, builds
        As the manifest has them, each build with its log where that is beside the collection; empty for a
        collection that annbatch wrote.
    categories
        Cells per category, by categorical column of obs.
    values
        Stored values of X per cell; None where X is dense.
    elements
        Sizes, by element.
    mixing
        By categorical column of obs: the entropy of its categories among ``mixing_rows`` neighbouring cells.
    genes
        Genes by mean and variance of X; None where the collection has no statistics stored.

    Examples
    --------
    >>> report = collection.report()
    >>> report.n_obs, [(source.path, source.n_obs) for source in report.sources]
    (500, [('a.h5ad', 300), ('b.h5ad', 200)])
    """

    path: str
    n_obs: int
    n_vars: int
    n_datasets: int
    sources: tuple[SourceRecord, ...]
    builds: tuple[tuple[BuildRecord, BuildLog | None], ...]
    categories: tuple[CategoryCounts, ...]
    values: ValueSummary | None
    elements: tuple[Element, ...]
    mixing: tuple[tuple[str, Mixing], ...]
    mixing_rows: int = field(default=_MIXING_ROWS)
    genes: MomentGrid | None = None

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def n_bytes_stored(self) -> int:
        """Bytes on disk."""
        return sum(e.n_bytes_stored for e in self.elements)

    @property
    def largest_source(self) -> int:
        """Cells of the largest source."""
        return max((s.n_obs for s in self.sources), default=0) or 1

    @property
    def largest_element(self) -> int:
        """Bytes on disk of the largest element."""
        return max((e.n_bytes_stored for e in self.elements), default=0) or 1

    @property
    def source_folder(self) -> str:
        """Common prefix of the paths of all sources, up to a slash."""
        common = os.path.commonprefix([s.path for s in self.sources])
        return common[: common.rfind("/") + 1]

    def figures(self) -> list[tuple[str, str]]:
        """The head of the page."""
        found = [
            ("cells", f"{self.n_obs:,}"),
            ("genes", f"{self.n_vars:,}"),
            ("datasets", f"{self.n_datasets:,}"),
            ("sources", f"{len(self.sources):,}"),
            ("on disk", format_bytes(self.n_bytes_stored)),
            ("a cell", format_bytes(self.n_bytes_stored / max(self.n_obs, 1))),
        ]
        return found if self.sources else [f for f in found if f[0] != "sources"]

    def gene_rows(self) -> list[tuple[str, list[OverlapRow]]]:
        """Shared genes of each build's sources, with a title where there are several builds."""
        rows, first = [], 1  # sources are numbered over all builds
        for k, (build, _) in enumerate(self.builds, start=1):
            if build.genes:
                rows.append((self._title(k), _overlaps(build, first)))
            first += len(build.sources)
        return rows

    def dropped_rows(self) -> tuple[list[str], list[tuple[SourceRecord, list[int]]]]:
        """Rules by which cells were dropped, and each source of which some were, with how many of them each dropped."""
        rules = list(dict.fromkeys(rule for s in self.sources for rule in s.dropped))
        return rules, [(s, [s.dropped.get(rule, 0) for rule in rules]) for s in self.sources if s.n_dropped]

    def conditions(self) -> list[str]:
        """Conditions on obs, and rules on counts, that cells had to meet, in words."""
        texts = [f"where {s.where}" for s in self.sources if s.where]
        texts += ["qc " + ", ".join(f"{k}={v}" for k, v in b.qc.items()) for b, _ in self.builds if b.qc]
        return list(dict.fromkeys(texts))

    def naming_rows(self) -> list[tuple[str, NamingRecord, list[tuple[str, int, int]]]]:
        """Each build that named genes by rules: a title where there are several builds, the rules, and its sources.

        Of each source its path, how many genes have another name, and how many went into another one.
        """
        rows = []
        for k, (build, _) in enumerate(self.builds, start=1):
            if (naming := build.naming) is not None:
                sources = list(zip(build.sources, naming.renamed, naming.joined, strict=True))
                rows.append((self._title(k), naming, sources))
        return rows

    def duplicates(self) -> list[tuple[str, DuplicatesRecord, PairMatrix]]:
        """What builds found that looked for duplicates, with a title where there are several builds."""
        paths = [s.path for s in self.sources]
        return [
            (self._title(k), build.duplicates, pair_matrix(build.duplicates.pairs, paths))
            for k, (build, _) in enumerate(self.builds, start=1)
            if build.duplicates is not None
        ]

    def _title(self, k: int) -> str:
        """Title of the k-th build; "" where it is the only one."""
        return f"build {k}: {self.builds[k - 1][0].mode}" if len(self.builds) > 1 else ""

    @cached_property
    def html(self) -> str:
        """The page."""
        return render("report.html", r=self, max_rows=_MAX_ROWS)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a local file."""
        with name_errors(os.fspath(path)):
            Path(path).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page, in a frame: its styles stay its own."""
        return render("frame.html", page=self.html)


def make_report(
    path: str,
    groups: Sequence[zarr.Group],
    manifest: Manifest | None,
    target: Folder | None,
    sums: GeneSums | None = None,
) -> Report:
    """Look at a collection's obs, row pointers and file sizes; X is not read.

    Parameters
    ----------
    path
        To show.
    groups
        The datasets.
    manifest
        Manifest of the collection, if it has one.
    target
        Its folder, beside which the logs of its builds are; None in memory.
    sums
        Sums of its genes over all cells, where they are stored.
    """
    n_obs = sum(n_rows(group["obs"]) for group in groups)
    mixing_rows = min(_MIXING_ROWS, max(n_obs // 20, 2))
    categories, mixing = [], []
    for column in _categorical_columns(groups):
        names, codes = _codes(groups, column)
        categories.append(_count(column, names, codes))
        if 1 < len(names) <= _MAX_CLASSES:
            windows = np.split(codes, range(mixing_rows, len(codes), mixing_rows))
            mixing.append((column, measure_mixing(windows)))
    builds = () if manifest is None else manifest.builds
    return Report(
        path=path,
        n_obs=n_obs,
        n_vars=n_rows(groups[0]["var"]),
        n_datasets=len(groups),
        sources=() if manifest is None else manifest.sources,
        builds=tuple((b, None if target is None else read_log(target, b.plan)) for b in builds),
        categories=tuple(categories),
        values=_values(groups),
        elements=tuple(_elements(groups, _files(groups, manifest, target))),
        mixing=tuple(mixing),
        mixing_rows=mixing_rows,
        genes=None if sums is None else moment_grid(*sums.moments(-1, "")),
    )


def _categorical_columns(groups: Sequence[zarr.Group]) -> list[str]:
    """Columns of obs that are categorical in every dataset."""
    frames: list[Any] = [group["obs"] for group in groups]
    return [name for name in frames[0].attrs["column-order"] if all(map(_is_categorical, frames, repeat(name)))]


def _is_categorical(frame: Any, name: str) -> bool:
    return name in frame and frame[name].attrs.get("encoding-type") == "categorical"


def _codes(groups: Sequence[zarr.Group], column: str) -> tuple[list[Any], NDArray[np.int32]]:
    """Categories over all datasets, and each row's place among them, -1 where it has none."""
    found: list[pd.Categorical] = [ad.io.read_elem(group["obs"][column]) for group in groups]  # type: ignore[index]
    names = unite_categories(part.categories for part in found)
    place = {name: k for k, name in enumerate(names)}
    recoded = [np.array([*map(place.__getitem__, part.categories), -1], np.int32)[part.codes] for part in found]
    return names, np.concatenate(recoded)


def _count(column: str, names: Sequence[Any], codes: NDArray[np.int32]) -> CategoryCounts:
    n_missing, *counts = np.bincount(codes + 1, minlength=len(names) + 1).tolist()
    named = [*((str(name), n) for name, n in zip(names, counts, strict=True)), (None, n_missing)]
    return CategoryCounts(column, tuple(sorted((c for c in named if c[1]), key=lambda c: -c[1])))


def _values(groups: Sequence[zarr.Group]) -> ValueSummary | None:
    """Statistics of values per cell, from the row pointers of X."""
    counts = np.zeros(1, np.int64)  # cells by their number of values
    for x in (group["X"] for group in groups):
        if not isinstance(x, zarr.Group):
            return None
        found = np.bincount(np.diff(x["indptr"][:]))  # type: ignore[arg-type, index]
        counts = np.pad(counts, (0, max(len(found) - len(counts), 0)))
        counts[: len(found)] += found
    present, n_obs = np.flatnonzero(counts), int(counts.sum())
    low, high = int(present[0]), int(present[-1])
    middle = np.searchsorted(np.cumsum(counts), [(n_obs - 1) // 2, n_obs // 2], side="right")
    width = -(-(high - low + 1) // _N_BINS)  # a bin of one number more than others would look like a peak
    bins = np.add.reduceat(counts, np.arange(low, high + 1, width))
    mean = float(np.arange(len(counts)) @ counts) / n_obs
    return ValueSummary(low, float(middle.mean()), mean, high, tuple(bins.tolist()))


def _files(groups: Sequence[zarr.Group], manifest: Manifest | None, target: Folder | None) -> Counter[str]:
    """Bytes of all files, by their path within a dataset."""
    total: Counter[str] = Counter()
    records = {} if manifest is None else {d.name: d for d in manifest.datasets}
    for name in (group.basename for group in groups):
        if target is not None:
            files = recorded_files(target, records[name]) if name in records else {}
            total.update({path: n for path, (n, _) in files.items()} or (target / name).sizes())
    if target is not None:
        total[METADATA] += target.size(METADATA) or 0
    return total


def _elements(groups: Sequence[zarr.Group], files: Mapping[str, int]) -> Iterator[Element]:
    stored: Counter[str] = Counter()
    for path, n in files.items():
        stored[_element_of(path)] += n
    matrices = element_names(groups[0])
    for name in (*matrices, *sorted(stored.keys() - set(matrices))):
        is_matrix = name in matrices and groups[0][name].attrs.get("encoding-type") != "dataframe"
        n_bytes = sum(a.nbytes for g in groups for a in _arrays(g[name]).values()) if is_matrix else None
        yield Element(name, describe_element(groups[0], name) if is_matrix else "", n_bytes, stored[name])


def _element_of(path: str) -> str:
    """The element a file belongs to."""
    first, *rest = path.split("/")
    if first in _NESTED and len(rest) > 1:
        return f"{first}/{rest[0]}"
    return first if rest and first not in _NESTED else "metadata"


def element_names(group: zarr.Group) -> list[str]:
    """Row-aligned matrices and frames of a dataset beside obs: X first."""
    nested = [f"{kind}/{name}" for kind in ("layers", "obsm") if kind in group for name in group[kind]]  # type: ignore[union-attr]
    return [name for name in ("X", *sorted(nested), "raw/X") if name in group]


def describe_element(group: zarr.Group, name: str) -> str:
    """Describe how an element is stored: its encoding and dtypes."""
    element: Any = group[name]
    kind = element.attrs.get("encoding-type", "array")
    dtypes = ", ".join(f"{array.dtype} {key}".strip() for key, array in _arrays(element).items() if key != "indptr")
    source = element.attrs.get(SOURCE_DTYPE)
    return f"{kind}, {dtypes}" + (f" (sources: {source})" if source else "")


def _arrays(element: Any) -> dict[str, zarr.Array]:
    """Arrays of a matrix, by name; a dense one has no name."""
    if isinstance(element, zarr.Array):
        return {"": element}
    return {key: element[key] for key in ("data", "indices", "indptr") if key in element}


def _overlaps(build: BuildRecord, first: int) -> list[OverlapRow]:
    masks = {int(mask, 16): n for mask, n in build.genes.items() if mask}
    return overlap_rows(masks, len(build.sources), first=first, n_other=build.genes.get("", 0))
