"""Records in the manifest of what some builds do and others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NamingRecord"]


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
    renamed, joined
        Of each input, how many genes of X have another name than in its index, and how many went into another one.
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
    joined: tuple[int, ...] = ()
    n_met: int = 0
    n_called: int = 0
    met: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), repr=False)
    called: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), repr=False)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NamingRecord:
        """Read from JSON values, whose lists become tuples."""
        return cls(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
