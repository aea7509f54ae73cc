"""Rows that are kept: bits say what a mask of numpy says, and blocks of few rows span no whole source."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.plan import kept as module
from annbatch_dask.plan.kept import KeptRows
from annbatch_dask.plan.layout import cut_blocks
from annbatch_dask.plan.schema import MatrixSchema, SourceSchema


@given(st.lists(st.booleans(), max_size=300), st.data())
def test_rows_are_those_of_the_mask(flags, data):
    mask = np.array(flags, bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEGMENT", 4)
        kept = KeptRows.of(mask, where="x", dropped={"where": int((~mask).sum())})
        found = np.flatnonzero(mask)
        start = data.draw(st.integers(0, len(found)))
        stop = data.draw(st.integers(start, len(found)))
        assert kept.n_kept == len(found)
        assert kept.rows(start, stop).tolist() == found[start:stop].tolist()
        assert kept.mask().tolist() == flags
        assert kept.numbers(range(len(flags) + 1)).tolist() == [int(mask[:k].sum()) for k in range(len(flags) + 1)]
        again = np.array(data.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found))), bool)
        narrowed = kept.narrowed(again, {"rule": int((~again).sum())})
        assert narrowed.rows(0, narrowed.n_kept).tolist() == found[again].tolist()


def source(mask):
    n = int(mask.sum())
    x = MatrixSchema("X", "dense", "float32", "", 100)
    kept = KeptRows.of(mask, where="x", dropped={})
    return SourceSchema("a", n, np.array(["g"] * 100, object), (x,), (), kept=None if mask.all() else kept)


def cut(schema):
    return cut_blocks([schema], block_nbytes=400_000, csc_nbytes=400_000, obs_nbytes=0)


def test_a_block_of_few_rows_spans_no_whole_source():
    mask = np.zeros(2_000_000, bool)
    mask[::100] = True
    few = cut(source(mask))
    assert len(few) > 100  # and 21 of as many rows that lie side by side
    assert [b.start for b in few[1:]] == [b.stop for b in few[:-1]]
    assert few[-1].stop == 20_000
    assert len(cut(source(np.ones(20_000, bool)))) == 21


def test_a_source_of_which_all_rows_are_kept_is_cut_as_ever():
    whole = source(np.ones(20_000, bool))
    kept = KeptRows.of(np.ones(20_000, bool), where="x", dropped={})
    assert cut(replace(whole, kept=kept)) == cut(whole)
