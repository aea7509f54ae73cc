"""Rank value encoding and value binning as the papers define them, a cell and a gene at a time."""

from __future__ import annotations

from fractions import Fraction
from hashlib import blake2b

import numpy as np

_MASK = 2**64 - 1


def rank_tokens(row, tokens, medians, *, max_length, first=None, last=None, pad=0):
    """Counts over the cell's total, times 10,000, over the gene's median; in exact fractions, greatest first."""
    total = sum(Fraction(float(value)) for value in row)
    ranked = sorted(
        (-(Fraction(float(value)) / total * 10_000 / Fraction(medians[gene])), tokens[gene])
        for gene, value in enumerate(row)
        if value != 0 and tokens[gene] >= 0
    )
    found = [] if first is None else [first]
    found += [token for _, token in ranked][: max_length - len(found) - (last is not None)]
    found += [] if last is None else [last]
    return found + [pad] * (max_length - len(found)), [True] * len(found) + [False] * (max_length - len(found))


def _finalise(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw_of(token, number, *, seed, epoch):
    """The number of 64 bits that a gene of a cell has in an epoch."""
    key = int.from_bytes(blake2b(f"tokens/{seed}/{epoch}".encode(), digest_size=8).digest(), "little")
    start = _finalise((key + number * 0x9E3779B97F4A7C15) & _MASK)
    return _finalise((start + token * 0xD1B54A32D192ED03) & _MASK)


def bins_of(values, n_bins):
    """The least and the greatest bin that each value may be in, by numpy's quantiles and digitize."""
    edges = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    highest, least = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return np.minimum(least + 1, highest), highest


def bin_tokens(
    row, tokens, *, n_bins, max_length, number, first=None, pad=0, ties="draw", sample=True, seed=0, epoch=0
):
    """Quantile bins of the values other than zero; gene ids beside."""
    genes = [gene for gene, value in enumerate(row) if value != 0 and tokens[gene] >= 0]
    drawn = {gene: draw_of(tokens[gene], number, seed=seed, epoch=epoch) for gene in genes}
    ids, values = ([], []) if first is None else ([first], [0])
    room = max_length - len(ids)
    if genes:
        least, highest = bins_of(np.array([row[gene] for gene in genes], np.float64), n_bins)
        taken = genes[:room] if not sample else sorted(sorted(genes, key=drawn.get)[:room])
        for gene, low, high in zip(genes, least.tolist(), highest.tolist(), strict=True):
            if gene in taken:
                ids.append(tokens[gene])
                below = ((_finalise(drawn[gene]) >> 32) * (high - low + 1)) >> 32
                values.append(high - below if ties == "draw" else high)
    n = len(ids)
    return ids + [pad] * (max_length - n), values + [0] * (max_length - n), [True] * n + [False] * (max_length - n)
