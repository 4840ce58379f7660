"""The MLflow database of a root.

MLflow makes its tables in the database itself, migration by migration. A kill in between, or two processes at once,
would leave a half-made database that MLflow can never open again. So the database is made aside, under a lock, and
renamed into place.
"""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from flows.servers import MLFLOW_DATABASE, sqlite_url
from storage.errors import InputError
from storage.rows.cache import locked

_MAKING = ".mlflow-being-made-"


def address(home: Path) -> str:
    """The tracking URI of the database in a root's local folder."""
    return sqlite_url(home / MLFLOW_DATABASE)


def create(home: Path) -> None:
    """Create the database in a root's local folder, unless it is there.

    Raises:
        InputError: it is there and half-made.
    """
    if (home / MLFLOW_DATABASE).exists():
        check(home)
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
