"""What tests of several rooms look at builds with: digests of folders, rows by name, counted events, a web server."""

from __future__ import annotations

import hashlib
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import anndata as ad

from annbatch_dask.events import Callback
from tests.etl.inputs import dense_x


def tree_digest(path, only=None):
    """Name and content of every file below a folder, or of those whose relative path passes a test."""
    files = sorted(p for p in Path(path).rglob("*") if p.is_file() and (only is None or only(p.relative_to(path))))
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows_of(collection):
    """Everything of every row, by name, in a form that compares."""
    out = {}
    for group in collection:
        a = ad.io.read_zarr(group)
        X = dense_x(a)
        for i, name in enumerate(a.obs_names):
            out[name] = (tuple(X[i]), tuple(a.obs.iloc[i].astype(str)))
    return out


class Counter(Callback):
    """Counts tasks and rows of each stage."""

    def __init__(self):
        self.tasks, self.rows, self.announced, self.bytes, self.reused = {}, {}, {}, {}, 0

    def on_stage_start(self, event):
        self.announced[event.stage] = (event.n_tasks, event.n_rows, event.n_bytes)

    def on_task_end(self, event):
        self.tasks[event.stage] = self.tasks.get(event.stage, 0) + 1
        self.rows[event.stage] = self.rows.get(event.stage, 0) + event.n_rows
        self.bytes[event.stage] = self.bytes.get(event.stage, 0) + event.n_bytes
        self.reused += event.reused


class At(Callback):
    """Does something when so many tasks of a stage are done."""

    def __init__(self, stage, n, then):
        self.stage, self.left, self.then = stage, n, then

    def on_task_end(self, event):
        self.left -= event.stage == self.stage
        if event.stage == self.stage and self.left == 0:
            self.then()


class RangeHandler(SimpleHTTPRequestHandler):
    """A folder over HTTP, with ranges; what does not carry ``?token=`` is refused."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        path, _, query = self.path.partition("?")
        found = self.server.folder / path.lstrip("/")
        if query != "token=s3cr3t" or not found.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = found.read_bytes()
        asked = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            low, high = asked.removeprefix("bytes=").split("-")
            first, last = int(low), min(int(high or last), last)
        body = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if send:
            self.wfile.write(body)
