"""Sums of genes against sums written out, over dtypes, long and short rows, counts in and beyond the table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.kernels.gene_sums import SUMS, add_csr, new_sums

TARGET = 1e4


def plain_sums(n_groups, n_vars, groups, rows):
    out = np.zeros((n_groups, n_vars, len(SUMS)))
    for group, (indices, values) in zip(groups, rows, strict=True):
        x = values.astype(np.float64)
        scaled = x * (TARGET / max(x.sum(), 1.0))
        logged = np.log1p(scaled)
        terms = (x != 0, x, x * x, scaled, scaled**2, logged, logged**2)
        np.add.at(out[group], indices, np.stack([np.asarray(t, np.float64) for t in terms], axis=-1))
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    index=st.sampled_from(["uint16", "uint32"]),
    n_groups=st.integers(1, 3),
    share_large=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_counts_are_added_up_as_written_out(seed, dtype, index, n_groups, share_large):
    rng = np.random.default_rng(seed)
    n_vars = 300
    rows = []
    for length in rng.choice([0, 1, 2, 63, 64, 65, 127, 128, 129, 300], 12):
        values = rng.integers(0, 64, length)  # a stored 0 is no cell that has the gene
        is_large = rng.random(length) < share_large
        values[is_large] = rng.choice([63, 64, 65, 255, np.iinfo(dtype).max], is_large.sum()) % (
            np.iinfo(dtype).max + 1
        )
        rows.append((np.sort(rng.choice(n_vars, length, replace=False)).astype(index), values.astype(dtype)))
    groups = rng.integers(0, n_groups, len(rows))
    sums = new_sums(n_groups, n_vars)
    offsets = np.concatenate([[0], np.cumsum([len(i) for i, _ in rows])]).astype(np.int64)
    cut = int(rng.integers(0, len(rows) + 1))  # calls may cut the rows anywhere
    for part in (range(cut), range(cut, len(rows))):
        some = slice(offsets[part.start], offsets[part.stop])
        indices, values = (np.concatenate([r[k] for r in rows])[some] for k in (0, 1))
        add_csr(
            sums,
            groups[part.start : part.stop],
            offsets[part.start : part.stop + 1] - some.start,
            indices,
            values,
            TARGET,
        )

    expected = plain_sums(n_groups, n_vars, groups, rows)
    np.testing.assert_array_equal(sums[:, :, :2], expected[:, :, :2])
    np.testing.assert_allclose(sums[:, :, : len(SUMS)], expected, rtol=1e-12, atol=1e-14)
    assert (sums[:, :, len(SUMS) :] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_other_numbers_are_added_up_likewise(dtype):
    rng = np.random.default_rng(0)
    values = (rng.random(50) * 100).astype(dtype)
    values[:2] = (5001, 1) if dtype == "int16" else (1e20, 1e-30)  # whose squares float32 does not hold
    indices = np.sort(rng.choice(80, 50, replace=False)).astype(np.uint16)
    sums = new_sums(1, 80)
    add_csr(sums, np.zeros(1, np.int64), np.array([0, 50]), indices, values, TARGET)
    np.testing.assert_allclose(sums[:, :, :7], plain_sums(1, 80, [0], [(indices, values)]), rtol=1e-12)
