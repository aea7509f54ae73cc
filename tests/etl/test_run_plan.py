"""A plan that was looked at is run: without another scan, and on nothing else than was planned."""

from dataclasses import replace

import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionChangedError, MemoryBudgetError, SourceError
from annbatch_dask.testing import make_adata
from tests.tools import tree_digest


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture
def paths(tmp_path):
    for seed, name in enumerate("ab"):
        make_adata(300, [f"g{i}" for i in range(seed, 40)], seed=seed).write_h5ad(tmp_path / f"{name}.h5ad")
    return [str(tmp_path / f"{name}.h5ad") for name in "ab"]


def test_it_builds_what_add_adatas_builds_and_scans_once(tmp_path, paths, monkeypatch):
    from annbatch_dask.etl import prepare

    scanned = []
    monkeypatch.setattr(
        prepare, "scan", lambda ref, *args, scan=prepare.scan: scanned.append(ref.label) or scan(ref, *args)
    )
    collection = DatasetCollection(tmp_path / "a.zarr")
    plan = collection.plan_adatas(paths, dataset_size=200, seed=3)
    assert collection.is_empty
    assert "3 datasets" in repr(plan)
    assert plan.run() is collection
    assert sorted(scanned) == sorted(paths)
    direct = DatasetCollection(tmp_path / "b.zarr").add_adatas(paths, dataset_size=200, seed=3)
    assert tree_digest(tmp_path / "a.zarr") == tree_digest(tmp_path / "b.zarr")
    assert collection.manifest == direct.manifest
    assert collection.verify(against=paths).ok


def test_a_copy_of_a_plan_runs_too(tmp_path, paths):
    plan = DatasetCollection(tmp_path / "a.zarr").plan_adatas(paths, seed=3)
    copy = replace(plan, left_out={})
    assert type(copy) is type(plan)
    assert copy.summary() == plan.summary()
    assert copy.fingerprint == plan.fingerprint
    assert copy.run().n_obs == 600


def test_run_again_it_does_nothing(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "a.zarr")
    plan = collection.plan_adatas(paths, seed=3)
    plan.run()
    before = tree_digest(tmp_path / "a.zarr")
    assert plan.run() is collection
    assert DatasetCollection(tmp_path / "a.zarr").add_adatas(paths, seed=3).n_obs == 600  # nor does the same call
    assert tree_digest(tmp_path / "a.zarr") == before


def test_a_plan_of_the_last_build_says_so_and_does_nothing(tmp_path, paths):
    for _ in range(2):  # a script that is run twice
        collection = DatasetCollection(tmp_path / "a.zarr")
        plan = collection.plan_adatas(paths, seed=3)
        assert plan.run() is collection
    assert plan.is_done
    assert repr(plan).startswith(
        f"Done already; anew it would be: {plan.title.partition(': ')[2]}\n  done     the last"
    )
    assert "the last build was this very call" in plan._repr_html_()
    assert replace(plan, left_out={}).run().n_obs == 600
    assert len(collection.manifest.builds) == 1


def test_another_seed_adds_the_cells_again_as_planned(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "a.zarr").add_adatas(paths, seed=3)
    with pytest.warns(UserWarning, match="is added again"):
        plan = collection.plan_adatas(paths, seed=4)
    assert not plan.is_done
    assert plan.run().n_obs == 1200


def test_a_plan_of_what_was_done_is_no_good_for_what_came_after(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "a.zarr").add_adatas(paths[:1], seed=3)
    plan = collection.plan_adatas(paths[:1], seed=3)
    DatasetCollection(tmp_path / "a.zarr").add_adatas(paths[1:], seed=4)
    with pytest.raises(CollectionChangedError, match="plan again"):
        plan.run()


def test_an_input_that_was_changed_since_is_refused(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "a.zarr")
    plan = collection.plan_adatas(paths, seed=3)
    make_adata(300, [f"g{i}" for i in range(1, 40)], seed=9).write_h5ad(paths[1])
    with pytest.raises(SourceError, match="was changed") as error:
        plan.run()
    assert "plan again" in str(error.value.__notes__)
    assert collection.is_empty


def test_a_collection_that_was_changed_since_is_refused(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "a.zarr")
    plan = collection.plan_adatas(paths[:1], seed=3)
    DatasetCollection(tmp_path / "a.zarr").add_adatas(paths[1:], seed=4)
    with pytest.raises(CollectionChangedError, match="was changed since this was planned; plan again"):
        plan.run()
    assert DatasetCollection(tmp_path / "a.zarr").n_obs == 300


def test_an_extension_is_planned_and_run(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "a.zarr").add_adatas(paths[:1], seed=3)
    again = collection.plan_adatas(paths[1:], seed=4, mode="append").run()
    assert (again.n_obs, len(again)) == (600, 2)
    assert again.verify(against=paths).ok


def test_one_that_replaces_a_collection_does_so_when_it_is_run(tmp_path, paths):
    DatasetCollection(tmp_path / "a.zarr").add_adatas(paths[:1], seed=3)
    new = DatasetCollection(tmp_path / "a.zarr", mode="w")
    plan = new.plan_adatas(paths[1:], seed=4)
    assert DatasetCollection(tmp_path / "a.zarr").n_obs == 300
    plan.run()
    assert [s.path for s in DatasetCollection(tmp_path / "a.zarr").manifest.sources] == paths[1:]


@pytest.mark.filterwarnings("ignore:Loading h5ad:UserWarning")
def test_into_a_folder_of_h5ad_files(tmp_path, paths):
    collection = DatasetCollection(tmp_path / "h", is_collection_h5ad=True)
    plan = collection.plan_adatas(paths, dataset_size=200, seed=3)
    assert plan.run() is collection
    assert sorted(p.name for p in (tmp_path / "h").iterdir()) == [f"dataset_{k}.h5ad" for k in range(3)]
    assert len(collection.obs()) == 600


def test_workers_that_are_too_small_are_refused(tmp_path, paths, monkeypatch):
    from annbatch_dask import collection as module
    from annbatch_dask.engines.choose import choose_engine

    plan = DatasetCollection(tmp_path / "a.zarr").plan_adatas(paths)
    monkeypatch.setattr(module, "choose_engine", lambda *_: choose_engine(None, "450MiB"))
    with pytest.raises(MemoryBudgetError, match="plan again for these workers"):
        plan.run(client=object())


def test_what_is_left_out_is_said(tmp_path, paths):
    other = make_adata(50, [f"g{i}" for i in range(40)], seed=5)
    other.layers["more"] = np.ones(other.shape, np.float32)
    other.write_h5ad(tmp_path / "c.h5ad")
    plan = DatasetCollection(tmp_path / "a.zarr").plan_adatas([*paths, tmp_path / "c.h5ad"])
    with pytest.warns(UserWarning, match="left out: .*layers/more") as said:
        plan.run()
    assert [w.filename for w in said if "left out" in str(w.message)] == [__file__]
