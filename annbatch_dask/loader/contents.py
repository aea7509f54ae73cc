"""The contents of batches: X and the other elements, in the requested form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.flags import check_flag
from annbatch_dask.kernels.gpu import knows
from annbatch_dask.loader.backing import RowSource
from annbatch_dask.loader.batch import Form, Selection
from annbatch_dask.loader.casts import check_cast, warn_of_negatives
from annbatch_dask.loader.gpu.device import Device, Placed
from annbatch_dask.loader.gpu.find import check_device, find_device, has_device
from annbatch_dask.loader.obs import Categories, Labels, ObsTable
from annbatch_dask.loader.obs_tables import JoinedTables, check_tables
from annbatch_dask.loader.output import Framework, check_framework, make_deliver
from annbatch_dask.loader.reading import refuse_missing
from annbatch_dask.loader.requests import Window
from annbatch_dask.loader.steps import Transform, split_transform
from annbatch_dask.loader.tokens import TokenForm, check_counts, deliver_each
from annbatch_dask.storage.threads import unlocked_property
from annbatch_dask.transforms import BinnedExpression, NormalizeLog1p, RankTokens

__all__ = ["BatchSpec", "Casting", "Contents", "Dense", "Key", "Matrix", "Transform"]

Array = NDArray[Any]
Dense = bool | Literal["cpu", "gpu"]
Casting = Literal["unsafe"]
Codes = Sequence[str] | Mapping[str, Sequence[Any] | None]
STORED = "stored"


class Key(NamedTuple):
    """Location of a matrix in an AnnData and in a batch. ``Key("X")`` is X."""

    kind: Literal["X", "layers", "obsm"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}[{self.name!r}]" if self.name else self.kind


X = Key("X")


@dataclass(frozen=True)
class Matrix:
    """One matrix over all datasets, and how its rows are delivered."""

    key: Key
    sources: tuple[RowSource, ...]
    form: Form
    deliver: Callable[[Any], Any]
    tokens: TokenForm | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first dataset; all are equal except for their rows."""
        return self.sources[0].shape

    @unlocked_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that holds the values of all datasets, so that it is the same for all batches."""
        return np.result_type(*(source.dtype for source in self.sources))


@dataclass(frozen=True)
class Contents:
    """Contents of the batches of one iteration.

    Attributes
    ----------
    matrices
        X first.
    obs, labels, tables, var
        Frames, label codes, tables, and the ``var`` of all batches; None where there is none.
    with_index
        Whether batches carry the rows' global positions.
    deliver
        From an array of codes to what the user gets.
    transform
        The last thing that happens to a batch, or None.
    device
        Where batches end up, or None for the host.
    is_made_there
        Whether they are made on the device, of windows that are there.
    """

    matrices: tuple[Matrix, ...]
    obs: ObsTable | None
    labels: Labels | None
    tables: JoinedTables | None
    var: pd.DataFrame | None
    with_index: bool
    deliver: Callable[[Array], Any]
    transform: Callable[[Any], Any] | None
    device: Device | None = None
    is_made_there: bool = False

    def batch(self, window: Window, number: int, built: Sequence[Any], placed: Placed | None = None) -> Any:
        """Put a batch together, of matrices that were built for it."""
        split, dealt = window.splits[number], window.dealt(number)
        delivered = {matrix.key: part for matrix, part in zip(self.matrices, built, strict=True)}
        batch: dict[str, Any] = {
            "X": delivered.pop(X),
            "obs": window.obs_of(number),
            "var": self.var,
            "index": window.rows[split] if self.with_index else None,
        }
        for key, matrix in delivered.items():
            batch.setdefault(key.kind, {})[key.name] = matrix
        if placed is not None and self.labels is not None:
            batch["obs_codes"] = placed.codes_of(number)
        elif self.labels is not None:
            batch["obs_codes"] = {name: self.deliver(codes[dealt]) for name, codes in window.codes.items()}
        if self.tables is not None:
            found = self.tables.take(window.rows[split])
            batch["obs_tables"] = {name: self.deliver(values) for name, values in found.items()}
        return batch if self.transform is None else self.transform(batch)


@dataclass(frozen=True)
class BatchSpec:
    """Contents that a user requested for batches, checked as far as possible without data."""

    to: Framework | None
    on_gpu: bool
    dense: Literal["cpu", "gpu"] | None
    dtype: DTypeLike | None
    casting: Casting | None
    var_names: tuple[str, ...] | None
    normalize: NormalizeLog1p | None
    tokens: RankTokens | BinnedExpression | None
    transform: Callable[[Any], Any] | None
    layers: tuple[str, ...] | None
    obsm: tuple[str, ...] | None
    obs_columns: tuple[str, ...] | None
    obs_codes: Mapping[str, Categories]
    obs_tables: Mapping[str, pd.DataFrame]

    @classmethod
    def of(  # noqa: PLR0913 - the Loader's arguments
        cls,
        *,
        to: Framework | None,
        preload_to_gpu: bool,
        dense: Dense,
        dtype: DTypeLike | None,
        casting: Casting | None,
        var_names: Sequence[str] | None,
        transform: Transform | Sequence[Transform] | None,
        layers: Sequence[str] | None,
        obsm: Sequence[str] | None,
        obs_columns: Sequence[str] | None,
        obs_codes: Codes | None,
        obs_tables: Mapping[str, pd.DataFrame] | None,
    ) -> BatchSpec:
        """Make the spec from the arguments of the Loader."""
        preload_to_gpu = check_flag("preload_to_gpu", preload_to_gpu)
        check_framework(to, preload_to_gpu=preload_to_gpu)
        made = _where_dense(dense, preload_to_gpu=preload_to_gpu)
        if made == "gpu":
            check_device(to)
        fused, rest = split_transform(transform)
        wanted = cls(
            to,
            preload_to_gpu or made == "gpu",
            made,
            _checked_dtype(dtype),
            casting,
            _names("var_names", var_names),
            fused if isinstance(fused, NormalizeLog1p) else None,
            None if isinstance(fused, NormalizeLog1p) else fused,
            rest,
            _names("layers", layers),
            _names("obsm", obsm),
            _names("obs_columns", obs_columns),
            _codes(obs_codes),
            check_tables(obs_tables),
        )
        wanted._check()
        return wanted

    def _check(self) -> None:
        if self.casting not in (None, "unsafe"):
            msg = f"casting must be None or 'unsafe', got {self.casting!r}"
            raise ValueError(msg)
        if self.dtype == "bfloat16" and (self.to != "torch" or (self.on_gpu and self.dense != "gpu")):
            msg = (
                f"dtype='bfloat16' needs to='torch', and dense='gpu' with preload_to_gpu; got to={self.to!r}, "
                f"dense={self.dense!r}"
            )
            raise ValueError(msg)
        is_float = self.dtype in (None, "bfloat16") or (self.dtype != STORED and np.dtype(self.dtype).kind == "f")
        if self.normalize is not None and not is_float:
            msg = f"NormalizeLog1p makes floats, dtype is {self.dtype!r}; give a float dtype or none"
            raise ValueError(msg)
        if self.tokens is not None and (self.dense is not None or self.dtype is not None):
            name = type(self.tokens).__name__
            msg = (
                f"{name} makes tokens of the rows as they are stored: leave out dense={self.dense!r} and "
                f"dtype={str(self.dtype)!r} ({name}(dtype=...) says which integers come)"
            )
            raise ValueError(msg)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The matrices beside X."""
        return (
            *(Key("layers", name) for name in self.layers or ()),
            *(Key("obsm", name) for name in self.obsm or ()),
        )

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns of obs that are needed; None for all."""
        return None if self.obs_columns is None else self.needed

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns of obs that are named, each of which must be there."""
        return tuple(dict.fromkeys((*(self.obs_columns or ()), *self.obs_codes, *self.obs_tables)))

    def select(self, var: pd.DataFrame | None) -> NDArray[np.int64] | None:
        """Positions of the chosen genes; None for all."""
        if self.var_names is None:
            return None
        if var is None:
            msg = f"var_names asks for {len(self.var_names)} genes, but the datasets have no var to look them up in"
            raise ValueError(msg)
        if not var.index.is_unique:
            msg = f"var_names cannot be looked up: {var.index[var.index.duplicated()][0]!r} stands twice in var"
            raise ValueError(msg)
        found = var.index.get_indexer(pd.Index(self.var_names))
        refuse_missing("var", [n for n, at in zip(self.var_names, found, strict=True) if at < 0], var.index)
        return found.astype(np.int64)

    def check_data(self, sources: Mapping[Key, RowSource], obs: pd.DataFrame | None, var: pd.DataFrame | None) -> None:
        """ValueError where a dataset cannot be delivered as asked for."""
        source = sources[X]
        self.select(var)
        tokens = self.tokens
        for what, is_asked in (
            ("var_names", self.var_names is not None),
            ("NormalizeLog1p", self.normalize),
            (type(tokens).__name__, tokens),
        ):
            if is_asked and len(source.shape) != 2:
                msg = f"{what} needs rows of one dimension, the dataset has shape {source.shape}"
                raise ValueError(msg)
        for key, other in sources.items():
            if other.n_obs != source.n_obs:
                msg = f"{key} has {other.n_obs} rows, X has {source.n_obs}"
                raise ValueError(msg)
            if key.kind == "layers" and other.shape != source.shape:
                msg = f"{key} has shape {other.shape}, X has {source.shape}"
                raise ValueError(msg)
        if self.normalize is not None:
            warn_of_negatives(source)
        if tokens is not None:
            check_counts(source, tokens)
            self._tokens_of(var)
        if self.dtype not in (None, STORED) and self.casting is None and self.normalize is None:
            check_cast("X", source, self.dtype)
        is_sparse = source.is_sparse and not self.dense
        if is_sparse and self.to is None and self.dtype is not None and self.dtype == np.float16:
            msg = "scipy has no sparse float16; add dense=True, or take another dtype"
            raise ValueError(msg)
        needed = self.needed
        if needed and obs is None:
            msg = f"obs column {needed[0]!r} is asked for, but the dataset has no obs"
            raise ValueError(msg)
        if obs is not None:
            refuse_missing("obs", [name for name in needed if name not in obs.columns], obs.columns)

    def contents(
        self,
        sources: Mapping[Key, tuple[RowSource, ...]],
        table: ObsTable | None,
        labels: Labels | None,
        tables: JoinedTables | None,
        var: pd.DataFrame | None,
        *,
        with_index: bool,
        epoch: int = 0,
    ) -> Contents:
        """Bring what is wanted together with the data, for the pass of this number."""
        chosen = self.select(var)
        selection = None if chosen is None else Selection.of(chosen, sources[X][0].shape[1])
        has_names = table is not None and all(index is not None for index in table.indexes)
        device = find_device(self.to) if self.dense == "gpu" or (self.on_gpu and has_device(self.to)) else None
        is_made_there = self.dense == "gpu" or self._makes_csr(device, sources)
        matrices = []
        for key, parts in sources.items():
            form = Form(dense=self.dense is not None, selection=None if key.kind == "obsm" else selection)
            tokens = self._tokens_of(var, epoch) if key == X else None
            if tokens is not None:
                form = Form(selection=tokens.selection)
            elif key == X:
                form = self._form_of_x(parts, form)
            deliver = self._deliver(device, is_made_there=is_made_there, bfloat16=form.is_bfloat16)
            if tokens is not None:
                deliver = partial(deliver_each, deliver)
            matrices.append(Matrix(key, parts, form, deliver, tokens))
        return Contents(
            tuple(matrices),
            table.select(self.obs_columns) if table is not None and (has_names or self.obs_columns != ()) else None,
            labels,
            tables,
            var if var is None or chosen is None else var.iloc[chosen],
            with_index,
            self._deliver(device),
            self.transform,
            device,
            is_made_there,
        )

    def _tokens_of(self, var: pd.DataFrame | None, epoch: int = 0) -> TokenForm | None:
        """How rows become tokens; None if they do not."""
        if self.tokens is None:
            return None
        if var is None:
            msg = f"{type(self.tokens).__name__} looks genes up by their names, but the datasets have no var"
            raise ValueError(msg)
        return TokenForm.of(self.tokens, var.index, self.select(var), epoch)

    def _makes_csr(self, device: Device | None, sources: Mapping[Key, tuple[RowSource, ...]]) -> bool:
        """True if sparse batches are made on the device: not of chosen genes, whose entries it would have to count."""
        is_chosen = self.var_names is not None or self.tokens is not None
        if device is None or not device.makes_csr or self.dense is not None or is_chosen:
            return False
        asked = () if self.dtype in (None, STORED, "bfloat16") else (self.dtype,)
        there = {dtype for parts in sources.values() for s in parts for dtype in (s.dtype, s.stored_dtype)}
        return all(map(knows, (*there, *asked)))

    def _deliver(
        self, device: Device | None, *, is_made_there: bool = False, bfloat16: bool = False
    ) -> Callable[[Any], Any]:
        if is_made_there:
            return _as_it_is
        if device is not None:
            return partial(device.deliver, bfloat16=bfloat16)
        return make_deliver(self.to, on_gpu=self.on_gpu, bfloat16=bfloat16)

    def _form_of_x(self, sources: tuple[RowSource, ...], form: Form) -> Form:
        is_bfloat16 = self.dtype == "bfloat16"
        if self.dtype == STORED:
            dtype: np.dtype[Any] | None = np.result_type(*(source.stored_dtype for source in sources))
        elif is_bfloat16:
            dtype = np.dtype(np.uint16)
        else:
            dtype = None if self.dtype is None else np.dtype(self.dtype)
        target_sum = None if self.normalize is None else self.normalize.target_sum
        return Form(form.dense, dtype, is_bfloat16, form.selection, target_sum)


