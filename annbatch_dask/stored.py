"""StoredCollection: a collection on disk as it is read, looked at and split."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from annbatch_dask.errors import CollectionError, SelectionError
from annbatch_dask.etl.prepare import dataset_refs
from annbatch_dask.etl.readable import check_readable
from annbatch_dask.etl.status import CollectionStatus, status_of
from annbatch_dask.etl.versions import CollectionVersion, versions_of
from annbatch_dask.formatting import first_few, plural
from annbatch_dask.html import render
from annbatch_dask.manifest import Manifest
from annbatch_dask.report import Report, make_report
from annbatch_dask.seeds import Seed, resolve_seed
from annbatch_dask.splits import Splits, make_splits
from annbatch_dask.statistics.methods import WithStatistics
from annbatch_dask.storage.frames import concat_obs, read_obs
from annbatch_dask.storage.lock import Lease
from annbatch_dask.storage.metadata import METADATA, is_metadata
from annbatch_dask.storage.root import H5adRoot, Root, open_group

if TYPE_CHECKING:
    import anndata as ad
    import xarray as xr
    import zarr

    from annbatch_dask.lazy.view import View

__all__ = ["StoredCollection"]


class StoredCollection(WithStatistics):
    """The readable part of a collection: its datasets, obs and var, lazy views, a report, splits.

    Nothing here changes it; :class:`annbatch_dask.DatasetCollection` adds what does.
    """

    @property
    def _is_h5ad(self) -> bool:
        return isinstance(self._root, H5adRoot)

    def __repr__(self) -> str:
        """Show path and size."""
        if self._is_h5ad or self.is_empty:
            return f"DatasetCollection({self.path!r}, empty)" if self.is_empty else f"DatasetCollection({self.path!r})"
        version = "" if self._root.pinned is None else f"version {self._root.pinned}, "
        shape = f"{self.n_obs:,} cells x {self.n_vars:,} genes"
        return f"DatasetCollection({self.path!r}, {version}{plural(len(self), 'dataset')}, {shape})"

    def _repr_html_(self) -> str:
        """Show path, size and sources in a notebook."""
        manifest, facts = self.manifest, []
        if not self._is_h5ad and not self.is_empty:
            facts = [("cells", f"{self.n_obs:,}"), ("genes", f"{self.n_vars:,}"), ("datasets", f"{len(self):,}")]
        sources = () if manifest is None else manifest.sources
        return render("collection.html", path=self.path, figures=facts, sources=sources)

    @property
    def path(self) -> str:
        """Path or URL of the collection."""
        return self._root.path

    @property
    def is_empty(self) -> bool:
        """True unless the collection's attributes are there and at least one dataset."""
        return self._root.is_empty

    def __len__(self) -> int:
        """Number of datasets."""
        return 0 if self.is_empty else len(self._root.names())

    def __iter__(self) -> Iterator[zarr.Group]:
        """The datasets as zarr groups, in numeric order."""
        return iter(self._root)

    def groups(self, edited: Collection[str] = ()) -> list[zarr.Group]:
        """List the datasets as zarr groups to read, many opened at a time: each may be a request to a store.

        Parameters
        ----------
        edited
            Datasets that :meth:`check` found to be edited. All others are opened by the copies that builds have made
            of their metadata, which are sure to be right after :meth:`check`.
        """
        return self._root.open_all(edited)

    @property
    def manifest(self) -> Manifest | None:
        """Manifest of the collection; None if it is empty or was written by annbatch."""
        return self._root.manifest

    @property
    def version(self) -> int | None:
        """Number of the version that was opened; None if the collection is empty or was written by annbatch."""
        return None if (manifest := self.manifest) is None else manifest.version

    @property
    def versions(self) -> list[CollectionVersion]:
        """The versions up to the one that is there now, in their order, and which of them are kept.

        Each commit makes one, and ``add_adatas(keep=...)`` says how many stay. Open one by its number, to read it:
        ``DatasetCollection(path, version=2)``.

        Examples
        --------
        >>> [version.n_obs for version in collection.versions if version.is_kept]
        [500]
        """
        if self._is_h5ad or not self._root.has_folder:
            return [] if (manifest := self.manifest) is None else versions_of(None, manifest)
        folder = self._root.folder
        now = Root(open_group(folder, "r"), folder).manifest  # which others may have changed since
        return [] if now is None else versions_of(folder, now)

    @property
    def n_obs(self) -> int:
        """Number of cells in all datasets."""
        return self._root.n_obs

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var) if (manifest := self.manifest) is None else manifest.n_vars

    @property
    def n_var(self) -> int:
        """Number of genes, by annbatch's name."""
        return self.n_vars

    def lease(self) -> Lease:
        """Keep the datasets from being removed by builds of other processes, until the lease is dropped.

        :meth:`annbatch_dask.Loader.use_collection` takes one, so that an epoch ends as it began. Local folders only.

        Raises
        ------
        CollectionChangedError
            If a dataset was replaced or removed since the collection was opened.
        """
        return self._root.lease()

    def obs(self, columns: Sequence[str] | None = None, *, names: bool = True) -> pd.DataFrame:
        """Obs of all datasets, in their order.

        Parameters
        ----------
        columns
            Which to read, in this order; None reads all. Where a dataset lacks one that others have, it is missing.
        names
            Read the obs names, which may take more memory than all columns; False numbers the rows instead.

        Returns
        -------
        (n_obs, n_columns) frame, indexed by obs names.

        Raises
        ------
        SelectionError
            If no dataset has one of the columns.
        """
        if isinstance(columns, str):
            msg = f"columns is the text {columns!r}; give a list of names"
            raise TypeError(msg)
        if self.is_empty:
            return pd.DataFrame()
        there: dict[str, None] = {}
        frames = []
        with self._root.as_opened(), self._root.obs_elements() as elements:
            self._check_there("obs")
            for elem in elements:
                there |= dict.fromkeys(elem.attrs["column-order"])
                frames.append(read_obs(elem, _in_order(elem, columns), names=names))
        if lacking := [column for column in columns or () if column not in there]:
            msg = f"obs has no column {lacking[0]!r}; it has {first_few(map(repr, there), 20)}"
            raise SelectionError(msg)
        obs = concat_obs(frames, names=names)
        return obs if columns is None else obs[list(dict.fromkeys(columns))]

    def report(self) -> Report:
        """Look at the collection: sources and their shared genes, cells per category, sizes, mixing, builds.

        obs, row pointers and the sizes of files are read, one column of one dataset at a time; X is not.

        Returns
        -------
        Report
            A notebook shows it; ``report.save("report.html")`` writes one page that needs no network; its attributes
            are the figures.

        Raises
        ------
        CollectionError
            If the collection is empty, or a folder of h5ad files.

        Examples
        --------
        >>> collection.report().save("report.html")
        """
        if self._is_h5ad or self.is_empty:
            msg = f"{self.path} holds no zarr datasets to report on; build it with add_adatas"
            raise CollectionError(msg)
        with self._root.as_opened():
            self._check_there()
            target = self._root.target if self._root.has_folder else None
            return make_report(self.path, list(self._root.readable()), self.manifest, target, self._stored_sums())

    def status(self) -> CollectionStatus:
        """Look for builds: those that run, on any machine, or were interrupted, how far they are, and the last ones.

        It reads what lies in the collection's folder and beside it, and writes nothing.

        Returns
        -------
        CollectionStatus
            ``state``, ``builds``, ``last``; ``print`` shows it in lines.

        Raises
        ------
        CollectionError
            If the collection has no path or URL, or is a folder of h5ad files.

        Examples
        --------
        >>> collection.status().state
        'idle'
        """
        if self._is_h5ad or not self._root.has_folder:
            msg = f"{self.path} has no builds to tell of: that takes a zarr collection at a path or URL"
            raise CollectionError(msg)
        folder = self._root.folder
        now = Root(open_group(folder, "r"), folder)  # which others may have changed since this object was made
        return status_of(now.target, self.path, now.manifest, None if now.is_empty else now.n_obs)

    def to_lazy(self, *, load_annotation_index: bool = True) -> ad.AnnData:
        """All datasets as one AnnData to look at: X, layers and raw are dask arrays, columns of obs are read when used.

        Parameters
        ----------
        load_annotation_index
            Read the obs names; False leaves them on disk. See :func:`annbatch_dask.concat_lazy`.

        Returns
        -------
        AnnData of (n_obs, n_vars), its rows in the order of the datasets; X has the dtype of the inputs.

        Examples
        --------
        >>> view = collection.to_lazy()  # doctest: +SKIP
        >>> view[view.obs["cell_type"] == "T"].to_memory()  # doctest: +SKIP
        """
        return self._view().to_anndata(load_annotation_index=load_annotation_index)

    def obs_dataset(self) -> xr.Dataset:
        """Obs of all datasets as a plain xarray dataset, to filter, group and plot.

        Returns
        -------
        Dataset of the dimension ``obs``, (n_obs,) in the order of the datasets. Its variables, and the coordinate
        ``obs_names``, are read when they are used; categorical ones keep all categories.

        Examples
        --------
        >>> obs = collection.obs_dataset()  # doctest: +SKIP
        >>> obs[["cell_type", "n_counts"]].groupby("cell_type").mean().to_dataframe()  # doctest: +SKIP
        """
        return self._view().obs_dataset()

    def _view(self) -> View:
        from annbatch_dask.lazy.view import View  # imports xarray, which takes a while

        if self.is_empty:
            msg = f"{self.path} holds no dataset to look at; build it with add_adatas"
            raise CollectionError(msg)
        with self._root.as_opened():
            return View.of(tuple(dataset_refs(self._root)), merge="first")  # they say the same of genes

    def split(
        self,
        fractions: Mapping[str, float],
        *,
        by: str | Sequence[str] | None = None,
        stratify: str | Sequence[str] | None = None,
        seed: Seed | None = 0,
    ) -> Splits:
        """Deal the cells into named parts, the same for the same seed.

        Parameters
        ----------
        fractions
            Share of the cells of each part, by its name; together 1.
        by
            Columns of obs whose combinations stay together: all cells of a donor in one part. By default every cell
            goes by itself.
        stratify
            Columns of obs whose values shall have these shares in every part, as far as whole groups allow.
        seed
            A non-negative integer, or a generator to draw one from; None is 0.

        Returns
        -------
        Splits
            ``splits["train"]`` is a mask for ``Loader(where=...)``; ``splits.report`` says what was achieved;
            ``splits.save(path)`` keeps it.

        Examples
        --------
        >>> splits = collection.split({"train": 0.8, "test": 0.2}, by="donor", seed=0)
        >>> loader = Loader(where=splits["train"], batch_size=512).use_collection(collection)
        """
        groups, strata = ([c] if isinstance(c, str) else list(c or ()) for c in (by, stratify))
        obs = self.obs([*groups, *strata], names=False) if groups or strata else pd.DataFrame(index=range(self.n_obs))
        number, digest = resolve_seed(seed), self._root.digest
        return make_splits(
            obs, fractions, by=groups, stratify=strata, seed=number, collection=digest, version=self.version
        )

    def read_split(self, path: str | os.PathLike[str]) -> Splits:
        """Read a split that was saved; SelectionError if it is of another collection or version, with its number."""
        return Splits.read(os.fspath(path), self._root.digest, self.n_obs, self.version)

    def check(self, obs_columns: Sequence[str] | None = None) -> dict[str, frozenset[str]]:
        """Refuse a collection that a loader would read wrong rows of.

        All files must be there and have their size, and what is read whole (obs, var, metadata) must have its checksum.
        :meth:`annbatch_dask.Loader.use_collection` calls this. Chunks of matrices have checksums that are checked each
        time a chunk is read; :meth:`verify` reads them all.

        Parameters
        ----------
        obs_columns
            Read these columns of obs, the names of cells and genes, and nothing else that is read whole, as a loader
            of these columns does. None reads everything.

        Returns
        -------
        Elements that somebody edited since the build, by dataset.

        Raises
        ------
        IntegrityError
            With the name of a file that is not as it was written, and that no edit explains.
        CollectionError
            If a dataset was edited, and has another number of rows.
        CollectionChangedError
            If others replaced or removed datasets since the collection was opened.
        """
        manifest = self.manifest
        if manifest is None or not self._root.has_folder:
            return {}
        with self._root.explained():
            reads = None if obs_columns is None else self._reads(obs_columns)
            document = METADATA if self._root.pinned is None else self._root.document
            edited = check_readable(self._root.target, manifest, reads, document)
        if edited:  # or it is another collection's
            self._root.check_as_opened()
        return edited

    def _reads(self, obs_columns: Sequence[str]) -> Callable[[str], bool]:
        """True if a loader of these columns reads a file whole, by its path within a dataset.

        Not so documents: copies of them are used, and one that somebody wrote has no seal, and so another size.
        """
        index = self._root.as_written(self._root.names()[0])["obs"].attrs["_index"]
        parts = tuple(f"obs/{name}/" for name in (*obs_columns, index)) + ("var/",)
        return lambda name: name.startswith(parts) and not is_metadata(name)


def _in_order(frame: Any, columns: Sequence[str] | None) -> list[str] | None:
    """The columns that a stored frame has of these, in its order."""
    return None if columns is None else [c for c in frame.attrs["column-order"] if c in set(columns)]
