"""Inputs: the schema and any rows of an AnnData file, or of the result of ``load_adata``."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from annbatch_dask.errors import AnnbatchDaskError, MissingPackageError, SourceError, SourceNotFoundError, StorageError
from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema, SourceSchema
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.files import GroupSource, is_current
from annbatch_dask.sources.garbage import no_garbage_collection
from annbatch_dask.sources.matrices import CsrRows
from annbatch_dask.sources.tenx import is_tenx_file, is_tenx_folder, read_tenx
from annbatch_dask.storage.filesystems import name_refusals
from annbatch_dask.storage.folder import Folder, StorageOptions
from annbatch_dask.storage.hdf5_filters import missing_filter, register_filters
from annbatch_dask.storage.metadata import METADATA, open_as_it_is
from annbatch_dask.storage.secrets import hiding_secrets
from annbatch_dask.storage.transient import is_transient

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "PickedSource",
    "Source",
    "SourceRef",
    "WholeSource",
    "hiding_secrets_of",
    "is_hdf5",
    "may_be_input",
    "open_source",
]


@dataclass(frozen=True)
class SourceRef:
    """An input as the user named it: what ``src_path`` says, and what a worker opens.

    ``is_dataset``: a dataset of the collection that is extended, whose rows say where they came from. ``counts``: the
    matrix that becomes X. ``loader``: identity of ``load_adata``, see :mod:`annbatch_dask.sources.identity`. ``known``:
    identity of the whole, where it is recorded. ``within``: a group of the file at ``item``. ``where``: the condition
    on obs that rows meet; "" for all rows. ``var_key``: the var column that names its genes, "" for the index; None
    where a build has no rules for names.
    """

    label: str
    item: Any = field(repr=False)  # a URL may be signed
    load_adata: Callable[[Any], AnnData] | None = None
    is_dataset: bool = False
    counts: str = "X"
    options: StorageOptions = field(default_factory=StorageOptions, repr=False)
    loader: str = ""
    known: str = ""
    within: str = ""
    where: str = ""
    var_key: str | None = None

    @property
    def folder(self) -> Folder:
        """The path or URL of the input."""
        return Folder(os.fspath(self.item), self.options)


class Source(Protocol):
    """Rows of an open input: all, or those that were chosen."""

    def annotations(self) -> AnnData:
        """Annotations of genes and of the input: an AnnData without cells, with var, varm, varp, uns and raw.var."""

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of a column."""

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""


class PickedSource(Source, Protocol):
    """Rows of an open input, all of them, of which any can be picked."""

    def picked(self, matrix: MatrixSchema, rows: NDArray[np.int64]) -> CsrRows | NDArray:
        """Rows of a matrix by their numbers, (n_picked,) int64, ascending, one at least."""


class WholeSource(PickedSource, Protocol):
    """An open input, with all of its rows."""

    @property
    def n_obs(self) -> int:
        """Rows."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes of the group that it is; none in memory."""

    def schema(self, *, metadata_only: bool = False, rows: NDArray[np.bool_] | None = None) -> SourceSchema:
        """Schema of the input. With ``metadata_only``, no matrix value is read; stored values per row are guessed.

        ``rows``, (n_obs,): the stored values that are counted are those of the rows of which it is true.
        """

    def obs_columns(self) -> tuple[ColumnSchema, ...]:
        """Columns of obs, without looking at their values."""

    def gene_column(self, frame: str, name: str) -> NDArray[np.object_] | None:
        """Values of a column of ``"var"`` or ``"raw/var"`` as names, None where missing; None if there is none."""

    def gene_values(self, frame: str, name: str) -> NDArray | None:
        """Values of a column of ``"var"`` or ``"raw/var"`` as they are; None if there is none."""

    def stored(self, matrix: MatrixSchema) -> Any:
        """A matrix as it is stored: an array, or the group of a sparse one; or as it is in memory."""


