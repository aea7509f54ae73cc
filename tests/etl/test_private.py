"""Scratch folders let nobody else in: what lies there is for one user, holds no secret, and is not run unchecked."""

from __future__ import annotations

import os
import pickle
import stat
import threading
import traceback
from dataclasses import fields
from functools import partial
from http.server import ThreadingHTTPServer

import anndata as ad
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from zarr.core.group import AsyncGroup, GroupMetadata

from annbatch_dask import DatasetCollection
from annbatch_dask.cli import main
from annbatch_dask.errors import ForeignScratchError, IntegrityError, SourceError
from annbatch_dask.etl.job import Job, load_job, save_job
from annbatch_dask.events import Callback
from annbatch_dask.plan.plan import Plan
from annbatch_dask.sources.identity import where_of
from annbatch_dask.sources.references import references
from annbatch_dask.storage.folder import Folder, folder_at
from annbatch_dask.storage.private import check_private, make_private
from annbatch_dask.storage.secrets import hiding_secrets, shown, without_secrets
from annbatch_dask.storage.spill import SpillError, SpillReader, write_spill
from annbatch_dask.testing import make_adata
from tests.s3.tools import At, CrashError, crash
from tests.tools import RangeHandler

pytestmark = pytest.mark.usefixtures("in_this_process")

SECRET = "s3cr3t"


@pytest.fixture
def open_umask():
    """As on machines where a group works together."""
    before = os.umask(0)
    yield
    os.umask(before)


class Evil:
    """What somebody else would like our workers to unpickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Before(Callback):
    """Calls a function as a stage begins."""

    def __init__(self, stage, then):
        self.stage, self.then = stage, then

    def on_stage_start(self, event):
        if event.stage == self.stage:
            self.then()


def test_a_job_file_that_somebody_replaced_is_not_unpickled(h5ad_pair, tmp_path):
    def replace():
        job = next(p for p in (tmp_path / "o.zarr.scratch").rglob("job*"))
        job.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))

    with pytest.raises(IntegrityError, match=r"job-\w+ \(\d+ bytes\) is not what this build wrote: it is damaged, or"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0, callbacks=[Before("scatter", replace)])
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("groupby", [None, "cell_type"])
def test_scratch_is_for_its_user_alone(h5ad_pair, tmp_path, open_umask, groupby):
    target, scratch, found = tmp_path / "o.zarr", tmp_path / "o.zarr.scratch", {}

    def look():
        found.update({p: stat.S_IMODE(p.stat().st_mode) for p in (scratch, *scratch.rglob("*"))})

    looks = [Before(stage, look) for stage in ("group", "scatter", "gather")]
    DatasetCollection(target).add_adatas(h5ad_pair, seed=0, groupby=groupby, callbacks=looks)
    assert {mode for p, mode in found.items() if p.suffix in (".bin", ".json") or p.name.startswith("job")} == {0o600}
    assert {mode for p, mode in found.items() if not p.suffix and not p.name.startswith("job")} == {0o700}
    assert any(p.name == "group" for p in found) == (groupby is not None)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in target.rglob("*"))  # the collection is for all


def test_a_folder_of_an_earlier_release_is_closed(tmp_path, open_umask):
    work = tmp_path / "s" / "w"
    work.mkdir(parents=True)
    assert work.stat().st_mode & 0o777 == 0o777
    make_private(Folder(str(work)))
    assert work.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o777  # may be everybody's


def owned_by(monkeypatch, owner, folder):
    real = os.lstat

    def lstat(path, **kwargs):
        found = real(path, **kwargs)
        return os.stat_result((*found[:4], owner, *found[5:])) if str(path) == str(folder) else found

    monkeypatch.setattr(os, "lstat", lstat)


def test_a_folder_of_another_user_is_refused(h5ad_pair, tmp_path, monkeypatch):
    with pytest.raises(CrashError):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0, callbacks=[At("gather", crash)])
    work = next((tmp_path / "o.zarr.scratch").iterdir())
    owned_by(monkeypatch, 4321, work)
    with pytest.raises(ForeignScratchError, match=f"belongs to user 4321, and this process runs as {os.geteuid()}"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0)
    with pytest.raises(PermissionError):  # in a worker
        check_private(Folder(str(work)))
    monkeypatch.undo()
    assert DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0).n_obs == 500


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForeignScratchError, match="is no folder but a link"):
        make_private(Folder(str(tmp_path / "work")))


def test_a_file_system_that_maps_users_is_taken_as_it_is(tmp_path, monkeypatch):
    owned_by(monkeypatch, 65534, tmp_path)
    monkeypatch.setattr("annbatch_dask.storage.private._owner_of_new_files", lambda _: 65534)
    check_private(Folder(str(tmp_path)))


def test_a_spill_file_names_plain_dtypes_only(tmp_path):
    folder = Folder(str(tmp_path))
    one = np.zeros(1, np.int64)
    write_spill(folder, 0, order=one, rows=np.array([0, 1]), fixed={"a": np.zeros(1, np.dtype("V8"))}, ragged={})
    with SpillReader(folder, 0, range(1)):
        pass
    write_spill(folder, 0, order=one, rows=np.array([0, 1]), fixed={"a": Named(1)}, ragged={})
    with pytest.raises(SpillError, match="names a dtype that no spill file has"):
        SpillReader(folder, 0, range(1))


class Named(np.ndarray):
    """Numbers that say they are objects."""

    def __new__(cls, n):
        return np.zeros(n, np.int64).view(cls)

    @property
    def dtype(self):
        return np.dtype(object)


# --- secrets


@pytest.fixture
def web(h5ad_pair):
    server = ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    server.folder = h5ad_pair[0].parent
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    thread.join()
    server.server_close()


def leaks(folder):
    return [p for p in folder.rglob("*") if SECRET in p.name or (p.is_file() and SECRET.encode() in p.read_bytes())]


def load(path, password):
    """A function of the user's, which knows a password."""
    return ad.read_h5ad(path)


