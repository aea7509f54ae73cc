"""Views of files on a web server and on S3: equal to local ones, and of X nothing is read until it is used."""

import threading
from http.server import ThreadingHTTPServer

import anndata as ad
import fsspec
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import concat_lazy, read_lazy
from annbatch_dask.storage import ahead
from tests.lazy.files import assert_equal, make, read, write
from tests.s3.server import S3Server
from tests.tools import RangeHandler


class Web(RangeHandler):
    """A folder over HTTP, with ranges; keeps what it sent."""

    def send_header(self, keyword, value):
        if keyword == "Content-Length" and self.command == "GET":
            self.server.sent.append((self.path.lstrip("/"), int(value)))
        super().send_header(keyword, value)

    def answer(self, send):
        self.path += "?token=s3cr3t"
        super().answer(send)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write(folder, "h5ad")
    write(folder, "zarr")
    return folder


@pytest.fixture(scope="module")
def web(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.folder, server.sent = folder, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def s3(folder):
    server = S3Server()
    fs = fsspec.filesystem("s3", **server.options)
    fs.call_s3("create_bucket", Bucket="lazy")
    fs.put(str(folder), "lazy/", recursive=True)
    yield server, f"s3://lazy/{folder.name}"
    server.stop()


def urls(base, kind, n=3):
    return [f"{base}/part_{k}.{kind}" for k in range(n)]


def keys_of_x(names):
    """Chunks of matrices among the names of files."""
    return [n for n in names if any(f"/{m}/" in n for m in ("X", "twice", "X_pca")) and "zarr.json" not in n]


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_view_over_http_equals_the_local_one(folder, web, kind):
    web.sent.clear()
    view = concat_lazy(urls(f"http://127.0.0.1:{web.server_port}", kind))
    found = view[view.obs["cell_type"] == "T"]
    if kind == "zarr":
        assert web.sent
        assert not keys_of_x(name for name, _ in web.sent)
    expected = ad.concat([read(folder / f"part_{k}.{kind}") for k in range(3)], join="outer")
    assert_equal(found.to_memory(), expected[expected.obs["cell_type"] == "T"].copy())


@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:zarr v3 autosharding", "ignore:Writing zarr v2")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_anndatas_tutorial_on_lazy_data(folder, web, zarr_format):
    """A store of either version at a URL: X lazy and obs in memory, and the same by way of ours."""
    expected = make(0)
    group = zarr.open_group(folder / f"v{zarr_format}.zarr", mode="w", zarr_format=zarr_format)
    ad.io.write_elem(group, "/", expected)
    zarr.consolidate_metadata(group.store, zarr_format=zarr_format)
    wanted = expected[expected.obs["cell_type"] == "T"].X.toarray()
    url = f"http://127.0.0.1:{web.server_port}/v{zarr_format}.zarr"
    for group in (zarr.open_group(url, mode="r"), zarr.open_group(fsspec.get_mapper(url), mode="r")):
        obs, var = ad.io.read_elem(group["obs"]), ad.io.read_elem(group["var"])
        theirs = ad.AnnData(X=ad.experimental.read_elem_lazy(group["X"]), obs=obs, var=var)
        for adata in (theirs, read_lazy(group), read_lazy(url)):
            np.testing.assert_array_equal(adata[adata.obs["cell_type"] == "T", :].X.compute().toarray(), wanted)


@pytest.mark.s3
@pytest.mark.parametrize("kind", [pytest.param("h5ad", marks=pytest.mark.chaos), "zarr"])
def test_a_view_on_s3_equals_the_local_one(folder, s3, kind):
    server, base = s3
    with server.recorded() as requests:
        view = concat_lazy(urls(base, kind, n=2), storage_options=server.options)
        found = view[view.obs["cell_type"] == "T"]
    if kind == "zarr":
        assert any(r.method == "GET" for r in requests)
        assert not keys_of_x(r.key for r in requests if r.method == "GET")
    expected = ad.concat([read(folder / f"part_{k}.{kind}") for k in range(2)], join="outer")
    assert_equal(found.to_memory(), expected[expected.obs["cell_type"] == "T"].copy())


def test_opening_and_slicing_a_remote_hdf5_file_leaves_its_matrices_where_they_are(folder, web, monkeypatch):
    monkeypatch.setattr(ahead, "_BLOCK_NBYTES", 4096)
    X = sp.random(2000, 300, density=0.5, format="csr", dtype=np.float32, random_state=0)
    obs = pd.DataFrame({"cell_type": pd.Categorical(["B", "T"] * 1000)}, index=[f"c{i}" for i in range(2000)])
    ad.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(300)])).write_h5ad(folder / "large.h5ad")
    web.sent.clear()
    view = read_lazy(f"http://127.0.0.1:{web.server_port}/large.h5ad")
    view = view[view.obs["cell_type"] == "T", ["g3", "g7"]]
    in_x = 8 * X.nnz
    assert 0 < sum(n for _, n in web.sent) < in_x / 4
    np.testing.assert_array_equal(view.X.compute().toarray(), X[1::2][:, [3, 7]].toarray())
    assert sum(n for _, n in web.sent) > in_x
