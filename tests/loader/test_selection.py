"""Only the rows that were asked for: queries, masks, indices, splits, and matched controls."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.chunks.reader import RangeReader
from annbatch_dask.errors import SelectionError, StateError
from annbatch_dask.manifest import DatasetRecord, Manifest
from annbatch_dask.samplers import DistributedSampler, MatchedControlSampler
from annbatch_dask.splits import Splits, make_splits
from annbatch_dask.storage.root import Root
from tests.loader.data import frame
from tests.loader.loaders import SMALL, csr, make
from tests.samplers.tools import batches

MASK = np.arange(221) % 3 == 1


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("kind == 'b'", np.flatnonzero(MASK)),
        (
            "kind in ['a', 'c'] and row > 125 and text != 't200'",
            [r for r in range(126, 221) if r % 3 != 1 and r != 200],
        ),
        ("index == 'cell_7' or row / 2 >= 110", [7, 220]),
        (MASK, np.flatnonzero(MASK)),
        (pd.Series(MASK), np.flatnonzero(MASK)),
        (pd.Series(np.where(MASK, True, None), dtype="boolean"), np.flatnonzero(MASK)),
        (pd.array(MASK, dtype="boolean"), np.flatnonzero(MASK)),
        ([200, 3, 130, 129], [3, 129, 130, 200]),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_only_selected_rows_come(collection, where, expected, shuffle):
    loader = make(collection, where=where, shuffle=shuffle, seed=0)
    assert loader.n_selected == len(expected)
    assert loader.n_obs == 221
    found = list(loader)
    assert len(found) == len(loader)
    index = np.concatenate([batch["index"] for batch in found])
    assert (sorted(index) if shuffle else index.tolist()) == list(expected)
    for batch in found:
        np.testing.assert_array_equal(batch["X"].toarray(), collection.x[batch["index"]])
        assert batch["obs"]["row"].tolist() == batch["index"].tolist()


def test_nothing_else_is_read(collection, monkeypatch):
    read = []
    original = RangeReader.tasks

    def tasks(self, spans, out):
        if not self.array.path.endswith("indptr"):
            read.append(int((spans[:, 1] - spans[:, 0]).sum()))
        return original(self, spans, out)

    monkeypatch.setattr(RangeReader, "tasks", tasks)
    nnz = int((collection.x[MASK] != 0).sum())
    list(make(collection, where=MASK))
    assert sum(read) == 2 * nnz  # values and columns


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("kind == 'z'", "selects none of 221 rows"),
        ("colour == 'b'", "'colour' is not a column of obs, which has 'row'"),
        ("row +", "cannot be read"),
        ("row > row.mean()", r"'row.mean\(\)' is refused; it may hold columns"),
        ("row", "must be true or false for each row"),
        (MASK[:-1], r"mask of shape \(220,\), the data has 221 rows"),
        ([1, 1], "1 rows more than once"),
        ([-1, 3], "names rows -1 to 3, the data has rows 0 to 220"),
        ([0.5], "must be a condition, a mask or indices"),
    ],
)
def test_what_selects_nothing_sensible_is_refused(collection, where, message):
    with pytest.raises(SelectionError, match=message):
        len(make(collection, where=where))


def test_a_condition_reads_the_columns_it_names_and_batches_do_not_carry_them(collection):
    loader = make(collection, where="kind == 'b'", obs_columns=["row"], obs_codes=[])
    assert sorted(loader._obs[0].columns) == ["kind", "row"]
    obs = pd.concat([batch["obs"] for batch in loader])
    assert obs.columns.tolist() == ["row"]
    assert obs["row"].tolist() == np.flatnonzero(MASK).tolist()


def test_a_condition_runs_nothing(tmp_path):
    path = tmp_path / "pwned.csv"
    with pytest.raises(SelectionError, match="is refused"):
        len(Loader(batch_size=5, **SMALL, where=f"text.to_csv({str(path)!r}) == 1").add_dataset(csr(), frame(20)))
    assert not path.exists()


def test_a_query_needs_obs():
    with pytest.raises(SelectionError, match="the datasets were added without"):
        len(Loader(batch_size=5, **SMALL, where="row > 1").add_dataset(csr()))


def test_a_selection_is_made_anew_when_data_are_added():
    loader = Loader(batch_size=5, **SMALL, where="row >= 15").add_dataset(csr(), obs=frame(20))
    assert loader.n_selected == 5
    loader.add_dataset(csr(), obs=frame(20, first=20))
    assert loader.n_selected == 25


def test_a_state_of_another_selection_is_refused(collection):
    loader, other = make(collection, where=MASK), make(collection, where="row < 74")
    next(iter(loader))
    with pytest.raises(StateError, match="other data"):
        other.load_state_dict(loader.state_dict())


# --- splits


def cells(n_obs, n_donors, seed=0):
    """Donors of very different sizes, each with types of its own liking."""
    rng = np.random.default_rng(seed)
    donor = rng.choice(n_donors, n_obs, p=rng.dirichlet(np.ones(n_donors)))
    kinds = np.where(rng.random(n_obs) < 0.7, donor % 3, rng.integers(0, 3, n_obs))
    return pd.DataFrame({"donor": pd.Categorical(donor), "kind": pd.Categorical.from_codes(kinds, list("abc"))})


THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


def split(obs, fractions=THREE, by=(), stratify=(), seed=0):
    return make_splits(obs, fractions, by=by, stratify=stratify, seed=seed, collection="c")


@pytest.mark.filterwarnings("ignore:no row of")
@given(n_obs=st.integers(1, 300), n_donors=st.integers(1, 30), seed=st.integers(0, 9))
def test_groups_are_never_torn(n_obs, n_donors, seed):
    obs = cells(n_obs, n_donors, seed)
    parts = split(obs, by=["donor"], stratify=["kind"], seed=seed)
    assert sum(mask.astype(int) for mask in parts.values()).tolist() == [1] * n_obs
    donors = [set(obs["donor"][mask]) for mask in parts.values()]
    assert sum(map(len, donors)) == obs["donor"].nunique()


@pytest.mark.filterwarnings("ignore:no row of")
@given(n_obs=st.integers(1, 300), seed=st.integers(0, 9))
def test_cells_by_themselves_meet_the_fractions_in_every_stratum(n_obs, seed):
    obs = cells(n_obs, 5, seed)
    parts = split(obs, stratify=["kind"], seed=seed)
    for kind in "abc":
        of_kind = (obs["kind"] == kind).to_numpy()
        for name, share in THREE.items():
            assert abs((parts[name] & of_kind).sum() - share * of_kind.sum()) <= 2


def test_groups_come_near_the_fractions():
    parts = split(cells(20_000, 200), by=["donor"], stratify=["kind"])
    report = parts.report
    assert report["n_obs"].sum() == 20_000
    assert (report["achieved"] - report["asked"]).abs().max() < 0.005
    shares = pd.crosstab(parts.codes, cells(20_000, 200)["kind"], normalize="columns").to_numpy()
    assert np.abs(shares - np.array([[0.8], [0.1], [0.1]])).max() < 0.02


def test_a_seed_fixes_a_split():
    obs = cells(500, 40)
    one, two, other = (split(obs, by=["donor"], seed=seed).codes.tolist() for seed in (1, 1, 2))
    assert one == two != other
    assert split(obs, seed=1).codes.tolist() != split(obs, seed=2).codes.tolist()


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5, "b": 0.6}, {"a": 1.2, "b": -0.2}])
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(SelectionError, match="must be positive and add up to 1"):
        split(cells(9, 2), fractions)


def test_fractions_without_names_are_refused():
    with pytest.raises(TypeError, match=r"fractions is \[0\.8, 0\.2\]; give shares by name, such as"):
        split(cells(9, 2), [0.8, 0.2])


def test_a_part_that_gets_no_row_is_warned_of():
    with pytest.warns(
        UserWarning, match="no row of 90 is in val, test; whole groups of donor go to one part: take fewer"
    ):
        parts = split(cells(90, 2), by=["donor"])
    assert parts.report["n_obs"].tolist() == [90, 0, 0]
    with pytest.warns(UserWarning, match="no row of 4 is in val, test; give these parts larger shares"):
        split(cells(4, 2))


@pytest.mark.parametrize("number", [int, np.int64])
def test_folds_may_have_numbers(tmp_path, number):
    folds = split(cells(90, 9), {number(k): np.float32(0.25) for k in range(4)})
    folds.save(tmp_path / "folds.npz")
    again = Splits.read(tmp_path / "folds.npz", "c", 90)
    assert (again[2] == folds[2]).all()
    assert again.fractions == {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(SelectionError, match="no column 'batch'; it has donor, kind"):
        split(cells(9, 2), by=["batch"])
    with pytest.raises(KeyError, match="no part is called 'tset'; there are train, val, test"):
        split(cells(90, 2))["tset"]


@pytest.mark.filterwarnings("ignore:It is customary")
def test_a_split_of_a_collection_is_saved_read_and_loaded(collection, tmp_path):
    shutil.copytree(collection.path, tmp_path / "c.zarr")
    zarr.open_group(tmp_path / "c.zarr").attrs.update(
        {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
    )
    stored = DatasetCollection(tmp_path / "c.zarr", mode="r")
    parts = stored.split({"train": 0.7, "test": 0.3}, by="kind", seed=3)
    parts.save(tmp_path / "split.npz")
    again = stored.read_split(tmp_path / "split.npz")
    assert (again.codes == parts.codes).all()
    assert (again.fractions, again.by, again.seed) == (parts.fractions, ("kind",), 3)
    with pytest.raises(SelectionError, match="obs has no column 'donor'; it has '.*'kind'"):
        stored.split({"train": 0.7, "test": 0.3}, by=["kind", "donor"])
    with pytest.raises(TypeError, match="columns is the text 'kind'; give a list of names"):
        stored.obs("kind")
    for content in (b"{}", (tmp_path / "split.npz").read_bytes()[:300]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(SelectionError, match=r"bad\.npz is no split that was saved, or is damaged"):
            stored.read_split(tmp_path / "bad.npz")
    loader = Loader(batch_size=8, **SMALL, where=again["test"]).use_collection(stored)
    assert set(np.concatenate([b["index"] for b in loader])) == set(np.flatnonzero(parts["test"]))
    parts = split(cells(221, 9))
    parts.save(tmp_path / "other.npz")
    with pytest.raises(SelectionError, match="it was changed or is another"):
        stored.read_split(tmp_path / "other.npz")


@pytest.mark.filterwarnings("ignore:It is customary")
def test_splits_and_states_outlive_a_release(collection, tmp_path, monkeypatch):
    """The next one's manifest has a field more, and other reprs."""

    @dataclass(frozen=True, repr=False)
    class Later(Manifest):
        later: str = "new"

        def __repr__(self):
            return "<manifest>"

    shutil.copytree(collection.path, tmp_path / "c.zarr")
    zarr.open_group(tmp_path / "c.zarr").attrs.update(
        {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
    )
    records = tuple(DatasetRecord(f"dataset_{k}", n, 5, f"{k:016x}") for k, n in enumerate((130, 1, 90)))
    values = {"n_obs": 221, "n_vars": 23, "matrices": {}, "datasets": records, "sources": (), "builds": ()}

    def opened(kind):
        monkeypatch.setattr(Root, "manifest", kind(**values, last_dataset=2, id="a" * 16))
        stored = DatasetCollection(tmp_path / "c.zarr", mode="r")
        monkeypatch.setattr(stored, "check", lambda _: {})
        return stored, Loader(batch_size=8, **SMALL, shuffle=True, seed=0).use_collection(stored)

    stored, loader = opened(Manifest)
    stored.split({"train": 0.7, "test": 0.3}, seed=3).save(tmp_path / "split.npz")
    epoch = iter(loader)
    next(epoch)
    state, rest = loader.state_dict(), [batch["index"].tolist() for batch in epoch]

    stored, loader = opened(Later)
    assert stored.read_split(tmp_path / "split.npz")["train"].sum() == 155
    loader.load_state_dict(state)
    assert [batch["index"].tolist() for batch in loader] == rest

    values["datasets"] = records[::-1]
    stored, loader = opened(Later)
    with pytest.raises(SelectionError, match="it was changed or is another"):
        stored.read_split(tmp_path / "split.npz")
    with pytest.raises(StateError, match="other data"):
        loader.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:It is customary")
def test_a_split_reads_the_columns_it_needs_and_no_names(collection, tmp_path):
    shutil.copytree(collection.path, tmp_path / "c.zarr")
    zarr.open_group(tmp_path / "c.zarr").attrs.update(
        {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
    )
    for dataset in sorted((tmp_path / "c.zarr").glob("dataset_*")):
        for name in ("_index", "text", "row"):
            for chunk in (dataset / "obs" / name).glob("**/c/*"):
                chunk.unlink()
                chunk.write_bytes(b"not a chunk")
    stored = DatasetCollection(tmp_path / "c.zarr", mode="r")
    parts = stored.split({"train": 0.7, "test": 0.3}, by="kind", seed=3)
    assert (
        parts.codes.tolist() == split(collection.obs, {"train": 0.7, "test": 0.3}, by=["kind"], seed=3).codes.tolist()
    )
    obs = stored.obs(["kind"], names=False)
    assert obs.index.equals(pd.RangeIndex(221))
    assert obs["kind"].tolist() == collection.obs["kind"].tolist()


# --- matched controls


def perturbed(n_obs=200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(n_obs) < 0.3, rng.choice(list("xyz"), n_obs)


@pytest.mark.parametrize("n_controls", [1, 3])
def test_every_perturbed_cell_comes_once_with_controls_of_its_group(n_controls):
    is_control, line = perturbed()
    n = 1 + n_controls
    sampler = MatchedControlSampler(
        4, 5, 4 * n, is_control=is_control, match=line, n_controls=n_controls, rng=np.random.default_rng(0)
    )
    counts = np.zeros(200, int)
    for _ in range(60):
        found = batches(sampler, 200)
        assert [len(batch) for batch in found[:-1]] == [4 * n] * (sampler.n_batches(200) - 1)
        groups = np.concatenate(found).reshape(-1, n)
        assert sorted(groups[:, 0].tolist()) == np.flatnonzero(~is_control).tolist()
        assert is_control[groups[:, 1:]].all()
        assert (line[groups] == line[groups[:, :1]]).all()
        counts += np.bincount(groups[:, 1:].ravel(), minlength=200)
    for name in "xyz":
        of_line = counts[is_control & (line == name)]
        expected = 60 * n_controls * (~is_control & (line == name)).sum() / len(of_line)
        assert np.abs(of_line / expected - 1).max() < 0.6
        assert of_line.mean() == pytest.approx(expected)


def test_ranks_share_matched_groups_whole():
    is_control, line = perturbed()
    found = []
    for rank in range(3):
        sampler = MatchedControlSampler(4, 6, 12, is_control=is_control, match=line, rng=np.random.default_rng(0))
        sampler.seed = 0
        found += batches(DistributedSampler(sampler, dist_info=(rank, 3), global_batches=True), 200)
    groups = np.concatenate(found).reshape(-1, 2)
    assert (line[groups[:, 0]] == line[groups[:, 1]]).all()


def test_controls_that_cannot_be_matched():
    with pytest.raises(SelectionError, match=r"1 groups have perturbed cells and no control, such as \['z'\]"):
        MatchedControlSampler(4, 5, 4, is_control=[True, False, False], match=["x", "x", "z"])
    with pytest.raises(ValueError, match="cannot hold whole groups of a cell and 2 controls"):
        MatchedControlSampler(4, 5, 4, is_control=[True, False], match=["x", "x"], n_controls=2)
    with pytest.raises(SelectionError, match="both need one value per row"):
        MatchedControlSampler(4, 5, 4, is_control=[True], match=["x", "x"])
    with pytest.raises(ValueError, match="does not match loader n_obs"):
        list(MatchedControlSampler(4, 5, 4, is_control=[True, False], match=["x", "x"]).sample(3))