def test_an_interrupted_build_leaves_no_secret(web, h5ad_pair, tmp_path, caplog):
    caplog.set_level("DEBUG", logger="annbatch_dask")
    url = f"{web[0]}/{h5ad_pair[0].name}?token={SECRET}"
    with pytest.raises(CrashError):
        DatasetCollection(tmp_path / "a.zarr").add_adatas([url], seed=0, callbacks=[At("gather", crash)])
    with pytest.raises(CrashError):
        DatasetCollection(tmp_path / "b.zarr").add_adatas(
            h5ad_pair, load_adata=partial(load, password=SECRET), seed=0, callbacks=[At("gather", crash)]
        )
    assert sum(p.name.startswith("job-") for p in tmp_path.rglob("*")) == 2
    assert not leaks(tmp_path)
    collection = DatasetCollection(tmp_path / "a.zarr").add_adatas([url], seed=0)
    collection.report().save(tmp_path / "report.html")
    assert not leaks(tmp_path)
    assert SECRET not in caplog.text


def test_a_group_in_a_store_with_credentials(tmp_path, h5ad_pair):
    """Given with a function that loads it, the group itself goes to the workers, its store with it."""
    pytest.importorskip("s3fs")
    options = {"key": "a", "secret": SECRET, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
    store = zarr.storage.FsspecStore.from_url("s3://bucket/x.zarr", storage_options=options)
    group = zarr.Group(AsyncGroup(metadata=GroupMetadata(), store_path=zarr.storage.StorePath(store)))
    here = Folder(str(tmp_path / "scratch" / "work"))
    runnable = DatasetCollection(tmp_path / "o.zarr").plan_adatas(h5ad_pair)
    plan = Plan(**{field.name: getattr(runnable, field.name) for field in fields(Plan)})
    file = save_job(Job(plan, references([group], ad.io.read_elem), make_private(here), here))
    assert not leaks(tmp_path)
    assert SECRET not in repr(file)
    assert load_job(file).refs[0].item.store.fs.secret == SECRET


def test_an_error_of_a_web_server_is_told_without_the_signature(web, h5ad_pair, tmp_path, monkeypatch):
    base, _ = web
    (h5ad_pair[0].parent / "page.html").write_text("<html></html>")
    with pytest.raises(SourceError, match="is no HDF5 file") as caught:
        DatasetCollection(tmp_path / "o.zarr").add_adatas([f"{base}/page.html?token={SECRET}"])
    assert SECRET not in whole(caught.value)

    def refuse(self, send):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    monkeypatch.setattr(RangeHandler, "answer", refuse)
    with pytest.raises(OSError, match="403") as caught:
        DatasetCollection(tmp_path / "o.zarr").add_adatas([f"{base}/{h5ad_pair[0].name}?token={SECRET}"])
    assert SECRET not in whole(caught.value)


def whole(error):
    return "".join(traceback.format_exception(error))


def test_errors_without_a_secret_stay_what_they_are():
    with pytest.raises(LookupError, match="nothing of the kind"), hiding_secrets(f"https://h/a?sig={SECRET}"):
        message = "nothing of the kind"
        raise LookupError(message)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/local/a@b?c", "/local/a@b?c"),
        ("s3://user:s3cr3t@host/x", "s3://host/x"),
        ("s3://bucket/what?.h5ad", "s3://bucket/what?.h5ad"),
        ("https://u:s3cr3t@host/a.h5ad?sig=s3cr3t", "https://host/a.h5ad"),
        ("https://host/a.h5ad#token=s3cr3t", "https://host/a.h5ad"),
        ("zip://a.h5ad::s3://user:s3cr3t@host/x.zip", "zip://a.h5ad::s3://host/x.zip"),
        ("filecache::https://u:s3cr3t@h/a?sig=s3cr3t", "filecache::https://h/a"),
        ("abfs://one@account.dfs.core.windows.net/a.zarr", "abfs://one@account.dfs.core.windows.net/a.zarr"),
        ("abfss://one@account.dfs.core.windows.net/a?sig=s3cr3t", "abfss://one@account.dfs.core.windows.net/a"),
        ("az://user:s3cr3t@container/a", "az://container/a"),
        ("webhdfs://host/a?delegation=s3cr3t", "webhdfs://host/a"),
        ("ftp://user:s3cr3t@host/a", "ftp://host/a"),
    ],
)
def test_what_is_shown_of_a_url(url, expected):
    assert shown(url) == expected
    assert without_secrets(f"GET {url!r}, (see <{url}>)") == f"GET {expected!r}, (see <{expected}>)"
    assert without_secrets(expected) == expected


