"""A real Postgres on this machine, with the databases of Prefect and MLflow."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import psycopg
from until import until

from flows import servers
from flows.access import DATABASES
from flows.children import set_parent_death_signal

PASSWORD = "p@ss:/word%41-that-nobody-must-see"
SYSTEM_USER = "postgres"
"""Who runs the server if we are root, which Postgres refuses to be."""


def programs() -> Path | None:
    """The folder of Postgres's programs: Debian's, else that of the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    found = shutil.which("postgres")
    return debian[-1] if debian else Path(found).parent if found else None


def reason_not_to() -> str | None:
    """Why there can be no server here, if so."""
    if programs() is None:
        return "Postgres is not installed (apt-get install postgresql)"
    if os.geteuid() == 0 and SYSTEM_USER not in {user.pw_name for user in pwd.getpwall()}:
        return f"root must not run Postgres, and there is no user {SYSTEM_USER}"
    return None


class PostgresServer:
    """A server in a folder of its own, which can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home, self.port, self._log = home, servers.free_port(), home / "log"
        self.url = f"postgresql://ditflow:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}"
        password = home / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (home, password):
                shutil.chown(path, SYSTEM_USER)
        options = ["--auth=scram-sha-256", "--username=ditflow", f"--pwfile={password}", "--encoding=UTF8", "--no-sync"]
        assert self._start("initdb", *options).wait() == 0, self._log.read_text()
        password.unlink()
        self.start()

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": self.home, "fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = self._start("postgres", "-p", str(self.port), *options)
        until(self._answers)

    def kill(self) -> None:
        """As a crash of the machine does, but for the disk: connections end, and a start recovers."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        with psycopg.connect(self.url, dbname=database, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def create_databases(self) -> None:
        """New and empty ones."""
        for name in DATABASES:
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            self.execute(f"CREATE DATABASE {name}")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _start(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        folder = programs()
        assert folder is not None
        command = [str(folder / program), "-D", str(self.home / "data"), *arguments]
        user = SYSTEM_USER if os.geteuid() == 0 else None
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.home,
                user=user,
                group=user,
                preexec_fn=partial(set_parent_death_signal, os.getpid(), signal.SIGQUIT),  # not to outlive killed tests
            )


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="ditflow-postgres-") as home:
        server = PostgresServer(Path(home))
        try:
            yield server
        finally:
            server.kill()
