"""obs as batches carry it: compact in memory, and the same rows, dtypes and names as pandas has them."""

from __future__ import annotations

import pickle
import shutil
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask import Loader
from annbatch_dask.errors import SelectionError
from annbatch_dask.loader import added as loader_module
from annbatch_dask.loader import obs as obs_module
from annbatch_dask.loader.obs import Names, ObsTable
from annbatch_dask.loader.requests import Resolved
from tests.loader.data import Collection, frame, quiet
from tests.loader.loaders import SMALL, csr, make

TEXT = st.text(st.characters(exclude_categories=()), max_size=6)


@given(st.lists(TEXT, max_size=300), st.integers(0, 9))
def test_names_come_back_as_they_were(names, seed):
    index = pd.Index(names, dtype=object, name="barcode")
    packed = Names.of(index)
    if not names:
        assert packed is None
        return
    rows = np.random.default_rng(seed).integers(0, len(names), 40)
    assert packed.take(rows).tolist() == index.take(rows).tolist()
    assert packed.take(rows[:0]).tolist() == []
    for some in (rows, np.sort(rows), np.arange(len(names))):
        assert packed._pick(some) == packed._pick_plainly(some)
    pd.testing.assert_index_equal(pickle.loads(pickle.dumps(packed)).whole(), index)


def test_names_that_rot_in_memory_are_an_error():
    packed = Names.of(pd.Index([f"cell_{k}" for k in range(300)]))
    raw = bytearray(packed.packed)
    raw[int(packed.ends[0]) - 2] ^= 1  # in the first block's checksum
    rotten = replace(packed, packed=bytes(raw))
    with pytest.raises(zlib.error, match="incorrect data check"):
        rotten.take(np.array([3]))
    assert rotten.take(np.array([200, 130])).tolist() == ["cell_200", "cell_130"]
    short = replace(packed, largest=(50, 9))  # less than a block: never written beyond
    assert short.take(np.arange(300)).tolist() == packed.take(np.arange(300)).tolist()


@pytest.mark.parametrize("index", [pd.RangeIndex(3), pd.Index(["a", None, "c"]), pd.Index(["a", 1, "c"])])
def test_what_is_no_text_is_kept_as_it_is(index):
    assert Names.of(index) is None
    table = ObsTable.of(pd.DataFrame({"n": [1, 2, 3]}), index).packed()
    assert table.frames()[0].index.equals(index)


def make_frame(seed: int, n: int) -> pd.DataFrame:
    """Columns of every kind; some frames lack some, or have others."""
    rng = np.random.default_rng(seed)
    columns = {
        "whole": rng.integers(-3, 4, n),
        "real": np.where(rng.random(n) < 0.3, np.nan, 0.5).astype(rng.choice(["float32", "float64"])),
        "flag": rng.random(n) < 0.5,
        "kind": pd.Categorical.from_codes(rng.integers(-1, 3, n), rng.permutation(list("abcdef"))[:3]),
        "stage": pd.Categorical.from_codes(rng.integers(-1, 3, n), list("abc"), ordered=True),
        "text": rng.choice(list("xyz"), n).astype(object),
        "count": pd.array(rng.integers(0, 9, n), dtype="Int64"),
        "note": pd.array(rng.choice(list("xyz"), n), dtype=pd.StringDtype("python")),
    }
    names = [name for name in columns if rng.random() < 0.9]
    return pd.DataFrame({k: columns[k] for k in names}, index=[f"cell_{seed}_{i}" for i in range(n)])


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_a_window_is_what_pandas_takes_of_all_rows(sizes, seed, pack):
    frames = [make_frame(seed + k, n) for k, n in enumerate(sizes)]
    tables = [ObsTable.of(f, f.index) for f in frames]
    table = ObsTable.joined([t.packed() for t in tables] if pack else tables)
    rows = np.random.default_rng(seed).integers(0, sum(sizes), 30)
    wanted = np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), 2))[: len(rows) + 3]
    asked = Resolved.of({"requests": rows, "splits": [wanted]}, table.bounds)
    found = table.take(asked.assignments, rows, asked.dealt, asked.taken)
    with quiet():  # columns that a frame lacks
        expected = pd.concat(frames).iloc[rows[wanted]]
    assert found.index.equals(expected.index)
    assert found.columns.tolist() == expected.columns.tolist()
    for name in expected.columns:
        assert found[name].astype(object).where(found[name].notna(), None).tolist() == (
            expected[name].astype(object).where(expected[name].notna(), None).tolist()
        )
    whole = pd.concat(table.frames())
    pd.testing.assert_frame_equal(found, whole.iloc[rows[wanted]])  # dtypes do not depend on the window
    assert table.names().tolist() == whole.index.tolist()