def _where_dense(dense: Dense, *, preload_to_gpu: bool) -> Literal["cpu", "gpu"] | None:
    """Device on which dense batches are made; None for sparse batches."""
    if isinstance(dense, str) and dense in {"cpu", "gpu"}:
        return dense
    try:
        is_dense = check_flag("dense", dense)
    except TypeError:
        msg = f"dense must be True, False, 'cpu' or 'gpu', got {dense!r}"
        raise ValueError(msg) from None
    return ("gpu" if preload_to_gpu else "cpu") if is_dense else None


def _as_it_is(built: Any) -> Any:
    return built


def _names(argument: str, names: Iterable[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        msg = f"{argument} is the text {names!r}; give a list of names"
        raise TypeError(msg)
    if not isinstance(names, Iterable):
        msg = f"{argument} is {names!r}; give a list of names"
        raise TypeError(msg)
    given = tuple(str(name) for name in names)
    if len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        msg = f"{argument} names {twice!r} {given.count(twice)} times; name each once"
        raise ValueError(msg)
    return given


def _codes(codes: Codes | None) -> dict[str, Categories]:
    """Names of label columns, and the categories that the user gives."""
    names = _names("obs_codes", codes) or ()
    if not isinstance(codes, Mapping):
        return dict.fromkeys(names)
    given: dict[str, Categories] = {}
    for name, listed in codes.items():
        if isinstance(listed, str) or not isinstance(listed, Iterable | None):
            msg = f"obs_codes gives {listed!r} as the categories of {name!r}; give a list of them, or None"
            raise TypeError(msg)
        values = () if listed is None else tuple(listed)
        given[str(name)] = None if listed is None else values
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            msg = f"obs_codes names category {twice!r} of {name!r} {values.count(twice)} times; name each once"
            raise ValueError(msg)
        if None in values[:-1]:
            msg = f"obs_codes of {name!r} has None before its end; it stands for all other values, and comes last"
            raise ValueError(msg)
    return given


def _checked_dtype(dtype: Any) -> Any:
    """The dtype, with torch's taken by name; bfloat16 and "stored" stay the names they are."""
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name in (STORED, "bfloat16"):
        return None if dtype is None else name
    try:
        found = np.dtype(name if str(dtype).startswith("torch.") else dtype)
    except TypeError as error:
        msg = f"dtype is {dtype!r}; give one of numpy's, 'bfloat16', 'stored' or None"
        raise TypeError(msg) from error
    if found.kind not in "biufc":
        msg = f"dtype is {dtype!r}, which holds no numbers; give one that does"
        raise TypeError(msg)
    return found
