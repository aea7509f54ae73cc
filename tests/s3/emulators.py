"""Emulators of stores that are not S3, where they are installed: Google's (PyPI) and Azure's (npm)."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

ACCOUNT = "devstoreaccount1"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The one that Azurite documents for everybody."""


@dataclass(frozen=True)
class Store:
    """A bucket of an emulator: its URL, the options to reach it, and its file system."""

    url: str
    options: dict[str, Any]

    @property
    def fs(self) -> Any:
        return fsspec.filesystem(self.url.partition("://")[0], **self.options)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        pytest.skip(f"{e}; `make chaos` installs it (the dependency group stores)")


class _Threaded(ThreadingHTTPServer):
    """A thread a connection: the emulator's own server answers one after another, and the system drops some of many."""

    request_queue_size = 512
    daemon_threads = True


@contextlib.contextmanager
def google() -> Iterator[Store]:
    """gs://, in threads of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC, which the emulator does not speak
        _need("gcsfs")
        emulator, buckets = _need("gcp_storage_emulator.server"), _need("gcp_storage_emulator.handlers.buckets")
        handle, lock = emulator.Router.handle, threading.Lock()

        def one_at_a_time(router: Any, method: str) -> None:
            with lock:
                handle(router, method)

        patch.setattr(emulator.Router, "handle", one_at_a_time)
        # A document of all objects, after each change: nobody reads it again.
        patch.setattr(emulator.Storage, "_write_config_to_file", lambda _: None)
        patch.setattr(emulator.RequestHandler, "disable_nagle_algorithm", True)
        storage = emulator.Storage(use_memory_fs=True)
        buckets.create_bucket("atlas", storage)
        server = _Threaded(("127.0.0.1", 0), partial(emulator.RequestHandler, storage))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield Store("gs://atlas", {"token": "anon", "endpoint_url": f"http://127.0.0.1:{server.server_port}"})
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@contextlib.contextmanager
def azure() -> Iterator[Store]:
    """abfs://, a process of Node."""
    _need("adlfs")
    here = Path(sys.prefix) / "azurite/node_modules/.bin"
    program = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=str(here))
    if program is None:
        pytest.skip(f"no azurite-blob on PATH nor in {here}; `make chaos` installs it where there is npm")
    command = [program, "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "successfully listen" in line)
        url = f"{said.split()[-1].rstrip('/')}/{ACCOUNT}"
        connection = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={_AZURE_KEY};BlobEndpoint={url};"
        store = Store(f"abfs://atlas@{ACCOUNT}.dfs.core.windows.net", {"connection_string": connection})
        store.fs.mkdir("atlas")
        yield store
    finally:
        process.terminate()
        process.communicate()