@contextlib.contextmanager
def open_source(ref: SourceRef) -> Iterator[WholeSource]:
    """Open an input, and close its files afterwards. Errors in the block do not show the secrets of its URL.

    Raises
    ------
    SourceNotFoundError
        If the path does not exist.
    SourceError
        If it is no AnnData file, or cut short.
    """
    with hiding_secrets_of(ref), _naming_refusals(ref), _opened(ref) as source:
        yield source


def hiding_secrets_of(ref: SourceRef) -> contextlib.AbstractContextManager[None]:
    """Errors in the block do not show what an input's URL holds."""
    return hiding_secrets(os.fspath(ref.item) if isinstance(ref.item, str | os.PathLike) else "")


def _naming_refusals(ref: SourceRef) -> contextlib.AbstractContextManager[None]:
    """Refusals of access in the block say so with the input: zarr leaves them in the store's words."""
    if ref.load_adata is not None or not isinstance(ref.item, str | os.PathLike):
        return contextlib.nullcontext()
    return name_refusals(ref.folder.fs, ref.folder.path)


@contextlib.contextmanager
def _opened(ref: SourceRef) -> Iterator[WholeSource]:
    register_filters()
    if ref.load_adata is not None:
        from annbatch_dask.sources.adata import AnnDataSource  # imports anndata, which takes seconds

        yield AnnDataSource(ref.label, _checked(ref, ref.load_adata(ref.item)))
        return
    if _is_tenx_folder(ref):
        yield _tenx_source(ref)
        return
    with contextlib.ExitStack() as files:
        group = _open_group(ref, files)
        has_frames = "obs" in group and "var" in group
        if not has_frames and isinstance(group, h5py.Group) and is_tenx_file(group):
            yield _tenx_source(ref)
            return
        if "X" not in group and (names := _parts(group)):
            msg = (
                f"{ref.label} holds several AnnData ({', '.join(names)}); give one of them: its path within a .zarr, "
                "or its group of zarr or h5py, or load_adata=, which returns it"
            )
            raise SourceError(msg)
        if not has_frames:
            msg = f"{ref.label} has no obs and var, so it is not an AnnData file; it holds {sorted(group)[:5]}"
            raise SourceError(msg)
        if is_current(group):
            with _name_filters(ref, group):
                yield GroupSource(ref.label, group)
        else:
            from annbatch_dask.sources.adata import AnnDataSource, read_legacy  # imports anndata

            if not isinstance(ref.item, zarr.Group | h5py.Group) and not ref.folder.is_local:
                msg = f"{ref.label} is of a format before anndata 0.7, read from local disks only; copy it there"
                raise SourceError(msg)
            yield AnnDataSource(ref.label, read_legacy(ref.item))


@contextlib.contextmanager
def _name_filters(ref: SourceRef, group: Any) -> Iterator[None]:
    """Where HDF5 lacks a filter, say what to install: its own error names a folder of plugins alone."""
    try:
        yield
    except OSError as e:
        if (
            not isinstance(group, h5py.Group)
            or isinstance(e, AnnbatchDaskError)
            or not (found := missing_filter(group))
        ):
            raise
        msg = f"{ref.label}: {found}, which HDF5 lacks here; pip install hdf5plugin, on workers as well"
        raise MissingPackageError(msg) from e


def _parts(group: Any) -> list[str]:
    """Places of the AnnData in a MuData, which has obs and var too, or a SpatialData."""
    found = [(name, group[name]) for name in ("mod", "tables") if name in group]
    return [f"{name}/{part}" for name, g in found if isinstance(g, h5py.Group | zarr.Group) for part in sorted(g)]


def _checked(ref: SourceRef, found: Any) -> AnnData:
    """What ``load_adata`` returned; SourceError for what is no AnnData."""
    import anndata as ad

    if not isinstance(found, ad.AnnData):
        msg = f"load_adata returned {type(found).__name__} for {ref.label}; it must return an AnnData"
        raise SourceError(msg)
    return found


def _is_tenx_folder(ref: SourceRef) -> bool:
    return isinstance(ref.item, str | os.PathLike) and ref.folder.is_local and is_tenx_folder(ref.folder.path)


