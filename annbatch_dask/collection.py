"""DatasetCollection: what a user holds of a collection on disk, to build it and to read it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, get_args

import anndata as ad
import dask
import numpy as np
import pandas as pd
import zarr
import zarr.codecs

from annbatch_dask.arguments import (
    absolute,
    check_portable,
    folder_at,
    groupby_columns,
    references,
    resolve_options,
    resolve_seed,
)
from annbatch_dask.engines.base import Engine, EngineChoice, run_stage
from annbatch_dask.engines.choose import choose_engine
from annbatch_dask.errors import CollectionBusyError, CollectionChangedError, CollectionError, LayoutError
from annbatch_dask.etl.build import build
from annbatch_dask.etl.frames import try_frames
from annbatch_dask.etl.h5ad import DATASET_FILE, write_datasets
from annbatch_dask.etl.inputs import Input, known_inputs
from annbatch_dask.etl.job import Job, say_what_is_lost, work_folder
from annbatch_dask.etl.log import Recorder
from annbatch_dask.etl.ours import FolderContents, Scratch, contents_of, default_scratch
from annbatch_dask.etl.repack import repack
from annbatch_dask.etl.scan import look, merge_annotations, scan, with_ranges
from annbatch_dask.etl.sweep import leftovers, sweep, sweep_idle
from annbatch_dask.etl.verify import (
    Verification,
    check_dataset,
    check_readable,
    check_root,
    check_source,
    match_sources,
    not_compared,
    run_check,
)
from annbatch_dask.events import Callback, Callbacks
from annbatch_dask.html import render
from annbatch_dask.manifest import (
    ANNBATCH_ENCODING,
    DATASET_NAME,
    MANIFEST_KEY,
    SRC_PATH,
    DatasetRecord,
    Manifest,
    MatrixRecord,
    dataset_names,
    dataset_number,
)
from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.dtypes import ValueRange
from annbatch_dask.plan.elements import Elements
from annbatch_dask.plan.genes import check_unique
from annbatch_dask.plan.memory import BLOCK_NBYTES
from annbatch_dask.plan.options import Extension, Options
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import INPUT_SRC_PATH, SourceSchema
from annbatch_dask.planned import RunnablePlan
from annbatch_dask.progress import default_callbacks
from annbatch_dask.report import Report, make_report
from annbatch_dask.sources.identity import identity_of, where_of
from annbatch_dask.sources.matrices import describe_matrix
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.splits import Splits, make_splits
from annbatch_dask.storage.claims import Work, claim_numbers
from annbatch_dask.storage.folder import UNFINISHED, Folder, StorageOptions, folder_of
from annbatch_dask.storage.frames import concat_obs, n_rows, read_obs
from annbatch_dask.storage.lock import Lease, check_unchanged, exclusive
from annbatch_dask.storage.metadata import METADATA, is_metadata

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client

    from annbatch_dask.lazy.view import View


__all__ = ["DatasetCollection"]

logger = logging.getLogger(__name__)

Mode = Literal["extend", "append", "reshuffle"]
OnDuplicate = Literal["warn", "error"]
MatrixLayout = Literal["open", "packed"]
GeneOrder = Literal["names", "abundance"]

_N_THREADS = 16
_HIDDEN = ".shuffled.zarr"
"""In a folder of h5ad files, what they will be written from."""
_DEFAULT_COMPRESSOR = (zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),)
"""annbatch's codec at level 5 instead of 3, whose larger blocks of counts decode up to twice as fast and are a tenth
smaller, at no cost in writing (measured on 20M uint16 values and their indices)."""


class DatasetCollection:
    """A folder of shuffled, sharded AnnData datasets, as annbatch has it.

    Parameters
    ----------
    group
        Path, URL or zarr group of the collection; a group of any store is read, and builds need one with a path or URL.
        Nothing is written until :meth:`add_adatas` commits.
    mode
        As zarr's: ``"a"`` (default) opens or will create, ``"r"`` needs an existing collection, ``"w"`` shows an
        existing one as empty, and replaces it when :meth:`add_adatas` commits: until then it stays as it is, for ever
        if no build follows, and who reads it ends the epoch as it began.
    is_collection_h5ad
        A folder of ``dataset_<i>.h5ad``: builds shuffle into such files, and of these only obs can be read here.
    storage_options
        fsspec's, for a URL: credentials, endpoint and the like. They are written nowhere.

    Raises
    ------
    CollectionError
        If something else than a collection lies there.

    Examples
    --------
    >>> collection = DatasetCollection("atlas.zarr").add_adatas(["a.h5ad", "b.h5ad"], seed=0)
    >>> collection.n_obs
    500
    """

    def __init__(
        self,
        group: zarr.Group | str | os.PathLike[str],
        *,
        mode: str = "a",
        is_collection_h5ad: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._h5ad = is_collection_h5ad
        self._parsed: tuple[zarr.Group, Manifest] | None = None
        self._replaces = mode == "w" and not isinstance(group, zarr.Group)  # what is there, at the next commit
        if isinstance(group, zarr.Group):
            if is_collection_h5ad:
                msg = "Do not set `is_collection_h5ad` to True with a zarr group: give the folder's path"
                raise ValueError(msg)
            self._group: zarr.Group | None = group
            return
        if not isinstance(group, str | os.PathLike):
            msg = f"a collection is a path or a zarr.Group, not {type(group).__name__}"
            raise TypeError(msg)
        self._folder = folder_at(group, storage_options)
        if is_collection_h5ad:
            warnings.warn("Loading h5ad is currently not supported: only obs can be read", UserWarning, stacklevel=2)
            self._group = None
            return
        if not self._folder.url.rstrip("/").endswith(".zarr"):
            warnings.warn("It is customary that collections have the `.zarr` suffix", UserWarning, stacklevel=2)
        self._group = _open(self._folder, mode)

    def __repr__(self) -> str:
        """Where, and how much."""
        if self._h5ad or self.is_empty:
            return f"DatasetCollection({self.path!r}, empty)" if self.is_empty else f"DatasetCollection({self.path!r})"
        return f"DatasetCollection({self.path!r}, {len(self)} datasets, {self.n_obs:,} cells x {self.n_var:,} genes)"

    def _repr_html_(self) -> str:
        """The same in a notebook, with the sources."""
        manifest, facts = self.manifest, []
        if not self._h5ad and not self.is_empty:
            facts = [("cells", f"{self.n_obs:,}"), ("genes", f"{self.n_var:,}"), ("datasets", f"{len(self):,}")]
        sources = () if manifest is None else manifest.sources
        return render("collection.html", path=self.path, figures=facts, sources=sources)

    @cached_property
    def _folder(self) -> Folder:
        assert self._group is not None  # set at construction, or _folder is
        return folder_of(self._group)

    @cached_property
    def _has_folder(self) -> bool:
        """Whether it lies at a path or URL; else its group's store alone knows its files: one in memory, say."""
        try:
            return bool(self._folder.url)
        except CollectionError:
            return False

    @property
    def path(self) -> str:
        """Path or URL of the collection."""
        return self._folder.url if self._has_folder else str(self._group)

    @property
    def is_empty(self) -> bool:
        """True unless the collection's attributes are there and at least one dataset."""
        if self._h5ad:
            return not any(n.endswith(".h5ad") for n in self._folder.names())
        if self._group is None:
            return True
        return not (ANNBATCH_ENCODING.items() <= dict(self._group.attrs).items() and self._names())

    def _names(self) -> list[str]:
        if self._group is None:
            return []
        if (manifest := self._manifest) is not None:
            return [d.name for d in manifest.datasets]
        return sorted(filter(DATASET_NAME.fullmatch, self._keys(self._group)), key=dataset_number)

    def _keys(self, group: zarr.Group) -> Iterable[str]:
        """Names in the root; zarr would warn of other files where the root does not say (annbatch wrote it)."""
        if not self._has_folder or group.metadata.consolidated_metadata is not None:
            return group.group_keys()
        return (name for name in self._folder.names() if DATASET_NAME.fullmatch(name) and name in group)

    def __len__(self) -> int:
        """Number of datasets."""
        return 0 if self.is_empty else len(self._names())

    def __iter__(self) -> Iterator[zarr.Group]:
        """The datasets as zarr groups, in numeric order."""
        if self._h5ad:
            msg = "Cannot iterate through a folder of h5ad files: shuffle them into a zarr collection"
            raise ValueError(msg)
        if not self.is_empty:
            assert self._group is not None  # not empty
            for name in self._names():
                yield self._group[name]  # type: ignore[misc]

    def groups(self) -> list[zarr.Group]:
        """The same as a list, many opened at a time: in a large collection, each is a request to a store."""
        if self.is_empty or self._group is None or not self._has_folder or self._folder.is_local:
            return list(self)
        with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="open") as pool:
            return list(pool.map(self._group.__getitem__, self._names()))  # type: ignore[arg-type]

    @property
    def manifest(self) -> Manifest | None:
        """What the build recorded; None for an empty collection and for one that annbatch wrote."""
        return None if self.is_empty else self._manifest

    @property
    def _manifest(self) -> Manifest | None:
        """As above, read once from each group."""
        group = self._group
        if group is None or MANIFEST_KEY not in group.attrs:
            return None
        if self._parsed is None or self._parsed[0] is not group:
            self._parsed = group, Manifest.from_json(group.attrs[MANIFEST_KEY])  # type: ignore[arg-type]
        return self._parsed[1]

    @property
    def n_obs(self) -> int:
        """Cells in all datasets."""
        if (manifest := self.manifest) is not None:
            return manifest.n_obs
        return sum(n_rows(group["obs"]) for group in self)

    @property
    def var(self) -> pd.DataFrame:
        """Frame of the genes, the same for all datasets."""
        with self._as_opened():
            for group in self:
                frame: pd.DataFrame = ad.io.read_elem(group["var"])
                return frame
        return pd.DataFrame()

    @property
    def n_var(self) -> int:
        """Genes."""
        if (manifest := self.manifest) is not None:
            return manifest.n_vars
        return len(self.var)

    def lease(self) -> Lease:
        """Keep the datasets from being removed by builds of other processes, until the lease is dropped.

        :meth:`annbatch_dask.Loader.use_collection` takes one, so that an epoch ends as it began. Local folders only.

        Raises
        ------
        CollectionError
            If the collection was changed since it was opened.
        """
        if not self._has_folder:
            return Lease(None)
        lease = Lease(self._folder)
        self._check_as_opened(lease.document() or None)
        return lease

    def _check_as_opened(self, document: bytes | None = None) -> None:
        """Refuse to go on where a dataset was replaced since the collection was opened, and others may be as it was.

        Raises
        ------
        CollectionChangedError
            If a dataset was replaced or removed since.
        """
        if self._group is None or not self._has_folder:
            return
        if document is None:
            document = self._folder.find(METADATA)
        if gone := self._replaced(document):
            msg = (
                f"{self.path} was changed since it was opened: {len(gone):,} of its {len(self._names()):,} datasets, "
                f"{min(gone)} among them, were replaced or removed; open it again"
            )
            raise CollectionChangedError(msg)

    def _replaced(self, document: bytes | None) -> set[str]:
        """Names of the datasets that are not there any more as they were, by the root document of now."""
        assert self._group is not None  # it was opened
        if document is None:
            return set(self._names()) or {"it"}
        opened, values = self._manifest, json.loads(document).get("attributes", {}).get(MANIFEST_KEY)
        if opened is None:  # annbatch wrote it, perhaps without the names
            now = dataset_names(document)
            return set(self._names()) - now if now else set()
        if values == self._group.attrs[MANIFEST_KEY]:
            return set()
        there = {d.name: d for d in Manifest.from_json(values).datasets} if values else {}
        return {d.name for d in opened.datasets if there.get(d.name) != d}

    @contextlib.contextmanager
    def _as_opened(self) -> Iterator[None]:
        """What is read in the block is of the collection that was opened, or an error says that it is not there."""
        try:
            yield
        except Exception:
            self._check_as_opened()
            raise
        self._check_as_opened()

    def obs(self, columns: Sequence[str] | None = None, *, names: bool = True) -> pd.DataFrame:
        """Obs of all datasets, in their order.

        Parameters
        ----------
        columns
            Which to read; None reads all, names that do not exist are ignored.
        names
            Read the obs names, which may take more memory than all columns; False numbers the rows instead.

        Returns
        -------
        (n_obs, n_columns) frame, indexed by obs names.
        """
        if self.is_empty or (columns is not None and not len(columns)):
            return pd.DataFrame()
        with self._as_opened():
            frames = [self._read_obs(elem, columns, names=names) for elem in self._obs_elems()]
        return concat_obs(frames, names=names)

    @staticmethod
    def _read_obs(elem: Any, columns: Sequence[str] | None, *, names: bool) -> pd.DataFrame:
        stored = elem.attrs["column-order"]
        return read_obs(elem, None if columns is None else [c for c in stored if c in set(columns)], names=names)

    def _obs_elems(self) -> Iterator[Any]:
        if not self._h5ad:
            yield from (g["obs"] for g in self)
            return
        import h5py

        names = [n for n in self._folder.names() if n.endswith(".h5ad")]
        for name in sorted(names, key=lambda n: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", n)]):
            with h5py.File(f"{self._folder.path}/{name}") as f:
                yield f["obs"]

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
        if self._h5ad or self.is_empty:
            msg = f"{self.path} holds no zarr datasets to report on; build it with add_adatas"
            raise CollectionError(msg)
        with self._as_opened():
            return make_report(self.path, list(self), self.manifest, self._target if self._has_folder else None)

    def to_lazy(self, *, load_annotation_index: bool = True) -> ad.AnnData:
        """All datasets as one AnnData to look at: X, layers and raw are dask arrays, columns of obs are read when used.

        Parameters
        ----------
        load_annotation_index
            Read the obs names; False leaves them on disk. See :func:`annbatch_dask.concat_lazy`.

        Returns
        -------
        AnnData of (n_obs, n_var), its rows in the order of the datasets; X has the dtype of the inputs.

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
        with self._as_opened():
            return View.of(tuple(self._dataset_refs()), merge="first")  # they say the same of genes

    # --- splitting ---------------------------------------------------------------------------------------------

    def split(
        self,
        fractions: Mapping[str, float],
        *,
        by: str | Sequence[str] | None = None,
        stratify: str | Sequence[str] | None = None,
        seed: int = 0,
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
            Any non-negative integer.

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
        return make_splits(obs, fractions, by=groups, stratify=strata, seed=seed, collection=self._digest())

    def read_split(self, path: str | os.PathLike[str]) -> Splits:
        """Read a split that was saved; SelectionError if it is of another collection or of an earlier one."""
        return Splits.read(os.fspath(path), self._digest(), self.n_obs)

    def _digest(self) -> str:
        """Differs where the cells, or their order, do."""
        manifest = self.manifest
        if manifest is not None:
            return manifest.identity
        about = {"datasets": [str(group.name) for group in self], "n_obs": self.n_obs}
        return blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()

    # --- building ----------------------------------------------------------------------------------------------

    def plan_adatas(  # noqa: PLR0913 - annbatch's arguments
        self,
        adata_paths: Iterable[Any],
        *,
        load_adata: Callable[[Any], ad.AnnData] | None = None,
        var_subset: Iterable[str] | None = None,
        n_obs_per_chunk: int = 64,
        shard_size: int | str = "1GB",
        zarr_compressor: Any = _DEFAULT_COMPRESSOR,
        dataset_size: int | str = "2GB",
        shuffle: bool = True,
        merge: str | None = None,
        groupby: str | Iterable[str] | None = None,
        elements: Iterable[str] | None = None,
        counts: str | Mapping[str, str] = "X",
        allow_mixed_counts: bool = False,
        layout: MatrixLayout | None = None,
        gene_order: GeneOrder | None = None,
        mode: Mode = "extend",
        genes: Literal["collection", "union"] = "collection",
        on_duplicate_source: OnDuplicate = "warn",
        seed: int | None = None,
        rng: np.random.Generator | None = None,
        memory_limit: int | str | None = None,
        client: Client | None = None,
        storage_options: Mapping[str, Any] | None = None,
        read_values: bool = False,
    ) -> RunnablePlan:
        """Scan the inputs and say what :meth:`add_adatas` with the same arguments would do, without doing it.

        Parameters are those of :meth:`add_adatas`, and ``read_values``: read every value, which takes as long as half
        the build, so that the plan also says their dtype and how many are NaN or infinite.

        Returns
        -------
        The plan; its repr says tasks, bytes and peak memory.
        """
        refs = references(adata_paths, load_adata, storage_options, counts)
        check_portable(refs)
        options = resolve_options(
            var_subset,
            n_obs_per_chunk,
            shard_size,
            zarr_compressor,
            dataset_size,
            shuffle=shuffle,
            seed=resolve_seed(seed, rng),
            groupby=groupby_columns(groupby),
            elements=Elements.parse(elements),
            allow_mixed_counts=allow_mixed_counts,
        )
        room = choose_engine(client, memory_limit)
        self._look_for_again(refs, on_duplicate_source)
        extension = self._extension(mode, genes)
        options = self._stored_as(options, layout, gene_order, extension)
        plan, _ = self._plan(refs, options, merge, room, extension, read_values=read_values)
        return RunnablePlan.of(plan)

    def add_adatas(  # noqa: PLR0913 - annbatch's arguments
        self,
        adata_paths: Iterable[Any],
        *,
        load_adata: Callable[[Any], ad.AnnData] | None = None,
        var_subset: Iterable[str] | None = None,
        n_obs_per_chunk: int = 64,
        shard_size: int | str = "1GB",
        zarr_compressor: Any = _DEFAULT_COMPRESSOR,
        dataset_size: int | str = "2GB",
        shuffle: bool = True,
        merge: str | None = None,
        groupby: str | Iterable[str] | None = None,
        shuffle_chunk_size: int | None = None,  # noqa: ARG002 - see the docstring
        h5ad_compressor: str | None = "gzip",
        elements: Iterable[str] | None = None,
        counts: str | Mapping[str, str] = "X",
        allow_mixed_counts: bool = False,
        layout: MatrixLayout | None = None,
        gene_order: GeneOrder | None = None,
        mode: Mode = "extend",
        genes: Literal["collection", "union"] = "collection",
        on_duplicate_source: OnDuplicate = "warn",
        seed: int | None = None,
        rng: np.random.Generator | None = None,
        memory_limit: int | str | None = None,
        client: Client | None = None,
        storage_options: Mapping[str, Any] | None = None,
        scratch: str | os.PathLike[str] | None = None,
        scratch_options: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] | None = None,
        progress: bool | None = None,
    ) -> DatasetCollection:
        """Shuffle the cells of many AnnData files into this collection.

        Every cell of every input gets a place drawn uniformly over the whole collection. The work is done by Dask, in
        bounded memory, and leaves the collection as it was until the last step publishes the new one. A build that was
        interrupted goes on where it stopped when it is called again with the same arguments, unless an input was
        changed since. The very same call, repeated after it succeeded, does nothing; anything else, such
        as other options or a file that was replaced, is done.

        A collection that holds cells already is extended: see ``mode``. Its old datasets are removed after the new
        ones are published.

        Parameters
        ----------
        adata_paths
            Paths or URLs of ``.h5ad`` files and ``.zarr`` stores, paths of 10x Genomics' ``.h5`` files and folders with
            a ``matrix.mtx`` (scanpy reads them, into memory: gene expression, symbols made unique), zarr groups on any
            store that can be sent to workers (obstore's, icechunk's, a zip file), or AnnData whose X is a dask array,
            such as :func:`annbatch_dask.concat_lazy` returns: each task computes the blocks of its own rows.
        load_adata
            ``path -> AnnData`` instead of the default, which reads all elements from the file. What it
            returns may be in memory, backed or lazy; it is called on the workers, several times for an input. An
            interrupted build goes on only where its code, and the file at the path it is given, are what they were.
            What is in memory is counted in the plan's figures, once a thread; what the function needs beside it while
            it runs, nobody knows.
        var_subset
            Keep only these genes.
        n_obs_per_chunk
            Cells of a zarr chunk (for sparse matrices: as many entries as that many cells have on average).
        shard_size
            Size of a shard: cells, or uncompressed bytes as a string.
        zarr_compressor
            A zarr codec (blosc, zstd or gzip), or () for none.
        dataset_size
            Size of a dataset: cells, or uncompressed bytes (as in the inputs) as a string. The last one is smaller.
        shuffle
            False keeps the order of the inputs.
        merge
            Which var columns, varm, varp and uns to keep of several inputs, as in :func:`anndata.concat`; None keeps
            none. All of a single input's are kept.
        groupby
            Columns of obs by which the rows of each dataset are sorted: by category in the collection's order of
            categories, by value where numbers or strings, missing ones last; rows of one group stand in the order of
            the shuffle. Categories may differ between inputs. An extension sorts what it rewrites only if it says so.
        shuffle_chunk_size
            annbatch's, taken and not needed: rows are shuffled one by one, which mixes no less than any of its values.
        h5ad_compressor
            Of a folder of h5ad files: ``"gzip"`` (default), ``"lzf"`` or None. On zarr it has no effect, and any other
            than the default is warned of.
        elements
            What to carry: names such as ``"layers"``, ``"layers/counts"``, ``"obsm/X_pca"``, ``"obs"``, ``"raw"``,
            ``"uns"``, beside X and the obs names. Names with a leading ``-`` say what not to carry. None carries
            everything that all inputs have. What is left out then is named in a warning and in the plan; ``obsp`` is
            always, as a shuffle parts its pairs. What is named must be there, and what cannot be carried (awkward
            arrays) must be excluded.
        counts
            The matrix of the inputs that becomes X: ``"X"`` (default), ``"raw/X"`` or ``"layers/<key>"``, for all of
            them, or by path for some.
        allow_mixed_counts
            Build even if X holds whole numbers in some inputs and fractions in others.
        layout
            How sparse matrices are stored: ``"open"`` (default), by ``zarr_compressor``, which any software for zarr v3
            reads, or ``"packed"``: columns and whole numbers in as few bits as most of them need, a third smaller and
            three times as fast to decode, which zarr and anndata read only where this package is installed. Values that
            are not whole numbers, and dense matrices, are stored as in ``"open"``. None keeps the collection's.
        gene_order
            Of a new collection's genes: ``"names"`` (default), as :func:`anndata.concat` has them, or ``"abundance"``:
            those first that most cells of a sample have, which makes sparse matrices smaller, packed or not. ``raw``
            keeps its order. None keeps the collection's, as every extension does.
        mode
            What happens to a collection that holds cells. ``"extend"`` (default) deals the new cells into its datasets,
            to each in proportion to its size and anywhere in it, and leaves their number and ``dataset_size`` as they
            are. ``"append"`` adds new datasets, shuffled among themselves. ``"reshuffle"`` shuffles everything anew.
        genes
            ``"collection"`` (default): an extension keeps the collection's genes, drops others of the new inputs and
            fills those they lack. ``"union"``: it adds the new inputs' genes behind; not with ``mode="append"``.
        on_duplicate_source
            An input whose cells the collection has: ``"warn"`` (default) adds them again, with a warning that says how
            many there are; ``"error"`` refuses. The same file under another path is the same input.
        seed, rng
            Of the shuffle: a non-negative integer (0 if not given), or a generator to draw one from. The manifest
            records it. The same seed and inputs give the same bytes on any cluster.
        memory_limit
            Memory a worker may use, bytes or a string; None uses what the workers have. The plan must fit.
        client
            A client of the Dask cluster to use. None uses the scheduler set in dask's configuration, or the current
            client, or starts a cluster of subprocesses on this machine and closes it afterwards.
        storage_options
            fsspec's, for inputs that are URLs: credentials, endpoint and the like. They go to the workers with each
            task, and are written nowhere. The collection has its own, see the class.
        scratch, scratch_options
            Folder or URL for spill files, which all workers can write, and fsspec's options for it; default beside the
            collection. What the build puts there is removed after success, and of a build that was interrupted by the
            next one or :meth:`gc`, which find it. In a local one that others may write to, a build makes a folder that
            only its user may enter, so workers run as that user; a URL's rights are the bucket's. What a worker runs
            comes through the scheduler or is checked with a key from there: trust the scheduler, and ``load_adata``.
        callbacks
            Listeners for the build's events, see :mod:`annbatch_dask.events`.
        progress
            Show progress bars. None shows them on a terminal and in notebooks.

        Returns
        -------
        The collection itself.

        Raises
        ------
        SourceError, SchemaError, LayoutError, MemoryBudgetError
            Before any work, where an input cannot be read, inputs contradict each other, or sizes cannot be met.
            SourceError also where an input is changed while the build reads it.
        CollectionError
            If an input lies in the collection itself, or is in it already and ``on_duplicate_source="error"``.
        CollectionBusyError
            If another build works on the collection.
        IntegrityError
            If what was written is not what was read; nothing is published.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "h5ad_compressor")}
        if self._h5ad:
            return self._add_as_h5ad(given, h5ad_compressor)
        if h5ad_compressor != "gzip":
            msg = "h5ad_compressor of annbatch's add_adatas has no effect on zarr; leave it out"
            warnings.warn(msg, UserWarning, stacklevel=2)
        self._check_target()
        refs = references(adata_paths, load_adata, storage_options, counts)
        check_portable(refs)
        options = resolve_options(
            var_subset,
            n_obs_per_chunk,
            shard_size,
            zarr_compressor,
            dataset_size,
            shuffle=shuffle,
            seed=resolve_seed(seed, rng),
            groupby=groupby_columns(groupby),
            elements=Elements.parse(elements),
            allow_mixed_counts=allow_mixed_counts,
        )
        callback = Callbacks([*default_callbacks(progress=progress), *(callbacks or ())])
        room = choose_engine(client, memory_limit)
        base = default_scratch(self._target) if scratch is None else absolute(folder_at(scratch, scratch_options))
        with exclusive(self._target):
            found = contents_of(self._target)
            found.check()
            self._refresh()
            extension = self._extension(mode, genes)
            options = self._stored_as(options, layout, gene_order, extension)
            request = options.request([(r.label, r.counts) for r in refs], mode, genes, merge)
            if self._is_done(refs, request, room):
                logger.info("%s holds these inputs already: nothing to do", self.path)
                sweep_idle(self._target, Scratch(self._target, base.options))
                return self
            self._look_for_again(refs, on_duplicate_source)
            if extension is None or extension.mode != "append":
                found.check_named()
            plan, annotations = self._plan(refs, options, merge, room, extension)
            if plan.left_out:
                warnings.warn(_words_of(plan.left_out, len(refs)), UserWarning, stacklevel=2)
            if plan.renamed:
                warnings.warn(_renamed(plan.renamed, len(refs)), UserWarning, stacklevel=2)
            with room.start(max(len(plan.blocks), plan.n_datasets)) as engine:
                all_refs = (*([] if extension is None else self._dataset_refs()), *refs)
                self._build(plan, all_refs, annotations, engine, callback, base, found, request)
        return self

    def _add_as_h5ad(self, arguments: dict[str, Any], compressor: str | None) -> DatasetCollection:
        """Shuffle into a hidden zarr collection, then write its datasets as h5ad files and remove it."""
        folder = self._target
        if not folder.is_local:
            msg = f"{folder.url} is no local folder, which h5ad files are written to; give a path, or build zarr"
            raise CollectionError(msg)
        old = [name for name in folder.names() if name.endswith(".h5ad")]
        hidden = folder / _HIDDEN
        if old and not self._replaces and hidden.version(METADATA) is None:
            msg = (
                f"{folder.url} holds {len(old):,} h5ad files, to which none can be added; give another folder, "
                "mode='w' to replace them, or build zarr"
            )
            raise CollectionError(msg)
        if foreign := [name for name in old if not (DATASET_FILE.fullmatch(name) or UNFINISHED.fullmatch(name))]:
            msg = (
                f"{folder.url} holds {min(foreign)}, one of {len(foreign):,} h5ad files that are no datasets of a "
                "collection and would go; move them, or give another folder"
            )
            raise CollectionError(msg)
        built = DatasetCollection(hidden.url, mode="w")  # what another call left is none of this one's
        built.add_adatas(**arguments)
        write_datasets(built, folder, compressor, old)
        for name in (n for n in folder.names() if n.startswith(_HIDDEN)):  # its log, too
            (folder / name).remove()
        self._replaces = False
        return self

    def _refresh(self) -> None:
        """See what other processes published since this object was made."""
        if not self._replaces and self._target.version(METADATA) is not None:
            self._group = zarr.open_group(self._target.zarr_store(), mode="r+", zarr_format=3)

    def _is_done(self, refs: tuple[SourceRef, ...], request: str, room: EngineChoice) -> bool:
        """Whether this very call has succeeded already, and was the last to do so: it asks for the same of the same."""
        manifest = self.manifest
        if manifest is None or not manifest.builds or manifest.builds[-1].request != request:
            return False
        known = known_inputs(self._target, manifest)[-len(refs) :]
        tasks = [(ref,) for ref in refs]
        found = room.scanner.run("look", identity_of, tasks, lambda *_: None, lambda i: refs[i].label)
        now = [Input.of(where_of(ref), identity) for ref, identity in zip(refs, found, strict=True)]
        for ref, was, is_now in zip(refs, known, now, strict=True):
            if was.where in ("", is_now.where) and not (was.content and is_now.content):
                msg = (
                    f"{self.path} was built last by this very call, and whether {ref.label} is what it was then cannot "
                    "be told: to add its cells again, give another seed; to replace them, build a new collection"
                )
                raise CollectionError(msg)
        return known == now

    def _look_for_again(self, refs: tuple[SourceRef, ...], on_duplicate_source: OnDuplicate) -> None:
        """Refuse inputs that lie in the collection; warn of those whose cells it has, or refuse these too."""
        if on_duplicate_source not in ("warn", "error"):
            msg = f"on_duplicate_source is {on_duplicate_source!r}; it must be 'warn' or 'error'"
            raise ValueError(msg)
        manifest, target = self.manifest, self._target
        own = where_of(SourceRef("", target.url, options=target.options))
        for ref in refs:
            if f"{where_of(ref)}/".startswith(f"{own}/"):
                msg = f"{ref.label} lies in the collection {self.path} itself, which has its cells; leave it out"
                raise CollectionError(msg)
        if manifest is None:
            return
        known = known_inputs(target, manifest)
        for ref in refs:
            where = Input.of(where_of(ref), "").where
            named = [k for k, s in enumerate(manifest.sources) if s.path == ref.label]
            same = [k for k, i in enumerate(known) if i.where and i.where == where]
            again = sorted({*same, *(k for k in named if not known[k].where or not where)})
            if again:
                n = sum(manifest.sources[k].n_obs for k in again)
                msg = f"{ref.label} is in {self.path} already, with {n:,} cells"
                if on_duplicate_source == "error":
                    msg = f"{msg}; leave it out, or build a new collection"
                    raise CollectionError(msg)
                msg = f"{msg}, and is added again; leave it out, or build a new collection, to have each cell once"
                warnings.warn(msg, UserWarning, stacklevel=3)
            elif named:
                msg = (
                    f"{self.path} has cells of another {ref.label}, which the column src_path will not tell apart; "
                    "give whole paths to have different names"
                )
                warnings.warn(msg, UserWarning, stacklevel=3)

    def _extension(self, mode: Mode, genes: str) -> Extension | None:
        """What the collection, if it holds cells, means for a build."""
        if mode not in ("extend", "append", "reshuffle") or genes not in ("collection", "union"):
            msg = (
                f"mode is {mode!r} and genes {genes!r}; give 'extend', 'append' or 'reshuffle', 'collection' or 'union'"
            )
            raise ValueError(msg)
        if self.is_empty:
            return None
        if mode == "append" and genes == "union":
            msg = "mode='append' leaves the datasets as they are, so genes='union' cannot add to them; use 'reshuffle'"
            raise ValueError(msg)
        last = max(map(dataset_number, self._names()))
        if self.manifest is not None:
            last = max(last, self.manifest.last_dataset)
        return Extension(mode, len(self), last + 1, union=genes == "union")

    def _stored_as(
        self, options: Options, layout: MatrixLayout | None, gene_order: GeneOrder | None, extension: Extension | None
    ) -> Options:
        """The options with the layout and the order of genes that were chosen, or that the collection has."""
        if layout not in (None, *get_args(MatrixLayout)) or gene_order not in (None, *get_args(GeneOrder)):
            msg = f"layout is {layout!r} and gene_order {gene_order!r}; give 'open' or 'packed', 'names' or 'abundance'"
            raise LayoutError(msg)
        manifest = None if extension is None else self.manifest
        was = options if manifest is None else manifest
        if extension is not None and gene_order not in (None, was.gene_order):
            msg = (
                f"{self.path} has its genes in the order of {was.gene_order}, and gene_order is {gene_order!r}; "
                "leave it out, or build a new collection"
            )
            raise LayoutError(msg)
        if extension is not None and extension.mode == "append" and layout not in (None, was.layout):
            msg = (
                f"{self.path} is stored in layout {was.layout!r}, and layout={layout!r} with mode='append' would leave "
                "it in two; leave it out, or give mode='extend', which writes all anew"
            )
            raise LayoutError(msg)
        return replace(options, layout=layout or was.layout, gene_order=gene_order or was.gene_order)

    def _dataset_refs(self) -> list[SourceRef]:
        """The datasets as inputs of a build that extends them, or of a view."""
        if not self._has_folder:
            return [SourceRef(name, group, tagged=True) for name, group in zip(self._names(), self, strict=True)]
        folder, manifest = self._target, self.manifest
        recorded = {} if manifest is None else {d.name: f"{d.fingerprint}/{d.metadata}" for d in manifest.datasets}
        return [
            SourceRef(n, (folder / n).url, tagged=True, options=folder.options, known=recorded.get(n, ""))
            for n in self._names()
        ]

    def _plan(
        self,
        refs: tuple[SourceRef, ...],
        options: Options,
        merge: str | None,
        room: EngineChoice,
        extension: Extension | None,
        *,
        read_values: bool = False,
    ) -> tuple[Plan, ad.AnnData | None]:
        """Scan the inputs, and the datasets of a collection that is extended, and plan."""
        wanted = merge is not None or (extension is None and len(refs) == 1)
        datasets = [] if extension is None else self._dataset_refs()
        first = extension is not None and (merge is not None or not extension.union)
        by_abundance = extension is None and options.gene_order == "abundance"
        tasks = [(ref, first and k == 0, False, False, False) for k, ref in enumerate(datasets)]
        tasks += [(ref, wanted, read_values, False, by_abundance) for ref in refs]
        scanned = room.scanner.run("scan", scan, tasks, lambda *_: None, lambda i: tasks[i][0].label)
        for s in scanned:
            check_unique(s.schema)
        found = [s.annotations for s in scanned if s.annotations is not None]
        if extension is not None and not extension.union:
            found = found[:1]  # the collection's own
        annotations = merge_annotations(found, merge) if found else None
        if annotations is not None:
            _exclude(annotations, options.elements)
        chosen = [s.schema if s.schema.tagged else options.elements.select(s.schema) for s in scanned]
        all_refs = [*datasets, *refs]

        def look_at(some: list[tuple[SourceRef, SourceSchema, frozenset[str]]]) -> list[dict[str, ValueRange]]:
            return room.scanner.run("look", look, some, lambda *_: None, lambda i: some[i][0].label)

        looked = with_ranges(all_refs, chosen, look_at)
        plan = build_plan(
            looked,
            options,
            budget=replace(room.budget, block_nbytes=_block_nbytes()),
            var=None if annotations is None else annotations.var,
            annotated=_annotated(annotations),
            extension=extension,
        )
        try_frames(plan, annotations)
        return plan, annotations

    @property
    def _target(self) -> Folder:
        """The collection's folder, by a path that other processes can open."""
        return absolute(self._folder)

    def _build(  # noqa: PLR0913, PLR0917 - a job's parts
        self,
        plan: Plan,
        refs: tuple[SourceRef, ...],
        annotations: ad.AnnData | None,
        engine: Engine,
        callback: Callback,
        scratch: Folder,
        found: FolderContents,
        request: str,
    ) -> None:
        target = self._target
        manifest = None if plan.extension is None else self.manifest or self._adopted()
        folder = scratch / work_folder(plan, target, request)
        say_what_is_lost(scratch, folder.url.rpartition("/")[2])
        work = Work(plan.fingerprint, folder.url, is_new=scratch.is_local and not os.path.exists(scratch.path))
        first, inherited = max(plan.first_dataset, found.last + 1), self._inherited(found)
        claim = claim_numbers(target, plan.work_key, first, plan.n_datasets, work)
        job = Job(
            plan,
            refs,
            folder,
            target,
            annotations,
            claim.first,
            manifest,
            found.version,
            request,
            claim=claim,
            replaced=tuple(sorted(found.named)),
            inherited=inherited,
            attributes=self._other_attributes(),
        )
        try:
            check_unchanged(target, found.version)  # now that what another build publishes has other names
            build(job, engine, Callbacks([callback, Recorder(target, plan)]))
        except CollectionBusyError:
            self._replaces = False
            self._refresh()
            last = None if self.manifest is None else self.manifest.builds[-1]
            if last is None or (last.plan, last.request) != (plan.fingerprint, request):
                raise
            logger.info("%s: another run of this build was faster", self.path)
        self._replaces = False
        self._refresh()

    def _inherited(self, found: FolderContents) -> tuple[str, ...]:
        """Datasets that do not say that they are of the collection after the build, and may be removed."""
        if self.manifest is not None:
            return found.inherited
        ours = (n for n in found.datasets if DATASET_NAME.fullmatch(n) and dataset_number(n) <= found.last)
        return tuple(sorted({*found.named, *found.inherited, *ours}, key=dataset_number))

    def _other_attributes(self) -> dict[str, Any]:
        """The root's attributes that others have put there."""
        known = {*ANNBATCH_ENCODING, MANIFEST_KEY}
        return {} if self._group is None else {k: v for k, v in self._group.attrs.items() if k not in known}

    def repack(
        self,
        path: str | os.PathLike[str],
        layout: MatrixLayout,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> DatasetCollection:
        """Write the same cells in the same order, in the other layout, as a collection at another place.

        What this one is stays as it is. Splits, and states of loaders, that were saved of one are good for both. Each
        dataset is read back and compared before the new collection is there. A call that was interrupted goes on with
        the dataset at which it stopped.

        Parameters
        ----------
        path, storage_options
            Where to, as for the class. Nothing may be there yet.
        layout
            ``"packed"`` or ``"open"``, see :meth:`add_adatas`.

        Returns
        -------
        The new collection.

        Raises
        ------
        CollectionError
            If this one is empty, has that layout already, or was not written by this package alone, or if something
            else is at the path.
        IntegrityError
            If something was damaged.

        Examples
        --------
        >>> collection.repack("atlas-packed.zarr", "packed").manifest.layout
        'packed'
        """
        if layout not in get_args(MatrixLayout):
            msg = f"layout is {layout!r}; give 'open' or 'packed'"
            raise LayoutError(msg)
        manifest, target = self.manifest, absolute(folder_at(path, storage_options))
        if manifest is None or manifest.layout == layout:
            why = "has no manifest" if manifest is None else f"has layout {layout!r} already"
            msg = f"{self.path} {why}; there is nothing to repack"
            raise CollectionError(msg)
        with self._as_opened(), exclusive(target):
            repack(self._target, manifest, target, layout, self._other_attributes())
        return DatasetCollection(path, storage_options=storage_options)

    # --- checking ----------------------------------------------------------------------------------------------

    def verify(
        self,
        against: Iterable[Any] | None = None,
        *,
        load_adata: Callable[[Any], ad.AnnData] | None = None,
        client: Client | None = None,
        storage_options: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] | None = None,
        progress: bool | None = None,
    ) -> Verification:
        """Read everything and compare it with what was written, file by file and row by row.

        Parameters
        ----------
        against
            The inputs the collection was made of: prove that it is a permutation of their cells. They may have moved
            to another folder. None compares with the manifest alone.
        load_adata
            The function the build used, if it used one.
        client
            A client of the Dask cluster to use; None uses the threads of this process.
        storage_options
            fsspec's, for inputs that are URLs.
        callbacks, progress
            As for :meth:`add_adatas`.

        Returns
        -------
        The problems found, none where all is well; nothing is raised for them.

        Raises
        ------
        CollectionError
            If there is nothing to verify, or an input is none of the collection's.
        """
        manifest = self.manifest
        if self.is_empty or manifest is None:
            msg = f"{self.path} has no manifest to compare with: it is empty, or annbatch wrote it"
            raise CollectionError(msg)
        callback = Callbacks([*default_callbacks(progress=progress), *(callbacks or ())])
        engine, target = choose_engine(client, None).scanner, self._target
        problems = check_root(target, manifest)
        size = (manifest.n_obs, sum(d.n_bytes for d in manifest.datasets))
        tasks: list[tuple[Any, ...]] = [(target, d, manifest.n_vars) for d in manifest.datasets]
        names = [d.name for d in manifest.datasets]
        problems += run_check(engine, "verify", check_dataset, tasks, callback, size, names)
        refs = () if against is None else references(against, load_adata, storage_options)
        if refs:
            candidates = match_sources([r.label for r in refs], manifest)
            first = SourceRef("dataset", (target / manifest.datasets[0].name).url, tagged=True, options=target.options)
            tasks = [(ref, some, first) for ref, some in zip(refs, candidates, strict=True)]
            results = run_stage(
                engine,
                "compare",
                check_source,
                tasks,
                callback,
                size=(sum(some[0].record.n_obs for some in candidates), 0),
                measure=lambda _, r: (r.n_rows, r.n_bytes),
                describe=lambda i: refs[i].label,
            )
            problems += [*not_compared(manifest, candidates, results), *(p for r in results for p in r.problems)]
        return Verification(
            path=self.path,
            problems=tuple(problems),
            leftovers=tuple(leftovers(target)),
            n_datasets=len(manifest.datasets),
            n_obs=manifest.n_obs,
            n_bytes=sum(d.n_bytes for d in manifest.datasets),
            against=tuple(r.label for r in refs),
        )

    def check(self, obs_columns: Sequence[str] | None = None) -> None:
        """Refuse a collection that a loader would read wrong rows of.

        All files must be there and have their size, and what is read whole (obs, var, metadata) must have its checksum.
        :meth:`annbatch_dask.Loader.use_collection` calls this. Chunks of matrices have checksums that are checked each
        time a chunk is read; :meth:`verify` reads them all.

        Parameters
        ----------
        obs_columns
            Read these columns of obs, the names of cells and genes, and nothing else that is read whole, as a loader
            of these columns does. None reads everything.

        Raises
        ------
        IntegrityError
            With the name of a file that is not as it was written.
        """
        manifest = self.manifest
        if manifest is not None and self._has_folder:
            check_readable(self._target, manifest, None if obs_columns is None else self._reads(obs_columns))

    def _reads(self, obs_columns: Sequence[str]) -> Callable[[str], bool]:
        """Whether a loader of these columns reads a file whole, by its path within a dataset."""
        index = next(iter(self))["obs"].attrs["_index"]
        parts = tuple(f"obs/{name}/" for name in (*obs_columns, index)) + ("var/",)
        return lambda name: name.startswith(parts) and not is_metadata(name)  # whose copies above are what is used

    def gc(
        self,
        *,
        dry_run: bool = False,
        abandoned: bool = False,
        scratch: str | os.PathLike[str] | None = None,
        scratch_options: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Remove what interrupted builds left in the collection's folder, and their scratch folders, wherever they are.

        A build that was interrupted cannot be resumed afterwards. Datasets that were replaced go, too, unless somebody
        reads them. What is not known to be this package's and this collection's stays.

        Parameters
        ----------
        dry_run
            Remove nothing, only say what would be removed.
        abandoned
            On an object store: also remove what a build of another machine left, of which nobody can know here whether
            it still runs.
        scratch
            A scratch folder to look through besides those that builds left word of.
        scratch_options
            fsspec's, for scratch folders on a store.

        Returns
        -------
        Names of what was removed, or would be; scratch folders by path.

        Raises
        ------
        CollectionBusyError
            If a build runs, or may run.
        CollectionError
            If something else lies in the folder, which is named; nothing is removed.
        """
        roots = [default_scratch(self._target)]
        if scratch is not None:
            roots.append(absolute(folder_at(scratch, scratch_options)))
        with exclusive(self._target):
            self._refresh()
            known = Scratch(self._target, options=StorageOptions(scratch_options or {}))
            return sweep(self._target, known, *roots, dry_run=dry_run, abandoned=abandoned)

    def _adopted(self) -> Manifest:
        """A manifest for a collection that annbatch wrote: what its metadata say, no fingerprints."""
        first = next(iter(self))
        records = tuple(
            DatasetRecord(name, n_rows(group["obs"]), _nnz(group["X"]))
            for name, group in zip(self._names(), self, strict=True)
        )
        stored = describe_matrix("X", first["X"])
        dtype = "float32" if stored is None else stored.dtype
        kind = "dense" if stored is None else stored.kind
        return Manifest(
            n_obs=sum(r.n_obs for r in records),
            n_vars=len(self.var),
            matrices={"X": MatrixRecord(kind, dtype, dtype)},
            datasets=records,
            sources=(),
            builds=(),
            last_dataset=max(r.number for r in records),
        )

    def _check_target(self) -> None:
        self._folder  # noqa: B018 - raises for stores that workers cannot open


def _block_nbytes() -> int:
    """Size of a row block, from dask's configuration: ``annbatch_dask.block_size``."""
    return int(dask.utils.parse_bytes(dask.config.get("annbatch_dask.block_size", BLOCK_NBYTES)))


def _open(folder: Folder, mode: str) -> zarr.Group | None:
    """The group at a path, None where there is none yet; an error where something else is there."""
    if mode not in ("r", "r+", "a", "w", "w-"):
        msg = f"mode is {mode!r}; it must be one of 'r', 'r+', 'a', 'w', 'w-'"
        raise ValueError(msg)
    if folder.version(METADATA) is None:
        _check_new(folder)
        if mode in ("r", "r+"):
            msg = f"there is no collection at {folder.url}; check the path, or build one with add_adatas"
            raise _CollectionNotFoundError(msg)
        return None
    group = zarr.open_group(folder.zarr_store(), mode="r" if mode == "r" else "r+", zarr_format=3)
    encoding = group.attrs.get("encoding-type")
    if encoding != ANNBATCH_ENCODING["encoding-type"] and (encoding or any(True for _ in group.keys())):
        msg = f"{folder.url} exists and is not a collection but {encoding or 'another zarr group'}; give another path"
        raise CollectionError(msg)
    if mode == "w-":
        msg = f"{folder.url} exists; give another path, or mode='w' to replace it"
        raise CollectionError(msg)
    return None if mode == "w" else group


def _check_new(folder: Folder) -> None:
    """Refuse a place without a collection where something else is than what builds of one have left."""
    if folder.fs.isfile(folder.path):
        msg = f"{folder.url} is a file, not a collection; give another path"
        raise CollectionError(msg)
    if strangers := contents_of(absolute(folder)).strangers:
        msg = f"{folder.url} exists and is not a collection: it holds {list(strangers[:3])}; give another path"
        raise CollectionError(msg)


class _CollectionNotFoundError(CollectionError, FileNotFoundError):
    """There is nothing at the path."""


def _words_of(left_out: Mapping[str, Sequence[str]], n_inputs: int) -> str:
    shown = ", ".join(f"{name} ({len(paths)} of {n_inputs} inputs)" for name, paths in left_out.items())
    return f"left out: {shown}; name them with a leading '-' in elements to confirm, or see merge"


def _renamed(paths: Sequence[str], n_inputs: int) -> str:
    return (
        f"obs of {paths[0]} ({len(paths)} of {n_inputs} inputs) has a column {SRC_PATH}, which is {INPUT_SRC_PATH} in "
        f"the collection, whose own says where a row came from; rename it in load_adata, or leave it out with "
        f"elements=['-obs/{SRC_PATH}']"
    )


def _exclude(annotations: ad.AnnData, elements: Elements) -> None:
    """Drop what was not chosen."""
    for kind in ("varm", "varp", "uns"):
        mapping = getattr(annotations, kind)
        for key in [k for k in mapping if not elements.keeps(f"{kind}/{k}")]:
            del mapping[key]


def _annotated(annotations: ad.AnnData | None) -> frozenset[str]:
    if annotations is None:
        return frozenset()
    return frozenset(f"{kind}/{key}" for kind in ("varm", "varp", "uns") for key in getattr(annotations, kind))


def _nnz(x: Any) -> int:
    return int(x["data"].shape[0]) if hasattr(x, "keys") else 0
