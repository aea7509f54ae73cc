"""Bad input fails before any work, with a message that says what to do, and touches nothing."""

import fcntl
import os

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import (
    AnnbatchDaskError,
    CollectionError,
    LayoutError,
    MemoryBudgetError,
    SchemaError,
    SourceError,
    SourceNotFoundError,
    StorageError,
)
from annbatch_dask.storage import transient

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def out(tmp_path):
    """A target; whatever a test does, nothing may appear beside or in it."""
    path = tmp_path / "target" / "out.zarr"
    path.parent.mkdir()
    yield path
    assert not list(path.parent.iterdir())


def small(**obs):
    n = len(next(iter(obs.values()))) if obs else 3
    frame = pd.DataFrame(obs, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(X=sp.csr_matrix(np.eye(n, 4, dtype=np.float32)), obs=frame, var=pd.DataFrame(index=list("abcd")))


def add(out, paths, **options):
    return DatasetCollection(out).add_adatas(paths, **options)


def test_a_missing_file(out, h5ad_pair, tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"nowhere\.h5ad does not exist; check the path"):
        add(out, [h5ad_pair[0], tmp_path / "nowhere.h5ad"])
    with pytest.raises(FileNotFoundError):
        add(out, [tmp_path / "nowhere.h5ad"])
    with pytest.raises(SourceNotFoundError, match=r"\*\.h5ad does not exist; give the files of the pattern"):
        add(out, [tmp_path / "*.h5ad"])


def test_a_truncated_file(out, h5ad_pair, tmp_path):
    cut = tmp_path / "cut.h5ad"
    raw = h5ad_pair[0].read_bytes()
    cut.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(
        SourceError, match=rf"cut\.h5ad \({len(raw) // 2:,} bytes\) is not a whole HDF5 file.*copy it again"
    ):
        add(out, [cut])


def test_a_file_that_may_not_be_read(out, h5ad_pair, monkeypatch):
    """It is as whole as before, and to copy it again would not help."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refused)
    with pytest.raises(SourceError, match=r"may not be read by this user .*Permission denied"):
        add(out, h5ad_pair)


def test_names_that_are_no_text(out, h5ad_pair, tmp_path):
    """As those of other letters where the locale knows ASCII alone."""
    path = tmp_path / os.fsdecode(b"\xff.h5ad")
    path.write_bytes(h5ad_pair[0].read_bytes())
    with pytest.raises(SourceError, match=r"\\udcff.h5ad' is no text .* set LC_ALL=C\.UTF-8, or .* rename it"):
        add(out, [path])
    with pytest.raises(CollectionError, match=r"\\udcff.zarr' is no text .* rename it"):
        add(out.with_name(os.fsdecode(b"\xff.zarr")), h5ad_pair)


def test_a_file_that_another_process_writes(out, h5ad_pair, monkeypatch):
    """HDF5 locks it, and tells of an errno."""
    monkeypatch.setattr(transient, "sleep", lambda _: None)
    with open(h5ad_pair[1], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"another process has it open to write: close it there, .*part_1.h5ad"):
            add(out, h5ad_pair)


def test_a_text_file_named_h5ad(out, tmp_path):
    (tmp_path / "t.h5ad").write_text("gene,count\n")
    with pytest.raises(SourceError, match="is no HDF5 file and not a zarr AnnData store .*; give an .h5ad file"):
        add(out, [tmp_path / "t.h5ad"])


@pytest.mark.parametrize(("parts", "frames"), [("mod", ["obs", "var"]), ("tables", [])])
def test_a_file_of_several_anndata_says_where_they_are(parts, frames, out, tmp_path, h5ad_pair):
    with h5py.File(h5ad_pair[0]) as one, h5py.File(tmp_path / "several.h5mu", "w") as several:
        for name in ("rna", "protein"):
            one.copy("/", several.require_group(parts), name)
        for name in frames:  # a MuData has those of all modalities
            one.copy(name, several)
    with pytest.raises(SourceError, match=f"holds several AnnData .{parts}/protein, {parts}/rna.; give one of them"):
        add(out, [tmp_path / "several.h5mu"])
    with h5py.File(tmp_path / "several.h5mu") as several:
        assert add(tmp_path / "a.zarr", [several[f"{parts}/rna"]]).n_obs == ad.read_h5ad(h5ad_pair[0]).n_obs


def test_a_file_that_is_not_anndata(out, tmp_path):
    import h5py

    with h5py.File(tmp_path / "other.h5ad", "w") as f:
        f["numbers"] = [1, 2]
    with pytest.raises(SourceError, match="has no obs and var"):
        add(out, [tmp_path / "other.h5ad"])


def test_a_folder_that_is_no_store(out, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match="is no HDF5 file and not a zarr AnnData store"):
        add(out, [tmp_path / "folder"])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_duplicate_var_names(out, h5ad_pair, tmp_path):
    a = small()
    a.var_names = ["a", "b", "a", "c"]
    a.write_h5ad(tmp_path / "dup.h5ad")
    for paths in ([tmp_path / "dup.h5ad"], [h5ad_pair[0], tmp_path / "dup.h5ad"]):
        with pytest.raises(
            SchemaError, match=r"var_names are not unique: 4 names, 3 distinct.*'a'.*var_names_make_unique"
        ):
            add(out, paths)


def test_an_empty_list_and_a_bare_path(out, h5ad_pair):
    with pytest.raises(SourceError, match="adata_paths is empty; give at least one"):
        add(out, [])
    with pytest.raises(TypeError, match="give a list of paths"):
        add(out, str(h5ad_pair[0]))
    with pytest.raises(TypeError, match=r"adata_paths is a set; give a list, .*sorted\(paths\)"):
        add(out, set(h5ad_pair))


def test_the_same_file_twice(out, h5ad_pair):
    with pytest.raises(SourceError, match="given 2 times"):
        add(out, [h5ad_pair[0], h5ad_pair[0]])


def test_only_empty_files(out, tmp_path):
    small()[:0].write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(SchemaError, match="no input has a cell"):
        add(out, [tmp_path / "none.h5ad"])


def ordered(*categories):
    return pd.Categorical([categories[0]] * 3, categories=categories, ordered=True)


def test_categoricals_with_clashing_orders(out, tmp_path):
    small(stage=ordered("early", "mid", "late")).write_h5ad(tmp_path / "a.h5ad")
    small(stage=ordered("late", "early")).write_h5ad(tmp_path / "b.h5ad")
    clash = r"\(.*early < mid < late; .*late < early\), so that .*'late' < 'early'"
    with pytest.raises(SchemaError, match=f"'stage' is ordered in clashing ways {clash}"):
        add(out, [tmp_path / "a.h5ad", tmp_path / "b.h5ad"])


def test_an_error_names_a_few_of_many_categories(out, tmp_path):
    names = [f"c{k}" for k in range(1000)]
    small(stage=ordered(*names)).write_h5ad(tmp_path / "a.h5ad")
    small(stage=ordered(*names[::-1])).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(SchemaError, match=r"c0 < c1 < c2 < c3 < c4 < \.\.\.") as caught:
        add(out, [tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    assert len(str(caught.value)) < 1000


def test_orders_that_do_not_decide(out, tmp_path):
    small(stage=ordered("early", "late")).write_h5ad(tmp_path / "a.h5ad")
    small(stage=ordered("early", "mid")).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(SchemaError, match="do not say how 'late' and 'mid' compare|do not say how 'mid' and 'late'"):
        add(out, [tmp_path / "a.h5ad", tmp_path / "b.h5ad"])


def test_orders_that_agree_are_merged(tmp_path):
    small(stage=ordered("early", "late")).write_h5ad(tmp_path / "a.h5ad")
    small(stage=ordered("early", "mid", "late")).write_h5ad(tmp_path / "b.h5ad")
    stage = add(tmp_path / "o.zarr", [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]).obs()["stage"]
    assert stage.cat.ordered
    assert stage.cat.categories.tolist() == ["early", "mid", "late"]


def test_ordered_in_one_and_not_in_the_other(out, tmp_path):
    small(stage=ordered("early", "late")).write_h5ad(tmp_path / "a.h5ad")
    small(stage=pd.Categorical(["late"] * 3)).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(SchemaError, match="ordered in .*a.h5ad and unordered in .*b.h5ad"):
        add(out, [tmp_path / "a.h5ad", tmp_path / "b.h5ad"])


@pytest.mark.parametrize("values", [pd.Categorical(["x", "y", "x"]), ["x", "y", "x"], [1, 2, 3], [True, False, True]])
@pytest.mark.parametrize("is_first", [True, False])
def test_categories_that_are_none_clash_with_nothing(tmp_path, values, is_first):
    """A column of missing values alone: pandas says that its categories are floats."""
    small(label=pd.Categorical([np.nan] * 3)).write_h5ad(tmp_path / "empty.h5ad")
    small(label=values).write_h5ad(tmp_path / "values.h5ad")
    names = ["empty", "values"] if is_first else ["values", "empty"]
    collection = add(tmp_path / "o.zarr", [tmp_path / f"{name}.h5ad" for name in names])
    label = collection.obs()["label"]
    assert label.isna().sum() == 3
    assert sorted(label.dropna()) == sorted(values)


def test_columns_of_clashing_kinds(out, tmp_path):
    small(cluster=pd.Categorical(["x", "y", "z"])).write_h5ad(tmp_path / "a.h5ad")
    small(cluster=[1, 2, 3]).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(SchemaError, match=r"'cluster' holds categories of dtype str in .*a.h5ad and int64 in .*b.h5ad"):
        add(out, [tmp_path / "a.h5ad", tmp_path / "b.h5ad"])


def test_no_x(out, tmp_path):
    a = small()
    a.X = None
    a.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(SchemaError, match="has no X; name the matrix to shuffle with counts"):
        add(out, [tmp_path / "a.h5ad"])


def test_a_dataset_larger_than_memory_allows(out, h5ad_pair):
    """Matrices stream through in parts; a dataset's obs is held whole, so that is what does not fit."""
    paths = [str(p) for p in h5ad_pair]
    many = DatasetCollection(out).plan_adatas(paths, seed=0)
    assert many.peak_nbytes[1] < many.budget.task_nbytes
    with pytest.raises(
        MemoryBudgetError, match=r"needs .* MB and a worker thread has .*B.*start workers with more memory"
    ):
        add(out, h5ad_pair, memory_limit="430MiB")
    with pytest.raises(MemoryError):
        add(out, h5ad_pair, memory_limit="430MiB")


def test_a_dataset_whose_obs_exceeds_memory_names_dataset_size():
    from annbatch_dask.plan.build import build_plan
    from annbatch_dask.plan.memory import MIB, Budget
    from annbatch_dask.plan.options import Options
    from annbatch_dask.plan.schema import MatrixSchema, SourceSchema

    n = 50_000_000
    nnz = np.arange(0, n + 1, 64, dtype=np.int64) * 100
    source = SourceSchema(
        "big.h5ad", n, np.array(["a", "b"], object), (MatrixSchema("X", "csr", "float32", "int32", 2, 64, nnz),), ()
    )
    budget = Budget(2000 * MIB)
    with pytest.raises(
        MemoryBudgetError, match=r"gathering a dataset of 50,000,000 cells needs .* GB.*lower dataset_size"
    ):
        build_plan([source], Options(seed=0, dataset_rows=n), budget=budget)
    plan = build_plan([source], Options(seed=0, dataset_rows=1_000_000), budget=budget)
    assert max(plan.peak_nbytes) <= budget.task_nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_size": 0}, "dataset_size is 0"),
        ({"dataset_size": "much"}, "dataset_size is 'much'; give a number of cells"),
        ({"dataset_size": "1B"}, "not one fits; raise dataset_size"),
        ({"n_obs_per_chunk": 0}, "n_obs_per_chunk is 0"),
        ({"n_obs_per_chunk": "64"}, "n_obs_per_chunk is '64'; it must be a whole number"),
        ({"n_obs_per_chunk": 64.0}, r"n_obs_per_chunk is 64\.0; it must be a whole number"),
        ({"zarr_compressor": "blosc"}, "zarr_compressor is 'blosc'; give a codec of zarr.codecs"),
        ({"shard_size": -1}, "shard_size is -1"),
        ({"zarr_compressor": zarr.codecs.Crc32cCodec()}, "give one of"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_sizes_that_cannot_be(out, h5ad_pair, options, message):
    with pytest.raises(LayoutError, match=message):
        add(out, h5ad_pair, **options)


def test_seed_and_rng(out, h5ad_pair):
    with pytest.raises(ValueError, match="give one"):
        add(out, h5ad_pair, seed=1, rng=np.random.default_rng())
    with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator"):
        add(out, h5ad_pair, rng="x")


def test_a_subset_without_known_genes(out, h5ad_pair):
    with pytest.raises(SchemaError, match="var_subset names 1 genes and none is among the 58 genes"):
        add(out, h5ad_pair, var_subset=["TP53"])


class TestTargets:
    """An output path that exists and is not a collection stays as it was."""

    def refused(self, path, message):
        before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
        with pytest.raises(CollectionError, match=message):
            DatasetCollection(path)
        assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before

    def test_a_file(self, tmp_path):
        (tmp_path / "x.zarr").write_text("mine")
        self.refused(tmp_path / "x.zarr", "is a file, not a collection; give another path")

    def test_a_folder_of_something(self, tmp_path):
        (tmp_path / "x.zarr").mkdir()
        (tmp_path / "x.zarr" / "thesis.tex").write_text("mine")
        self.refused(tmp_path / "x.zarr", r"exists and is not a collection: it holds \['thesis.tex'\]")

    def test_an_anndata_store(self, tmp_path):
        zarr.open_group(tmp_path / "x.zarr", mode="w", attributes={"encoding-type": "anndata"}).create_group("obs")
        self.refused(tmp_path / "x.zarr", "exists and is not a collection but anndata")

    def test_a_collection_with_cells(self, tmp_path, h5ad_pair):
        collection = add(tmp_path / "x.zarr", h5ad_pair[:1], seed=0)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(CollectionError, match="is in .* already, with 300 cells; leave it out"):
            collection.add_adatas(h5ad_pair, on_duplicate_source="error")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    def test_a_missing_one_to_read(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no collection at"):
            DatasetCollection(tmp_path / "x.zarr", mode="r")

    def test_memory_store(self, h5ad_pair):
        group = zarr.open_group(zarr.storage.MemoryStore(), mode="w")
        with pytest.raises(CollectionError, match="need a path or URL that workers can open"):
            DatasetCollection(group).add_adatas(h5ad_pair)

    def test_other_types(self):
        with pytest.raises(TypeError, match="a path or a zarr.Group, not int"):
            DatasetCollection(3)

    def test_no_suffix_warns(self, tmp_path):
        with pytest.warns(UserWarning, match="collections have the `.zarr` suffix"):
            DatasetCollection(tmp_path / "x")


def test_a_column_index_out_of_range(tmp_path):
    import h5py

    small().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as f:
        f["X/indices"][1] = 99
    with pytest.raises(SchemaError, match="column indices run from 0 to 99 in a matrix of 4 columns") as caught:
        add(tmp_path / "o.zarr", [tmp_path / "a.h5ad"], seed=0)
    assert any("a.h5ad, rows 0 to 3" in note for note in caught.value.__notes__)
    assert DatasetCollection(tmp_path / "o.zarr").is_empty


def test_row_pointers_of_which_the_file_is_missing(out, tmp_path):
    """zarr reads zeros there, which would be rows without values."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(group, "/", small())
    (tmp_path / "a.zarr/X/indptr/c/0").unlink()
    with pytest.raises(SchemaError, match="indptr gives no row any of 3 values, .*; copy it again"):
        add(out, [tmp_path / "a.zarr"])


def listed(h, name):
    """Say in a file that obs has a column of this name."""
    h["obs"].attrs["column-order"] = np.array([*h["obs"].attrs["column-order"], name], dtype=object)


def a_column_that_is_not_there(h):
    listed(h, "lost")


def a_short_column(h):
    h["obs"].create_dataset("short", data=np.arange(2)).attrs.update({"encoding-type": "array"})
    listed(h, "short")


def a_long_column(h):
    h["obs"].create_dataset("long", data=np.arange(4)).attrs.update({"encoding-type": "array"})
    listed(h, "long")


def too_few_codes(h):
    del h["obs/kind/codes"]
    h["obs/kind/codes"] = np.zeros(2, "i1")


def no_order_of_columns(h):
    del h["obs"].attrs["column-order"]


def no_index(h):
    h["obs"].attrs["_index"] = "lost"


def no_row_pointers(h):
    del h["X/indptr"]


def no_shape(h):
    del h["X"].attrs["shape"]


def a_shape_of_three(h):
    h["X"].attrs["shape"] = [3, 4, 1]


def a_link_that_leads_nowhere(h):
    del h["X"]
    h["X"] = h5py.SoftLink("/lost")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (a_column_that_is_not_there, SourceError, r"a\.h5ad is not as anndata writes files: KeyError: .*'lost'"),
        (a_short_column, SchemaError, r"a\.h5ad: obs/short has 2 rows and obs has 3; the file is damaged"),
        (a_long_column, SchemaError, "obs/long has 4 rows and obs has 3"),
        (too_few_codes, SchemaError, "obs/kind has 2 rows and obs has 3"),
        (no_order_of_columns, SourceError, r"KeyError: .*'column-order'"),
        (no_index, SourceError, r"KeyError: .*'lost'.*; it is damaged, or another program wrote it"),
        (no_row_pointers, SourceError, r"KeyError: .*'indptr'"),
        (no_shape, SourceError, r"KeyError: .*'shape'"),
        (a_shape_of_three, SourceError, "ValueError: too many values.*: write it anew with anndata, or read it in"),
        (a_link_that_leads_nowhere, SourceError, "KeyError: "),
    ],
)
def test_a_file_that_anndata_did_not_write_so(out, tmp_path, spoil, error, message):
    small(kind=ordered("early", "late")).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as h:
        spoil(h)
    with pytest.raises(error, match=message):
        add(out, [tmp_path / "a.h5ad"])


def test_names_of_cells_may_be_numbers(tmp_path):
    """Files of other programs have them; anndata makes text of them, too."""
    small().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as h:
        name = h["obs"].attrs["_index"]
        del h["obs"][name]
        h["obs"].create_dataset(name, data=[7, 8, 9]).attrs.update({"encoding-type": "array"})
    collection = add(tmp_path / "o.zarr", [tmp_path / "a.h5ad"], seed=0)
    assert sorted(collection.obs().index) == ["7", "8", "9"]
    assert collection.verify(against=[tmp_path / "a.h5ad"]).ok


def twice(a):
    a.var = pd.concat([a.var.assign(symbol="x")] * 2, axis=1)


def levels(a):
    a.obs.index = pd.MultiIndex.from_arrays([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (twice, "a: var has columns 'symbol' and 'symbol', which are stored under one name; rename one in load_adata"),
        (levels, "a: the index of obs is a MultiIndex of 2 levels; give each row one name in load_adata"),
    ],
)
def test_frames_in_memory_that_no_file_can_hold(out, spoil, message):
    def load(_):
        a = small()
        spoil(a)
        return a

    with pytest.raises(SchemaError, match=message):
        add(out, ["a"], load_adata=load)


def test_nan_and_infinite_values_are_data(tmp_path):
    a = small()
    a.X.data[:] = [np.nan, np.inf, -np.inf]
    a.write_h5ad(tmp_path / "a.h5ad")
    collection = add(tmp_path / "o.zarr", [tmp_path / "a.h5ad"], seed=0)
    out = ad.io.read_zarr(next(iter(collection)))
    assert sorted(map(str, out.X.data.tolist())) == ["-inf", "inf", "nan"]
    assert collection.manifest.matrices["X"].n_nan == 1
    assert collection.manifest.matrices["X"].n_inf == 2
    plan = DatasetCollection(tmp_path / "p.zarr").plan_adatas([tmp_path / "a.h5ad"], seed=0, read_values=True)
    assert "1 NaN and 2 infinite values, kept as they are" in repr(plan)


def test_every_error_is_also_a_builtin():
    for cls in AnnbatchDaskError.__subclasses__():
        assert any(
            b.__module__ == "builtins" and b not in (Exception, object) for b in cls.__mro__ if b is not BaseException
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"var_subset": "ab"}, TypeError, "var_subset is the text 'ab'; give a list of names"),  # not genes a and b
        ({"elements": 5}, TypeError, "elements is 5; give a list of names"),
        ({"groupby": 5}, TypeError, "groupby is 5; give a list of names"),
        ({"shuffle": "no"}, TypeError, "shuffle is the text 'no'; give True or False"),  # not True
        ({"stats": "false"}, TypeError, "stats is the text 'false'; give True or False"),
        ({"merge": "all"}, ValueError, "merge is 'all'; give one of 'same'"),
        ({"where": 5}, TypeError, "where is 5; give a condition on obs as text"),
        ({"where": np.ones(3, bool)}, TypeError, "where is array"),
        ({"where": {"*": None}}, TypeError, "where is {'[*]': None}; give a condition"),
        ({"counts": 5}, TypeError, "counts is 5; give the name of a matrix"),
        ({"scratch": ""}, CollectionError, "the path is empty, which would be the current folder"),
    ],
)
def test_arguments_of_another_kind(out, h5ad_pair, options, error, message):
    with pytest.raises(error, match=message):
        add(out, h5ad_pair, **options)


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CollectionError, match="the path is empty"):
        DatasetCollection("")
    with pytest.raises(SourceError, match="an input's path is empty"):
        DatasetCollection("o.zarr").plan_adatas([""])


def test_an_array_is_no_collection(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype="i4")
    with pytest.raises(CollectionError, match="exists and is not a collection but a zarr array; give another path"):
        DatasetCollection(tmp_path / "a.zarr")


def test_a_version_of_what_is_no_collection(tmp_path):
    zarr.create_group(tmp_path / "a.zarr", attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"})
    with pytest.raises(CollectionError, match="exists and is not a collection but anndata; give another path"):
        DatasetCollection(tmp_path / "a.zarr", version=1)


def test_a_folder_that_is_no_input_is_not_walked_through(out, tmp_path):
    """It may be a whole disk; this one cannot be."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/round").symlink_to(tmp_path / "disk")
    with pytest.raises(SourceError, match="is no HDF5 file and not a zarr AnnData store"):
        add(out, [tmp_path / "disk"])
