"""Rows dealt into named parts, whole groups to one part: train, validation, test."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SelectionError
from annbatch_dask.warn import warn

__all__ = ["Splits", "make_splits"]

_VERSION = 2
_MAX_PARTS = 255


@dataclass(frozen=True)
class Splits(Mapping[str, NDArray[np.bool_]]):
    """Parts of the rows of a collection. ``splits["train"]`` is a mask to hand to ``Loader(where=...)``.

    Attributes
    ----------
    fractions
        What was asked for.
    codes
        (n_obs,) uint8, the part of each row.
    by, stratify, seed
        How it was made.
    collection, version
        Digest of the collection it belongs to, and the number of its version; None where that is not recorded.

    Examples
    --------
    >>> splits = collection.split({"train": 0.8, "test": 0.2}, seed=0)
    >>> {name: int(mask.sum()) for name, mask in splits.items()}
    {'train': 400, 'test': 100}
    """

    fractions: dict[str, float]
    codes: NDArray[np.uint8]
    by: tuple[str, ...]
    stratify: tuple[str, ...]
    seed: int
    collection: str
    version: int | None = None

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        """(n_obs,) mask of one part."""
        return self.codes == list(self.fractions).index(name) if name in self.fractions else self._refuse(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fractions)

    def __len__(self) -> int:
        return len(self.fractions)

    def _refuse(self, name: str) -> NDArray[np.bool_]:
        msg = f"no part is called {name!r}; there are {', '.join(map(str, self.fractions))}"
        raise KeyError(msg)

    @property
    def report(self) -> pd.DataFrame:
        """Rows of each part, the fraction asked for, and the fraction achieved."""
        n_rows = np.bincount(self.codes, minlength=len(self))
        asked = np.array(list(self.fractions.values()))
        columns = {"n_obs": n_rows, "asked": asked, "achieved": n_rows / max(len(self.codes), 1)}
        return pd.DataFrame(columns, index=pd.Index(self.fractions, name="part"))

    def save(self, path: str | Path) -> None:
        """Write to one compressed file."""
        about = {
            "version": _VERSION,
            "fractions": list(self.fractions.items()),  # names may be numbers, which keys of JSON are not
            "by": self.by,
            "stratify": self.stratify,
            "seed": self.seed,
            "collection": self.collection,
            "collection_version": self.version,
        }
        buffer = io.BytesIO()
        text = json.dumps(about, default=lambda name: name.item())  # a number of numpy's
        np.savez_compressed(buffer, codes=self.codes, about=np.array(text))
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def read(cls, path: str | Path, collection: str, n_obs: int, version: int | None = None) -> Splits:
        """Read what :meth:`save` wrote; SelectionError where it is of another collection, version or release."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                about, codes = json.loads(str(stored["about"])), stored["codes"]
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as e:
            msg = f"{path} is no split that was saved, or is damaged ({e}); make it anew with its seed"
            raise SelectionError(msg) from e
        if about.pop("version") != _VERSION:
            msg = f"{path} was written by another release; make the split anew with its seed, {about['seed']}"
            raise SelectionError(msg)
        if about["collection"] != collection or len(codes) != n_obs:
            was = about.get("collection_version")
            msg = (
                f"{path} splits {len(codes)} rows of collection {_named(about['collection'], was)}, this one has "
                f"{n_obs} rows and is {_named(collection, version)}: it was changed or is another; make the split anew"
            )
            if None not in (was, version) and was != version:
                msg = f"{msg}, or open that version, if it is kept: DatasetCollection(path, version={was})"
            raise SelectionError(msg)
        parts = tuple(about["by"]), tuple(about["stratify"])
        return cls(dict(about["fractions"]), codes, *parts, about["seed"], collection, version)


def _named(collection: str, version: int | None) -> str:
    return collection if version is None else f"{collection}, version {version}"


