"""Identity of an input: its location and a version of its content, without reading its values.

An identity is a short string. Two looks at an unchanged input give the same, on any machine that sees its files; a file
that was replaced or written to gives another. The empty one stands for what cannot be known, and equals nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import chain
from typing import Any
from uuid import uuid4

import numpy as np

from annbatch_dask.errors import SourceError
from annbatch_dask.sources.open import SourceRef, hiding_secrets_of, is_hdf5, may_be_input
from annbatch_dask.storage.filesystems import account_of, file_info, protocols, version_of
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import METADATA
from annbatch_dask.storage.secrets import shown
from annbatch_dask.storage.transient import raise_not_found

__all__ = [
    "function_identity",
    "has_many_files",
    "identity_of",
    "is_known",
    "raise_if_changed",
    "unchanged",
    "unique_identity",
    "where_of",
]

_FILE, _STORE, _UNKNOWN = "file", "store", "unknown"
_MANY_FILES = 2000
"""A store of more files is looked at once after all its rows were read, and not around each task."""


def where_of(ref: SourceRef) -> str:
    """The place of an input, one for all its spellings, without credentials; empty for what is at none."""
    if not isinstance(ref.item, str | os.PathLike):
        return ""
    folder = ref.folder
    if folder.is_local:
        return os.path.realpath(folder.path) + ref.within
    if "::" in folder.url:
        return shown(folder.url)
    account = account_of(folder.fs)
    return f"{protocols(folder.fs)[0]}:{account + '/' if account else ''}{shown(folder.path).rstrip('/')}"


def identity_of(ref: SourceRef, *, at_a_glance: bool = False, fresh: bool = False, was_file: bool = False) -> str:
    """The identity of an input's content.

    Parameters
    ----------
    ref
        The input. Of what ``load_adata`` returns: the files at its path, and the function.
    at_a_glance
        Look at the first document of a store, and not at all of its files, which may be many.
    fresh
        Open each file of a local store: then a network file system asks its server, and answers from no cache.
    was_file
        It was a file when it was looked at before: whether it is one now is not asked for before its version is.

    Returns
    -------
    The same for the same content; empty where that cannot be known.
    """
    if ref.known:
        return ref.known
    if inside := [identity_of(r, at_a_glance=at_a_glance, fresh=fresh) for r in _refs_inside(ref.item)]:
        return _digest([ref.label, *inside]) if all(inside) else ""
    if not isinstance(ref.item, str | os.PathLike) or (ref.load_adata is not None and not ref.loader):
        return ""
    with hiding_secrets_of(ref), _named(ref):
        found = _look(ref, at_a_glance=at_a_glance, fresh=fresh, was_file=was_file)
    return f"{found}/{ref.loader}" if found and ref.loader else found


@contextlib.contextmanager
def _named(ref: SourceRef) -> Iterator[None]:
    """Errors in the block say which input was looked at: those of connections do not."""
    try:
        yield
    except Exception as e:
        e.add_note(f"while looking at {ref.label}")
        raise


def has_many_files(identity: str) -> bool:
    """True if an input is a store of so many files that looking at them takes a while."""
    kind, _, rest = identity.partition(":")
    return kind == _STORE and int(rest.partition("/")[0]) > _MANY_FILES


def is_known(identity: str) -> bool:
    """True if an identity says something: equal ones then mean equal contents."""
    return bool(identity) and not identity.startswith(_UNKNOWN)


def unique_identity() -> str:
    """An identity that equals no other."""
    return f"{_UNKNOWN}:{uuid4().hex}"


def raise_if_changed(ref: SourceRef, identity: str) -> None:
    """Refuse an input that is not what it was.

    Raises
    ------
    SourceError
        With its name.
    StorageError
        If it is not found, which may pass.
    """
    was_file = identity.startswith(f"{_FILE}:")
    if not is_known(identity) or ref.known or identity_of(ref, was_file=was_file) == identity:
        return
    if not (now := identity_of(ref, fresh=True)):
        raise_not_found(ref.label)
    if now != identity:
        was, now = _words(identity), _words(now)
        msg = (
            f"{ref.label} was changed while the build read it: it was {was} when the build looked at it first, and is "
            f"{now}; nothing was published: call again when no other process writes to it"
        )
        raise SourceError(msg)


@contextlib.contextmanager
def unchanged(ref: SourceRef, identity: str) -> Iterator[None]:
    """Refuse what was read in the block if the input was changed before or meanwhile.

    Raises
    ------
    SourceError
        If the input changed, in place of any other error.
    """
    if has_many_files(identity):
        yield
        return
    raise_if_changed(ref, identity)
    try:
        yield
    except Exception as e:
        try:
            raise_if_changed(ref, identity)
        except SourceError as changed:
            raise changed from e
        raise
    raise_if_changed(ref, identity)


def _words(identity: str) -> str:
    kind, _, rest = identity.partition(":")
    what, _, stamp = rest.partition("/")
    if kind == _FILE:
        return f"a file of {int(what):,} bytes, version {stamp.partition('/')[0]}"
    return f"a store of {int(what):,} files" if kind == _STORE and what else identity or "gone"


# --- files ---------------------------------------------------------------------------------------------------------


def _look(ref: SourceRef, *, at_a_glance: bool, fresh: bool, was_file: bool) -> str:
    folder = ref.folder
    try:
        if folder.is_local:
            if not os.path.isdir(folder.path):
                return _stamp_of_file(folder.path)
            if ref.load_adata is None and not may_be_input(folder.path):
                return ""  # and may be as large as a disk
            return _local_glance(folder) if at_a_glance else _store(_local_stamps(folder.path, fresh=fresh))
        if was_file or _is_file(ref):
            info = file_info(folder.fs, folder.path)
            version = version_of(info)
            return f"{_FILE}:{info['size']}/{version}" if version and info.get("size") is not None else ""
        if at_a_glance or "http" in folder.fs.protocol:
            return ""  # a web server lists no files
        return _store(_remote_stamps(folder))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""  # opening it says so better


def _is_file(ref: SourceRef) -> bool:
    """True if a remote input is one file; what ``load_adata`` reads may be of any format."""
    if ref.load_adata is None:
        return is_hdf5(ref)
    return bool(ref.folder.fs.isfile(ref.folder.path))


def _stamp_of_file(path: str) -> str:
    """Size and time of change, of the open file: a network file system then asks its server."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return f"{_FILE}:{found.st_size}/{found.st_mtime_ns}"


