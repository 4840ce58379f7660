"""A ``storage.tracker.Tracker`` that sends to MLflow in a background thread and never stops the stage.

While MLflow does not answer, records are queued and sent again later. Those that are left when the stage ends are
written beside its manifest, to ``tracking-unsent.jsonl``; `flows.tracking.runs.sync_run` sends them later.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from storage import uri
from storage.errors import InputError, one_line
from storage.manifest import StageOutput

LOGGER = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)
UNSENT = "tracking-unsent.jsonl"
"""Name of the file beside the manifest."""
REFUSES = "MLflow refuses"
BATCH = 1000  # the most that MLflow takes in one call
FLUSH_SECONDS = 1.0
CLOSE_SECONDS = 10.0  # less than torchrun waits for a rank after SIGTERM
MAX_BACKOFF_SECONDS = 30.0

Record: TypeAlias = Metric | tuple[str, bytes]
"""A metric, or the name and bytes of a file."""


class MlflowSink:
    """Queues metrics and files, and sends them to an MLflow run from a thread.

    Args:
        tracking: MLflow's tracking URI.
        run_id: None if MLflow could not open a run: then nothing is sent, and `close` returns everything.
        skip_to: last step whose metrics the run has from before a restart.
    """

    def __init__(self, tracking: str, run_id: str | None, skip_to: int = -1) -> None:
        self._tracking, self._run_id, self._skip_to = tracking, run_id, skip_to
        self._lock = threading.Lock()  # guards the records; not held while sending
        self._records: list[Record] = []
        self._failing = False
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        if run_id is not None:
            self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue scalars at a step, unless the run has them: after a restart training repeats steps."""
        if step > self._skip_to:
            self._skip_to = step
            now = int(time.time() * 1000)
            self._queue([Metric(key, float(value), now, step) for key, value in values.items()])

    def file(self, name: str, data: bytes) -> None:
        """Queue a file."""
        self._queue([(name, data)])

    def close(self) -> list[Record]:
        """Send what is queued, end the thread, and return what could not be sent. Waits at most `CLOSE_SECONDS`."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        if self._run_id is not None:
            self._thread.join(CLOSE_SECONDS)
        with self._lock:
            return list(self._records)

    def _queue(self, records: Sequence[Record]) -> None:
        with self._lock:
            self._records += records

    def _send_all(self) -> None:
        pause = FLUSH_SECONDS
        while time.monotonic() < self._deadline:
            closing, failing = self._closing.wait(pause), self._failing
            sent = self._send()
            if closing and (sent or failing):
                return
            if closing:
                time.sleep(FLUSH_SECONDS)
            pause = FLUSH_SECONDS if sent else min(2 * pause, MAX_BACKOFF_SECONDS)

    def _send(self) -> bool:
        try:
            while batch := self._next_batch():
                assert self._run_id is not None
                log_records(MlflowClient(self._tracking), self._run_id, batch)
                with self._lock:
                    del self._records[: len(batch)]
        except Exception as error:  # MLflow documents no exception types
            if not self._failing:
                LOGGER.warning("%s; records are kept, to be sent later: %s", complaint(error), one_line(error))
            self._failing = True
            return False
        if self._failing:
            LOGGER.warning("MLflow takes records again and has all")
        self._failing = False
        return True

    def _next_batch(self) -> list[Record]:
        with self._lock:
            return self._records[:BATCH]


class StageTracker:
    """A ``storage.tracker.Tracker`` that passes records to an `MlflowSink` and progress to a display."""

    def __init__(self, sink: MlflowSink | None, progress: Callable[[int, int, str], None] | None) -> None:
        self._sink, self._progress = sink, progress
        self._loss = ""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Send scalars at a step to MLflow."""
        self._loss = f", loss {values['loss']:.4g}" if "loss" in values else self._loss
        if self._sink is not None:
            self._sink.metrics(values, step)

    def artifact(self, name: str, data: bytes) -> None:
        """Send a file to MLflow."""
        if self._sink is not None:
            self._sink.file(name, data)

    def progress(self, done: int, total: int, unit: str) -> None:
        """Show the progress, with the last loss behind the name of the units."""
        if self._progress is not None:
            self._progress(done, total, f"{unit}{self._loss}")

    def close(self, output: StageOutput) -> None:
        """Send what is queued; write what MLflow does not take beside the manifest, one JSON object on each line."""
        unsent = self._sink.close() if self._sink is not None else []
        if not unsent:
            return
        try:
            url = output.url(UNSENT)
            before = uri.read(url) if uri.exists(url) else b""
            uri.write(url, before + "".join(json.dumps(_as_json(item)) + "\n" for item in unsent).encode())
        except Exception as error:  # a full disk or an unreachable store must not fail a finished stage
            LOGGER.error("%d records for MLflow are lost: %s", len(unsent), one_line(error))


def read_unsent(url: str) -> tuple[list[Metric], list[str]]:
    """The metrics, and the names of the files, in an `UNSENT` file."""
    records = [json.loads(line) for line in uri.read(url).splitlines()]
    metrics = [Metric(r["metric"], r["value"], r["timestamp"], r["step"]) for r in records if "metric" in r]
    return metrics, [r["artifact"] for r in records if "artifact" in r]


def log_records(client: MlflowClient, run_id: str, records: Sequence[Record]) -> None:
    """Send any number of metrics and files to a run, without a queue. Sending them again changes nothing."""
    metrics = [record for record in records if isinstance(record, Metric)]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    for record in records:
        if not isinstance(record, Metric):
            log_file(client, run_id, *record)


def complaint(error: Exception) -> str:
    """Whether MLflow does not answer, or answers and refuses, as when a person has deleted the run."""
    refused = isinstance(error, MlflowException) and error.get_http_status_code() < HTTPStatus.INTERNAL_SERVER_ERROR
    return REFUSES if refused or isinstance(error, InputError) else "MLflow does not answer"


class BestEffort:
    """Logs what MLflow raises in the block and goes on behind it, except for errors of the types ``passing``."""

    def __init__(self, *passing: type[Exception]) -> None:
        self._passing = passing

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._passing):  # MLflow documents no exception types
            return False
        LOGGER.warning("%s; the stage goes on without it: %s", complaint(error), one_line(error))
        return True


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
