"""Hugging Face's Hub on loopback: one repository of datasets, as far as its client asks for it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "lab/atlas"


class Hub(BaseHTTPRequestHandler):
    """Lists, reads and commits of the files of its server."""

    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, below = unquote(urlsplit(self.path).path).partition(f"/{REPO}")
        below = below.strip("/")
        if path == "/api/datasets" and below.startswith("tree/"):
            folder = below.partition("/")[2].partition("/")[2]
            self.list(folder, is_deep="recursive=true" in self.path.lower())
        elif path == "/api/datasets":
            self.json({"id": REPO, "sha": self.server.sha, "private": False, "tags": [], "downloads": 0, "likes": 0})
        else:
            self.send_file(below.partition("/")[2].partition("/")[2])

    do_HEAD = do_GET

    def list(self, folder: str, *, is_deep: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for name, payload in self.server.files.items():
            rest = name.removeprefix(prefix).split("/")
            if name.startswith(prefix):
                ends = [f"{prefix}{'/'.join(rest[:k])}" for k in range(1, len(rest) if is_deep else 2)]
                found |= {end: {"type": "directory", "path": end, "oid": "t"} for end in ends if end != name}
                if is_deep or len(rest) == 1:
                    found[name] = {"type": "file", "path": name, "size": len(payload), "oid": oid(payload)}
        if found or not folder:
            self.json(list(found.values()))
        else:
            self.json({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})

    def send_file(self, name: str) -> None:
        if (payload := self.server.files.get(name)) is None:
            self.json({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self.server.reads.append(name)
        headers = {"ETag": f'"{oid(payload)}"', "X-Repo-Commit": self.server.sha, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(payload), len(payload))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(payload)}"
            payload = payload[int(first) : stop]
        self.answer(payload, 206 if asked else 200, headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            self.json(
                {
                    "commitUrl": f"{self.server.url}/datasets/{REPO}/commit/{self.server.commit(body)}",
                    "commitOid": self.server.sha,
                    "hookOutput": "",
                }
            )
        else:
            self.json({"url": f"{self.server.url}/datasets/{REPO}", "name": REPO})

    def json(self, found: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(found).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def answer(self, payload: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(payload))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)


class Server(ThreadingHTTPServer):
    """Files of a repository, which change a commit at a time."""

    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.reads: list[str] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def sha(self) -> str:
        return oid(str(len(self.commits)).encode())

    def put(self, name: str, path: Path) -> None:
        self.files = self.files | {name: path.read_bytes()}

    def commit(self, body: bytes) -> str:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        with self._lock:
            self.files = self.files | {name: base64.b64decode(content) for name, content in files.items()}
            self.commits.append(sorted(files))
        return self.sha


def oid(payload: bytes) -> str:
    return hashlib.sha1(payload, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def served() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