def test_an_azure_container_is_no_credential():
    urls = [f"abfs://{c}@account.dfs.core.windows.net/a.h5ad" for c in ("one", "two")]
    assert [shown(url) for url in urls] == urls
    assert [folder_at(url, None).url for url in urls] == urls


def test_one_path_in_two_accounts_is_two_inputs(monkeypatch):
    class Azure(MemoryFileSystem):
        """Takes URLs and names its account as adlfs does."""

        protocol = "abfs"

        def __init__(self, account_name):
            super().__init__()
            self.account_name = account_name

        @staticmethod
        def _get_kwargs_from_urls(url):
            return {"account_name": url.partition("@")[2].partition(".")[0]}

        @classmethod
        def _strip_protocol(cls, path):
            container, _, rest = path.removeprefix("abfs://").partition("@")
            return f"{container}/{rest.partition('/')[2]}"

    monkeypatch.setitem(_registry, "abfs", Azure)
    urls = [f"abfs://one@{account}.dfs.core.windows.net/a.h5ad" for account in ("here", "there")]
    refs = references(urls, None)
    assert [ref.label for ref in refs] == urls
    assert [where_of(ref) for ref in refs] == ["abfs:here/one/a.h5ad", "abfs:there/one/a.h5ad"]
    with pytest.raises(SourceError, match="is given 2 times"):
        references([urls[0], urls[0]], None)


def test_labels_of_groups_hold_no_signature():
    class Signed(zarr.Group):
        def __str__(self):
            return f"<Group https://host/a?sig={SECRET}>"

    group = Signed(zarr.group()._async_group)
    assert references([group], ad.io.read_elem)[0].label == "<Group https://host/a>"


# --- names


def test_hostile_names_in_a_page_and_on_a_terminal(tmp_path, capsys):
    tag, code = "<script>alert(1)", "\x1b]0;title\x07\u202e"
    adata = make_adata(60, [f"g{i}" for i in range(20)], seed=0)
    adata.obs[f"{tag} \x1b[2J"] = "x"
    folder = tmp_path / f"in {code}{tag}"
    folder.mkdir()
    adata.write_h5ad(folder / "a.h5ad")
    collection = DatasetCollection(tmp_path / "o.zarr")
    plan = collection.plan_adatas([folder / "a.h5ad"], seed=0)
    collection.add_adatas([folder / "a.h5ad"], seed=0)
    for page in (plan._repr_html_(), collection._repr_html_(), collection.report()._repr_html_()):
        assert "<script>alert" not in page
    for argv in (["info"], ["verify"], ["plan", str(folder / "a.h5ad")], ["stream", "--by", f"{tag} \x1b[2J"]):
        assert main([argv[0], *([] if argv[0] == "plan" else [str(tmp_path / "o.zarr")]), *argv[1:]]) == 0
    assert main(["info", str(folder / "nothing.zarr")]) == 1
    said = "".join(capsys.readouterr())
    assert "\\x1b]0;title\\x07\\u202e" in said
    assert not [c for c in said if not c.isprintable() and c != "\n"]