def make_splits(  # noqa: PLR0913
    obs: pd.DataFrame,
    fractions: Mapping[str, float],
    *,
    by: Sequence[str],
    stratify: Sequence[str],
    seed: int,
    collection: str,
    version: int | None = None,
) -> Splits:
    """Deal rows out; see :meth:`annbatch_dask.DatasetCollection.split`."""
    shares = _check_fractions(fractions)
    for name in (*by, *stratify):
        if name not in obs.columns:
            msg = f"obs has no column {name!r}; it has {', '.join(map(str, obs.columns))}"
            raise SelectionError(msg)
    strata = _number(obs, stratify)
    rng = np.random.default_rng(seed)
    codes = _deal_groups(_number(obs, by), strata, shares, rng) if by else _deal_rows(strata, shares, rng)
    found = Splits(
        {name: float(share) for name, share in fractions.items()},
        *(codes, tuple(by), tuple(stratify), seed, collection, version),
    )
    if empty := [str(name) for name, n in found.report["n_obs"].items() if not n]:
        whole = f"whole groups of {', '.join(by)} go to one part: take fewer parts, or finer groups" if by else ""
        warn(f"no row of {len(obs):,} is in {', '.join(empty)}; {whole or 'give these parts larger shares'}")
    return found


def _check_fractions(fractions: Mapping[str, float]) -> NDArray[np.float64]:
    if not isinstance(fractions, Mapping):
        msg = f"fractions is {fractions!r}; give shares by name, such as {{'train': 0.8, 'test': 0.2}}"
        raise TypeError(msg)
    shares = np.array(list(fractions.values()), np.float64)
    if not 0 < len(shares) <= _MAX_PARTS or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        msg = f"fractions must be positive and add up to 1, got {dict(fractions)}, which add up to {shares.sum():g}"
        raise SelectionError(msg)
    shares /= shares.sum()
    return shares


def _number(obs: pd.DataFrame, columns: Sequence[str]) -> NDArray[np.int64]:
    """One number for each combination of values; missing ones are a value of their own."""
    numbers = np.zeros(len(obs), np.int64)
    for name in columns:
        codes, values = pd.factorize(obs[name], use_na_sentinel=False)
        numbers = pd.factorize(numbers * len(values) + codes)[0].astype(np.int64)
    return numbers


def _deal_rows(strata: NDArray[np.int64], shares: NDArray[np.float64], rng: Any) -> NDArray[np.uint8]:
    """Each row by itself; each stratum, and so the whole, in the given shares but for rounding."""
    order = np.lexsort((rng.permutation(len(strata)), strata))
    # Rows are stratum by stratum, shuffled within: dealing them out like cards keeps the shares in every stretch.
    turns = _interleave(shares, len(strata))
    codes = np.empty(len(strata), np.uint8)
    codes[order] = turns
    return codes


def _interleave(shares: NDArray[np.float64], n: int) -> NDArray[np.uint8]:
    """(n,) parts in turn, such that each has had its share, but for less than one, at every point."""
    due = [(np.arange(round(n * share) + 2) + 0.5) / share for share in shares]
    parts = np.repeat(np.arange(len(shares)), [len(times) for times in due])
    return parts[np.argsort(np.concatenate(due), kind="stable")][:n].astype(np.uint8)


def _deal_groups(
    groups: NDArray[np.int64], strata: NDArray[np.int64], shares: NDArray[np.float64], rng: Any
) -> NDArray[np.uint8]:
    """Whole groups, the largest first, each to the part that then is nearest to its shares of every stratum."""
    n_groups, n_strata = int(groups.max(initial=-1)) + 1, int(strata.max(initial=-1)) + 1
    counts = np.zeros((n_groups, n_strata))
    np.add.at(counts, (groups, strata), 1)
    in_all = counts.sum(0)
    wanted = shares[:, None] * in_all
    have = np.zeros_like(wanted)
    part_of = np.empty(n_groups, np.uint8)
    order = rng.permutation(n_groups)
    for group in order[np.argsort(-counts[order].sum(1), kind="stable")]:
        gap = have - wanted
        cost = ((gap + counts[group]) ** 2 - gap**2) / in_all
        part_of[group] = part = int(cost.sum(1).argmin())
        have[part] += counts[group]
    return part_of[groups]