def may_be_input(path: str) -> bool:
    """True if a local folder has what a zarr store or a folder of 10x Genomics' has."""
    return any(os.path.exists(f"{path}/{name}") for name in _ZARR_ROOTS) or is_tenx_folder(path)


def _tenx_source(ref: SourceRef) -> WholeSource:
    from annbatch_dask.sources.adata import AnnDataSource  # imports anndata

    if not isinstance(ref.item, str | os.PathLike) or not ref.folder.is_local:
        msg = f"{ref.label} is 10x Genomics' output, read from local disks only; copy it, or read it in load_adata"
        raise SourceError(msg)
    return AnnDataSource(ref.label, read_tenx(ref.folder.path))


def _open_group(ref: SourceRef, files: contextlib.ExitStack) -> Any:
    if isinstance(ref.item, zarr.Group | h5py.Group):
        return ref.item
    folder = ref.folder
    if is_hdf5(ref):
        try:
            if folder.is_local:
                return files.enter_context(h5py.File(folder.path, "r"))
            files.enter_context(no_garbage_collection())
            return files.enter_context(h5py.File(files.enter_context(folder.open()), "r"))
        except OSError as e:
            if folder.is_local and "unable to lock file" in str(e):  # HDF5 locks what is open to be written
                msg = "another process has it open to write: close it there, or give a copy of it"
                raise StorageError(errno.EAGAIN, msg, ref.label) from e
            if is_transient(e) or isinstance(e, AnnbatchDaskError | FileNotFoundError):  # says nothing about the file
                raise
            if isinstance(e, PermissionError):
                msg = f"{ref.label} may not be read by this user ({e}); have its owner allow it, or leave it out"
                raise SourceError(msg) from e
            size = folder.fs.size(folder.path)
            if folder.is_local and size and not h5py.is_hdf5(folder.path):
                raise _of_no_kind(ref, e) from e
            msg = f"{ref.label} ({size:,} bytes) is not a whole HDF5 file: {e}; copy it again, or leave it out"
            raise SourceError(msg) from e
    try:
        return open_as_it_is(folder) if ref.is_dataset else zarr.open_group(folder.zarr_store(read_only=True), mode="r")
    except (FileNotFoundError, ValueError) as e:
        raise _of_no_kind(ref, e) from e


def _of_no_kind(ref: SourceRef, error: Exception) -> SourceError:
    return SourceError(
        f"{ref.label} is no HDF5 file and not a zarr AnnData store ({error}); give an .h5ad file, a .zarr store, or "
        "10x Genomics' .h5 file or folder"
    )


def is_hdf5(ref: SourceRef) -> bool:
    """True if an input is an HDF5 file: a local file, or a remote one with its signature.

    A store cannot tell files from folders without listing, and an HTTP server not at all.

    Raises
    ------
    SourceNotFoundError
        If there is nothing.
    """
    folder, path = ref.folder, ref.label
    if folder.is_local:
        try:
            return not stat.S_ISDIR(os.stat(folder.path).st_mode)  # os.path.exists takes every error for a no
        except (FileNotFoundError, NotADirectoryError):
            if ref.is_dataset:
                msg = f"{path} of the collection is missing: {folder.path} does not exist; restore it"
                raise SourceNotFoundError(msg) from None
            looked = "" if os.path.isabs(path) else f" (looked in {os.getcwd()})"
            what = (
                "give the files of the pattern, as glob.glob finds them" if glob.has_magic(path) else "check the path"
            )
            msg = f"{path} does not exist; {what}{looked}"
            raise SourceNotFoundError(msg) from None
    try:
        return folder.first_bytes(len(_HDF5)) == _HDF5
    except (FileNotFoundError, IsADirectoryError):
        if all(folder.version(name) is None for name in _ZARR_ROOTS):
            msg = f"{path} does not exist; check the URL, and whether the credentials may read it"
            raise SourceNotFoundError(msg) from None
        return False


_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZARR_ROOTS = (METADATA, ".zgroup")
