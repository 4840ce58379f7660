"""MLflow behind ``storage.tracker.Tracker``, sent in the background.

A tracker never stops the work. One thread sends what it is told; while the server is away it keeps
everything and tries again, and what it still holds at the end is written beside the manifest.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Metric

from storage import uri
from storage.errors import one_line
from storage.manifest import StageOutput

LOGGER = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)
UNSENT = "tracking-unsent.jsonl"
BATCH = 1000  # what MLflow takes in one call
FLUSH_SECONDS = 1.0
CLOSE_SECONDS = 10.0  # within what a rank is given to end
MAX_BACKOFF_SECONDS = 30.0

Record: TypeAlias = Metric | tuple[str, bytes]
"""A metric, or a file by its name."""


class MlflowSink:
    """Sends metrics and files to an MLflow run, in the background, for as long as it takes.

    Args:
        tracking: MLflow's tracking URI.
        run_id: None when MLflow could not open a run: then everything is kept.
        skip_to: metrics up to this step are in the run already, from before a restart.
    """

    def __init__(self, tracking: str, run_id: str | None, skip_to: int = -1) -> None:
        self._tracking, self._run_id, self._skip_to = tracking, run_id, skip_to
        self._lock = threading.Lock()  # of the records; nobody sends while holding it
        self._records: list[Record] = []
        self._away = False
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        if run_id is not None:
            self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue scalars at a step, unless it had some: training can go back to a checkpoint."""
        if step > self._skip_to:
            self._skip_to = step
            now = int(time.time() * 1000)
            self._keep([Metric(key, float(value), now, step) for key, value in values.items()])

    def file(self, name: str, data: bytes) -> None:
        """Queue a file."""
        self._keep([(name, data)])

    def close(self) -> list[Record]:
        """Send what is left and end; return what could not be sent. Waits at most 10 s, less if MLflow is away."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        if self._run_id is not None:
            self._thread.join(CLOSE_SECONDS)
        with self._lock:
            return list(self._records)

    def _keep(self, records: Sequence[Record]) -> None:
        with self._lock:
            self._records += records

    def _send_all(self) -> None:
        pause = FLUSH_SECONDS
        while time.monotonic() < self._deadline:
            closing, away = self._closing.wait(pause), self._away
            sent = self._send()
            if closing and (sent or away):
                return
            if closing:
                time.sleep(FLUSH_SECONDS)
            pause = FLUSH_SECONDS if sent else min(2 * pause, MAX_BACKOFF_SECONDS)

    def _send(self) -> bool:
        try:
            while batch := self._first():
                assert self._run_id is not None
                log_records(MlflowClient(self._tracking), self._run_id, batch)
                with self._lock:
                    del self._records[: len(batch)]
        except Exception as error:  # whatever MLflow raises: it must not stop the work
            if not self._away:
                LOGGER.warning("MLflow takes nothing, records wait: %s", one_line(error))
            self._away = True
            return False
        if self._away:
            LOGGER.warning("MLflow is back and has all records")
        self._away = False
        return True

    def _first(self) -> list[Record]:
        with self._lock:
            return self._records[:BATCH]


class StageTracker:
    """A ``storage.tracker.Tracker`` that passes on to MLflow and to a progress display."""

    def __init__(self, sink: MlflowSink | None, progress: Callable[[int, int, str], None] | None) -> None:
        self._sink, self._progress = sink, progress

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Scalars at a step, for MLflow."""
        if self._sink is not None:
            self._sink.metrics(values, step)

    def artifact(self, name: str, data: bytes) -> None:
        """A file, for MLflow."""
        if self._sink is not None:
            self._sink.file(name, data)

    def progress(self, done: int, total: int, unit: str) -> None:
        """How far the stage is, for the display."""
        if self._progress is not None:
            self._progress(done, total, unit)

    def close(self, output: StageOutput) -> None:
        """Send what is left; what MLflow does not take is kept beside the manifest, a JSON object a line."""
        unsent = self._sink.close() if self._sink is not None else []
        if not unsent:
            return
        try:
            url = output.url(UNSENT)
            before = uri.read(url) if uri.exists(url) else b""
            uri.write(url, before + "".join(json.dumps(_as_json(item)) + "\n" for item in unsent).encode())
        except Exception as error:  # a full disk, a store out of reach: the work itself may be done
            LOGGER.error("%d records for MLflow are lost: %s", len(unsent), one_line(error))


def read_unsent(url: str) -> tuple[list[Metric], list[str]]:
    """The metrics that a tracker kept beside a manifest, and the names of the files that it could not send."""
    records = [json.loads(line) for line in uri.read(url).splitlines()]
    metrics = [Metric(r["metric"], r["value"], r["timestamp"], r["step"]) for r in records if "metric" in r]
    return metrics, [r["artifact"] for r in records if "artifact" in r]


def log_records(client: MlflowClient, run_id: str, records: Sequence[Record]) -> None:
    """Send any number of metrics and files to a run, now. Sent twice, they are there once."""
    metrics = [record for record in records if isinstance(record, Metric)]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    for record in records:
        if not isinstance(record, Metric):
            log_file(client, run_id, *record)


def log_file(client: MlflowClient, run_id: str, name: str, data: bytes) -> None:
    """Log bytes as an artifact of a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(data)
        client.log_artifact(run_id, str(path))


def _as_json(item: Record) -> dict[str, Any]:
    if isinstance(item, Metric):
        return {"metric": item.key, "value": item.value, "step": item.step, "timestamp": item.timestamp}
    return {"artifact": item[0], "bytes": len(item[1])}
