"""Inputs and collections in stores other than S3: the process's own memory, and a web server."""

import threading
from http.server import ThreadingHTTPServer

import dask
import fsspec
import numpy as np
import pytest
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError, IntegrityError, SchedulerError, SourceError, SourceNotFoundError
from tests.s3.tools import contents, epoch
from tests.tools import RangeHandler

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs.clear()


@pytest.fixture
def web(h5ad_pair):
    server = ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    server.folder = h5ad_pair[0].parent
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_in_memory(memory, h5ad_pair, tmp_path):
    urls = [f"memory://in/{path.name}" for path in h5ad_pair]
    for url, path in zip(urls, h5ad_pair, strict=True):
        memory.pipe_file(url, path.read_bytes())
    collection = DatasetCollection("memory://o.zarr").add_adatas(urls, seed=0, dataset_size=150)
    local = DatasetCollection(tmp_path / "o.zarr").add_adatas(urls, seed=0, dataset_size=150)
    assert contents(memory, "memory://o.zarr") == contents(fsspec.filesystem("file"), str(tmp_path / "o.zarr"))
    assert collection.verify(against=urls).ok
    opened = DatasetCollection("memory://o.zarr", mode="r")
    np.testing.assert_array_equal(np.concatenate(epoch(opened)), np.concatenate(epoch(local)))
    assert not [path for path in memory.find("/") if ".scratch" in path or ".claim" in path]


@pytest.mark.parametrize("where", ["output", "scratch", "input", "plan"])
def test_what_is_in_memory_is_refused_where_tasks_run_in_other_processes(where, memory, h5ad_pair, tmp_path):
    """They looked for it for two minutes, and said then that it had been there before."""
    out = tmp_path / "o.zarr" if where in ("scratch", "input") else "memory://o.zarr"
    paths = ["memory://in/a.h5ad"] if where == "input" else h5ad_pair
    memory.pipe_file("memory://in/a.h5ad", h5ad_pair[0].read_bytes())
    options = {"scratch": "memory://scratch"} if where == "scratch" else {}
    collection = DatasetCollection(out)
    with dask.config.set(scheduler="processes"), pytest.raises(SchedulerError, match=r"memory://.*scheduler='threads'"):
        if where == "plan":
            collection.plan_adatas(paths).run()
        else:
            collection.add_adatas(paths, **options)
    assert collection.is_empty


def test_inputs_from_a_web_server_and_no_word_of_their_signature(web, h5ad_pair, tmp_path):
    urls = [f"{web}/{path.name}?token=s3cr3t" for path in h5ad_pair]
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(urls, seed=0)
    assert [s.path for s in collection.manifest.sources] == [f"{web}/{path.name}" for path in h5ad_pair]
    assert collection.verify(against=urls).ok
    assert collection.obs()["src_path"].cat.categories.tolist() == sorted(f"{web}/{path.name}" for path in h5ad_pair)
    for content in contents(fsspec.filesystem("file"), str(tmp_path)).values():
        assert b"s3cr3t" not in content


def test_a_page_that_is_not_there_is_named_without_its_signature(web, tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"nothing\.h5ad does not exist; check the URL") as caught:
        DatasetCollection(tmp_path / "o.zarr").add_adatas([f"{web}/nothing.h5ad?token=s3cr3t"])
    assert "s3cr3t" not in str(caught.value)


def test_a_page_that_is_no_anndata(web, h5ad_pair, tmp_path):
    (h5ad_pair[0].parent / "page.html").write_text("<html></html>")
    with pytest.raises(SourceError, match="is no HDF5 file and not a zarr AnnData store"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas([f"{web}/page.html?token=s3cr3t"])


@pytest.mark.parametrize("url", ["s3://user:s3cr3t@bucket/o.zarr", "http://host/o.zarr?token=s3cr3t"])
def test_a_url_with_credentials_is_refused(url):
    with pytest.raises(CollectionError, match="give credentials in storage_options") as caught:
        DatasetCollection(url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("what", ["collection", "scratch"])
def test_nothing_is_built_on_a_web_server(web, h5ad_pair, tmp_path, what):
    place, scratch = (f"{web}/o.zarr", None) if what == "collection" else (tmp_path / "o.zarr", f"{web}/scratch")
    with pytest.raises(CollectionError, match="is on a web server, which is read only: give a local path"):
        DatasetCollection(place).add_adatas(h5ad_pair, scratch=scratch)
    assert not list(tmp_path.glob("o.zarr*"))


class Pages(RangeHandler):
    """Files without a token; folders as pages of links, as web servers have them, where ``lists`` says so."""

    def answer(self, send):
        folder = self.server.folder / self.path.strip("/")
        if self.server.lists and folder.is_dir():
            names = [f"{found.name}/" if found.is_dir() else found.name for found in folder.iterdir()]
            page = "".join(f'<a href="{self.path.rstrip("/")}/{name}">{name}</a>' for name in names).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page if send else b"")
        else:
            self.path += "?token=s3cr3t"
            super().answer(send)


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "lists nothing"])
@pytest.mark.parametrize("form", ["url", "group"])
def test_a_collection_is_read_from_a_web_server(tmp_path, h5ad_pair, lists, form):
    """A page of names says no sizes, and a server need not have such pages: files are asked for by name."""
    local = DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0, dataset_size=150)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.folder, server.lists = tmp_path, lists
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/o.zarr"
        there = DatasetCollection(url if form == "url" else zarr.open_group(url, mode="r"), mode="r")
        assert len(there) == len(local) == 4
        np.testing.assert_array_equal(np.concatenate(epoch(there)), np.concatenate(epoch(local)))
        shard = next(path for path in sorted((tmp_path / "o.zarr/dataset_0/X").rglob("c/0")))
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(IntegrityError, match=r"has [\d,]+ bytes and was written with"):
            epoch(DatasetCollection(url, mode="r"))
        shard.unlink()
        with pytest.raises(IntegrityError, match="is missing"):
            epoch(DatasetCollection(url, mode="r"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
