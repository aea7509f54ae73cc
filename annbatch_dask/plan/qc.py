"""QC: rules on the counts of a cell, which decide whether it is kept, and what they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.schema import ColumnSchema, SourceSchema

__all__ = ["COUNTS", "GENES", "QC", "Metrics", "find_genes"]

COUNTS, GENES = "n_counts", "n_genes"
_MAX_SETS = 64
"""Sets of genes that a bit each of one number can tell apart."""

GeneSet = str | Sequence[str] | Mapping[str, str | bool]


@dataclass(frozen=True)
class QC:
    """Rules by which :meth:`annbatch_dask.DatasetCollection.add_adatas` keeps cells, on the counts that become X.

    They are :func:`scanpy.pp.filter_cells`' and those of fractions as of :func:`scanpy.pp.calculate_qc_metrics`, each
    worked out over all genes of a cell's own input, also those that the collection leaves out. X of the inputs is read
    once more for it.

    Parameters
    ----------
    min_counts, max_counts
        Least and greatest sum of a cell's values.
    min_genes, max_genes
        Least and greatest number of genes with a value other than 0.
    max_fraction
        By gene set: the greatest share of a cell's counts that are of its genes. A cell without counts has none, and
        is dropped.
    gene_sets
        By name: genes by a prefix of their names (``"MT-"``), a list of names, or the name of a boolean column of var;
        ``{"feature_name": "MT-"}`` is a prefix of the texts in a column of var, for inputs whose names are ids. Each
        must have a gene in every input, unless it is a boolean column.
    annotate
        Add the columns ``n_counts``, ``n_genes`` and ``fraction_<set>`` to obs; a text is put before these names.

    Examples
    --------
    >>> from annbatch_dask import QC
    >>> QC(min_genes=200, max_fraction={"mito": 0.2}, gene_sets={"mito": "MT-"}).rules
    ('min_genes', 'max_fraction/mito')
    """

    min_counts: float | None = None
    max_counts: float | None = None
    min_genes: int | None = None
    max_genes: int | None = None
    max_fraction: Mapping[str, float] = field(default_factory=dict)
    gene_sets: Mapping[str, GeneSet] = field(default_factory=dict)
    annotate: bool | str = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("min_counts", "max_counts", "min_genes", "max_genes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
                msg = f"QC: {name} is {value!r}; give a number"
                raise TypeError(msg)
            if value is not None and np.isnan(value):
                msg = f"QC: {name} is NaN, which no cell meets; give a number, or None for no limit"
                raise ValueError(msg)
        for low, high in (("min_counts", "max_counts"), ("min_genes", "max_genes")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                msg = f"QC: {low}={least} is more than {high}={most}, so that no cell is kept; give a range"
                raise ValueError(msg)
        _check_sets(self.gene_sets)
        _check_fractions(self.max_fraction, self.gene_sets)
        if len(self.gene_sets) > _MAX_SETS:
            msg = f"QC: {len(self.gene_sets)} gene_sets; give {_MAX_SETS} or fewer"
            raise ValueError(msg)
        is_quoted = isinstance(self.annotate, str) and self.annotate.lower() in ("true", "false")
        if is_quoted or not isinstance(self.annotate, bool | str):
            msg = f"QC: annotate is {self.annotate!r}; give True or False, or a text to put before the names"
            raise TypeError(msg)
        if not self.rules and not self.annotate:
            msg = "QC has no rule and annotates nothing; give one, such as min_genes=200, or annotate=True"
            raise ValueError(msg)

    @classmethod
    def of(cls, value: QC | Mapping[str, Any] | None) -> QC | None:
        """Rules as they are, or of a mapping, as YAML has them.

        Raises
        ------
        TypeError
            For anything else, and for names that are no rules.
        """
        if value is None or isinstance(value, QC):
            return value
        names = [f.name for f in fields(cls)]
        if not isinstance(value, Mapping) or set(value) - set(names):
            msg = f"qc is {value!r}; give QC(...), or a mapping with some of {', '.join(names)}"
            raise TypeError(msg)
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values that :meth:`of` takes, without defaults."""
        values = {k: v for k, v in asdict(self).items() if v not in (None, False, {})}
        for name in ("max_fraction", "gene_sets"):
            if name in values:
                values[name] = {str(k): _plain(v) for k, v in values[name].items()}
        return {k: _plain(v) for k, v in values.items()}

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in the order in which cells are tried by them."""
        return tuple(name for name, *_ in self._rules())

    @property
    def counts_genes(self) -> bool:
        """True if it matters how many genes a cell has."""
        return bool(self.annotate) or any(what == GENES for _, what, *_ in self._rules())

    def _rules(self) -> Iterator[tuple[str, str, float, float]]:
        """Name, what it looks at, and the least and the greatest that this may be."""
        for kind, what in (("counts", COUNTS), ("genes", GENES)):
            least, most = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if least is not None:
                yield f"min_{kind}", what, least, np.inf
            if most is not None:
                yield f"max_{kind}", what, -np.inf, most
        for name, most in self.max_fraction.items():
            yield f"max_fraction/{name}", name, -np.inf, most

    def judge(self, metrics: Metrics) -> tuple[NDArray[np.bool_], dict[str, int]]:
        """The cells that meet all rules, (n_cells,) bool, and how many each rule dropped, as the first they failed."""
        passed, dropped = np.ones(len(metrics.n_counts), bool), {}
        for rule, what, least, most in self._rules():
            found = metrics.of(what, self)
            met = (found >= least) & (found <= most)  # a NaN meets neither
            dropped[rule] = int(np.count_nonzero(passed & ~met))
            passed &= met
        return passed, dropped

    def columns(self) -> tuple[ColumnSchema, ...]:
        """Columns that it adds to obs."""
        if not self.annotate:
            return ()
        before = self.annotate if isinstance(self.annotate, str) else ""
        plain = ((COUNTS, COUNTS, "float64"), (GENES, GENES, "int32"))
        sets = ((f"fraction_{name}", name, "float32") for name in self.gene_sets)
        return tuple(ColumnSchema(before + n, "numeric", d, stored=what) for n, what, d in (*plain, *sets))

    def annotated(self, source: SourceSchema) -> SourceSchema:
        """A source whose obs has these columns besides.

        Raises
        ------
        SchemaError
            If it has one of its own by such a name.
        """
        added = self.columns()
        if taken := {c.path for c in source.columns} & {c.path for c in added}:
            msg = (
                f"{source.path}: obs has {min(taken).partition('/')[2]}, which qc adds; give annotate='qc_', which is "
                "put before the names that it adds, or rename the file's in load_adata"
            )
            raise SchemaError(msg)
        return replace(source, columns=(*source.columns, *added))


def _check_sets(sets: Any) -> None:
    """Refuse what does not say of any gene whether it is in a set."""
    if not isinstance(sets, Mapping):
        msg = f"QC: gene_sets is {sets!r}; give each a name, such as {{'mito': 'MT-'}}"
        raise TypeError(msg)
    for name, wanted in sets.items():
        if isinstance(wanted, Mapping):
            is_set = len(wanted) == 1 and all(v is True or (isinstance(v, str) and v) for v in wanted.values())
        else:
            is_set = isinstance(wanted, Sequence | np.ndarray | pd.Index) and len(wanted) > 0
        if not is_set:
            msg = (
                f"QC: gene set {name!r} is {wanted!r}; give a prefix of names, a list of names, the name of a boolean "
                "column of var, or {'<column of var>': '<prefix>'}"
            )
            raise TypeError(msg)


def _check_fractions(fractions: Any, sets: Mapping[str, GeneSet]) -> None:
    """Refuse what is no share of the counts for a gene set."""
    if not isinstance(fractions, Mapping):
        msg = f"QC: max_fraction is {fractions!r}; give a share for a gene set, such as {{'mito': 0.2}}"
        raise TypeError(msg)
    for name, most in fractions.items():
        if not isinstance(most, int | float | np.number):
            msg = f"QC: max_fraction of {name!r} is {most!r}; give a share from 0 to 1, such as 0.2 for 20 %"
            raise TypeError(msg)
        if name not in sets:
            known = ", ".join(sets) or "none"
            msg = f"QC: max_fraction names {name!r}, and gene_sets has {known}; add gene_sets={{{name!r}: 'MT-'}}"
            raise ValueError(msg)
        if not 0 <= most <= 1:
            msg = f"QC: max_fraction of {name!r} is {most}; give a share from 0 to 1, such as 0.2 for 20 %"
            raise ValueError(msg)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, str) or not isinstance(value, Sequence) else [str(v) for v in value]


@dataclass(frozen=True)
class Metrics:
    """What was measured of some cells.

    Attributes
    ----------
    n_counts
        (n_cells,) float64 sum of each one's values.
    n_genes
        (n_cells,) int32 genes with a value other than 0.
    in_sets
        (n_cells, n_sets) float64 sum of the values of each gene set.
    """

    n_counts: NDArray[np.float64]
    n_genes: NDArray[np.int32]
    in_sets: NDArray[np.float64]

    def of(self, what: str, qc: QC) -> NDArray:
        """Counts or genes, or the share of a gene set, NaN for a cell without counts."""
        if what == GENES:
            return self.n_genes
        if what == COUNTS:
            return self.n_counts
        with np.errstate(invalid="ignore", divide="ignore"):
            share: NDArray = self.in_sets[:, list(qc.gene_sets).index(what)] / self.n_counts
        return share

    def take(self, rows: NDArray) -> Metrics:
        """Those of some of the cells."""
        return Metrics(self.n_counts[rows], self.n_genes[rows], self.in_sets[rows])


def find_genes(
    qc: QC,
    label: str,
    names: tuple[NDArray[np.object_], NDArray[np.object_]],
    column: Callable[[str], NDArray | None],
) -> tuple[NDArray[np.int32], ...]:
    """Find the genes of each set in an input: their numbers, ascending.

    Parameters
    ----------
    names
        (n_genes,) gene names of the matrix that becomes X, and what the index of var calls them: either will do.
    column
        Returns the (n_genes,) values of a column of var; None where there is none.

    Raises
    ------
    SchemaError
        For a set of which it has no gene.
    """
    return tuple(_find_set(name, wanted, label, names, column) for name, wanted in qc.gene_sets.items())


def _flags(values: NDArray) -> NDArray[np.bool_] | None:
    """Values that are true or false, of which missing ones are false; None where there are others."""
    if values.dtype.kind not in "bO":
        return None
    try:
        return pd.array(values, "boolean").to_numpy(bool, na_value=False)
    except TypeError:  # pandas' word for others
        return None


def _find_set(
    name: str,
    wanted: GeneSet,
    label: str,
    names: tuple[NDArray[np.object_], NDArray[np.object_]],
    column: Callable[[str], NDArray | None],
) -> NDArray[np.int32]:
    if isinstance(wanted, str) and (values := column(wanted)) is not None and (flags := _flags(values)) is not None:
        return np.flatnonzero(flags).astype(np.int32)  # none is a word too: somebody looked
    if isinstance(wanted, Mapping):
        ((where, prefix),) = wanted.items()
        values = column(str(where))
        if values is None:
            msg = f"gene set {name!r}: var of {label} has no column {where!r}; add it in load_adata"
            raise SchemaError(msg)
        if prefix is True:
            if (flags := _flags(values)) is None:
                msg = f"gene set {name!r}: {where!r} of var of {label} is not true or false; mend it in load_adata"
                raise SchemaError(msg)
            return np.flatnonzero(flags).astype(np.int32)
        found = np.array([str(v).startswith(str(prefix)) for v in values], bool)
    elif isinstance(wanted, str):
        found = np.array([any(str(n).startswith(wanted) for n in both) for both in zip(*names, strict=True)], bool)
    else:
        known = {str(w) for w in wanted}
        found = np.array([str(a) in known or str(b) in known for a, b in zip(*names, strict=True)], bool)
    if not found.any():
        some = ", ".join(map(str, names[0][:3]))
        shown = wanted if isinstance(wanted, str | Mapping) else list(wanted)[:3]
        msg = (
            f"gene set {name!r} ({shown!r}) has none of the {len(found):,} genes of {label}, which look like {some}; "
            "give a prefix, a list of names as there, {'<column of var>': '<prefix>'}, or a boolean column of var, "
            "which may be false for all"
        )
        raise SchemaError(msg)
    return np.flatnonzero(found).astype(np.int32)
