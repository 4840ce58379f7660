"""A real S3 endpoint: moto's server in a process of its own, which keeps nothing."""

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from until import until

SERVER = """
import sys
from threading import Lock

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

store, lock = DomainDispatcherApplication(create_backend_app), Lock()


def one_at_a_time(environ, start_response):
    with lock:
        return store(environ, start_response)


run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""
"""S3 looks and writes at once, where moto looks and then writes: without a lock two exclusive creators can both win."""
SECRET = "not-a-real-secret-but-looked-for"
BUCKET = "ditflow"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment with which any S3 client reaches the server for the length of the block; its bucket is empty."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", SERVER, str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _answers(address, process))
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"))
            yield {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "NO_PROXY": "127.0.0.1," + os.environ.get("NO_PROXY", ""),
            }
        finally:
            process.kill()


def _answers(address: str, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "moto's server ended"
    try:
        urllib.request.urlopen(address)
    except OSError:
        return False
    return True
