#!/usr/bin/env python3
"""An S3 server of a folder on loopback, that answers late and fails when it is told to.

far_server.py FOLDER      prints its port, and serves until it is ended

It knows what s3fs and obstore ask for: objects and ranges of them, with conditions, uploads in parts, lists, removals.
`PUT /_` with JSON changes its :class:`Settings` while it runs, and answers with what it has counted since the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

STATUS = {200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"}
STATUS |= {416: "Range Not Satisfiable", 503: "Slow Down"}
CODES = {404: "NoSuchKey", 412: "PreconditionFailed", 416: "InvalidRange", 503: "SlowDown"}
MAX_KEYS = 1000


@dataclass(frozen=True)
class Settings:
    """How well the server does.

    Attributes
    ----------
    latency_s
        Before each answer.
    n_slow, slow_s
        So many of the next answers take so long, of those to reads of shards.
    failing
        Share of the requests that are answered with 503, or whose connection is reset, by turns.
    """

    latency_s: float = 0.0
    n_slow: int = 0
    slow_s: float = 5.0
    failing: float = 0.0


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What is answered."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Store:
    """Objects, which are the files below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parts: dict[str, dict[int, bytes]] = {}

    def answer(self, request: Request) -> Answer:
        """Do what is asked for."""
        bucket, _, key = request.key.partition("/")
        match request.method:
            case "GET" if not key:
                return self._list(bucket, request.query)
            case "GET" | "HEAD":
                return self._get(request)
            case "PUT" if "partNumber" in request.query:
                self._parts[request.query["uploadId"]][int(request.query["partNumber"])] = request.body
                return Answer(200, headers={"ETag": '"part"'})
            case "PUT":
                return self._put(request, request.body) if key else Answer(200)
            case "POST" if "uploads" in request.query:
                upload = uuid4().hex
                self._parts[upload] = {}
                found = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
                return Answer(200, _xml("InitiateMultipartUploadResult", found))
            case "POST" if "uploadId" in request.query:
                parts = self._parts.pop(request.query["uploadId"])
                done = self._put(request, b"".join(parts[n] for n in sorted(parts)))
                found = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><ETag>{done.headers.get('ETag')}</ETag>"
                return replace(done, body=_xml("CompleteMultipartUploadResult", found)) if done.status == 200 else done
            case "POST":
                for part in request.body.decode().split("<Key>")[1:]:
                    self._remove(f"{bucket}/{part.partition('</Key>')[0]}")
                return Answer(200, _xml("DeleteResult", ""))
            case "DELETE":
                self._parts.pop(request.query.get("uploadId", ""), None)
                self._remove(request.key)
                return Answer(204)
        return Answer(404)

    def _get(self, request: Request) -> Answer:
        path = self._root / request.key
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return Answer(404)
        if path.is_dir():
            return Answer(404)
        tag = _tag(found)
        if request.headers.get("if-match", tag) != tag:
            return Answer(412)
        headers = {"ETag": tag, "Last-Modified": formatdate(found.st_mtime, usegmt=True), "Accept-Ranges": "bytes"}
        start, stop = 0, found.st_size
        if asked := request.headers.get("range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = (int(first), int(last or stop - 1) + 1) if first else (max(0, stop - int(last)), stop)
            stop = min(stop, found.st_size)
            if start >= stop:
                return Answer(416)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.st_size}"
        if request.method == "HEAD":
            return Answer(200, headers=headers | {"Content-Length": str(stop - start)})
        with path.open("rb") as f:
            return Answer(206 if asked else 200, os.pread(f.fileno(), stop - start, start), headers)

    def _put(self, request: Request, payload: bytes) -> Answer:
        path = self._root / request.key
        tag = _tag(path.stat()) if path.exists() else None
        wanted = request.headers.get("if-match")
        if (wanted is not None and wanted != tag) or ("if-none-match" in request.headers and tag is not None):
            return Answer(412)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".tmp-{uuid4().hex[:8]}")
        tmp.write_bytes(payload)
        tmp.rename(path)
        return Answer(200, headers={"ETag": _tag(path.stat())})

    def _remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._root / key).unlink()

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        if "location" in query:
            return Answer(200, _xml("LocationConstraint", ""))
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        root = self._root / bucket
        base = root / prefix.rpartition("/")[0]
        keys = sorted(
            str(p.relative_to(root)) for p in base.rglob("*") if p.is_file() and not p.name.startswith(".tmp")
        )
        keys = [
            k
            for k in keys
            if k.startswith(prefix) and k > query.get("continuation-token", query.get("start-after", ""))
        ]
        if delimiter:
            ends = [k.find(delimiter, len(prefix)) for k in keys]
            folders = sorted({k[: end + 1] for k, end in zip(keys, ends, strict=True) if end >= 0})
            keys = [k for k, end in zip(keys, ends, strict=True) if end < 0]
        else:
            folders = []
        page, more = keys[:MAX_KEYS], len(keys) > MAX_KEYS
        said = [f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"]
        said.append(f"<MaxKeys>{MAX_KEYS}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>")
        if more:
            said.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for key in page:
            found = (root / key).stat()
            when = formatdate_iso(found.st_mtime)
            said.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>{escape(_tag(found))}</ETag>"
                f"<Size>{found.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        said += [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders]
        return Answer(200, _xml("ListBucketResult", "".join(said)))


def _tag(found: os.stat_result) -> str:
    return f'"{found.st_mtime_ns:x}-{found.st_size:x}"'


def formatdate_iso(seconds: float) -> str:
    """Return a time as S3 lists it."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _xml(name: str, inside: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inside}</{name}>'.encode()


class Server:
    """Answers late, and counts."""

    def __init__(self, store: Store) -> None:
        self._store, self._settings, self._rng = store, Settings(), random.Random(0)
        self._n_open = 0
        self._counted: dict[str, int] = {}
        self._cpu_s = 0.0
        self._forget()

    def _forget(self) -> None:
        self._counted = {"n_requests": 0, "n_at_once": 0, "n_failed": 0, "n_bytes": 0}
        self._cpu_s = time.process_time()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes over one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._serve_one(reader, writer):
                pass
        writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        if headers.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        split = urlsplit(target)
        query = {k: v[0] for k, v in parse_qs(split.query, keep_blank_values=True).items()}
        request = Request(method, unquote(split.path).strip("/"), query, headers, body)
        if request.key == "_":
            self._write(writer, request, self._control(request))
            return True
        self._n_open += 1
        self._counted["n_requests"] += 1
        self._counted["n_at_once"] = max(self._counted["n_at_once"], self._n_open)
        try:
            await asyncio.sleep(self._delay_s(request))
            if self._rng.random() < self._settings.failing:
                self._counted["n_failed"] += 1
                if self._counted["n_failed"] % 2:
                    writer.transport.abort()
                    return False
                answer = Answer(503)
            else:
                answer = self._store.answer(request)
        finally:
            self._n_open -= 1
        self._write(writer, request, answer)
        await writer.drain()
        return True

    def _delay_s(self, request: Request) -> float:
        if self._settings.n_slow and request.method == "GET" and "/c/" in request.key:
            self._settings = replace(self._settings, n_slow=self._settings.n_slow - 1)
            return self._settings.slow_s
        return self._settings.latency_s

    def _write(self, writer: asyncio.StreamWriter, request: Request, answer: Answer) -> None:
        body = answer.body
        if answer.status in CODES:
            code = CODES[answer.status]
            error = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"  # of no namespace, as S3's
            body = error.encode() if request.method != "HEAD" else b""
        headers = {"Content-Length": str(len(body)), "Server": "far"} | answer.headers
        said = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        self._counted["n_bytes"] += len(body)
        writer.write(f"HTTP/1.1 {answer.status} {STATUS[answer.status]}\r\n{said}\r\n".encode() + body)

    def _control(self, request: Request) -> Answer:
        if request.body:
            self._settings = Settings(**json.loads(request.body))
        counted = json.dumps(self._counted | {"server_cpu_s": round(time.process_time() - self._cpu_s, 2)}).encode()
        self._forget()
        return Answer(200, counted)


async def _main(folder: Path) -> None:
    server = await asyncio.start_server(Server(Store(folder)).serve, "127.0.0.1", 0, limit=2**16, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass(frozen=True)
class Far:
    """A server that runs in a process of its own."""

    url: str

    def options(self, n_connections: int | None = None) -> dict[str, Any]:
        """storage_options to reach it."""
        found: dict[str, Any] = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": self.url}}
        return found if n_connections is None else found | {"config_kwargs": {"max_pool_connections": n_connections}}

    def set(self, settings: Settings) -> dict[str, float]:
        """Change how well it does; return what it has counted since the last time."""
        request = urllib.request.Request(f"{self.url}/_", json.dumps(asdict(settings)).encode(), method="PUT")
        with urllib.request.urlopen(request) as answer:
            counted: dict[str, float] = json.load(answer)
        return counted


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Far]:
    """Serve a folder, whose folders are buckets."""
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Far(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args().folder))
