"""Tables of one number for each gene: the token of a vocabulary, a median; given, or read from a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from annbatch_dask.errors import MissingPackageError, SchemaError, SourceError, SourceNotFoundError

__all__ = ["GeneTable", "read_genes", "read_medians", "read_vocabulary"]

GeneTable = Mapping[str, Any] | pd.Series | str | os.PathLike[str]
"""A mapping, a series indexed by gene, or a file."""

_MAX_TOKEN = np.iinfo(np.int32).max
_PICKLES = {".pkl", ".pickle", ".p"}


def read_vocabulary(given: GeneTable) -> dict[str, int]:
    """The token of each gene, and of what is none, such as ``<pad>``.

    Raises
    ------
    SchemaError
        If a token is no whole number from 0 to 2**31 - 1, or two genes have the same.
    """
    named, numbers = read_genes("vocabulary", given)
    found: dict[str, int] = {}
    owner: dict[int, str] = {}
    for gene, value in named.items():
        if not 0 <= value <= _MAX_TOKEN or value != int(value):
            msg = f"{numbers}: the token of {gene!r} is {value!r}; tokens are whole numbers from 0 to {_MAX_TOKEN:,}"
            raise SchemaError(msg)
        if (other := owner.setdefault(int(value), gene)) != gene:
            msg = f"{numbers}: {other!r} and {gene!r} both have the token {int(value)}; give each its own"
            raise SchemaError(msg)
        found[gene] = int(value)
    return found


def read_medians(given: GeneTable) -> dict[str, float]:
    """The median of each gene; SchemaError if one is not greater than 0."""
    named, numbers = read_genes("medians", given)
    bad = [gene for gene, value in named.items() if not 0 < value <= sys.float_info.max]
    if bad:
        msg = (
            f"{numbers}: {len(bad):,} of {len(named):,} medians are not greater than 0, or no numbers, such as that of "
            f"{bad[0]!r}: {named[bad[0]]!r}; they are medians of a gene's counts other than zero"
        )
        raise SchemaError(msg)
    return named


def read_genes(what: str, given: GeneTable) -> tuple[dict[str, float], str]:
    """The number of each gene, and in words where they are from.

    Files are JSON (an object), CSV or TSV (two columns, with or without a line of names), or Parquet (two columns, or
    one and an index).

    Raises
    ------
    SourceNotFoundError
        If there is no such file.
    SourceError
        If a file is of another kind; a pickle is not opened, since that runs whatever code is in it.
    SchemaError
        If a gene is named twice, or there is none.
    """
    where = what
    if isinstance(given, pd.Series):
        pairs = [(str(gene), value) for gene, value in given.items()]
    elif isinstance(given, Mapping):
        pairs = [(str(gene), value) for gene, value in given.items()]
    elif not isinstance(given, str | os.PathLike):
        msg = f"{what} must be a mapping, a series or the path of a file, got {type(given)}"
        raise TypeError(msg)
    else:
        path = Path(os.fspath(given))
        where = f"{what} of {path}"
        pairs = _read(path, what)
    found: dict[str, float] = {}
    for gene, value in pairs:
        if gene in found:
            msg = f"{where}: {gene!r} is named twice, with {found[gene]!r} and {value!r}; name each gene once"
            raise SchemaError(msg)
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or value != value:  # noqa: PLR0124
            msg = f"{where}: {gene!r} has {value!r}, which is no number"
            raise SchemaError(msg)
        found[gene] = value.item() if isinstance(value, np.generic) else value
    if not found:
        msg = f"{where}: there are no genes in it"
        raise SchemaError(msg)
    return found, where


def _read(path: Path, what: str) -> list[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        number = "int" if what == "vocabulary" else "float"
        msg = (
            f"{path} is a pickle, which may run any code when it is opened, so it is not. Where you trust it, write it "
            f"anew once: import json, pathlib, pickle; pathlib.Path({str(path.with_suffix('.json'))!r}).write_text("
            f"json.dumps({{str(k): {number}(v) for k, v in pickle.loads(pathlib.Path({str(path)!r}).read_bytes())"
            ".items()}))"
        )
        raise SourceError(msg)
    if suffix not in _READERS:
        msg = f"{path} is no table of genes: it must be one of {', '.join(_READERS)}, by its ending"
        raise SourceError(msg)
    if not path.exists():
        msg = f"{path} does not exist; it was given as the file of the {what}"
        raise SourceNotFoundError(msg)
    return _READERS[suffix](path)


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        pairs = json.loads(path.read_text(encoding="utf8"), object_pairs_hook=list)
    except ValueError as error:
        msg = f"{path} is no JSON: {error}"
        raise SourceError(msg) from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        msg = f"{path} must hold one JSON object, from the name of a gene to its number"
        raise SourceError(msg)
    return pairs


def _read_text(path: Path) -> list[tuple[str, Any]]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        frame = pd.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False, encoding="utf8")
    except ValueError as error:
        msg = f"{path} is no table: {error}"
        raise SourceError(msg) from error
    _check_width(path, list(frame.columns))
    numbers = pd.to_numeric(frame[1], errors="coerce")
    if len(frame) and pd.isna(numbers.iloc[0]):  # the names of the columns
        frame, numbers = frame.iloc[1:], numbers.iloc[1:]
    bad = np.flatnonzero(numbers.isna())
    if len(bad):
        gene, text = frame.iloc[bad[0]]
        msg = f"{path}: {gene!r} has {text!r}, which is no number"
        raise SchemaError(msg)
    return list(zip(frame[0].tolist(), pd.to_numeric(frame[1]).tolist(), strict=True))


def _read_parquet(path: Path) -> list[tuple[str, Any]]:
    try:
        frame = pd.read_parquet(path)
    except ImportError as error:
        msg = f"{path} needs a reader of Parquet: `pip install pyarrow`, or write it as JSON or CSV"
        raise MissingPackageError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path} is no Parquet file: {error}"
        raise SourceError(msg) from error
    if len(frame.columns) == 1:
        frame = frame.reset_index()
    _check_width(path, list(frame.columns))
    return list(zip(frame.iloc[:, 0].astype(str).tolist(), frame.iloc[:, 1].tolist(), strict=True))


def _check_width(path: Path, columns: list[Any]) -> None:
    if len(columns) != 2:
        msg = f"{path} has {len(columns)} columns, and must have 2: the gene, then its number"
        raise SourceError(msg)


_READERS = {".json": _read_json, ".csv": _read_text, ".tsv": _read_text, ".parquet": _read_parquet}
