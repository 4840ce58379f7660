"""How any stage is performed under Prefect: skip it if it is done, else track it, run it and link it."""

import base64
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows.children import terminate_with_prefect_worker
from flows.contract import Source, Stage
from flows.launch import start
from flows.launch.spec import LaunchSpec, LocalLaunch, WorkerSpec
from flows.tracking import runs, sink
from flows.tracking.progress import StageProgress
from flows.tracking.spec import TrackingSpec
from storage import uri
from storage.archives.open import ArchiveRef
from storage.config import Config
from storage.manifest import Manifest, Provenance, StageOutput
from storage.stage import Run

LOGGER = logging.getLogger(__name__)
SKIPPED = "Skipped"
MAX_PICTURE_BYTES = 300_000  # Prefect takes about 500 kB, and base64 adds a third


class RunSettings(Config):
    """What holds for a run, whatever the stage."""

    root: str = Field(default_factory=lambda: os.environ.get("DITFLOW_ROOT", "runs"))
    """fsspec URL of the folder that holds every output."""
    force: bool = False
    """Run a finished stage again, beside its old output."""
    pipeline_id: str | None = None
    """The pipeline that this run belongs to."""


def perform(
    stage: Stage,
    config: Config,
    given: ArchiveRef | str,
    settings: RunSettings,
    launcher: LaunchSpec | None = None,
    run: Run[Any, Any, Manifest] | None = None,
) -> State[str]:
    """Bring a stage to its committed manifest, inside a Prefect flow.

    Args:
        given: the archive, or a reference to the manifest that the stage starts from.
        launcher: how to start ranks; without one, and for a single rank here of any stage but training,
            the stage runs in this process.
        run: does the work instead of the stage's own.

    Returns:
        A completed state with the manifest's URL, named ``Skipped`` when it was there before.
    """
    terminate_with_prefect_worker()
    source = stage.source(runs.resolve(given, settings.root) if isinstance(given, str) else given)
    provenance = Provenance(
        pipeline_id=settings.pipeline_id,
        prefect_flow_run_id=flow_run.id,
        prefect_flow_run_url=flow_run.ui_url,
    )
    output = stage.output(settings.root, config, source, force=settings.force, provenance=provenance)
    done = output.committed(stage.kind)
    if done is not None:
        runs.sync_run(done, settings.root)
        _show(stage, partial(_link, stage, done.provenance.mlflow_run_id, settings.root))
        _show(stage, partial(_create_artifacts, stage, done))
        return Completed(name=SKIPPED, message=f"done before: {done.url}", data=done.url)
    with runs.stage_run(output, settings.root) as (tracked, spec):
        _show(stage, partial(_link, stage, spec.run_id, settings.root))
        manifest = _run(stage, config, source, tracked, spec, launcher, run or stage.run)
    _show(stage, partial(_create_artifacts, stage, manifest))
    return Completed(message=manifest.url, data=manifest.url)


def _run(
    stage: Stage,
    config: Config,
    source: Source,
    output: StageOutput,
    spec: TrackingSpec,
    launcher: LaunchSpec | None,
    run: Run[Any, Any, Manifest],
) -> Manifest:
    with StageProgress(stage.name).shown() as progress:
        if launcher is not None and not _is_enough(stage, launcher):
            assert isinstance(source, Manifest)
            values = config.model_dump(mode="json")
            job = WorkerSpec(stage=stage.name, config=values, source=source.uri, output=output, tracking=spec)
            start.run(job, launcher, progress=progress.update, log=get_run_logger())
            return stage.kind.read(output.uri)
        tracker = sink.StageTracker(sink.MlflowSink(spec.uri, spec.run_id, spec.skip_to), progress.update)
        try:
            return run(config, source, out=output, tracker=tracker)
        finally:
            tracker.close(output)


def _is_enough(stage: Stage, launcher: LaunchSpec) -> bool:
    """Whether this process does for what a launcher would start: torchrun takes seconds."""
    return stage.name != "train" and isinstance(launcher, LocalLaunch) and launcher.world_size == 1


def _show(stage: Stage, create: Callable[[], None]) -> None:
    """Show something in Prefect, or say that it cannot be: that must not fail the stage."""
    try:
        create()
    except Exception as error:
        LOGGER.warning("%s: no artifacts in Prefect: %s", stage.name, error)


def _link(stage: Stage, run_id: str | None, root: str) -> None:
    """Link the flow run to its MLflow run, from its beginning on."""
    address = runs.run_url(run_id, root) if run_id else None
    if address:
        create_link_artifact(address, link_text=f"MLflow run {run_id}", key=f"{stage.name}-mlflow")


def _create_artifacts(stage: Stage, manifest: Manifest) -> None:
    """The manifest with its numbers, and the stage's pictures."""
    run_id = manifest.provenance.mlflow_run_id
    facts = manifest.metrics | manifest.counts
    rows = "".join(f"| {name} | {value:,.6g} |\n" for name, value in facts.items())
    text = f"`{manifest.url}`\n\nMLflow run `{run_id}`\n\n| | |\n|---|---|\n{rows}"
    create_markdown_artifact(text, key=f"{stage.name}-manifest", description=f"What {stage.name} made")
    for entry in manifest.files:
        if entry.path.startswith("artifacts/") and entry.path.endswith(".png") and entry.size <= MAX_PICTURE_BYTES:
            picture = base64.b64encode(uri.read(uri.join(manifest.uri, entry.path))).decode()
            name = entry.path.removeprefix("artifacts/").removesuffix(".png")
            create_image_artifact(f"data:image/png;base64,{picture}", key=f"{stage.name}-{name}", description=name)
