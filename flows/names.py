"""Names of flow runs: ``<recipe>-<digest> train`` in the place of one that Prefect made up; a typed one stays."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

_GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon"
_GREEK += "|phi|chi|psi|omega"
_PRAISE = "Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|Practical"
_PRAISE += "|Ergonomic|Handcrafted|Tasty|Handmade|Incredible"
_OF_FORMS = re.compile(rf"(?:{_GREEK})\d*(?:-[a-z]+){{1,3}}|(?:{_PRAISE})-\S+")
"""What Prefect's two user interfaces suggest in their forms."""


def named(name: str) -> str:
    """Name the flow run that runs here, unless a person or its parent has named it; return its name."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return name
    run = context.flow_run
    if is_made_up(run.name):
        with get_client(sync_client=True) as client:
            client.set_flow_run_name(run.id, name)
        run.name = name
    return run.name


def is_made_up(name: str) -> bool:
    """Whether Prefect has made up the name of a run, as its server and its forms do."""
    words = name.split("-")
    by_server = len(words) == 2 and _words().issuperset(words)
    return by_server or _OF_FORMS.fullmatch(name) is not None


@cache
def _words() -> frozenset[str]:
    """Those of the package with which Prefect's server makes names."""
    from coolname.data import config

    lists: Iterable[Any] = config.values()
    return frozenset(word for each in lists for word in each.get("words", ()))
