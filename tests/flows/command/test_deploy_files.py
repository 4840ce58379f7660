"""The compose file and the Containerfile name what there is."""

import re
import tomllib
from pathlib import Path

import yaml

from flows import access
from flows.command.main import _parser

REPOSITORY = Path(__file__).parents[3]
DEPLOY = REPOSITORY / "docs" / "deploy"


def test_the_compose_file_starts_the_servers_as_the_command_asks_for() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    servers = services["servers"]
    program, *arguments = servers["command"]
    assert program == "ditflow"
    options = _parser().parse_args(arguments)
    assert (options.servers_only, options.host) == (True, servers["hostname"].replace(":?", ""))
    assert {access.POSTGRES, access.PREFECT_PASSWORD, access.MLFLOW_PASSWORD} <= servers["environment"].keys()
    assert servers["ports"] == [f"{port}:{port}" for port in (options.prefect_port, options.mlflow_port)]
    assert (DEPLOY / servers["build"]["context"] / servers["build"]["dockerfile"]).is_file()
    given = servers["environment"][access.POSTGRES]
    assert access._postgres(given).url.host == "postgres"
    made = re.findall(r"CREATE DATABASE (\w+);", (DEPLOY / "databases.sql").read_text())
    assert tuple(made) == access.DATABASES


def test_the_image_has_what_there_is() -> None:
    lines = (DEPLOY / "Containerfile").read_text()
    for copied in re.findall(r"^COPY --chown=\S+ (.*) \S+$", lines, re.MULTILINE):
        assert all((REPOSITORY / name).exists() for name in copied.split())
    (extras,) = re.findall(r"'\.\[(.*)\]'", lines)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert all(f" {package}\n" in lines for package in packages["packages"])
