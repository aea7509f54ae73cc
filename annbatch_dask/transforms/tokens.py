"""Cells as sequences of tokens: Geneformer's ranks and scGPT's bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.flags import check_flag
from annbatch_dask.formatting import first_few
from annbatch_dask.seeds import check_number
from annbatch_dask.sizes import check_positive
from annbatch_dask.transforms.vocabulary import GeneTable, read_medians, read_vocabulary

__all__ = ["BinnedExpression", "RankTokens", "Tokens"]

Ints = NDArray[np.int32]


class Tokens:
    """What transforms have in common that make a sequence of tokens of each cell.

    Attributes
    ----------
    vocabulary
        Token of each gene, and of what is none.
    max_length
        Tokens of a row at most, with those that stand for no gene.
    pad
        What fills rows up, by its name in the vocabulary.
    missing
        ``"error"`` or ``"drop"``: what to do with genes of the data that are not in the vocabulary.
    dtype
        Of the integers that come out.
    """

    vocabulary: Mapping[str, int]
    max_length: int
    pad: str
    missing: Literal["error", "drop"]
    dtype: Literal["int64", "int32"]
    names: ClassVar[tuple[str, ...]]
    """Of the arrays that come out, the mask last."""

    def _check(self, specials: Sequence[str | None]) -> None:
        if self.missing not in ("error", "drop"):
            msg = f"missing must be 'error' or 'drop', got {self.missing!r}"
            raise ValueError(msg)
        if self.dtype not in ("int64", "int32"):
            msg = f"dtype must be 'int64' or 'int32', got {self.dtype!r}"
            raise ValueError(msg)
        check_positive("max_length", self.max_length)
        named = [name for name in specials if name is not None]
        lacking = [name for name in (*named, self.pad) if name not in self.vocabulary]
        if lacking:
            msg = (
                f"the vocabulary has no token {lacking[0]!r}, which {type(self).__name__} is to write; add it, or say "
                "how it is called there (pad=, cls=, eos=)"
            )
            raise SchemaError(msg)
        if self.max_length <= len(named):
            msg = f"max_length is {self.max_length}, and {len(named)} are taken by {named}: no gene has room"
            raise ValueError(msg)

    def token(self, name: str | None) -> int:
        """Token of this name; -1 for None."""
        return -1 if name is None else self.vocabulary[name]

    def find(self, genes: pd.Index, known: Mapping[str, Any] | None = None) -> Ints:
        """(n,) int32 token of each gene; -1 for one that is dropped.

        Parameters
        ----------
        genes
            Names of the genes of the data.
        known
            Those that count as known are in here too.

        Raises
        ------
        SchemaError
            If genes are not in the vocabulary, and are not to be dropped; or none is.
        """
        names = [str(gene) for gene in genes]
        found = np.array([self.vocabulary.get(name, -1) for name in names], np.int32)
        if known is not None:
            found[[name not in known for name in names]] = -1
        lacking = [name for name, token in zip(names, found.tolist(), strict=True) if token < 0]
        if lacking and (self.missing == "error" or len(lacking) == len(names)):
            self._refuse(lacking, names, "vocabulary" if known is None else "vocabulary, or no median")
        return found

    def _refuse(self, lacking: Sequence[str], names: Sequence[str], what: str) -> None:
        msg = f"{len(lacking):,} of {len(names):,} genes are not in the {what}: {first_few(map(repr, lacking))}; "
        if len(lacking) < len(names):
            msg += "leave them out with missing='drop', choose others with Loader(var_names=...), or add them to it"
        else:
            its = [repr(name) for name in self.vocabulary if not name.startswith("<")][:3]
            msg += f"it names {', '.join(its)}. Join the files by what it names them by, add_adatas(var_key=...)"
        raise SchemaError(msg)


@dataclass(frozen=True)
class RankTokens(Tokens):
    """Genes of each cell in order of their counts over the gene's median: Geneformer's rank value encoding.

    Each cell becomes the tokens of the genes it has counts of, those first whose count is greatest, divided by the
    median of the gene's counts other than zero over a large corpus: genes that are high everywhere come late. A batch's
    ``X`` is then a dictionary of ``input_ids``, (n, max_length) integers, and ``attention_mask``, (n, max_length)
    booleans, True where a token is none that fills up; so ``model(**batch["X"])`` is what HuggingFace's models take.

    Geneformer also divides by the cell's total and multiplies by 10,000, which is the same for all genes of a cell and
    so changes no rank; one division rounds less than three. Genes of equal rank, which numpy's sort leaves in any
    order there, come in ascending order of their tokens here. So a cell's tokens depend on its counts and on nothing
    else: not on the order of the genes, on the batch, the rank or the worker. Where ``var_names`` are chosen, these are
    ranked as if there were no others.

    Parameters
    ----------
    vocabulary
        Token of each gene, by its name in the data: a mapping, a series indexed by gene, or a file of JSON, CSV, TSV or
        Parquet. Pickles, as Geneformer's, are not opened; the error says how to convert them.
    medians
        Median of each gene, given alike; None ranks by the counts alone.
    max_length
        Tokens of a row: the rest is cut off, and shorter ones are filled up. 2,048 in Geneformer's V1, 4,096 in V2.
    cls, eos
        Names of tokens that stand before and behind the genes, ``"<cls>"`` and ``"<eos>"`` in V2; by default none.
    pad
        Name of the token that fills up.
    missing
        What to do with genes of the data that are not in the vocabulary, or have no median: ``"error"``, or ``"drop"``
        as Geneformer does.
    dtype
        ``"int64"`` or ``"int32"``.

    Raises
    ------
    SchemaError
        If the vocabulary or the medians contradict themselves; when data are added, if genes are not among them, or
        values are negative.
    SourceError
        If a file cannot be read.

    References
    ----------
    Theodoris et al. (2023), "Transfer learning enables predictions in network biology", Nature 618, Methods: "Rank
    value encoding of transcriptomes". Chen et al. (2024), "Quantized multi-task learning for context-specific
    representations of gene network dynamics", bioRxiv 2024.08.16.608180, for V2.

    Examples
    --------
    >>> from annbatch_dask.transforms import RankTokens
    >>> vocabulary = {"<pad>": 0, "<cls>": 1} | {gene: n + 2 for n, gene in enumerate(collection.var.index)}
    >>> transform = RankTokens(vocabulary, max_length=8, cls="<cls>")
    >>> batch = next(iter(Loader(batch_size=4, transform=transform).use_collection(collection)))
    >>> batch["X"]["input_ids"].shape, batch["X"]["attention_mask"][:, 0].tolist()
    ((4, 8), [True, True, True, True])
    """

    vocabulary: GeneTable = field(repr=False)  # type: ignore[assignment]
    medians: GeneTable | None = field(default=None, repr=False)
    max_length: int = 2048
    cls: str | None = None
    eos: str | None = None
    pad: str = "<pad>"
    missing: Literal["error", "drop"] = "error"
    dtype: Literal["int64", "int32"] = "int64"
    names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", read_vocabulary(self.vocabulary))
        if self.medians is not None:
            object.__setattr__(self, "medians", read_medians(self.medians))
        self._check((self.cls, self.eos))

    def scales(self, genes: pd.Index, tokens: Ints) -> NDArray[np.float64]:
        """(n,) what to divide the counts of each gene by; 1 for one that is dropped."""
        found = np.ones(len(genes))
        if isinstance(self.medians, Mapping):
            kept = np.flatnonzero(tokens >= 0)
            found[kept] = [self.medians[str(genes[k])] for k in kept.tolist()]
        return found

    def find(self, genes: pd.Index, known: Mapping[str, Any] | None = None) -> Ints:
        """As for all; a gene without a median is not known."""
        return super().find(genes, self.medians if isinstance(self.medians, Mapping) else known)


@dataclass(frozen=True)
class BinnedExpression(Tokens):
    """Genes of each cell, and the quantile bin of each one's count: scGPT's value binning.

    A batch's ``X`` is a dictionary of ``gene_ids``, the tokens of the genes that the cell has counts of, ``values``,
    their bins from 1 to ``n_bins - 1``, both (n, max_length) integers, and ``mask``, (n, max_length) booleans, True
    where a token is none that fills up. Tokens that stand for no gene have the value 0.

    The edges of a cell's bins are the ``n_bins - 1`` quantiles, evenly spaced from the least to the greatest, of its
    values other than zero, by linear interpolation; so the bins are those of the counts, and of any rising function of
    them, such as log(1 + x) of their share. A value's bin is how many edges are no greater. Most counts of a cell are
    equal, and so are edges: such a value may be in any of several bins, and scGPT draws one at random. Here the draw
    is a function of ``seed``, the epoch, the cell's position among all and the gene: it differs from cell to cell and
    from epoch to epoch, and is the same after a resume, on any rank and in any worker. With ``ties="upper"`` nothing
    is drawn, and such values are all in the highest of their bins (``side="one"`` there).

    Genes come in the order in which the data have them. Of a cell with more than there is room for, as many are drawn,
    by the same rule, or with ``sample=False`` the first ones taken. Where ``var_names`` are chosen, bins are those of
    their values.

    Parameters
    ----------
    vocabulary
        Token of each gene, as for :class:`RankTokens`; scGPT's ``vocab.json`` is one.
    n_bins
        Bins, of which the first, 0, is that of zeros, which do not come.
    max_length
        Tokens of a row.
    cls
        Name of the token before the genes, None for none.
    pad
        Name of the token that fills up.
    missing
        ``"error"``, or ``"drop"``, for genes of the data that are not in the vocabulary.
    ties
        ``"draw"`` or ``"upper"``, for values that are edges.
    sample
        Draw the genes of cells that have too many.
    seed
        Fixes what is drawn.
    dtype
        ``"int64"`` or ``"int32"``.

    Raises
    ------
    SchemaError
        As for :class:`RankTokens`.

    References
    ----------
    Cui et al. (2024), "scGPT: toward building a foundation model for single-cell multi-omics using generative AI",
    Nature Methods 21, Methods: "Expression values". What is not in the paper is as in its code of release 0.2
    (``scgpt.preprocess``, ``scgpt.data_collator``).

    Examples
    --------
    >>> from annbatch_dask.transforms import BinnedExpression
    >>> vocabulary = {"<pad>": 0, "<cls>": 1} | {gene: n + 2 for n, gene in enumerate(collection.var.index)}
    >>> transform = BinnedExpression(vocabulary, max_length=12)
    >>> batch = next(iter(Loader(batch_size=4, transform=transform).use_collection(collection)))
    >>> {name: part.shape for name, part in batch["X"].items()}
    {'gene_ids': (4, 12), 'values': (4, 12), 'mask': (4, 12)}
    """

    vocabulary: GeneTable = field(repr=False)  # type: ignore[assignment]
    n_bins: int = 51
    max_length: int = 1200
    cls: str | None = "<cls>"
    pad: str = "<pad>"
    missing: Literal["error", "drop"] = "error"
    ties: Literal["draw", "upper"] = "draw"
    sample: bool = True
    seed: int = 0
    dtype: Literal["int64", "int32"] = "int64"
    names: ClassVar[tuple[str, ...]] = ("gene_ids", "values", "mask")

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", read_vocabulary(self.vocabulary))
        check_positive("n_bins", self.n_bins)
        check_number(self.seed)
        object.__setattr__(self, "sample", check_flag("sample", self.sample))
        if self.n_bins < 3:
            msg = f"n_bins is {self.n_bins}; there must be 3 or more: that of zeros, and two others"
            raise ValueError(msg)
        if self.ties not in ("draw", "upper"):
            msg = f"ties must be 'draw' or 'upper', got {self.ties!r}"
            raise ValueError(msg)
        self._check((self.cls,))

    @property
    def quantiles(self) -> NDArray[np.float64]:
        """(n_bins - 1,) of the values of a cell that are the edges of its bins."""
        return np.linspace(0, 1, self.n_bins - 1)
