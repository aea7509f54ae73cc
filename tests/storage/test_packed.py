"""The codec of packed integers, as zarr and anndata use it: here, in other processes, and where it is missing."""

import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from zarr.codecs import Crc32cCodec
from zarrs.pipeline import UnsupportedMetadataError

import annbatch_dask
from annbatch_dask.errors import IntegrityError, LayoutError
from annbatch_dask.kernels.packing import pack
from annbatch_dask.storage.packed import PACKED, PackedCodec, unpack_chunk

ROOT = Path(annbatch_dask.__file__).parents[1]


def create(store, values, *, differences=True, chunks=300, shards=900, name=None):
    return zarr.create_array(
        store,
        name=name,
        data=values,
        chunks=(chunks, *values.shape[1:]),
        shards=None if shards is None else (shards, *values.shape[1:]),
        serializer=PackedCodec(differences),
        compressors=Crc32cCodec(),
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">u2", "int32", ">i4", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("shards", [None, 900])
def test_zarr_writes_and_reads_it(dtype, shards):
    values = np.random.default_rng(0).integers(0, 100, 2000).astype(dtype)
    store = {}
    create(store, values, shards=shards)
    array = zarr.open_array(store, mode="r+")
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[123:1500:7], values[123:1500:7])
    array[10:20] = 5
    values[10:20] = 5
    np.testing.assert_array_equal(array[:], values)
    assert np.dtype(array.dtype).name == np.dtype(dtype).name


def test_matrices_of_integers_can_be_packed():
    values = np.random.default_rng(0).integers(0, 9, (100, 30), np.uint16)
    store = {}
    create(store, values, differences=False, chunks=10, shards=50)
    np.testing.assert_array_equal(zarr.open_array(store)[13:57, 3:], values[13:57, 3:])


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_what_is_no_integer_is_refused(dtype):
    with pytest.raises(LayoutError, match=f"packs integers, and the array is of {dtype}"):
        zarr.create_array({}, shape=5, dtype=dtype, serializer=PackedCodec(), compressors=None)


def test_a_configuration_of_a_later_release_is_refused():
    with pytest.raises(LayoutError, match="upgrade"):
        PackedCodec.from_dict({"name": PACKED, "configuration": {"differences": True, "lanes": 3}})
    with pytest.raises(LayoutError, match="upgrade"):
        PackedCodec.from_dict({"name": PACKED, "configuration": {"differences": "rows"}})


@pytest.mark.parametrize("codec", [PackedCodec(), PackedCodec(differences=True)])
def test_it_pickles_and_is_its_metadata(codec):
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert PackedCodec.from_dict(codec.to_dict()) == codec


def test_an_array_of_it_pickles(tmp_path):
    values = np.arange(1000, dtype=np.uint16)
    create(tmp_path / "a.zarr", values)
    array = zarr.open_array(tmp_path / "a.zarr", mode="r")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array))[:], values)


@pytest.mark.parametrize("n_bytes", [0, 7, 23, 100])
def test_a_damaged_chunk_is_an_integrity_error(n_bytes):
    raw = bytes(pack(np.arange(300, dtype=np.uint16), differences=False))[:n_bytes]
    with pytest.raises(IntegrityError, match=r"packed chunk of \d+ bytes and 300 values of uint16 is damaged"):
        unpack_chunk(raw, np.empty(300, np.uint16))


def test_zarr_passes_the_error_on():
    store = {}
    values = np.arange(300, dtype=np.uint16)
    zarr.create_array(store, data=values, chunks=300, serializer=PackedCodec(), compressors=None)
    key = next(k for k in store if k.startswith("c/"))
    store[key] = store[key][:50]
    with pytest.raises(IntegrityError, match="damaged"):
        zarr.open_array(store)[:]


# ------------------------------------------------------------------------------------------ other processes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """An AnnData whose X is packed, and X."""
    path = tmp_path_factory.mktemp("packed") / "a.zarr"
    counts = sp.random_array((200, 500), density=0.2, random_state=np.random.default_rng(0), format="csr")
    counts.data = np.ceil(counts.data * 9)
    counts = sp.csr_matrix(counts.astype(np.uint16))
    group = zarr.open_group(path, mode="w", zarr_format=3)
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(group, "/", ad.AnnData(counts))
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name, differences in (("indices", True), ("data", False)):
        values = group["X"][name][:]
        del group["X"][name]
        create(group["X"].store, values, differences=differences, chunks=3000, shards=9000, name=f"X/{name}")
    return path, counts.toarray()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that says of this package what installing it says."""
    site = tmp_path_factory.mktemp("site")
    (site / "annbatch_dask").symlink_to(ROOT / "annbatch_dask")
    info = site / "annbatch_dask-99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: annbatch-dask\nVersion: 99\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items())
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


def run(code, *arguments, path):
    env = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=path)


READ = """
import sys
import anndata as ad
X = ad.read_zarr(sys.argv[1]).X.toarray()
print(X.sum(), "annbatch_dask.collection" in sys.modules)
"""


def test_anndata_alone_reads_it_where_the_package_is_installed(dataset, installed):
    path, counts = dataset
    done = run(READ, path, path=installed)
    assert done.stdout.split() == [str(counts.sum()), "False"], done.stderr


WITHOUT = "import sys\nsys.modules['annbatch_dask'] = None\n"


def test_the_error_names_the_package_where_it_is_missing(dataset, tmp_path):
    done = run(
        WITHOUT + "import zarr\nzarr.open_group(sys.argv[1], use_consolidated=False)['X/data']",
        dataset[0],
        path=tmp_path,
    )
    assert done.returncode != 0
    assert "annbatch_dask" in done.stderr.splitlines()[-1]


ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}


def test_the_pipeline_of_zarrs_leaves_it_to_zarr(dataset):
    """zarrs runs no codec that is written for zarr, and says so."""
    path, counts = dataset
    with zarr.config.set(ZARRS), pytest.warns(UserWarning, match=f"unsupported by ZarrsCodecPipeline.*{PACKED}"):
        found = ad.io.read_zarr(path)
    np.testing.assert_array_equal(found.X.toarray(), counts)


def test_the_strict_pipeline_of_zarrs_refuses_it(dataset):
    with zarr.config.set(ZARRS | {"codec_pipeline.strict": True}), pytest.raises(UnsupportedMetadataError):
        zarr.open_group(dataset[0], mode="r")["X/data"]
