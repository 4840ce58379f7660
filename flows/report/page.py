"""The report of a pipeline run: one HTML file with all pictures in it and no scripts.

It is made from manifests and what they list, and is an output itself: a report is written once, and `ditflow verify`
checks it with all that it shows.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from mlflow import MlflowClient

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.metrics.comparison import Estimate
from dit.metrics.published import METRICS, Row, deviations, rows_for, unstated
from dit.report import plots
from dit.report.by_class import by_class
from dit.report.neighbours import neighbours
from dit.sample import PICTURE, SampleManifest
from flows import over_widths
from flows.contract import ENCODE_HELD_OUT, Outcome
from flows.over_training import evaluations_of
from flows.report import attention, guidance_sweep, over_training, processes, widths
from flows.report.html import Figure, Section, Strips, Table, render
from flows.report.kept import ReportManifest, keep, kept, output
from flows.tracking import runs
from flows.tracking.sink import log_file
from storage import uri
from storage.config import Config
from storage.errors import one_line
from storage.header import short_digest
from storage.manifest import Manifest, StageOutput
from storage.tracker import NullTracker

LOGGER = logging.getLogger(__name__)
REPORT = "report.html"
VERSION = 9
"""Raised when the same manifests make another page."""
CLASSES, EACH, WIDE = 10, 16, 1024
"""Number of classes shown, most samples of each, and width of a strip in pixels."""
SHOWN, NEAREST = 8, 5
PUBLISHED = (
    "Papers report FID on ImageNet, CIFAR-10 and FFHQ; a distance over other images, in another size or by another "
    "network is another quantity."
)
CAPTIONS = {
    "images.png": "Training images",
    "reconstructions.png": "Training images after the autoencoder",
    "loss.png": "Training loss",
    "samples.png": "Samples",
}


class ReportConfig(Config):
    """A page depends on the outputs that it shows; its title does not count."""


@dataclass(frozen=True)
class Shown:
    """What a report shows."""

    name: str
    """The recipe's."""
    stages: Sequence[Manifest]
    """In their order."""
    root: str
    """Folder or URL of all outputs."""
    further: Sequence[MetricsManifest] = ()
    """The evaluations of milestones and of averages that the recipe asks for."""
    held_out: Manifest | None = None
    """The latents of the images on which training has measured its loss, if it has."""

    @classmethod
    def of(cls, name: str, outcomes: Sequence[Outcome], root: str) -> Self:
        """What the report of a pipeline shows, by the outcomes of its stages."""
        made = {outcome.name: Manifest.read(outcome.manifest) for outcome in outcomes if outcome.own}
        held_out = made.pop(ENCODE_HELD_OUT, None)
        further = [*evaluations_of(outcomes).values(), *over_widths.evaluations_of(outcomes).values()]
        return cls(name, list(made.values()), root, further, held_out)

    @property
    def evaluations(self) -> list[MetricsManifest]:
        """Those of the stages."""
        return [MetricsManifest.read(made.uri) for made in self.stages if made.stage == MetricsManifest.STAGE]

    @property
    def series(self) -> list[list[MetricsManifest]]:
        """The series over training: that of the milestones, and that of the evaluation itself if it is another one."""
        milestones = [each for each in self.further if widths.WIDTH not in each.conditions]
        found = [over_training.series_of(each, self.root) for each in (*milestones[-1:], *self.evaluations)]
        distinct = {tuple(each.digest for each in series): series for series in found if len(series) > 1}
        return list(distinct.values())

    @property
    def lineage(self) -> list[tuple[str, Manifest]]:
        """The stages with their names, and the second encoding behind the first."""
        rows = [(made.stage, made) for made in self.stages]
        at = next((row for row, (name, _) in enumerate(rows, start=1) if name == "encode"), 0)
        return [*rows[:at], *([(ENCODE_HELD_OUT, self.held_out)] if self.held_out else []), *rows[at:]]


def page_output(shown: Shown) -> StageOutput:
    """The output of a page. Its parents are the stages, and what its series show.

    Raises:
        InputError: a stage's output is gone.
    """
    swept = [other for manifest in shown.evaluations for other in guidance_sweep.sweep_of(manifest, shown.root)]
    trained = [other for series in shown.series for other in series]
    beside = [other for manifest in shown.evaluations for other in processes.beside(manifest, shown.root)]
    averaged = widths.series_of([*shown.further, *shown.evaluations], shown.root)
    stages = [made for _, made in shown.lineage]
    everything = (*swept, *trained, *averaged, *beside, *stages)
    parents = {f"{made.stage} {made.folder_name}": made for made in everything}
    return output(ReportManifest, VERSION, ReportConfig(), parents, shown.root)


