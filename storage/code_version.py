"""Which code is running."""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from shutil import which
from subprocess import run


@cache
def code_version() -> str:
    """The package's version, followed by the git commit (and ``+dirty``) if it runs from a checkout."""
    name = version("ditflow")
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists() or which("git") is None:
        return name
    described = run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty=+dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{name}-g{described.stdout.strip()}" if described.returncode == 0 else name