def _local_glance(folder: Folder) -> str:
    names = (METADATA, ".zgroup", ".zattrs", ".zmetadata")
    return _store(f"{n}/{folder.size(n)}/{folder.version(n)}" for n in names)


def _local_stamps(root: str, *, fresh: bool) -> Iterator[str]:
    for path, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        inside = os.path.relpath(path, root)
        for name in sorted(n for n in names if not n.startswith(".nfs")):  # removed, and still open somewhere
            whole = os.path.join(path, name)
            if fresh:
                yield f"{inside}/{name}/{_stamp_of_file(whole)}"
            else:
                found = os.stat(whole)
                yield f"{inside}/{name}/{_FILE}:{found.st_size}/{found.st_mtime_ns}"


def _remote_stamps(folder: Folder) -> Iterator[str]:
    root = folder.path.rstrip("/")
    folder.fs.invalidate_cache(root)
    for path, info in sorted(folder.fs.find(root, detail=True).items()):
        version = version_of(info)
        yield f"{path[path.rindex(root) + len(root) :]}/{info['size']}/{version}" if version else ""


def _store(stamps: Iterable[str]) -> str:
    found = list(stamps)
    return f"{_STORE}:{len(found)}/{_digest(found)}" if found and all(found) else ""


def _digest(parts: Iterable[str]) -> str:
    h = blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogateescape")
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.hexdigest()


def _refs_inside(item: Any) -> Iterator[SourceRef]:
    """The files that a lazy view of ours reads, as its tasks name them."""
    graph = getattr(getattr(item, "X", None), "dask", None)
    seen: set[int] = set()
    for layer in getattr(graph, "layers", {}).values():
        for task in getattr(layer, "mapping", {}).values():
            for ref in task if isinstance(task, tuple) else ():
                if isinstance(ref, SourceRef) and id(ref) not in seen:
                    seen.add(id(ref))
                    yield ref


# --- functions -----------------------------------------------------------------------------------------------------


class _UnknownError(Exception):
    """The identity of a value cannot be determined."""


def function_identity(function: Callable[..., Any]) -> str:
    """The identity of a function: of its code, its defaults and all that it refers to.

    What belongs to an installed package counts by its name and that package's version. Empty where the function refers
    to something whose content cannot be told, such as an open file.
    """
    try:
        return _digest(_said(function, set()))
    except (_UnknownError, RecursionError):
        return ""


