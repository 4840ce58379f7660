"""The registered versions, and which outputs of a root they were made from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.servers import MLFLOW_DATABASE, local_home
from flows.tracking import database
from flows.tracking.runs import mlflow_errors, tracking_uri
from flows.tracking.store import DIGEST_TAG

LINEAGE = "digest."
"""What the tags with the digests of a version's lineage begin with."""
MODEL = f"{LINEAGE}checkpoint"
PAGE = 1000


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]

    def __str__(self) -> str:
        return " ".join([f"{self.name}/{self.number}", *(f"@{alias}" for alias in self.aliases)])

    @property
    def digests(self) -> set[str]:
        """Digests of the outputs that it was made from, and of its registration."""
        lineage = {value for key, value in self.tags.items() if key.startswith(LINEAGE)}
        return lineage | {self.tags.get(DIGEST_TAG, "")} - {""}

    @property
    def shown_at(self) -> set[str]:
        """Digests of its registration and of its model, where people look for its aliases."""
        return {self.tags.get(DIGEST_TAG, ""), self.tags.get(MODEL, "")} - {""}


def versions(root: str) -> list[Version]:
    """All versions in the registry of a root; none if there is no registry yet.

    Raises:
        InputError: MLflow's database is half-made.
        DitflowError: MLflow does not answer.
    """
    if not _is_there(root):
        return []
    client = MlflowClient(tracking_uri(root))
    with mlflow_errors(root):
        models = _all(lambda token: client.search_registered_models(page_token=token))
        found = _all(lambda token: client.search_model_versions(max_results=PAGE, page_token=token))
    aliases: dict[tuple[str, int], list[str]] = {}
    for model in models:
        for alias, number in model.aliases.items():
            aliases.setdefault((model.name, int(number)), []).append(alias)
    keys = [(each.name, int(each.version)) for each in found]
    return [Version(*key, tuple(aliases.get(key, ())), dict(each.tags)) for key, each in zip(keys, found, strict=True)]


def knows_run(run_id: str, root: str) -> bool:
    """Whether the tracking store of a root has a run, be it deleted. If not, it is another store."""
    try:
        MlflowClient(tracking_uri(root)).get_run(run_id)
    except MlflowException:
        return False
    return True


def _is_there(root: str) -> bool:
    home = local_home(root)
    if tracking_uri(root) != database.address(home):
        return True
    database.check(home)
    return (home / MLFLOW_DATABASE).exists()


def _all(search: Callable[[str | None], Any]) -> list[Any]:
    """All pages of a search, which takes the token of a page."""
    page = search(None)
    found = list(page)
    while page.token:
        page = search(page.token)
        found += page
    return found
