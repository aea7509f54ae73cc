"""Chooses the elements that a build carries, and the matrix that becomes X."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.schema import OBS, SourceSchema

__all__ = ["Elements", "check_counts", "choose_counts"]


@dataclass(frozen=True)
class Elements:
    """A choice of elements by name: ``"layers/counts"``, or ``"layers"`` for all of them.

    Attributes
    ----------
    wanted
        What to carry beside X and the obs names; empty for everything.
    excluded
        What not to.
    """

    wanted: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    @classmethod
    def parse(cls, names: Iterable[str] | None) -> Elements:
        """Parse names; those with a leading ``-`` are excluded.

        Raises
        ------
        ValueError
            For a name that no element can have, or where X is excluded.
        """
        if isinstance(names, str):
            msg = f"elements is one string, {names!r}; give a list of names"
            raise TypeError(msg)
        names = [str(n) for n in names or ()]
        excluded = tuple(sorted({n[1:] for n in names if n.startswith("-")}))
        wanted = tuple(sorted({n for n in names if not n.startswith("-")}))
        for name in (*wanted, *excluded):
            if name.split("/")[0] not in _KINDS or (name == "X" and name in excluded):
                msg = (
                    f"elements names {name!r}; give names such as {', '.join(_KINDS)}, 'layers/<key>' or '-obsm/<key>'"
                )
                raise ValueError(msg)
        return cls(wanted, excluded)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the form that :meth:`parse` takes."""
        return (*self.wanted, *(f"-{n}" for n in self.excluded))

    def keeps(self, name: str) -> bool:
        """True if an element is carried if it can be."""
        if any(_is_in(name, e) for e in self.excluded):
            return False
        return not self.wanted or name == "X" or any(_is_in(name, w) for w in self.wanted)

    def refuse(self, left_out: Mapping[str, Sequence[str]], *, n_sources: int) -> None:
        """Refuse to leave out what was named.

        Raises
        ------
        SchemaError
            With the first such element.
        """
        for name, paths in left_out.items():
            if any(_is_in(name, w) for w in self.wanted):
                msg = (
                    f"{name}, which elements names, is in {len(paths)} of {n_sources} inputs ({paths[0]}) and cannot "
                    "be carried: a matrix must be in all, uns, varm and varp must come from one input or merge, obsp "
                    f"never can; exclude it with '-{name}'"
                )
                raise SchemaError(msg)

    def select(self, source: SourceSchema) -> SourceSchema:
        """A source with what is carried of it alone.

        Raises
        ------
        SchemaError
            If something wanted is not there, or cannot be carried and is not excluded.
        """
        if refused := [n for n in source.unsupported if self.keeps(n)]:
            remedy = ", ".join(repr(f"-{n}") for n in refused)
            msg = (
                f"{source.path}: {', '.join(refused)} cannot be carried: awkward arrays, "
                f"values that are no numbers; leave out with elements=[{remedy}], or convert in load_adata"
            )
            raise SchemaError(msg)
        names = [m.name for m in source.matrices] + [c.path for c in source.columns] + list(source.left_out)
        for wanted in self.wanted:
            if wanted != OBS and not any(_is_in(n, wanted) for n in names):
                msg = f"{source.path} has no {wanted}, which elements names; it has {', '.join(sorted(names))}"
                raise SchemaError(msg)
        return replace(
            source,
            matrices=tuple(m for m in source.matrices if self.keeps(m.name)),
            columns=tuple(c for c in source.columns if self.keeps(c.path)),
            left_out=tuple(n for n in source.left_out if self.keeps(n)),
            unsupported=(),
        )


_KINDS = ("X", "raw", "layers", "obsm", OBS, "uns", "varm", "varp", "obsp")


def _is_in(name: str, element: str) -> bool:
    return name == element or name.startswith(f"{element}/")


def choose_counts(source: SourceSchema, name: str) -> SourceSchema:
    """A source whose X is another of its matrices; its own X, and what is moved, stay behind.

    Parameters
    ----------
    source
        The source as it was scanned.
    name
        ``"X"``, ``"raw/X"`` or ``"layers/<key>"``.

    Raises
    ------
    SchemaError
        If it has no such matrix.
    """
    if name == "X":
        return source
    chosen = next((m for m in source.matrices if m.name == name and (m.genes or name == "X")), None)
    if chosen is None:
        names = ", ".join(m.name for m in source.matrices if m.genes)
        msg = f"{source.path} has no {name}, which counts names; of its matrices, these have genes: {names or 'none'}"
        raise SchemaError(msg)
    others = tuple(m for m in source.matrices if m.name not in ("X", name))
    return replace(source, matrices=(replace(chosen, name="X", stored=name), *others))


def check_counts(sources: Sequence[SourceSchema]) -> None:
    """Refuse inputs of which some have whole numbers in X and others have not: two scales in one matrix.

    Raises
    ------
    SchemaError
        With one of each.
    """
    by_kind: dict[bool, SourceSchema] = {}
    for s in sources:
        x = next((m for m in s.matrices if m.name == "X"), None)
        if x is not None and x.integral is not None:
            by_kind.setdefault(x.integral, s)
    if len(by_kind) > 1:
        whole, other = by_kind[True], by_kind[False]
        remedy = f"choose the count matrix with counts={{{other.path!r}: 'raw/X'}}"
        if other.is_dataset:  # a dataset of the collection, whose X is what it is
            remedy = f"choose the matrix of {whole.path} that is like the collection's X with counts="
        msg = (
            f"{whole.x.source_name} of {whole.path} holds whole numbers and {other.x.source_name} of {other.path} does "
            f"not, so raw counts and normalised values would be mixed; {remedy}, or pass allow_mixed_counts=True"
        )
        raise SchemaError(msg)
