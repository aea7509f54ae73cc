"""Zero-shot and few-shot splits of perturbed cells, by the TOML files of Arc's cell-load."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SelectionError, SourceError, SourceNotFoundError

__all__ = ["TomlSplits", "read_toml_splits"]

Mask = NDArray[np.bool_]
PARTS = ("train", "val", "test")
_SECTIONS = ("datasets", "training", "zeroshot", "fewshot")


@dataclass(frozen=True)
class TomlSplits(Mapping[str, Mask]):
    """Parts of the rows of a collection: ``splits["train"]`` is a mask to hand to ``Loader(where=...)``.

    A row may be in both ``"val"`` and ``"test"``, where the file names its perturbation in both, and in none, where
    its dataset is not one of the file's.

    Attributes
    ----------
    masks
        (n_obs,) for each of ``"train"``, ``"val"`` and ``"test"``.
    is_control
        (n_obs,) whether a row is a control: what :class:`annbatch_dask.samplers.CellSets` wants to know.
    seed
        Of the controls of few-shot cell types, which are dealt out at random.

    Examples
    --------
    >>> masks = {"train": np.array([True, False, True]), "test": np.array([False, True, False])}
    >>> toml_splits.TomlSplits(masks, np.array([True, False, False]), seed=0).report.loc["train"].tolist()
    [2, 1]
    """

    masks: dict[str, Mask] = field(repr=False)
    is_control: Mask = field(repr=False)
    seed: int

    def __getitem__(self, name: str) -> Mask:
        """(n_obs,) mask of one part."""
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def report(self) -> pd.DataFrame:
        """Rows of each part, and how many of them are controls."""
        counts = {
            "n_obs": [int(mask.sum()) for mask in self.masks.values()],
            "n_controls": [int((mask & self.is_control).sum()) for mask in self.masks.values()],
        }
        return pd.DataFrame(counts, index=pd.Index(self.masks, name="part"))


def read_toml_splits(  # noqa: PLR0913
    path: str | os.PathLike[str],
    obs: pd.DataFrame,
    *,
    cell_type: str = "cell_type",
    perturbation: str = "gene",
    control: str = "non-targeting",
    dataset: str | None = "src_path",
    missing: Literal["error", "drop"] = "error",
    seed: int = 0,
) -> TomlSplits:
    r"""Divide perturbed cells as a TOML file of Arc's cell-load says: zero-shot and few-shot.

    All cells of a dataset of ``[training]`` are in ``"train"``, but for those of cell types with a rule of their own.
    ``[zeroshot]`` has ``"dataset.cell_type" = "test"`` (or ``"val"``) for all cells of one, controls too.
    ``[fewshot."dataset.cell_type"]`` lists perturbations for ``val`` and ``test``; all others are in ``"train"``, and
    the controls are dealt out at random in proportion. Rows of other datasets are in no part.

    Parameters
    ----------
    path
        The file.
    obs
        Obs of the collection, with the columns named below: ``collection.obs([...], names=False)``.
    cell_type, perturbation
        Columns of obs.
    control
        Value of ``perturbation`` that controls have.
    dataset
        Column of obs that tells the datasets apart: by their names in ``[datasets]``, or by the files' paths, which are
        what is given there, or lie in that folder, or match that pattern. None for a file with one dataset.
    missing
        ``"error"``, or ``"drop"`` for cell types and perturbations that the file names and the collection lacks.
    seed
        Fixes which controls go where.

    Returns
    -------
    TomlSplits
        ``splits["train"]`` is a mask for ``Loader(where=...)``.

    Raises
    ------
    SourceError
        If the file cannot be read, or contradicts itself.
    SelectionError
        If it names what the collection does not have.

    References
    ----------
    The format: https://github.com/ArcInstitute/cell-load.

    Examples
    --------
    >>> import pathlib
    >>> text = '[datasets]\natlas = "."\n[training]\natlas = "train"\n[zeroshot]\n"atlas.B" = "test"'
    >>> _ = pathlib.Path("split.toml").write_text(text)
    >>> obs = collection.obs(["cell_type", "donor"], names=False)
    >>> names = {"perturbation": "donor", "control": "D0", "dataset": None}
    >>> splits = toml_splits.read_toml_splits("split.toml", obs, **names)
    >>> bool(splits["train"][obs["cell_type"] == "B"].any()), int(sum(map(sum, splits.values())))
    (False, 500)
    """
    if missing not in ("error", "drop"):
        msg = f"missing must be 'error' or 'drop', got {missing!r}"
        raise ValueError(msg)
    config = _read(Path(os.fspath(path)))
    for name in (cell_type, perturbation, *([] if dataset is None else [dataset])):
        if name not in obs.columns:
            msg = f"obs has no column {name!r}; it has {', '.join(map(str, obs.columns))}"
            raise SelectionError(msg)
    dealing = _Dealing.of(str(path), config, obs, (cell_type, perturbation, dataset), control, missing)
    dealing.deal(config, np.random.default_rng(seed))
    return TomlSplits(dealing.masks, dealing.is_control, seed)


def _read(path: Path) -> dict[str, Any]:
    """The sections of a file, checked by themselves."""
    if not path.exists():
        msg = f"{path} does not exist"
        raise SourceNotFoundError(msg)
    try:
        found = tomllib.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        msg = f"{path} is no TOML: {error}"
        raise SourceError(msg) from error
    unknown = sorted(set(found) - set(_SECTIONS))
    if unknown:
        msg = f"{path} has a section [{unknown[0]}]; known are {', '.join(f'[{name}]' for name in _SECTIONS)}"
        raise SourceError(msg)
    config = {name: found.get(name, {}) for name in _SECTIONS}
    for name, part in config["training"].items():
        _check_part(path, f"[training] {name}", part, ("train",))
    for name, part in config["zeroshot"].items():
        _check_part(path, f'[zeroshot] "{name}"', part, PARTS)
    for name, lists in config["fewshot"].items():
        if not isinstance(lists, dict):
            msg = f'{path}: [fewshot] {name} is {lists!r}; write a section [fewshot."{name}"] with val and test'
            raise SourceError(msg)
        for part, listed in lists.items():
            _check_part(path, f'[fewshot."{name}"]', part, ("val", "test"))
            if not isinstance(listed, list):
                msg = f'{path}: [fewshot."{name}"] {part} is {listed!r}; it must be a list of perturbations'
                raise SourceError(msg)
    named = {*config["training"], *(_halves(path, name)[0] for name in (*config["zeroshot"], *config["fewshot"]))}
    lacking = sorted(named - set(config["datasets"]))
    if lacking or not named:
        what = f"names the dataset {lacking[0]!r}, which [datasets] does not" if lacking else "names no dataset"
        msg = f"{path} {what}; [datasets] has {', '.join(config['datasets']) or 'none'}"
        raise SourceError(msg)
    both = sorted(set(config["zeroshot"]) & set(config["fewshot"]))
    if both:
        msg = f"{path} has {both[0]!r} in [zeroshot] and in [fewshot]; decide for one"
        raise SourceError(msg)
    return config


def _check_part(path: Path, where: str, part: Any, known: Sequence[str]) -> None:
    if part not in known:
        msg = f"{path}: {where} says {part!r}; it may say {' or '.join(map(repr, known))}"
        raise SourceError(msg)


def _halves(path: Path | str, name: str) -> tuple[str, str]:
    dataset, dot, cell_type = name.partition(".")
    if not dot:
        msg = f"{path} names {name!r}, which must be a dataset, a dot, and a cell type"
        raise SourceError(msg)
    return dataset, cell_type


@dataclass
class _Dealing:
    """Rows that are being dealt out, and what is known of them."""

    path: str
    datasets: dict[str, Mask]
    cell_types: pd.Series
    perturbations: pd.Series
    is_control: Mask
    masks: dict[str, Mask]
    missing: str

    @classmethod
    def of(  # noqa: PLR0913
        cls,
        path: str,
        config: Mapping[str, Any],
        obs: pd.DataFrame,
        columns: tuple[str, str, str | None],
        control: str,
        missing: str,
    ) -> _Dealing:
        """Nothing is dealt yet; SelectionError where no row is of a dataset, or none a control."""
        names, (cell_type, perturbation, dataset) = config["datasets"], columns
        column = None if dataset is None else obs[dataset]
        found = {name: _rows_of(path, name, where, names, column, len(obs)) for name, where in names.items()}
        perturbations = _as_text(obs[perturbation])
        is_control = (perturbations == str(control)).to_numpy(bool)
        if not is_control.any():
            some = ", ".join(map(repr, pd.unique(perturbations.dropna())[:5]))
            msg = f"no row of {perturbation!r} is the control {control!r}; there are {some}; say which one is, control="
            raise SelectionError(msg)
        masks = {part: np.zeros(len(obs), bool) for part in PARTS}
        return cls(path, found, _as_text(obs[cell_type]), perturbations, is_control, masks, missing)

    def deal(self, config: Mapping[str, Any], rng: np.random.Generator) -> None:
        """Whole datasets, without the cell types that have a rule of their own; then these."""
        ruled = {name: self._rows(name) for name in (*config["zeroshot"], *config["fewshot"])}
        for name in config["training"]:
            self.masks["train"] |= self.datasets[name]
        for rows in ruled.values():
            self.masks["train"] &= ~rows
        for name, part in config["zeroshot"].items():
            self.masks[part] |= ruled[name]
        for name, lists in config["fewshot"].items():
            self._deal_few(name, ruled[name], lists, rng)

    def _rows(self, name: str) -> Mask:
        """Rows of one cell type of one dataset."""
        dataset, cell_type = _halves(self.path, name)
        own = self.datasets[dataset]
        found: Mask = own & (self.cell_types == cell_type).to_numpy(bool)
        if not found.any():
            self._lack(f"a cell type {cell_type!r} of {dataset!r}", self.cell_types[own])
        return found

    def _deal_few(self, name: str, rows: Mask, lists: Mapping[str, list[str]], rng: np.random.Generator) -> None:
        """Listed perturbations to their parts, all others to train, and controls in proportion."""
        there = self.perturbations[rows & ~self.is_control]
        lists = {part: list(map(str, listed)) for part, listed in lists.items()}
        for listed in lists.values():
            for value in sorted(set(listed) - set(there)):
                self._lack(f"the perturbation {value!r} of {name!r}", there)
        rest = perturbed = rows & ~self.is_control
        held = {part: perturbed & self.perturbations.isin(listed).to_numpy(bool) for part, listed in lists.items()}
        for mask in held.values():
            rest = rest & ~mask
        parts = {"val": held.get("val", rest & False), "test": held.get("test", rest & False), "train": rest}
        n_each = {part: int(mask.sum()) for part, mask in parts.items()}
        controls = rng.permutation(np.flatnonzero(rows & self.is_control))
        n_all, first = sum(n_each.values()), 0
        for part, mask in parts.items():
            n_controls = len(controls) * n_each[part] // max(n_all, 1)
            stop = len(controls) if part == "train" else first + n_controls
            self.masks[part] |= mask
            self.masks[part][controls[first:stop]] = n_each[part] > 0 or part == "train"
            first = stop

    def _lack(self, what: str, there: Iterable[Any]) -> None:
        if self.missing == "drop":
            return
        some = ", ".join(map(repr, pd.unique(pd.Series(there, dtype=object).dropna())[:5]))
        msg = f"{self.path} names {what}, and the collection has none: there are {some}; or pass missing='drop'"
        raise SelectionError(msg)


def _rows_of(
    path: str, name: str, where: str, datasets: Mapping[str, str], column: pd.Series | None, n_obs: int
) -> Mask:
    """Rows of one dataset: of its name, or of files that are where it says."""
    if column is None:
        if len(datasets) > 1:
            msg = f"{path} has {len(datasets)} datasets; say which column of obs tells them apart, dataset="
            raise SelectionError(msg)
        return np.ones(n_obs, bool)
    values = pd.unique(column.dropna())
    own = [value for value in values if str(value) == name or _lies_in(str(value), where)]
    if not own:
        some = ", ".join(map(repr, values[:5]))
        msg = (
            f"{path} has the dataset {name!r} in {where!r}, and no row is of it: {column.name!r} says {some}. Correct "
            "the path, or name a column of obs that has the datasets' names, dataset="
        )
        raise SelectionError(msg)
    return column.isin(own).to_numpy(bool)


def _as_text(column: pd.Series) -> pd.Series:
    """Values as a file names them: TOML has no keys but text. Missing ones stay missing."""
    return column.astype(object).map(str, na_action="ignore")


def _lies_in(value: str, where: str) -> bool:
    return value == where or PurePath(value).is_relative_to(PurePath(where)) or fnmatchcase(value, where)
