"""An S3 server, moto's, in a process of its own, that can be told to fail.

The client's library may hold Python's lock while it waits for an answer, so the server can't be a thread.
Faults are random: an answer that says 503, one that is late, and one that gets lost although the request was carried
out. `lost` tells how many requests that wrote a log entry were answered by nothing.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
from deltalake import DeltaTable

TESTS = Path(__file__).parents[1]
BUCKET = "lake"


class ObjectStore:
    """A running server, with the bucket `lake` in it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.port = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    @property
    def environ(self) -> dict[str, str]:
        """What a client has in its environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "backoff_config.init_backoff": "10 ms",
            "backoff_config.max_backoff": "100 ms",
        }

    def fail(self, share: float, seed: int = 0) -> int:
        """From now on this share of the requests fails; how many answers were lost so far, of writes to a log."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([share, seed]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def rows(self, url: str) -> pa.Table | None:
        """A Delta table, its files read by Arrow; None if it is not there."""
        if not DeltaTable.is_deltatable(url, storage_options=self.environ):
            return None
        table = DeltaTable(url, storage_options=self.environ)
        kinds = pa.schema(table.schema().to_arrow())
        files = [unquote(file.removeprefix("s3://")) for file in table.file_uris()]
        store = pyarrow.fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{self.port}", scheme="http", access_key="somebody", secret_key="secret"
        )
        return ds.dataset(files, schema=kinds.remove_metadata(), filesystem=store, format="parquet").to_table()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server for a test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.object_store"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield ObjectStore(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


class _Faults:
    """Fails some of the requests to an application."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.share, self.lost, self.random = 0.0, 0, random.Random(0)
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        writes_log = environ["REQUEST_METHOD"] == "PUT" and "_delta_log" in environ["PATH_INFO"]
        with self.lock:
            fault = self.random.choice(("busy", "late", "lost")) if self.random.random() < self.share else ""
            if writes_log and self.random.random() < 2 * self.share:
                fault = "lost"
        if fault == "busy":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        if fault == "late":
            time.sleep(0.1)
        if fault != "lost":
            return self.application(environ, start_response)
        b"".join(self.application(environ, lambda *_: None))
        self.lost += writes_log
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return []


def _serve() -> None:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").disabled = True
    faults = _Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.port}",
        aws_access_key_id="somebody",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    print(server.port, flush=True)
    for line in sys.stdin:
        share, seed = json.loads(line)
        faults.random, faults.share = random.Random(seed), share
        print(faults.lost, flush=True)


if __name__ == "__main__":
    _serve()
