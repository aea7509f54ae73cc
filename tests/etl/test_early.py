"""What a build could not write is refused by its plan, before anything is read."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import LayoutError, SchemaError
from annbatch_dask.etl.frames import is_plain, write_frames
from annbatch_dask.testing import make_adata

pytestmark = pytest.mark.usefixtures("in_this_process")

GENES = [f"g{i}" for i in range(12)]


@pytest.fixture
def path(tmp_path):
    make_adata(30, GENES, seed=0).write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


def loader(change):
    def load(path):
        a = ad.read_h5ad(path)
        change(a)
        return a

    return load


def refused(tmp_path, paths, error, words, **options):
    collection = DatasetCollection(tmp_path / "o.zarr")
    for do in (collection.plan_adatas, collection.add_adatas):
        with pytest.raises(error, match=words):
            do(paths, **{"seed": 0} | options)
    assert not list(tmp_path.glob("o.zarr*"))


def slash(a):
    a.obs["CD4/CD8"] = 1.0


def no_name(a):
    a.obs[""] = 1.0


def layer(a):
    a.layers["a/b"] = a.X


def an_object(a):
    a.uns["model"] = object()


def nested_object(a):
    a.uns["deep"] = {"model": object()}


def a_time(a):
    a.var["day"] = pd.Timestamp(0)


def reserved(a):
    a.var["_index"] = 1.0


def a_wide_column(a):
    a.obs["wide"] = np.zeros(a.n_obs, np.longdouble)


def a_complex_column(a):
    a.obs["complex"] = np.zeros(a.n_obs, np.complex128)


def a_wide_layer(a):
    a.layers["wide"] = np.zeros(a.shape, np.longdouble)


def alike_as_text(a):
    a.obs["alike"] = pd.Categorical([1, "1"] * (a.n_obs // 2))


def surrogate_gene(a):
    a.var_names = [f"\ud800{i}" for i in range(a.n_vars)]


def surrogate(a):
    a.obs["text"] = pd.Series(["\ud800"] * a.n_obs, index=a.obs_names, dtype=object)


def surrogate_category(a):
    a.obs["text"] = pd.Categorical(["\ud800"] * a.n_obs)


def surrogate_name(a):
    a.obs_names = [f"\ud800{i}" for i in range(a.n_obs)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (slash, r"obs has 'CD4/CD8', which cannot be a name in a store; .*'-obs/CD4/CD8'"),
        (no_name, "obs has '', which cannot be a name"),
        (layer, "layers has 'a/b', which cannot be a name"),
        (an_object, "uns/model cannot be stored"),
        (nested_object, "uns/deep cannot be stored"),
        (a_time, "var cannot be stored"),
        (reserved, "var cannot be stored"),
        (a_wide_column, "obs column 'wide' of dtype float128 holds longdouble values; convert it"),
        (a_complex_column, "obs column 'complex' of dtype complex128 holds complex values; convert it"),
        (a_wide_layer, "layers/wide"),
        (alike_as_text, "obs column 'alike' has the categories 1 and '1', which are one as text"),
        (surrogate_gene, "var cannot be stored"),
        (surrogate, "obs column 'text': '.ud800' is no Unicode text"),
        (surrogate_category, "categories of obs/text: '.ud800' is no Unicode text"),
        (surrogate_name, "obs names: '.ud8000' is no Unicode text"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_no_store_holds_is_refused_by_the_plan(tmp_path, path, change, words):
    refused(tmp_path, [path], SchemaError, words, load_adata=loader(change))


@settings(max_examples=25)
@given(
    st.dictionaries(st.text("ab_ -./\0é", max_size=3), st.sampled_from(["b1", "i4", "u8", "f2", "f8"])),
    st.none() | st.text("ab_ -./é", max_size=3),
)
def test_a_frame_that_is_not_tried_can_be_stored(columns, name):
    index = pd.Index(GENES, dtype=object, name=name)
    frame = pd.DataFrame({k: np.zeros(len(GENES), dtype) for k, dtype in columns.items()}, index=index)
    if is_plain(frame):
        group = zarr.create_group({})
        write_frames(group, {"var": frame})
        pd.testing.assert_frame_equal(ad.io.read_elem(group["var"]), frame, check_names=False, check_index_type=False)


def test_what_is_left_out_is_not_refused(tmp_path, path):
    load = loader(lambda a: (slash(a), an_object(a)))
    options = {"load_adata": load, "elements": ["-obs/CD4/CD8", "-uns/model"]}
    assert DatasetCollection(tmp_path / "o.zarr").add_adatas([path], seed=0, **options).n_obs == 30


def test_a_chunk_that_no_codec_takes_is_refused_by_the_plan(tmp_path, path):
    words = r"n_obs_per_chunk is 2,147,483,648 and a cell takes .* bytes: a chunk would take .* GB, and holds 2\.1 GB"
    refused(tmp_path, [path], LayoutError, words, n_obs_per_chunk=2**31)


def test_a_chunk_of_more_cells_than_there_are_takes_what_there_is(tmp_path, path):
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas([path], seed=0, n_obs_per_chunk=2**20)
    data = next(iter(collection))["X/data"]
    assert data.chunks == data.shape
    assert collection.verify(against=[path]).ok


@pytest.mark.parametrize("name", ["barcode", "src_path", "_index"])
def test_an_index_with_the_name_of_a_column_has_none(tmp_path, name):
    paths = []
    for k in range(2):
        a = make_adata(20, GENES, seed=k)
        if k and name == "barcode":
            a.obs[name] = a.obs_names.to_numpy()
        a.obs.index.name = name
        paths.append(a)
    collection = DatasetCollection(tmp_path / "o.zarr")
    for k in range(2):
        make_adata(20, GENES, seed=k).write_h5ad(tmp_path / f"{k}.h5ad")
    files = [tmp_path / f"{k}.h5ad" for k in range(2)]
    by_file = dict(zip(map(str, files), paths, strict=True))
    collection.add_adatas(files, seed=0, load_adata=lambda p: by_file[str(p)])
    got = collection.obs()
    assert got.index.name is None
    assert sorted(got.index) == sorted([*paths[0].obs_names, *paths[1].obs_names])
    if name == "barcode":
        there = got[got["src_path"] == str(files[1])]
        assert there["barcode"].tolist() == there.index.tolist()
    assert np.isin(got["src_path"], list(by_file)).all()
