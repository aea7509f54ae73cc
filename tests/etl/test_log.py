"""The log of a build says where its time went."""

import json

import pytest
from dask import config

from annbatch_dask import DatasetCollection
from annbatch_dask.etl.log import StageLog, limit_of, read_log


def test_the_log_says_what_the_limit_was(tmp_path, h5ad_pair):
    with config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0, dataset_size=200)
    build = collection.manifest.builds[-1]
    log = read_log(collection._root.target, build.plan)
    spent = {stage.name: set(stage.spent) for stage in log.stages}
    assert {"inflate", "spill"} <= spent["scatter"]
    assert {"wait", "encode", "write"} <= spent["gather"]
    assert log.limit in ("inflate", "spill", "write")
    assert sum(sum(stage.spent.values()) for stage in log.stages) <= log.seconds


def test_the_limit_is_what_took_most():
    def stage(**spent):
        return StageLog("scatter", 1, 0, 1, 1, 1.0, spent)

    assert limit_of([stage(inflate=2.0, read=1.0, spill=2.5), stage(encode=1.0, write=1.5)]) == "inflate"
    assert limit_of([stage(inflate=2.0, spill=1.5), stage(wait=1.0, encode=1.0, write=1.0)]) == "spill"
    assert limit_of([stage(inflate=1.0, hash=9.0), stage(wait=1.0, encode=1.0, write=1.0)]) == "write"
    assert limit_of([stage()]) == ""


@pytest.mark.parametrize("field", ["limit", "spent"])
def test_a_log_of_an_earlier_release_is_read(tmp_path, h5ad_pair, field):
    with config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0)
    target, plan = collection._root.target, collection.manifest.builds[-1].plan
    path = tmp_path / f"o.zarr.log/{plan}.json"
    values = json.loads(path.read_text())
    for place in (values, *values["stages"]):
        place.pop(field, None)
    path.write_text(json.dumps(values))
    assert read_log(target, plan).n_bytes_read > 0
