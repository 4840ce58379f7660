"""A real S3 endpoint: moto's server in a process of its own, which keeps nothing."""

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from s3fs import S3FileSystem
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
            S3FileSystem.clear_instance_cache()  # else fsspec goes on with the client of an earlier server
            yield {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "NO_PROXY": "127.0.0.1," + os.environ.get("NO_PROXY", ""),
            }
        finally:
            process.kill()
            S3FileSystem.clear_instance_cache()


class Door:
    """A way to a server that can be shut and opened again: behind a shut one nobody listens.

    Args:
        address: the server's, as http://host:port.
    """

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._server, self._port = (host, int(port)), 0
        self._listener: socket.socket | None = None
        self._ends, self._lock = list[socket.socket](), threading.Lock()
        self.open()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        with self._lock:
            if self._listener is None:
                self._listener = socket.create_server(("127.0.0.1", self._port))
                self._port = self._listener.getsockname()[1]
                threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        with self._lock:
            for end in [*self._ends, *([self._listener] if self._listener else [])]:
                with suppress(OSError):  # not connected any more
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._ends, self._listener = [], None

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # shut
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._server)
                self._ends += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=_pump, args=(source, target), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _answers(address: str, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "moto's server ended"
    try:
        urllib.request.urlopen(address)
    except OSError:
        return False
    return True