@pytest.mark.parametrize("dtype", [object, pd.StringDtype("python"), None], ids=["object", "string", "pandas'"])
def test_names_of_a_window_are_what_pandas_takes_whatever_holds_text(dtype):
    rng = np.random.default_rng(0)
    index = pd.Index([f"cell_{k}" for k in range(60)] + [None], dtype=dtype, name="barcode")
    table = ObsTable.of(pd.DataFrame(index=index), index)
    rows, wanted = rng.permutation(61), rng.permutation(61)
    asked = Resolved.of({"requests": rows, "splits": [wanted]}, table.bounds)
    found = table.take(asked.assignments, rows, asked.dealt, asked.taken).index
    pd.testing.assert_index_equal(found, index.take(rows[wanted]), exact=True)


@pytest.fixture
def packed(monkeypatch):
    monkeypatch.setattr(loader_module, "_MAX_PLAIN_NAMES", 0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_compressed_names_are_delivered_as_plain_ones(collection, packed, shuffle):
    loader = make(collection, shuffle=shuffle, seed=0, where="index != 'cell_7' and text != 't9'")
    assert all(isinstance(index, Names) for index in loader._table.indexes)
    again = pickle.loads(pickle.dumps(loader))
    for batch, other in zip(loader, again, strict=True):
        pd.testing.assert_frame_equal(batch["obs"], collection.obs.iloc[batch["index"]])
        pd.testing.assert_frame_equal(batch["obs"], other["obs"])
    pd.testing.assert_frame_equal(pd.concat(loader._obs), collection.obs)


def test_a_row_of_names_and_codes_takes_16_bytes():
    rng = np.random.default_rng(0)
    n = 20_000
    letters = np.array(list("ACGT"))[rng.integers(0, 4, (n, 16))]
    names = [f"{''.join(row)}-1-sample_{k}" for row, k in zip(letters, rng.integers(0, 500, n), strict=True)]
    obs = pd.DataFrame({f"c{k}": pd.Categorical.from_codes(rng.integers(-1, 50, n), range(50)) for k in range(3)})
    table = ObsTable.joined([ObsTable.of(obs, pd.Index(names)).packed()] * 2)
    n_bytes = sum(len(i.packed) + i.ends.nbytes for i in table.indexes) + sum(c.nbytes for c in table.columns.values())
    assert n_bytes - 3 * 50 * 8 <= 16 * 2 * n
    assert len(pickle.dumps(table)) <= 17 * 2 * n


def test_no_columns_means_no_names_are_read(collection, tmp_path):
    shutil.copytree(collection.path, tmp_path / "c.zarr")
    for chunk in (tmp_path / "c.zarr").glob("dataset_*/obs/_index/**/c/*"):  # pandas 3: a group of values and a mask
        chunk.write_bytes(b"not a chunk")
    broken = Collection(tmp_path / "c.zarr", collection.x, collection.obs)
    loader = make(broken, obs_columns=[], obs_codes=["kind"], where="row > 30")
    for batch in loader:
        assert batch["obs"] is None
        assert batch["obs_codes"]["kind"].tolist() == (batch["index"] % 3).tolist()
    loader.load_state_dict(loader.state_dict())
    assert next(iter(make(broken, obs_columns=[])))["obs"] is None
    with pytest.raises(Exception, match="(?i)zstd|blosc|decompress|decod|corrupt|chunk|buffer"):
        make(broken, obs_columns=[], where="index == 'cell_3'")


def test_labels_are_made_once(monkeypatch):
    made = []
    original = obs_module._encoded
    monkeypatch.setattr(obs_module, "_encoded", lambda column: made.append(1) or original(column))
    loader = Loader(batch_size=5, **SMALL, obs_codes=["text", "kind"]).add_dataset(csr(), obs=frame(20))
    for _ in range(3):
        assert sum(len(batch["obs_codes"]["text"]) for batch in loader) == 20
    assert loader.obs_categories["text"].tolist() == sorted(f"t{r}" for r in range(20))
    assert len(made) == 2
    loader.add_dataset(csr(), obs=frame(20, first=20))
    assert len(loader.obs_categories["text"]) == 40


def test_codes_that_an_extension_would_shift_are_warned_of(collection):
    with pytest.warns(UserWarning, match=r"obs_codes of 'text', 'row' are ranks .* obs_codes=\{'text': \[...\]\}"):
        make(collection, obs_codes=["text", "kind", "row"])
    make(collection, obs_codes={"text": ["t1", None], "kind": None})


@pytest.mark.parametrize("dtype", ["bool", "boolean"])
@pytest.mark.parametrize("flags", [[True, True], [False], [True, False]])
def test_flags_have_the_same_codes_whichever_there_are(flags, dtype):
    obs = pd.DataFrame({"flag": pd.array(flags, dtype=dtype)}, index=[f"c{k}" for k in range(len(flags))])
    loader = Loader(batch_size=len(flags), **SMALL, obs_codes=["flag"]).add_dataset(csr()[: len(flags)], obs=obs)
    assert [batch["obs_codes"]["flag"].tolist() for batch in loader] == [list(map(int, flags))]
    assert loader.obs_categories["flag"].tolist() == [False, True]


# --- categories that the user gives


def coded(codes, **options):
    return Loader(batch_size=20, **SMALL, obs_codes=codes, **options).add_dataset(csr(), obs=frame(20))


@pytest.mark.parametrize(
    ("codes", "where", "expected"),
    [
        ({"kind": ["c", "b", "a"]}, None, [2 - r % 3 for r in range(20)]),
        ({"kind": ["z", "b", "a", "c"]}, None, [(2, 1, 3)[r % 3] for r in range(20)]),
        ({"kind": None}, None, [r % 3 for r in range(20)]),
        ({"kind": ["c", None]}, None, [(-1, -1, 0)[r % 3] for r in range(20)]),
        ({"kind": [None]}, None, [-1] * 20),
        ({"kind": ["c", "a"]}, "kind != 'b'", [(1, 0, 0)[r % 3] for r in range(20) if r % 3 != 1]),
        ({"text": ["t3", "t1", None]}, "row < 5", [-1, 1, -1, 0, -1]),
    ],
)
def test_categories_are_those_given(codes, where, expected):
    loader = coded(codes, where=where)
    (name, given) = next(iter(codes.items()))
    found = np.concatenate([batch["obs_codes"][name] for batch in loader])
    assert found.dtype == np.int64
    assert found.tolist() == expected
    if given is not None:
        assert loader.obs_categories[name].tolist() == [value for value in given if value is not None]


def test_a_value_that_is_not_among_the_categories_given_is_refused():
    loader = coded({"kind": ["a", "z"]})
    with pytest.raises(
        SelectionError, match=r"2 categories of 'kind', rows .* 2 others: 'b' \(7 rows\), 'c' \(6 rows\)"
    ):
        next(iter(loader))
    with pytest.raises(ValueError, match="names category 'a' of 'kind' 2 times"):
        coded({"kind": ["a", "a"]})
    with pytest.raises(ValueError, match="None before its end"):
        coded({"kind": [None, "a"]})
    with pytest.raises(ValueError, match="'age'"):
        coded({"age": ["a"]})