def page_url(shown: Shown) -> str:
    """The URL of a page. Errors as `page_output`."""
    return page_output(shown).url(REPORT)


def write_page(shown: Shown) -> bytes:
    """Write the report of a pipeline and return it; one that is there is kept.

    Raises:
        InputError: a stage's output is gone, or the extractor or a DiffiT's autoencoder cannot be loaded.
        StorageError: a picture is not what was committed, or the disk is full.
    """
    return keep(page_output(shown), ReportManifest, REPORT, lambda: page(shown).encode())


def publish(shown: Shown, run_id: str | None) -> None:
    """Write the report and log it, with the picture of the samples, to the pipeline's MLflow run, if there is one.

    An error becomes a warning: the stages are committed, and the report must not fail them.
    """
    try:
        written = write_page(shown)
        if run_id is not None:
            client = MlflowClient(runs.tracking_uri(shown.root))
            log_file(client, run_id, REPORT, written)
            for made in shown.stages:
                if made.stage == SampleManifest.STAGE:
                    log_file(client, run_id, PICTURE, made.read_object(f"artifacts/{PICTURE}"))
    except Exception as error:
        LOGGER.warning("no report: %s", one_line(error))


def publish_missing(shown: Shown) -> None:
    """Publish the report of a finished pipeline if it is missing or damaged.

    It is missing if the command was killed before it, or if a series that it shows has grown since.
    """
    if kept(page_output(shown), ReportManifest, REPORT) is None:
        pipeline = shown.stages[-1].provenance.pipeline_id
        publish(shown, runs.pipeline_run_id(pipeline, shown.root) if pipeline else None)


def page(shown: Shown) -> str:
    """The report as HTML: the same bytes for the same manifests. Errors as `write_page`."""
    manifests, evaluations, root = shown.stages, shown.evaluations, shown.root
    drawn = [SampleManifest.read(manifest.uri) for manifest in manifests if manifest.stage == SampleManifest.STAGE]
    sections = [_samples(samples) for samples in drawn]
    own = "Registered and" if any(manifest.stage == "register" for manifest in manifests) else "Samples"
    steps = [f"{own} shown in the other sections: {_model(each)}." for each in evaluations]
    trained = [_trained(series, *steps) for series in shown.series]
    averaged = list(_averaged(widths.series_of([*shown.further, *evaluations], root)))
    for manifest in evaluations:
        sections += [
            _papers(manifest),
            *trained,
            *averaged,
            *_beside(processes.beside(manifest, root)),
            *_guided(guidance_sweep.sweep_of(manifest, root), manifest.distance),
            _nearest(manifest, root),
        ]
    sections += [section for samples in drawn for section in attention.sections(samples)]
    sections.append(Section("Pictures of the stages", list(_pictures(manifests))))
    for manifest in evaluations:
        sections += [_metrics(manifest), _conditions(manifest)]
    return render(shown.name, [_lead(manifest) for manifest in evaluations], [*sections, _lineage(shown.lineage)])


def _model(metrics: MetricsManifest) -> str:
    """Which model of a training was evaluated."""
    step = f"step {over_training.steps_of(metrics):,}"
    averaged = widths.WIDTH in metrics.conditions
    return f"the average of width {widths.width_of(metrics):g} at {step}" if averaged else step


def _lead(metrics: MetricsManifest) -> tuple[str, str]:
    """The distance, and others to read it by."""
    text = f"{metrics.distance} {metrics.estimate} from {metrics.counts['samples']:,} samples"
    far = {end: metrics.metrics.get(f"{metrics.metric}_{end}") for end in ("ceiling", "floor", "at_floor_n")}
    bounds = f"The interval covers 95 %. Equally many images of noise have {far['ceiling']:.4g}."
    if far["floor"] is not None:
        count = f"{metrics.counts['floor']:,}"
        bounds += f" {count} held-out images have {far['floor']:.4g}, {count} of the samples {far['at_floor_n']:.4g}."
    return text, bounds


