"""What every stage's flow does: skip the stage if its manifest exists, else run it with an MLflow run.

`perform` finds the input, names the output and looks for its manifest. Without one it opens the MLflow run of the
output and runs the stage, in this process or on ranks; the stage itself resumes what an earlier attempt has committed.
Both ways end with links and artifacts in Prefect.
"""

import base64
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows import processes, servers, temporary
from flows.children import terminate_with_prefect_worker
from flows.claims import claim
from flows.contract import STAGES, Source, Stage
from flows.inventory import input_of
from flows.launch import start
from flows.launch.spec import LaunchSpec, LocalLaunch, NodesLaunch, WorkerSpec
from flows.names import named
from flows.report.html import markdown
from flows.tracking import runs, sink
from flows.tracking.progress import StageProgress, noted
from flows.tracking.references import located
from flows.tracking.spec import TrackingSpec
from storage import uri
from storage.archives.once import listed_once
from storage.archives.open import ArchiveRef
from storage.config import Config, Location
from storage.cost import Gauge, metered
from storage.estimate import PlanContext
from storage.manifest import Manifest, StageOutput, key_of, output_folder
from storage.patience import STAGE_SECONDS, patient, seconds
from storage.processors import Processors
from storage.rows.cache import making
from storage.stage import Run

LOGGER = logging.getLogger(__name__)
SKIPPED = "Skipped"
MAX_PICTURE_BYTES = 300_000  # Prefect accepts about 500 kB, and base64 adds a third


class RunSettings(Config):
    """Settings of a run that are the same for every stage."""

    root: Location = Field(default_factory=lambda: os.environ.get("DITFLOW_ROOT", "runs"))
    """Folder or fsspec URL of all outputs. Default: DITFLOW_ROOT, else runs."""
    force: bool = False
    """Whether to run a finished stage again, into a new folder beside its old output."""
    patience: float = Field(default=STAGE_SECONDS, ge=0)
    """Seconds for which a stage asks an object store again that does not answer. Then the stage fails."""
    pipeline_id: str | None = None
    """Id of the pipeline that this run belongs to. Default: none."""


def perform(
    stage: Stage,
    config: Config,
    given: ArchiveRef | str,
    settings: RunSettings,
    launcher: LaunchSpec | None = None,
    run: Run[Any, Any, Manifest] | None = None,
) -> State[str]:
    """Run a stage inside a Prefect flow, unless its output is committed already.

    Args:
        given: the archive, or the URL or MLflow run id of the manifest that the stage reads.
        launcher: where the ranks run; without one, and for a single rank on this machine of any stage but
            training, the stage runs in this process.
        run: replaces the stage's own ``run``.

    Returns:
        A completed state with the manifest's URL, named ``Skipped`` if the output was committed before.

    Raises:
        SubmittedError: nobody waits for the job that makes the output.
    """
    terminate_with_prefect_worker()
    temporary.hold()
    processes.note(flow_run.id, settings.root)
    with listed_once(), patient(settings.patience):
        return _perform(stage, config, given, settings, launcher, run or stage.run)


def _perform(
    stage: Stage,
    config: Config,
    given: ArchiveRef | str,
    settings: RunSettings,
    launcher: LaunchSpec | None,
    run: Run[Any, Any, Manifest],
) -> State[str]:
    source = _source(stage, given, settings.root)
    config = located(config, settings.root)
    output = stage.output(settings.root, config, source, force=settings.force)
    output = output.made_by(
        name=named(f"{stage.name} {output.header.folder_name[:8]}"),
        pipeline_id=settings.pipeline_id,
        prefect_flow_run_id=flow_run.id,
        prefect_flow_run_url=None if servers.SHORT_LIVED in os.environ else flow_run.ui_url,
    )
    claim(settings.root, [key_of(url) for url in (output.uri, *(each.uri for each in output.header.parents.values()))])
    done = output.committed(stage.kind)
    if done is None:
        with _alone(stage, output, launcher):
            done = output.committed(stage.kind)  # by the process that was waited for
            if done is None:
                if settings.pipeline_id is None:  # else `preflight` has done it
                    if launcher is not None:
                        start.check(launcher, settings.root, force=settings.force)
                    _check(stage, config, source, output, launcher)
                manifest = _make(stage, config, source, output, settings.root, launcher, run)
                return Completed(message=manifest.url, data=manifest.url)
    runs.sync_run(done, settings.root)
    _show(stage, partial(_link, stage, done.provenance.mlflow_run_id, settings.root))
    _show(stage, partial(_create_artifacts, stage, done))
    return Completed(name=SKIPPED, message=f"already done: {done.url}", data=done.url)


def _source(stage: Stage, given: ArchiveRef | str, root: str) -> Source:
    """What the stage reads, which nobody deletes from now on."""
    if not isinstance(given, str):
        return stage.source(given)
    url = input_of(stage, given, root)
    if url != given:
        get_run_logger().info("%s: %s is %s", stage.role, given, uri.redact(url))
    claim(root, [key_of(output_folder(url))])
    return stage.source(url)


