"""DatasetCollection: what a user holds of a collection on disk, to build it and to read it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import zarr
import zarr.codecs

from annbatch_dask.engines.base import EngineChoice
from annbatch_dask.engines.choose import choose_engine
from annbatch_dask.etl.genes import OnDuplicateGene, VarKey
from annbatch_dask.etl.h5ad import written_from
from annbatch_dask.etl.open import open_root
from annbatch_dask.etl.prepare import Prepared, is_done_already, prepare, resolve, warn_of_duplicates
from annbatch_dask.etl.repack import repack
from annbatch_dask.etl.request import DuplicateCells, GeneOrder, MatrixLayout, Mode, OnDuplicate, Request, make_request
from annbatch_dask.etl.scratches import default_scratch
from annbatch_dask.etl.start import Means, plan_and_run, run_prepared
from annbatch_dask.events import Callback, Callbacks
from annbatch_dask.maintained import MaintainedCollection
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.qc import QC
from annbatch_dask.planned import RunnablePlan
from annbatch_dask.progress import default_callbacks
from annbatch_dask.seeds import Seed
from annbatch_dask.storage.folder import absolute, folder_at
from annbatch_dask.storage.root import H5adRoot, Root
from annbatch_dask.warn import warn

if TYPE_CHECKING:
    import anndata as ad
    from distributed import Client

__all__ = ["DatasetCollection"]

_DEFAULT_COMPRESSOR = (zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),)
"""annbatch's codec at level 5 instead of 3, whose larger blocks of counts decode up to twice as fast and are a tenth
smaller, at no cost in writing (measured on 20M uint16 values and their indices)."""


class DatasetCollection(MaintainedCollection):
    """A folder of shuffled, sharded AnnData datasets, as annbatch has it.

    Parameters
    ----------
    group
        Path, URL or zarr group of the collection; a group of any store is read, and builds need one with a path or URL.
        Nothing is written until :meth:`add_adatas` commits.
    mode
        As in zarr: ``"a"`` (default) opens or creates, ``"r"`` requires an existing collection, and ``"w"`` shows an
        existing one as empty and replaces it when :meth:`add_adatas` commits. Until then, it stays unchanged, and
        open readers finish their epoch on it.
    is_collection_h5ad
        True for a folder of ``dataset_<i>.h5ad``. Builds write such files. Only their obs can be read here.
    storage_options
        Options of fsspec for a URL, such as credentials and endpoint. They are not stored.
    version
        Open the collection as it was at this commit, to read it; :attr:`versions` lists those that are kept. None is
        the collection of now.

    Raises
    ------
    CollectionError
        If the path holds something other than a collection.
    VersionNotFoundError
        If there is no such version, or it is not kept; with those that are.

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
        version: int | None = None,
    ) -> None:
        root = open_root(group, mode, storage_options, is_collection_h5ad=is_collection_h5ad, version=version)
        super().__init__(root)

    def plan_adatas(  # noqa: PLR0913 - annbatch's arguments
        self,
        adata_paths: Iterable[Any],
        *,
        seed: Seed | None = None,
        dataset_size: int | str = "2GiB",
        shuffle: bool = True,
        var_subset: Iterable[str] | None = None,
        elements: Iterable[str] | None = None,
        counts: str | Mapping[str, str] = "X",
        mode: Mode = "extend",
        genes: Literal["collection", "union"] = "collection",
        on_duplicate_source: OnDuplicate = "warn",
        merge: str | None = None,
        groupby: str | Iterable[str] | None = None,
        load_adata: Callable[[Any], ad.AnnData] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        allow_mixed_counts: bool = False,
        layout: MatrixLayout | None = None,
        gene_order: GeneOrder | None = None,
        where: str | Mapping[str, str] | None = None,
        qc: QC | Mapping[str, Any] | None = None,
        var_key: VarKey | None = None,
        gene_map: Any = None,
        strip_versions: bool | None = None,
        on_duplicate_gene: OnDuplicateGene | None = None,
        duplicates: DuplicateCells = "keep",
        stats: bool | None = None,
        stats_by: str | None = None,
        keep: int | None = None,
        n_obs_per_chunk: int = 64,
        shard_size: int | str = "1GiB",
        zarr_compressor: Any = _DEFAULT_COMPRESSOR,
        h5ad_compressor: str | None = "gzip",
        shuffle_chunk_size: int | None = None,  # noqa: ARG002 - see add_adatas
        rng: np.random.Generator | None = None,
        client: Client | None = None,
        memory_limit: int | str | None = None,
        read_values: bool = False,
    ) -> RunnablePlan[DatasetCollection]:
        """Scan the inputs and plan what :meth:`add_adatas` would do with the same arguments, without doing it.

        The parameters are those of :meth:`add_adatas`, and ``read_values``: read every value, which takes about half
        the time of the build. The plan then includes the dtypes on disk and the numbers of NaN and infinite values.

        Returns
        -------
        The plan. Its repr shows tasks, bytes and peak memory. Its method ``run`` builds the collection. Where the last
        build was this very call, the plan is the one that would add the cells again, and says so; ``run`` does nothing.
        """
        request = self._request(locals())
        room = choose_engine(client, memory_limit)
        root = self._root.hidden() if isinstance(self._root, H5adRoot) else copy(self._root)
        root.refresh()  # the copy alone: what was opened stays so until a build
        is_done = is_done_already(root, request, resolve(root, request)[1], room)
        if not is_done:
            warn_of_duplicates(root, request.refs, on_duplicate_source)
        prepared = replace(prepare(root, request, room, read_values=read_values), is_done=is_done)
        run = functools.partial(self._run, prepared, room, h5ad_compressor)
        return RunnablePlan.of(prepared.plan, run, is_done=is_done)

    def add_adatas(  # noqa: PLR0913 - annbatch's arguments
        self,
        adata_paths: Iterable[Any],
        *,
        seed: Seed | None = None,
        dataset_size: int | str = "2GiB",
        shuffle: bool = True,
        var_subset: Iterable[str] | None = None,
        elements: Iterable[str] | None = None,
        counts: str | Mapping[str, str] = "X",
        mode: Mode = "extend",
        genes: Literal["collection", "union"] = "collection",
        on_duplicate_source: OnDuplicate = "warn",
        merge: str | None = None,
        groupby: str | Iterable[str] | None = None,
        load_adata: Callable[[Any], ad.AnnData] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        allow_mixed_counts: bool = False,
        layout: MatrixLayout | None = None,
        gene_order: GeneOrder | None = None,
        where: str | Mapping[str, str] | None = None,
        qc: QC | Mapping[str, Any] | None = None,
        var_key: VarKey | None = None,
        gene_map: Any = None,
        strip_versions: bool | None = None,
        on_duplicate_gene: OnDuplicateGene | None = None,
        duplicates: DuplicateCells = "keep",
        stats: bool | None = None,
        stats_by: str | None = None,
        keep: int | None = None,
        n_obs_per_chunk: int = 64,
        shard_size: int | str = "1GiB",
        zarr_compressor: Any = _DEFAULT_COMPRESSOR,
        h5ad_compressor: str | None = "gzip",
        shuffle_chunk_size: int | None = None,  # noqa: ARG002 - see the docstring
        rng: np.random.Generator | None = None,
        client: Client | None = None,
        memory_limit: int | str | None = None,
        scratch: str | os.PathLike[str] | None = None,
        scratch_options: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] | None = None,
        progress: bool | None = None,
        performance_report: str | os.PathLike[str] | None = None,
    ) -> DatasetCollection:
        """Shuffle the cells of many AnnData files into this collection.

        Each cell gets a position drawn uniformly over the whole collection. Dask does the work in bounded memory. The
        collection stays unchanged until the last step publishes the new one. An interrupted build resumes when it is
        called again with the same arguments, unless an input has changed. The same call, repeated after success, does
        nothing. A call with other options or replaced files is a new build.

        A collection that holds cells is extended, see ``mode``. Its old datasets are removed after the new ones are
        published.

        Parameters
        ----------
        adata_paths
            Paths or URLs of ``.h5ad`` files and ``.zarr`` stores, paths of 10x Genomics' ``.h5`` files and folders with
            a ``matrix.mtx`` (scanpy reads them, into memory: gene expression, symbols made unique), zarr groups on any
            store that can be sent to workers (obstore's, icechunk's, a zip file), or AnnData whose X is a dask array,
            such as :func:`annbatch_dask.concat_lazy` returns: each task computes the blocks of its own rows.
        seed
            Seed of the shuffle: a non-negative integer, or a generator to draw one from; None is 0. The manifest
            records it. Equal seeds and inputs give equal bytes on any cluster.
        dataset_size
            Size of a dataset: cells, or uncompressed bytes (as in the inputs) as a string. The last one is smaller.
        shuffle
            False keeps the order of the inputs.
        var_subset
            Keep only these genes; names that are none are warned of. An extension keeps all genes of the collection.
        elements
            What to carry: names such as ``"layers"``, ``"layers/counts"``, ``"obsm/X_pca"``, ``"obs"``, ``"raw"``,
            ``"uns"``, beside X and the obs names. Names with a leading ``-`` are excluded. None carries
            everything that all inputs have; a warning and the plan name what is left out. ``obsp`` is always left out,
            because a shuffle separates its pairs. Named elements must exist, and elements that cannot be carried
            (awkward arrays) must be excluded.
        counts
            The matrix of the inputs that becomes X: ``"X"`` (default), ``"raw/X"`` or ``"layers/<key>"``, for all of
            them, or by path or pattern of paths for some (the first that fits).
        mode
            How a collection that holds cells is extended. ``"extend"`` (default) distributes the new cells over its
            datasets, in proportion to their sizes and at random positions; the number of datasets stays. ``"append"``
            adds new datasets, shuffled among themselves. ``"reshuffle"`` shuffles all cells.
        genes
            ``"collection"`` (default): an extension keeps the collection's genes, drops other genes of the new inputs
            and fills missing ones. ``"union"``: it appends the new inputs' genes, of which cells that are there have no
            counts (0, or NaN where dense), even where their files had some; not with ``mode="append"``.
        on_duplicate_source
            For an input whose cells the collection has: ``"warn"`` (default) adds them again with a warning;
            ``"error"`` refuses. The same file under another path is the same input.
        merge
            Which var columns, varm, varp and uns of several inputs to keep, as in :func:`anndata.concat`; None keeps
            none. Those of a single input are all kept.
        groupby
            Columns of obs by which the rows of each dataset are sorted: by category in the collection's order of
            categories, by value where numbers or strings, missing ones last; rows of one group stand in the order of
            the shuffle. Categories may differ between inputs. An extension sorts what it rewrites only if it says so.
        load_adata
            ``path -> AnnData`` instead of the default, which reads all elements from the file. What it returns may be
            in memory, backed or lazy; it is called on the workers, several times for an input. An interrupted build
            resumes only if its code and the file are unchanged. Its result, if in memory, is counted in the plan's
            figures, once per thread; the function's own temporary memory is not.
        storage_options
            Options of fsspec for inputs that are URLs, such as credentials and endpoint. They are sent to the workers
            with each task and are not stored in the clear. The collection has its own, see the class.
        allow_mixed_counts
            Build even if X holds whole numbers in some inputs and fractions in others.
        layout
            Storage of sparse matrices. ``"open"`` (default) uses ``zarr_compressor`` and is readable by any software
            for zarr v3. ``"packed"`` stores columns and whole numbers in as few bits as most of them need: a third
            smaller and three times as fast to decode, but zarr and anndata read it only where this package is
            installed. Other values and dense matrices are stored as in ``"open"``. None keeps the collection's.
        gene_order
            Order of a new collection's genes: ``"names"`` (default), as in :func:`anndata.concat`, or ``"abundance"``:
            most expressed first (in a sample of cells), which makes sparse matrices smaller. ``raw`` keeps its order.
            None keeps the collection's, as every extension does.
        where
            Keep only the cells whose obs meets a condition, written as for the Loader's ``where``:
            ``"is_primary_data and tissue == 'lung'"``. One for all inputs, or by path or pattern of paths (the first
            that fits; others are kept whole). Cells that the collection has already are not asked.
        qc
            Keep only the cells whose counts meet rules, see :class:`annbatch_dask.QC`, after ``where``.
        var_key
            The var column whose values name the genes, such as ``"feature_id"`` or ``"gene_ids"``, of ``raw`` too: for
            all inputs, or by path or pattern of paths (the first that fits; of others it is the index, which is
            ``""``). None keeps the collection's, or the index. The collection's var gets a column ``input_var_names``.
        gene_map
            Other names for genes, as retired ids for current ones: a dict or pandas Series from each name to the one in
            the collection, or a table of these two columns, as a DataFrame or path (``.csv``, ``.tsv``, ``.parquet``).
            It is applied once, after ``strip_versions``. None keeps the collection's; ``{}`` is none.
        strip_versions
            Take the versions from Ensembl ids: ``ENSG00000000003.15`` is ``ENSG00000000003``. None keeps the
            collection's, or False.
        on_duplicate_gene
            Several genes of one input with one name: ``"error"`` (default) refuses, ``"sum"`` adds their values up
            (whole numbers exactly, or it is an error), ``"first"`` keeps the first. None keeps the collection's.
        duplicates
            For cells whose X equals an earlier cell's in every gene: ``"keep"`` (default) does not look for them,
            ``"report"`` counts them by file, ``"drop"`` keeps the first of equals, ``"error"`` refuses. Cells without
            counts are no duplicates, nor are those that the collection has. Not with ``mode="append"``.
        stats, stats_by
            Sum up each gene's counts and log-normalised counts on the way, for :meth:`gene_stats` and others; by a
            categorical column of obs too, such as ``"donor"``. None keeps the collection's, or makes none.
        keep
            How many versions stay, the new one with them: 2 keeps what the collection was before this call, with the
            datasets that it alone has. 1 keeps none but what open readers hold. None keeps as many as the last build
            was told to, or 1. See :attr:`versions`.
        n_obs_per_chunk
            Cells per zarr chunk. A chunk of a sparse matrix has as many entries as that many cells have on average.
        shard_size
            Size of a shard: cells, or uncompressed bytes as a string such as ``"1GiB"``, 2**30, or ``"1GB"``, 10**9.
        zarr_compressor
            A zarr codec (blosc, zstd or gzip), or () for none.
        h5ad_compressor
            Compression of h5ad files: ``"gzip"`` (default), ``"lzf"`` or None. It has no effect on zarr, where other
            values give a warning.
        shuffle_chunk_size
            Argument of annbatch, without effect: rows are shuffled one by one.
        rng
            Generator; annbatch's name for ``seed``.
        client
            A client of the Dask cluster to use. None uses the scheduler set in dask's configuration, or the current
            client, or the cluster at dask's ``scheduler-address`` (``DASK_SCHEDULER_ADDRESS``), or starts a cluster of
            subprocesses on this machine and closes it afterwards.
        memory_limit
            Memory of a worker, in bytes or as a string such as ``"4GB"``; None uses the workers' own limits. The plan
            must fit.
        scratch, scratch_options
            Folder or URL for spill files, writable by all workers, and fsspec's options for it; by default beside the
            collection. Its content is removed after success; that of an interrupted build by the next build or
            :meth:`gc`. In a local folder, a build makes a private folder, so workers must run as the same user. Code
            that workers run comes through the scheduler, or is authenticated with a key from it.
        callbacks
            Listeners for the build's events, see :mod:`annbatch_dask.events`.
        progress
            Show progress bars. None shows them on a terminal and in notebooks.
        performance_report
            File for Dask's performance report of the build, one page of HTML. It needs a cluster and bokeh.

        Returns
        -------
        The collection itself.

        Raises
        ------
        SchedulerError
            If dask is set to use a scheduler that is not there, or that it does not know.
        SourceError, SchemaError, LayoutError, SelectionError, MemoryBudgetError
            Before any work, if an input cannot be read, inputs contradict each other, sizes cannot be met, or no cell
            is kept.
            SourceError also if an input changes while the build reads it.
        CollectionError
            If an input is in the collection itself, or is in it already and ``on_duplicate_source="error"``.
        CollectionBusyError
            If another build works on the collection.
        DuplicateCellsError
            If there are duplicates, and ``duplicates="error"``; nothing is published.
        IntegrityError
            If written rows differ from the rows that were read; nothing is published.
        """
        given = locals()
        request = self._request(given)
        room = choose_engine(client, memory_limit)
        with self._building(h5ad_compressor) as root:
            plan_and_run(root, request, _means(root, room, given))
        return self

    def _request(self, given: Mapping[str, Any]) -> Request:
        """Make a request from the arguments of a method."""
        self._root.check_unpinned("add cells")
        if self._is_h5ad and given["keep"] not in (None, 1):
            msg = f"keep={given['keep']!r} keeps versions, and a folder of h5ad files has none; build zarr"
            raise ValueError(msg)
        if not self._is_h5ad and given["h5ad_compressor"] != "gzip":
            warn("h5ad_compressor of annbatch's add_adatas has no effect on zarr; leave it out")
        self._root.folder  # noqa: B018 - raises for stores that workers cannot open
        return make_request(given)

    def _run(
        self, prepared: Prepared, room: EngineChoice, compressor: str | None, plan: Plan, given: Mapping[str, Any]
    ) -> Self:
        """Run a plan of this collection, by the arguments of its own method."""
        if given["client"] is not None:
            room = choose_engine(given["client"], None)
        with self._building(compressor) as root:
            run_prepared(root, replace(prepared, plan=plan), _means(root, room, given))
        return self

    def _building(self, h5ad_compressor: str | None) -> AbstractContextManager[Root]:
        """The zarr collection to build in the block."""
        root = self._root
        return written_from(root, h5ad_compressor) if isinstance(root, H5adRoot) else nullcontext(root)

    def repack(
        self,
        path: str | os.PathLike[str],
        layout: MatrixLayout,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> DatasetCollection:
        """Write the same cells in the same order, in the other layout, as a collection at another place.

        What this one is stays as it is. Splits, and states of loaders, that were saved of one are good for both. Each
        dataset is read back and compared before the new collection is there. A call that was interrupted continues with
        the dataset at which it stopped.

        Parameters
        ----------
        path, storage_options
            Where to, as for the class. Nothing may be there yet but what this call has written before.
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
        repack(self._root, absolute(folder_at(path, storage_options)), layout)
        return DatasetCollection(path, storage_options=storage_options)


def _means(root: Root, room: EngineChoice, given: Mapping[str, Any]) -> Means:
    """Make the means of a build from a method's arguments by name."""
    scratch = given["scratch"]
    base = default_scratch(root.target) if scratch is None else absolute(folder_at(scratch, given["scratch_options"]))
    callback = Callbacks([*default_callbacks(progress=given["progress"]), *(given["callbacks"] or ())])
    report = given["performance_report"]
    return Means(room, callback, base, None if report is None else os.fspath(report))