def _said(value: Any, seen: set[int]) -> Iterator[str]:  # noqa: C901, PLR0912 - one line for each kind of value
    """Strings that identify a value, equal in every process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic | types.EllipsisType):
        yield f"{type(value).__name__} {value!r}"
        return
    if isinstance(value, types.FunctionType | types.ModuleType | type):  # these may refer to themselves
        if id(value) in seen:
            yield "again"
            return
        seen.add(id(value))
    yield type(value).__qualname__
    match value:
        case types.CodeType():
            names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
            yield repr((value.co_code, names, value.co_argcount, value.co_kwonlyargcount, value.co_flags))
            yield from _all(value.co_consts, seen)
        case types.FunctionType() if not _is_installed(value.__module__):
            yield from _function_said(value, seen)
        case types.FunctionType() | type() if _is_installed(value.__module__):
            yield f"{value.__module__}.{value.__qualname__} {_version(value.__module__)}"
        case type():
            yield from _all(value.__bases__, seen)
            plain = {k: v for k, v in vars(value).items() if not k.startswith("__") or callable(v)}
            yield from _said(plain, seen)
        case types.ModuleType():
            yield from _module_said(value, seen)
        case types.MethodType():
            yield from _all((value.__self__, value.__func__), seen)
        case types.BuiltinFunctionType():
            yield value.__name__
            yield from _said(value.__self__, seen)
        case functools.partial():
            yield from _all((value.func, value.args, value.keywords), seen)
        case staticmethod() | classmethod():
            yield from _said(value.__func__, seen)
        case property():
            yield from _all((value.fget, value.fset, value.fdel), seen)
        case tuple() | list():
            yield from _all(value, seen)
        case set() | frozenset():
            yield from sorted(_digest(_said(v, set(seen))) for v in value)
        case dict():
            yield from _all(chain.from_iterable(value.items()), seen)
        case os.PathLike():
            yield os.fspath(value)
        case _:
            yield from _object_said(value, seen)


def _all(values: Iterable[Any], seen: set[int]) -> Iterator[str]:
    return chain.from_iterable(_said(v, seen) for v in values)


def _function_said(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    try:
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as e:  # a name that has no value yet
        raise _UnknownError from e
    yield from _all((function.__code__, function.__defaults__, function.__kwdefaults__, closure), seen)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            yield from _said(function.__globals__[name], seen)
        elif name in sys.modules:  # imported in the function
            yield from _said(sys.modules[name], seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _module_said(module: types.ModuleType, seen: set[int]) -> Iterator[str]:
    yield module.__name__
    file = getattr(module, "__file__", None)
    if _is_installed(module.__name__) or file is None:
        yield _version(module.__name__)
        return
    with contextlib.suppress(OSError), open(file, "rb") as f:
        yield blake2b(f.read(), digest_size=16).hexdigest()
    inner = {v.__name__: v for v in vars(module).values() if isinstance(v, types.ModuleType)}
    yield from _all((inner[k] for k in sorted(inner) if not _is_installed(k)), seen)


def _object_said(value: Any, seen: set[int]) -> Iterator[str]:
    from dask.tokenize import TokenizationError, tokenize

    kind = type(value)
    if kind.__module__.partition(".")[0] in ("numpy", "pandas", "scipy"):
        try:
            yield tokenize(value, ensure_deterministic=True)
        except TokenizationError as e:
            raise _UnknownError from e
        return
    if (wrapped := getattr(value, "__wrapped__", None)) is not None:  # functools.cache and its like
        yield from _said(wrapped, seen)
        return
    if _is_installed(kind.__module__) or not isinstance(getattr(value, "__dict__", None), dict):
        raise _UnknownError
    yield from _all((kind, vars(value)), seen)


_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_paths()[k]) + os.sep for k in ("stdlib", "platstdlib", "purelib", "platlib")}
)


@functools.cache
def _is_installed(module: str | None) -> bool:
    """True if a module belongs to Python or an installed package, and so changes with its version alone."""
    if module == "__main__":
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is None and module in sys.modules or os.path.realpath(file or "").startswith(_LIBRARIES)


def _version(module: str) -> str:
    top: Mapping[str, Any] = vars(sys.modules.get(module.partition(".")[0], types.SimpleNamespace()))
    return str(top.get("__version__", ""))
