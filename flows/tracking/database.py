"""The MLflow database of a root.

MLflow makes its tables in the database itself, migration by migration. A kill in between, or two processes at once,
would leave a half-made database that MLflow can never open again. So the database is made aside, under a lock, and
renamed into place.

MLflow writes absolute addresses of artifacts. Those of a root that was moved are mended when it is opened, and so are
those that only a server could resolve, as earlier versions of ``ditflow up`` left them.
"""

import re
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from flows.servers import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, sqlite_url
from storage.errors import InputError
from storage.rows.cache import locked

EXPERIMENT = "ditflow"
_MAKING = ".mlflow-being-made-"
_ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""Columns with addresses of artifacts, by table."""


def address(home: Path) -> str:
    """The tracking URI of the database in a root's local folder."""
    return sqlite_url(home / MLFLOW_DATABASE)


def artifacts(home: Path) -> str:
    """The URL of the folder of artifacts in a root's local folder."""
    return (home / MLFLOW_ARTIFACTS).as_uri()


def create(home: Path) -> None:
    """Create the database in a root's local folder, unless it is there.

    Raises:
        InputError: it is there and half-made.
    """
    if (home / MLFLOW_DATABASE).exists():
        check(home)
        _follow(home)
        return
    from mlflow import MlflowClient  # takes seconds

    home.mkdir(parents=True, exist_ok=True)
    with locked(home / _MAKING):
        for killed in home.glob(f"{_MAKING}*/"):
            shutil.rmtree(killed)
        if not (home / MLFLOW_DATABASE).exists():
            with tempfile.TemporaryDirectory(prefix=_MAKING, dir=home) as making:
                MlflowClient(address(Path(making))).search_experiments()
                Path(making, MLFLOW_DATABASE).replace(home / MLFLOW_DATABASE)


def registered(home: Path) -> dict[str, list[int]] | None:
    """The versions of each registered model in the database of a root's local folder, read without MLflow.

    None if the database is busy, or does not have MLflow's tables of today: MLflow itself must be asked then.
    """
    path = home / MLFLOW_DATABASE
    if not path.exists():
        return {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            names = database.execute("SELECT name FROM registered_models").fetchall()
            versions = database.execute(
                "SELECT name, version FROM model_versions WHERE current_stage <> 'Deleted_Internal'"
            ).fetchall()
    except sqlite3.Error:
        return None
    return {name: sorted(version for other, version in versions if other == name) for (name,) in names}


def _follow(home: Path) -> None:
    """Let the experiment's artifacts lie below the root's local folder, where it is now."""
    here = artifacts(home)
    select = "SELECT artifact_location FROM experiments WHERE name = ?"
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(home / MLFLOW_DATABASE)) as database, database:
        for (place,) in database.execute(select, (EXPERIMENT,)).fetchall():
            found = re.fullmatch(rf"(mlflow-artifacts:|file://.*/{MLFLOW_ARTIFACTS})(?:/\d+)?", place)
            if found is not None and found[1] != here:
                for table, column in _ADDRESSES.items():
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                        f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(found[1]) + 1, found[1], len(found[1]) + 1, f"{found[1]}/"),
                    )


def check(home: Path) -> None:
    """See that the database, if there is one, has all its tables.

    Raises:
        InputError: it is half-made, or no database.
    """
    path = home / MLFLOW_DATABASE
    if not path.exists():
        return
    try:  # writable, since a killed writer leaves a journal that must be rolled back before anything can be read
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            half_made = "alembic_version" not in tables or any(name.startswith("_alembic_tmp_") for name in tables)
    except sqlite3.OperationalError:
        return  # busy, or read-only: for MLflow to say
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path}: not a database ({error}); move the file away and run the command again") from error
    if half_made:
        problem = "MLflow was killed while it made this database, and cannot open it any more"
        raise InputError(f"{path}: {problem}; move the file away and run the command again")
