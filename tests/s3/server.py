"""An S3 server on loopback, which keeps a list of what it was asked for and can be told to fail."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

SECRET = "s3cr3t-" + "x" * 20
ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message></Error>'
FAULTS = {
    "400": ("400 Bad Request", ERROR.format("ExpiredToken", "The provided token has expired.")),
    "501": ("501 Not Implemented", ERROR.format("NotImplemented", "A header you provided is not implemented.")),
    "500": ("500 Internal Server Error", ERROR.format("InternalError", "We encountered an internal error.")),
    "403": ("403 Forbidden", ERROR.format("AccessDenied", "Access Denied")),
    "503": ("503 Slow Down", ERROR.format("SlowDown", "Please reduce your request rate.")),
}


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]

    @property
    def is_list(self):
        return self.method == "GET" and not self.key and "location" not in self.query

    @property
    def kind(self):
        return "LIST" if self.is_list else self.method


class QuietHandler(WSGIRequestHandler):
    """Keeps connections open, and writes no log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms

    def log(self, *args):
        pass


class Held:
    """An answer that waits until :meth:`answer` is called, and counts the others that do not."""

    def __init__(self, n_others):
        self._go, self._are_others, self._first = threading.Event(), threading.Event(), threading.Lock()
        self._others = iter(range(n_others - 1))

    def hold_or_count(self):
        if self._first.acquire(blocking=False):
            self._go.wait(60)
        elif next(self._others, None) is None:
            self._are_others.set()

    def wait_for_others(self, timeout_s):
        """True once so many others were answered."""
        return self._are_others.wait(timeout_s)

    def answer(self):
        """Let it go."""
        self._go.set()


class S3Server:
    """moto behind a log and a source of faults, on a free port of one of this machine's addresses."""

    def __init__(self, host="127.0.0.1"):
        self._app = create_backend_app("s3")  # finding the service of each request takes longer than answering it
        self._server = make_server(host, 0, self, threaded=True, request_handler=QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._lock = threading.Lock()
        self._fault = lambda _: None
        self._conditions = "kept"
        self.requests = []
        self.n_faults = 0
        self._delay_s, self._n_enough = 0.0, 1
        self._are_enough = threading.Event()
        self._n_open = self.n_at_once = 0
        self._held = None
        self._thread.start()

    @property
    def url(self):
        return f"http://{self._server.host}:{self._server.server_port}"

    @property
    def options(self):
        """storage_options to reach it."""
        return {
            "key": "an-access-key",
            "secret": SECRET,
            "client_kwargs": {"endpoint_url": self.url},
            "config_kwargs": {"retries": {"max_attempts": 4}},
        }

    def stop(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __call__(self, environ, start_response):
        bucket, _, key = unquote(environ["PATH_INFO"]).lstrip("/").partition("/")
        query = {k: v[0] for k, v in parse_qs(environ["QUERY_STRING"], keep_blank_values=True).items()}
        request = Request(environ["REQUEST_METHOD"], bucket, key, query)
        with self._lock:
            self.requests.append(request)
            fault = self._fault(request)
            if request.method == "PUT" and self._conditions != "kept":
                given = [environ.pop(name, None) for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")]
                if self._conditions == "refused" and any(given):
                    fault = "501"
            self.n_faults += fault is not None
        if fault is None:
            return self._answer(environ, start_response)
        if fault == "reset":
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)  # a close alone waits for the handler's files
            raise ConnectionResetError
        if fault == "lost":  # done, and nobody hears of it
            list(self._app(environ, lambda *_: None))
            fault = "500"
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, body = FAULTS[fault]
        body = "" if request.method == "HEAD" else body
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body.encode()]

    def _answer(self, environ, start_response):
        with self._lock:
            self._n_open += 1
            self.n_at_once = max(self.n_at_once, self._n_open)
            if self.n_at_once >= self._n_enough:
                self._are_enough.set()
        self._are_enough.wait(self._delay_s)
        if (held := self._held) is not None and "/c/" in environ["PATH_INFO"]:
            held.hold_or_count()
        try:
            return self._app(environ, start_response)
        finally:
            with self._lock:
                self._n_open -= 1

    @contextlib.contextmanager
    def slow(self, delay_s, n_enough):
        """Let each answer take longer until so many requests were waited for together, which ``n_at_once`` counts."""
        self._are_enough.clear()
        self._delay_s, self._n_enough, self.n_at_once = delay_s, n_enough, 0
        try:
            yield
        finally:
            self._delay_s = 0.0
            self._are_enough.set()

    @contextlib.contextmanager
    def one_held(self, n_others):
        """Let the first answer to a read of a chunk wait; see :class:`Held`."""
        self._held = held = Held(n_others)
        try:
            yield held
        finally:
            held.answer()
            self._held = None

    @contextlib.contextmanager
    def conditions(self, how):
        """Let writes on a condition be "refused", or the condition "ignored"."""
        self._conditions = how
        try:
            yield
        finally:
            self._conditions = "kept"

    @contextlib.contextmanager
    def failing(self, fault):
        """Fail as a function of the request says: "403", "500", "503", "reset", "lost", or None for not at all."""
        self._fault, self.n_faults = fault, 0
        try:
            yield
        finally:
            self._fault = lambda _: None

    def faults(self, share, seed=0):
        """Let a share of all requests fail, in every way."""
        rng = random.Random(seed)
        return self.failing(lambda _: rng.choice(["500", "503", "reset"]) if rng.random() < share else None)

    @contextlib.contextmanager
    def recorded(self):
        """The requests made in a block."""
        found, start = [], len(self.requests)
        yield found
        found += self.requests[start:]


def counts(requests):
    """How many of each kind."""
    return Counter(r.kind for r in requests)
