"""Prefect's API over plain HTTP, as a page or a script speaks to it."""

import base64
import json
import time
import urllib.error
import urllib.request
from typing import Any

PASSWORD = "ditflow:of-the-tests"


def send(
    address: str, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> Any:
    """The answer of Prefect's API; a POST if there is a body, and no other method is given.

    Raises:
        HTTPError: it refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{address}/api{path}", data, {"Content-Type": "application/json"} | (headers or {}), method=method
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            if error.code != 503:  # sqlite is busy: Prefect's own clients try again as well
                raise
            time.sleep(0.5)


def call(address: str, path: str, body: Any = None, password: str = PASSWORD, method: str | None = None) -> Any:
    """The answer for somebody who knows the password."""
    headers = {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"}
    if body is not None:
        token = send(address, "/csrf-token?client=tests", headers=headers)["token"]
        headers |= {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token}
    return send(address, path, body, headers, method)
