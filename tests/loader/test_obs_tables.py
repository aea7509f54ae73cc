"""Tables with a row for each value of an obs column, joined to batches."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask.errors import SelectionError
from annbatch_dask.loader import Loader
from tests.loader.data import frame, genes, matrix
from tests.loader.loaders import SMALL, make

TABLE = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 6)).astype("f4"), index=["c", "a", "other", "b"])


@pytest.mark.parametrize("to", [None, "torch"])
@pytest.mark.parametrize("columns", [None, [], ["row"]])
def test_each_cell_has_the_row_of_its_value(collection, to, columns):
    if to:
        pytest.importorskip(to)
    loader = make(collection, obs_tables={"kind": TABLE}, to=to, shuffle=True, obs_columns=columns)
    n = 0
    for batch in loader:
        found = batch["obs_tables"]["kind"]
        assert type(found).__module__.split(".")[0] == (to or "numpy")
        expected = TABLE.loc[collection.obs["kind"].iloc[batch["index"]].astype(str)].to_numpy()
        np.testing.assert_array_equal(np.asarray(found), expected)
        assert "obs_codes" not in batch
        n += len(found)
    assert n == len(collection.x)


def test_tables_of_text_and_numbers_stand_beside_codes(collection):
    rows = pd.DataFrame({"n": np.arange(len(collection.x)) * 2}, index=np.arange(len(collection.x)))
    loader = make(collection, obs_tables={"row": rows, "kind": TABLE}, obs_codes=["kind"])
    for batch in loader:
        np.testing.assert_array_equal(batch["obs_tables"]["row"][:, 0], collection.obs["row"].iloc[batch["index"]] * 2)
        assert batch["obs_tables"]["row"].dtype == rows["n"].dtype
        assert set(batch["obs_codes"]) == {"kind"}


def test_values_that_a_table_lacks_are_refused_unless_their_rows_take_no_part(collection):
    short = TABLE.drop(index="b")
    message = (
        r"obs_tables\['kind'\] has 3 rows, and rows that take part have 1 values that it has not: 'b' \(\d+ rows\)"
    )
    with pytest.raises(SelectionError, match=message):
        next(iter(make(collection, obs_tables={"kind": short})))
    loader = make(collection, obs_tables={"kind": short}, where="kind != 'b'")
    assert sum(len(batch["obs_tables"]["kind"]) for batch in loader) == (collection.obs["kind"] != "b").sum()


def test_a_missing_value_has_no_row():
    obs = frame(12)
    obs.loc[obs.index[3], "kind"] = np.nan
    loader = Loader(**SMALL, obs_tables={"kind": TABLE}).add_dataset(sp.csr_matrix(matrix(12)), obs=obs, var=genes())
    with pytest.raises(SelectionError, match=r"nan \(1 rows\); add them, or leave such rows out with where="):
        next(iter(loader))


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        ({"n": [1, 2, 3, 4], "is_control": [True, False, False, True]}, "i8"),
        ({"n": pd.array([1, 2, 3, 4], "Int32"), "is_control": pd.array([True, False, False, True])}, "i4"),
        ({"dose": pd.array([0.5, None, 1.0, 2.0], "Float32"), "n": np.arange(4, dtype="i2")}, "f4"),
    ],
)
def test_kinds_of_numbers_become_the_one_that_holds_them_all(collection, columns, dtype):
    table = pd.DataFrame(columns, index=TABLE.index)
    batch = next(iter(make(collection, obs_tables={"kind": table})))
    expected = table.astype(dtype).loc[collection.obs["kind"].iloc[batch["index"]].astype(str)]
    np.testing.assert_array_equal(batch["obs_tables"]["kind"], expected.to_numpy())
    assert batch["obs_tables"]["kind"].dtype == dtype


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ([1], TypeError, "must be a DataFrame indexed by the values of 'kind', got"),
        (pd.concat([TABLE, TABLE.iloc[:1]]), ValueError, "has more than one row for 'c'; give each value one"),
        (TABLE.assign(name="x"), TypeError, r"must hold numbers alone, and has \{'name': "),
        (TABLE.assign(n=1, name="x")[["n", "name"]], TypeError, r"must hold numbers alone, and has \{'name': "),
        (TABLE[[]], ValueError, "has no column; give it one, or leave it out"),
        (pd.DataFrame({"n": pd.array([1, None], "Int64")}, ["a", "b"]), ValueError, "has missing values among int64"),
    ],
)
def test_what_is_no_table_is_refused(table, error, message):
    with pytest.raises(error, match=message):
        Loader(**SMALL, obs_tables={"kind": table})


def test_a_column_that_is_not_there(collection):
    with pytest.raises(ValueError, match="1 of the names asked for are not among the 3 of obs: 'gene'"):
        make(collection, obs_tables={"gene": TABLE})