def _check(stage: Stage, config: Config, source: Source, output: StageOutput, launcher: LaunchSpec | None) -> None:
    """Refuse what the stage would refuse, before it has a run in MLflow, ranks or a job."""
    nodes = 1 if launcher is None or isinstance(launcher, LocalLaunch) else launcher.nodes
    world_size = launcher.world_size if launcher else 1
    before = {each.stage: each for each in _chain(source)}
    with suppress(KeyError):  # an output before the source is gone; the stage says so if it needs it
        stage.definition.check(config, source, PlanContext(output, {}, world_size, nodes, before))


def _chain(source: Source) -> Iterator[Manifest]:
    """The output that a stage reads, and what that was made from, stage by stage."""
    reads = {stage.role: STAGES[stage.reads] for stage in STAGES.values() if stage.reads}
    while isinstance(source, Manifest):
        yield source
        role = next((role for role in reads if role in source.parents and source.has(role)), None)
        if role is None:
            return
        source = source.parent(role, reads[role].kind)


@contextmanager
def _alone(stage: Stage, output: StageOutput, launcher: LaunchSpec | None) -> Iterator[None]:
    """Make an output alone on this machine: what several recipes share is made once, while the others wait.

    Nodes need one another, and may be processes of one machine.
    """

    def wait() -> None:
        said = f"waiting for another process, which makes {uri.redact(output.uri)}"
        get_run_logger().info(said)
        noted(stage.name, said)

    if isinstance(launcher, NodesLaunch):
        yield
        return
    with making(output.uri, wait):
        yield


def _make(
    stage: Stage,
    config: Config,
    source: Source,
    output: StageOutput,
    root: str,
    launcher: LaunchSpec | None,
    run: Run[Any, Any, Manifest],
) -> Manifest:
    with runs.stage_run(output, root, here=_ends_with_us(launcher)) as (tracked, spec):
        _show(stage, partial(_link, stage, spec.run_id, root))
        tracked.begin()
        manifest = _run(stage, config, source, tracked, spec, launcher, run)
    _show(stage, partial(_create_artifacts, stage, manifest))
    return manifest


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
        if launcher is not None and not _runs_here(stage, launcher):
            assert isinstance(source, Manifest)
            values = config.model_dump(mode="json")
            job = WorkerSpec(
                stage=stage.name,
                config=values,
                source=source.uri,
                output=output,
                tracking=spec,
                patience=seconds(),
            )
            progress.note(start.announced(launcher))
            start.run(job, launcher, progress=progress.update, log=get_run_logger())
            return stage.kind.read(output.uri)
        tracker = sink.StageTracker(sink.MlflowSink(spec.uri, spec.run_id, spec.skip_to), progress.update)
        try:
            with metered(output.uri, _gauge(stage)):
                return run(config, source, out=output, tracker=tracker)
        finally:
            tracker.close(output)


def _gauge(stage: Stage) -> Gauge:
    """What measures a stage in this process."""
    if not stage.ranked:
        return Processors()
    from flows.launch.gauge import gauge  # imports torch, which shards are made without

    return gauge()


def _runs_here(stage: Stage, launcher: LaunchSpec) -> bool:
    """Whether the stage runs in this process: a single rank, without the seconds that torchrun takes to start."""
    return stage.name != "train" and isinstance(launcher, LocalLaunch) and launcher.world_size == 1


def _ends_with_us(launcher: LaunchSpec | None) -> bool:
    """Whether a kill of this process ends the stage: a cluster's job, and other nodes, go on."""
    return launcher is None or isinstance(launcher, LocalLaunch)


def _show(stage: Stage, create: Callable[[], None]) -> None:
    """Create artifacts in Prefect. An error is logged and does not fail the stage."""
    try:
        create()
    except Exception as error:
        LOGGER.warning("%s: Prefect has not stored the artifacts: %s", stage.name, error)


def _link(stage: Stage, run_id: str | None, root: str) -> None:
    """Link the flow run to its MLflow run."""
    address = runs.run_url(run_id, root) if run_id else None
    if address:
        get_run_logger().info("MLflow run %s", address)
        create_link_artifact(address, link_text=f"MLflow run {run_id}", key=f"{stage.name}-mlflow")


def _create_artifacts(stage: Stage, manifest: Manifest) -> None:
    """Artifacts with the manifest's metrics and counts, and with the stage's pictures."""
    run_id = manifest.provenance.mlflow_run_id
    facts = manifest.metrics | manifest.counts
    rows = "".join(f"| {name} | {value:,.6g} |\n" for name, value in facts.items())
    text = f"{markdown(manifest.url)}\n\nMLflow run `{run_id}`\n\n| | |\n|---|---|\n{rows}"
    create_markdown_artifact(text, key=f"{stage.name}-manifest", description=f"Output of {stage.name}")
    for entry in manifest.files:
        if entry.path.startswith("artifacts/") and entry.path.endswith(".png") and entry.size <= MAX_PICTURE_BYTES:
            picture = base64.b64encode(manifest.read_object(entry.path)).decode()
            name = entry.path.removeprefix("artifacts/").removesuffix(".png")
            create_image_artifact(f"data:image/png;base64,{picture}", key=f"{stage.name}-{name}", description=name)
