"""Who is told of what: Prefect's notification blocks and automations, made from the ``notify`` block of the settings.

The settings name environment variables and hold no secret. The URLs go into blocks, which Prefect's server keeps
encrypted and Apprise sends to. What a person switches off in Prefect's UI stays off.
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError

from flows.contract import STAGES
from flows.prefect_client import all_pages
from flows.yaml_text import parse
from storage.config import Config, problem
from storage.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

Subject = Literal["failed", "crashed", "preempted", "late", "drifted", "promoted"]
SUBJECTS: tuple[Subject, ...] = ("failed", "crashed", "preempted", "late", "drifted", "promoted")
SCHEMES = {"webhook": ("http://", "https://"), "slack": ("https://hooks.slack",), "mail": ("mailto://", "mailtos://")}
PREFIX = "ditflow notify "
"""Begins the name of each automation that is made here; others are left alone."""
PREEMPTED = "*PreemptedError*"
"""Message of a run that ended because its ranks were preempted too often."""
RUN = "prefect.flow-run."
PAGE = "PAGE"
LINK = f"{PAGE}/runs/flow-run/{{{{ flow_run.id }}}}"
MESSAGE = "{{ event.resource['prefect.state-message'] }}"
EVENTS: dict[Subject, tuple[str, str, str]] = {
    "failed": (f"{RUN}Failed", "{{ event.resource.name }} failed", f"{MESSAGE}\n{LINK}"),
    "crashed": (f"{RUN}Crashed", "{{ event.resource.name }} crashed", f"{MESSAGE}\n{LINK}"),
    "preempted": (f"{RUN}Failed", "{{ event.resource.name }} was preempted too often", f"{MESSAGE}\n{LINK}"),
    "late": (f"{RUN}Late", "{{ event.resource.name }} is late", f"It waits for a worker.\n{LINK}"),
    "drifted": (
        "ditflow.metric.drifted",
        "{{ event.resource.name }} {{ event.payload.version }} drifted",
        "{{ event.payload.metric }} is {{ event.payload.change }}: "
        "{{ event.payload.then }} -> {{ event.payload.now }}, {{ event.payload.period }}",
    ),
    "promoted": (
        "ditflow.model.promoted",
        "{{ event.resource.name }} {{ event.payload.version }} is champion",
        "{{ event.payload.why }}",
    ),
}
"""The event, subject and text of each message."""


class Notice(Config):
    """Who is told."""

    kind: Literal["webhook", "slack", "mail"]
    """How: by a POST of JSON to a web service, by a message in Slack, or by mail."""
    url_from: str
    """Environment variable that holds the URL: of the service, of Slack's incoming webhook, or of the mail server as
    ``mailtos://user:password@host?from=address&to=address``, with ``mailto`` if it speaks no TLS."""
    about: tuple[Subject, ...] = Field(default=SUBJECTS, min_length=1)
    """Of what: ``failed``, ``crashed``, ``preempted`` (too often, so that the run ended) and ``late`` runs, ``drifted``
    metrics of registered models, ``promoted`` models. All by default."""

    def address(self) -> str:
        """The URL, as Apprise writes it.

        Raises:
            InputError: the variable is not set, or holds no such URL.
        """
        from apprise import Apprise  # takes a second

        where = f"notify: the environment variable {self.url_from}"
        if not (given := os.environ.get(self.url_from)):
            raise InputError(f"{where} is not set")
        if not given.startswith(SCHEMES[self.kind]):
            raise InputError(
                f"{where} holds no URL of a {self.kind}: it must begin with {' or '.join(SCHEMES[self.kind])}"
            )
        url = _as_json_service(given) if self.kind == "webhook" else given
        logging.getLogger("apprise").addFilter(_silent)  # it would print the URL
        try:
            if Apprise.instantiate(url) is None:
                raise InputError(f"{where} holds no complete URL of a {self.kind}")
        finally:
            logging.getLogger("apprise").removeFilter(_silent)
        return url


class Settings(Config):
    """The settings of `ditflow up`."""

    notify: tuple[Notice, ...] = ()
    """Who is told of what."""


def read_settings(path: Path) -> Settings:
    """Read the settings, and see that every variable that they name is set.

    Raises:
        InputError: there is no such file, it is wrong, or a variable is not set.
    """
    try:
        values = parse(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {problem(error, values)}") from error
    for notice in settings.notify:
        notice.address()
    return settings


def apply(settings: Settings) -> None:
    """Make the blocks and automations of the settings on Prefect's server, and remove those of earlier settings."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import AutomationSort

    with get_client(sync_client=True) as client:
        in_order = partial(client.read_automations, sort=AutomationSort.CREATED_DESC)  # several may share a name
        runs = _runs(client)
        of_each = [_automations(place, notice, runs) for place, notice in enumerate(settings.notify)]
        there = {each.name: each for each in all_pages(in_order) if each.name.startswith(PREFIX)}
        for automation in chain.from_iterable(of_each):
            if (old := there.pop(automation.name, None)) is None:
                client.create_automation(automation)
            else:
                client.update_automation(old.id, automation.model_copy(update={"enabled": old.enabled}))
        for old in there.values():
            client.delete_automation(old.id)


def _automations(place: int, notice: Notice, runs: Sequence[str]) -> list["AutomationCore"]:
    from prefect.blocks.notifications import SlackWebhook
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    # Whatever its name, it takes any URL of Apprise. Prefect's block for webhooks logs the URL when the service fails.
    block = SlackWebhook(url=SecretStr(notice.address())).save(f"ditflow-{notice.kind}-{place}", overwrite=True)
    page, made = os.environ["PREFECT_API_URL"].removesuffix("/api"), []
    for subject in notice.about:
        event, title, text = EVENTS[subject]
        match: dict[str, Any] = {"prefect.resource.id": f"{RUN}*" if event.startswith(RUN) else "ditflow.model.*"}
        if event == f"{RUN}Failed":
            match["prefect.state-message"] = PREEMPTED if subject == "preempted" else f"!{PREEMPTED}"
        related = {"prefect.resource.id": list(runs)} if event.startswith(RUN) else {}
        trigger = EventTrigger(
            match=match, match_related=related, expect={event}, posture=Posture.Reactive, threshold=1
        )
        body = text.replace(PAGE, page)
        action = SendNotification(block_document_id=block, subject=title, body=body)
        made.append(AutomationCore(name=f"{PREFIX}{notice.kind} {place}: {subject}", trigger=trigger, actions=[action]))
    return made


def _runs(client: "SyncPrefectClient") -> list[str]:
    """What a run that people or schedules started is related to; a stage within a pipeline to none of them."""
    from prefect.client.schemas.sorting import DeploymentSort

    # Several have the same name: sorted by names, pages might leave one out.
    in_order = partial(client.read_deployments, sort=DeploymentSort.CREATED_DESC)
    whole = [f"prefect.flow.{flow.id}" for flow in all_pages(client.read_flows) if flow.name not in STAGES]
    return whole + [f"prefect.deployment.{deployment.id}" for deployment in all_pages(in_order)]


def _as_json_service(url: str) -> str:
    """A web service's URL, as Apprise writes it; query parameters have a minus sign there."""
    parts = urlsplit(url)
    query = urlencode([(f"-{key}", value) for key, value in parse_qsl(parts.query, keep_blank_values=True)])
    return urlunsplit(({"http": "json", "https": "jsons"}[parts.scheme], parts.netloc, parts.path, query, ""))


def _silent(_: logging.LogRecord) -> bool:
    return False
