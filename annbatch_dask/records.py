"""Records in the manifest of what some builds do and others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from annbatch_dask.formatting import first_few, plural

__all__ = ["DuplicatesRecord", "NamingRecord"]


@dataclass(frozen=True)
class DuplicatesRecord:
    """What a build found that looked for cells whose X is equal to an earlier cell's.

    Attributes
    ----------
    mode
        What it was asked to do with them: ``"report"``, ``"drop"`` or ``"error"``.
    n_obs
        How many there were.
    pairs
        ``(file, file of the first of its equals, cells)``; the 64 most frequent pairs, and
        all others together as "" and "".
    """

    mode: str
    n_obs: int
    pairs: tuple[tuple[str, str, int], ...] = field(default=(), repr=False)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DuplicatesRecord:
        """Read from JSON values, whose lists become tuples."""
        return cls(values["mode"], values["n_obs"], tuple((a, b, n) for a, b, n in values["pairs"]))


@dataclass(frozen=True)
class NamingRecord:
    """How a build named the genes of its inputs, where not by their indices.

    Attributes
    ----------
    var_key
        Paths or patterns of inputs, and the var column that names their genes; ``""`` is the index.
    strip_versions
        Whether Ensembl ids lost their versions.
    gene_map
        Digest of the map of names; ``""`` for none.
    on_duplicate
        What became of several genes of an input with one name: ``"error"``, ``"sum"`` or ``"first"``.
    renamed, mapped, joined
        Of each input, how many genes of X have another name than in its index, how many ``gene_map`` names, and how
        many went into another one.
    n_met, n_called
        How many genes several of one input became, and how many the inputs call differently.
    met, called
        The first of these, each with the names in the index.
    """

    var_key: tuple[tuple[str, str], ...] = ()
    strip_versions: bool = False
    gene_map: str = ""
    on_duplicate: str = "error"
    renamed: tuple[int, ...] = ()
    mapped: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()
    n_met: int = 0
    n_called: int = 0
    met: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), repr=False)
    called: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), repr=False)

    @property
    def rules(self) -> str:
        """The rules, in words."""
        shown = [_key_words(*pair) for pair in self.var_key[:_SHOWN]]
        if len(self.var_key) > _SHOWN:
            shown.append(f"{len(self.var_key) - _SHOWN:,} more")
        if not any(pattern == "*" for pattern, _ in self.var_key):
            shown.append("else by the index" if shown else "by the index")
        rules = [", ".join(shown)]
        rules += ["Ensembl versions stripped"] if self.strip_versions else []
        rules += [f"gene_map {self.gene_map[:12]}"] if self.gene_map else []
        return "; ".join(rules)

    @property
    def effects(self) -> list[tuple[str, str]]:
        """What became of genes, in words, each with examples."""
        mapped = f", {sum(self.mapped):,} by gene_map" if self.gene_map else ""
        found = [("renamed", f"{_genes_of(self.renamed)}{mapped}")]
        if any(self.joined):
            done = "added up" if self.on_duplicate == "sum" else "the first of each kept"
            what = f"{_genes_of(self.joined)} went into others, of which there are {self.n_met:,}; {done}"
            found.append(("met", f"{what}: {_examples(self.met)}"))
        if self.n_called:
            called = f"{plural(self.n_called, 'gene')} with several names in the sources"
            found.append(("called", f"{called}: {_examples(self.called)}"))
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NamingRecord:
        """Read from JSON values, whose lists become tuples."""
        return cls(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


_SHOWN = 3


def _key_words(pattern: str, column: str) -> str:
    of = "" if pattern == "*" else f" of {pattern}"
    return f"by var column {column!r}{of}" if column else f"by the index{of}"


def _genes_of(counts: tuple[int, ...]) -> str:
    return f"{plural(sum(counts), 'gene')} of {plural(sum(n > 0 for n in counts), 'source')}"


def _examples(genes: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    return first_few((f"{gene} ({', '.join(names)})" for gene, names in genes), _SHOWN)
