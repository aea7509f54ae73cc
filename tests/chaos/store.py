"""A process that is an object store: its address, a folder for ``store.json``, which tells how to reach it, and files."""

import json
import os
import sys
import threading
from pathlib import Path

import fsspec

from tests.s3.server import S3Server

BUCKET = "cut"


def serve(host, paths):
    """A store with a bucket that holds some files."""
    server = S3Server(host)
    fs = fsspec.filesystem("s3", **server.options)
    fs.call_s3("create_bucket", Bucket=BUCKET)
    for path in paths:
        fs.put_file(str(path), f"{BUCKET}/in/{Path(path).name}")
    return server


if __name__ == "__main__":
    address, folder, *files = sys.argv[1:]
    options = json.dumps(serve(address, files).options)
    Path(folder, "store.new").write_text(options)
    os.replace(f"{folder}/store.new", f"{folder}/store.json")  # it is there, and whole
    threading.Event().wait()