def _samples(samples: SampleManifest) -> Section:
    """A strip of samples for each of some classes; one picture of samples if they have no classes."""
    rows = by_class(samples, classes=CLASSES, each=_in_a_strip(samples))
    if not rows:
        return Section("Samples", [Figure(samples.read_object(f"artifacts/{PICTURE}"), CAPTIONS[PICTURE])])
    total = len(samples.class_names)
    which = f"{len(rows)} of {total:,} classes" if len(rows) < total else "every class"
    return Section("Samples by class", [f"The first samples of {which}.", Strips(rows)])


def _in_a_strip(samples: SampleManifest) -> int:
    return max(4, min(EACH, WIDE // samples.resolution))


def _papers(metrics: MetricsManifest) -> Section:
    """The published rows on the same data, each with the conditions that differ from this run's."""
    samples = metrics.parent("samples", SampleManifest)
    images, classes, side = metrics.counts["reference"], len(samples.class_names), samples.resolution
    rows = rows_for(distance=metrics.distance, images=images, classes=classes, resolution=side)
    here = f"{metrics.distance} against {images:,} images in {classes:,} classes at {side} px"
    if not rows:
        return Section("Published results", [f"No published result compares with {here}. {PUBLISHED}"])
    steps = metrics.conditions["training_steps"]
    own = (f"this run, {steps:,} steps", *(_own(name, metrics) for name in METRICS), "", "")
    head = ("model", "FID", "sFID", "IS", "precision", "recall", "conditions", "source")
    note = (
        f"{here}, which is {rows[0].data.name} by these counts. Papers use reference statistics from files of their "
        "own; here they come from the training images. Not compared are training steps, decoder, seed, and conditions "
        "that a paper does not state. Rows under other conditions do not rank this run."
    )
    return Section("Published results", [Table(head, [own, *(_row(row, metrics) for row in rows)]), note])


def _own(name: str, metrics: MetricsManifest) -> str:
    return str(Estimate.of(name, metrics.metrics)) if name in metrics.metrics else ""


def _row(row: Row, metrics: MetricsManifest) -> tuple[str, ...]:
    other = deviations(row, metrics.conditions)
    values = [f"{value:g}" for value in row.values]
    steps = row.conditions.get("training_steps")
    model = f"{row.model}, {steps:,} steps" if steps else row.model
    conditions = f"other: {', '.join(other)}" if other else "the same"
    if missing := unstated(row):
        conditions += f"; not stated: {', '.join(missing)}"
    return (model, *values, *[""] * (len(METRICS) - len(values)), conditions, row.source)


def _trained(series: Sequence[MetricsManifest], *notes: str) -> Section:
    """The metrics over training: evaluations after several numbers of steps."""
    steps = {f"{over_training.steps_of(each):,}": each for each in series}
    at = [over_training.steps_of(each) for each in series]
    caption = "The same training and conditions after several numbers of steps; bars are 95 % intervals"
    return _over("Over training", ("training step", "step"), at, steps, caption, *notes)


def _averaged(series: Sequence[MetricsManifest]) -> Iterator[Section]:
    """The metrics over the width of the average, if averages were evaluated."""
    if series:
        named = {f"{widths.width_of(each):g}": each for each in series}
        at = [widths.width_of(each) for each in series]
        caption = "Averages of other widths of the weights of one training; bars are 95 % intervals"
        note = f"The averages end at step {over_training.steps_of(series[0]):,}."
        yield _over("Width of the average", ("relative width", "width"), at, named, caption, note)


def _over(
    title: str,
    axis: tuple[str, str],
    at: Sequence[float],
    named: Mapping[str, MetricsManifest],
    caption: str,
    *notes: str,
) -> Section:
    """The metrics over a number, whose name is long or short: the best one, a plot, a table, and the first samples."""
    series, (long, short) = list(named.values()), axis
    distances, shares, (metrics, *_) = [each.estimate for each in series], over_training.shares(series), series
    best = min(named, key=lambda name: named[name].estimate.value)
    line = f"Best: {short} {best}, {metrics.distance} {named[best].estimate}."
    line = " ".join([line, f"Each point is from {metrics.counts['samples']:,} samples.", *notes])
    plot = plots.over(long, at, distances, metrics.distance, shares)
    rows = [
        (name, str(distance), *(f"{value:.4f}" for value in values))
        for name, distance, *values in zip(named, distances, *shares.values(), strict=True)
    ]
    table = Table((long, f"{metrics.distance} (95 % interval)", *shares), rows)
    each = _in_a_strip(metrics.parent("samples", SampleManifest))
    strips = Strips([(f"{short} {name}", over_training.strip(made, each)) for name, made in named.items()])
    same = "The first samples of each, from the same noise."
    return Section(title, [line, Figure(plot, caption, plot=True), table, same, strips])


def _beside(evaluations: Sequence[MetricsManifest]) -> Iterator[Section]:
    """Other processes and samplers, if the root has evaluations of any."""
    if len(evaluations) == 1:
        return
    note = "The same network, trained alike on the same images. "
    note += "The margin of a difference is that of independent samples, at 95 %."
    yield Section("Other processes and samplers", [note, Table(*processes.table(evaluations))])


def _guided(evaluations: Sequence[MetricsManifest], distance: str) -> Iterator[Section]:
    """The guidance sweep, if the root has one."""
    lines = guidance_sweep.lines(evaluations)
    if not lines:
        return
    rows = [
        (line.name, f"{scale:g}", str(far), f"{precision:.4f}", f"{recall:.4f}")
        for line in lines
        for scale, far, precision, recall in zip(line.scales, line.distances, line.precision, line.recall, strict=True)
    ]
    caption = "The same checkpoint and conditions at several guidance scales; bars are 95 % intervals"
    head = ("guidance", "scale", f"{distance} (95 % interval)", "precision", "recall")
    yield Section("Guidance", [Figure(plots.guidance(lines, distance), caption, plot=True), Table(head, rows)])


def _pictures(manifests: Sequence[Manifest]) -> Iterator[Figure]:
    """The pictures of the stages before sampling."""
    for manifest in manifests:
        if manifest.stage in (SampleManifest.STAGE, "register"):
            continue
        for path in (entry.path for entry in manifest.files if entry.path.startswith("artifacts/")):
            if path.endswith(".png"):
                name = path.rpartition("/")[2]
                yield Figure(manifest.read_object(path), CAPTIONS.get(name, name), plot=name == "loss.png")


def _nearest(metrics: MetricsManifest, root: str) -> Section:
    samples = metrics.parent("samples", SampleManifest)
    config = EvaluateConfig.model_validate(metrics.config)
    near = neighbours(config, samples, root=root, count=SHOWN, nearest=NEAREST, tracker=NullTracker())
    caption = f"In each row a sample, then the nearest of {near.among:,} training images in feature space"
    rows = [(f"sample {row}", *(f"{value:.4g}" for value in far)) for row, far in enumerate(near.distances)]
    head = ("distance to", *(f"neighbour {rank + 1}" for rank in range(len(near.distances[0]))))
    usual = f"Half of the training images have another one within a distance of {near.usual:.4g}."
    return Section("Nearest training images", [Figure(near.picture, caption), Table(head, rows), usual])


def _metrics(metrics: MetricsManifest) -> Section:
    ends = ("_low", "_high")
    names = [
        name for name in metrics.metrics if not name.endswith(ends) or name[: name.rindex("_")] not in metrics.metrics
    ]
    values = {name: Estimate.of(name, metrics.metrics) for name in names}
    rows = [(name, f"{each.value:.6g}", _interval(each)) for name, each in values.items()]
    counts = [(name, f"{value:,}") for name, value in metrics.counts.items()]
    return Section("Metrics", [Table(("metric", "value", "95 % interval"), rows), Table(("images", "count"), counts)])


def _conditions(metrics: MetricsManifest) -> Section:
    rows = [(name, str(value)) for name, value in metrics.conditions.items()]
    return Section("Conditions", [Table(("condition", "value"), rows)])


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"{estimate.low:.6g} to {estimate.high:.6g}"


def _lineage(stages: Sequence[tuple[str, Manifest]]) -> Section:
    rows = [
        (
            name,
            manifest.folder_name,
            ", ".join(f"{role} {short_digest(digest)}" for role, digest in manifest.inputs.items()),
            ", ".join(f"{value:,} {what}" for what, value in manifest.counts.items()),
            manifest.provenance.mlflow_run_id or "",
            manifest.code_version,
        )
        for name, manifest in stages
    ]
    head = ("stage", "digest", "inputs", "counts", "MLflow run", "code")
    roots = sorted({uri.redact(manifest.root) for _, manifest in stages})
    where = f"Each output is the folder stage/digest below {' or '.join(roots)}."
    return Section("Lineage", [Table(head, rows), where])
