"""The report of a pipeline: whole, harmless, and the same each time."""

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small import SAMPLING, SHAPE, Small

from dit.diffusion.config import FlowConfig
from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.comparison import gain
from dit.metrics.published import CIFAR10, ROWS, deviations
from dit.models.choice import DiffiTChoice, Shape
from dit.sample import SampleManifest
from flows.recipe import load_recipe
from flows.report import guidance_sweep, over_training, processes
from flows.report import page as pages
from flows.report.page import Shown, page, page_url, write_page
from storage.latents import LatentManifest
from storage.manifest import Manifest
from storage.shards.shard import ShardManifest
from storage.verify import faults, outputs

NAME = "<script>alert('digits & co')</script>"
LATER = 4
ALIKE = ({"guidance_scale": 1.0}, {"guidance_scale": 3.0})
OTHER = {"guidance_scale": 3.0, "seed": 1}
FLOW, EULER = FlowConfig(times="logit_normal"), {"sampler": "euler", "steps": 3, "shift": 0.5}
OTHER_SHAPE = Shape(depth=1, width=64, heads=2)
SECTIONS = (
    *("Samples by class", "Published results", "Over training", "Other processes and samplers", "Guidance"),
    *("Nearest training images", "Pictures of the stages", "Metrics", "Conditions", "Lineage"),
)


class Reader(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "onload", "onerror")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@dataclass(frozen=True)
class Made:
    """A finished root."""

    root: str
    manifests: list[Manifest]
    """Of the stages that the page is about."""
    metrics: MetricsManifest
    alike: list[MetricsManifest]
    """Of the same checkpoint, guided otherwise."""
    later: MetricsManifest
    """Of the same training after more steps."""
    flow: MetricsManifest
    """Of the same network, trained as a flow."""
    url_before: str
    """Of the page before those were made."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tracking_template: Path) -> Iterator[Made]:
    root = tmp_path_factory.mktemp("root")
    shutil.copy(tracking_template, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        small = Small(root)
        latents = small.latents()
        checkpoint = small.checkpoint(latents)
        metrics = small.evaluated(checkpoint)
        small.evaluated(small.checkpoint(latents, shape=OTHER_SHAPE), SAMPLING.model_copy(update=ALIKE[1]))
        small.evaluated(checkpoint, SAMPLING.model_copy(update=OTHER))
        manifests = lineage(metrics)
        before = page_url(Shown(NAME, manifests, str(root)))
        alike = [small.evaluated(checkpoint, SAMPLING.model_copy(update=change)) for change in ALIKE]
        later = small.evaluated(small.checkpoint(latents, steps=LATER))
        flow = small.evaluated(small.checkpoint(latents, diffusion=FLOW), SAMPLING.model_copy(update=EULER))
        yield Made(str(root), manifests, metrics, alike, later, flow, before)


def lineage(metrics: MetricsManifest) -> list[Manifest]:
    samples = metrics.parent("samples", SampleManifest)
    checkpoint = samples.parent("checkpoint", CheckpointManifest)
    latents = checkpoint.parent("latents", LatentManifest)
    return [latents.parent("shards", ShardManifest), latents, checkpoint, samples, metrics]


@pytest.fixture(scope="module")
def read(made: Made) -> Reader:
    return Reader(page(Shown(NAME, made.manifests, made.root)))


def test_nothing_runs_and_nothing_is_fetched(read: Reader) -> None:
    assert read.open == []
    assert "script" not in read.tags
    assert all(source.startswith("data:image/png;base64,") for source in read.sources)
    assert NAME in read.words


def test_it_shows_every_stage(read: Reader, made: Made) -> None:
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in read.sources]
    drawn = sum(entry.path.endswith(".png") for manifest in made.manifests for entry in manifest.files)
    several = 10 + 3 + 1 + 1  # classes, training, guidance, neighbours
    assert len(sizes) == several + drawn - 1 >= 17  # all but samples.png
    assert sizes[:10] == [(3 * 16 + 2 * 2, 16)] * 10  # three samples of each digit
    assert sizes[11:13] == [(16 * 16 + 15 * 2, 16)] * 2  # the samples of two numbers of steps
    assert sizes[14] == (6 * 16 + 5 * 2, 8 * 16 + 7 * 2)  # a sample and five neighbours, eight times
    assert [word for word in read.words if word in SECTIONS] == list(SECTIONS)
    text = " ".join(read.words)
    for manifest in made.manifests:
        assert manifest.digest[:16] in text
        assert str(manifest.provenance.mlflow_run_id) in text
    assert f"Each output is the folder stage/digest below {made.root}." in text
    metrics = made.metrics.metrics
    for name in metrics.keys() - {"fd_low", "fd_high"}:
        assert f"{name} {metrics[name]:.6g}" in text
    assert f"fd {metrics['fd']:.6g} {metrics['fd_low']:.6g} to {metrics['fd_high']:.6g}" in text
    for name, condition in made.metrics.conditions.items():
        assert f"{name} {condition}" in text
    assert re.search(rf"{re.escape(made.metrics.distance)} [\d.]+ \([\d.]+ to [\d.]+\) from 30 samples", text)


def test_guidance_scales_of_the_same_checkpoint_are_lined_up(read: Reader, made: Made) -> None:
    among = [made.metrics, *made.alike]
    for each in among:
        assert {found.digest for found in guidance_sweep.sweep_of(each, made.root)} == {found.digest for found in among}
    (line,) = guidance_sweep.lines(among)
    assert (line.name, line.scales) == ("channels all, schedule constant", [1.0, 2.0, 3.0])
    text = " ".join(read.words)
    for scale, found in zip((2, 1, 3), among, strict=True):
        distance, low, high = (found.metrics[name] for name in ("fd", "fd_low", "fd_high"))
        precision, recall = (found.metrics[f"{name}_fp32"] for name in ("precision", "recall"))
        row = f"{line.name} {scale} {distance:.4g} ({low:.4g} to {high:.4g}) {precision:.4f} {recall:.4f}"
        assert row in text


def test_numbers_of_steps_of_the_same_training_are_lined_up(read: Reader, made: Made) -> None:
    for each in (made.metrics, made.later):
        found = over_training.series_of(each, made.root)
        assert [metrics.digest for metrics in found] == [made.metrics.digest, made.later.digest]
    text = " ".join(read.words)
    for steps, metrics in ((2, made.metrics), (LATER, made.later)):
        shares = " ".join(f"{metrics.metrics[name]:.4f}" for name in over_training.shares([metrics]))
        assert f"{steps} {metrics.estimate} {shares}" in text
    assert "recognised" in over_training.shares([made.metrics])
    best = min((made.metrics, made.later), key=lambda metrics: metrics.estimate.value)
    assert f"Best: step {over_training.steps_of(best)}, {best.distance} {best.estimate}." in text


def test_the_same_network_as_another_process_stands_beside(read: Reader, made: Made) -> None:
    for one, others in ((made.metrics, [made.flow]), (made.flow, [made.metrics, *made.alike])):
        first, *found = processes.beside(one, made.root)
        assert first.digest == one.digest
        assert {each.digest for each in found} == {each.digest for each in others}
    text = " ".join(read.words)
    guidance = "scale 2.0, channels all, schedule constant"
    assert f"gaussian ddim steps 2, eta 0.0 {guidance} {made.metrics.estimate} this run" in text
    better = gain("fd", "lower", made.metrics.metrics, made.flow.metrics)
    shares = " ".join(f"{value:.4f}" for (value,) in over_training.shares([made.flow]).values())
    row = f"flow times logit_normal euler steps 3, shift 0.5, nfe 3 {guidance} {made.flow.estimate} {better} {shares}"
    assert row in text


def test_without_another_process_there_is_no_table(made: Made) -> None:
    assert processes.beside(made.later, made.root) == [made.later]
    assert "Other processes and samplers" not in page(Shown(NAME, lineage(made.later), made.root))


def test_of_evaluations_with_equal_steps_the_page_has_its_own(made: Made) -> None:
    small = Small(Path(made.root))
    checkpoint = made.manifests[2]
    again = [small.evaluated(checkpoint, SAMPLING.model_copy(update={"batch_size": size})) for size in (15, 10)]
    for each in again:
        assert each.digest in [found.digest for found in over_training.series_of(each, made.root)]
        assert [found.digest for found in processes.beside(each, made.root)] == [each.digest, made.flow.digest]
        (line,) = guidance_sweep.lines(guidance_sweep.sweep_of(each, made.root))
        assert each.estimate in line.distances


def test_one_number_of_steps_is_no_series(made: Made) -> None:
    assert over_training.series_of(made.alike[0], made.root) == [made.alike[0]]


def test_one_scale_is_no_line(made: Made) -> None:
    assert guidance_sweep.lines([made.metrics]) == []
    assert guidance_sweep.lines(made.alike[:1]) == []  # without guidance


def test_numbers_in_another_space_stand_alone(read: Reader, made: Made) -> None:
    here = f"No published result compares with {made.metrics.distance} against 60 images in 10 classes at 16 px. "
    assert any(word.startswith(here) for word in read.words)


def test_rows_of_papers_say_what_was_other_there(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [next(row for row in ROWS if row.data is CIFAR10), next(row for row in ROWS if row.values == (2.16,))]
    monkeypatch.setattr(pages, "rows_for", lambda **_: shown)
    text = " ".join(Reader(page(Shown("digits", made.manifests, made.root))).words)
    assert "this run, 2 steps" in text
    other = "other: count 50000, labels none, sampler heun, steps 18"
    assert re.search(rf"DiffiT 1\.95 {other} Hatamizadeh et al\., arXiv 2312\.02139", text)
    unknown = "other: guidance_scale 1.0; not stated: count, labels, sampler, steps"
    assert re.search(rf"RAE, 80 epochs 2\.16 {unknown} Zheng et al\., arXiv 2510\.11690", text)
    assert "Rows under other conditions do not rank this run." in text


def test_attention_of_a_diffit_is_shown(read: Reader, made: Made) -> None:
    title = "Attention over the noise levels"
    assert title not in read.words
    small, model = Small(Path(made.root)), DiffiTChoice(size=SHAPE, patch_size=4)
    samples = small.bring("sample", SAMPLING, small.checkpoint(made.manifests[1], model=model))
    found = Reader(page(Shown("digits", [*made.manifests[:2], samples], made.root)))
    assert title in found.words
    text = " ".join(found.words)
    number = r"[-\d.e]+ \([-\d.e]+ to [-\d.e]+\)"
    assert re.search(rf"layer 1 of 1: 4 x 4 tokens t 999 {number} {number} 0 \(0 to 0\) 0 \(0 to 0\)", text)
    assert re.search(rf"layer 1 of 1: 4 x 4 tokens t 0 {number} {number} {number} {number}", text)


def test_it_is_written_once_and_the_same(made: Made) -> None:
    shown = Shown("digits", made.manifests, made.root)
    first, url = write_page(shown), page_url(shown)
    assert url != made.url_before
    assert page(shown).encode() == first == Path(url).read_bytes()
    written = Path(url).stat().st_mtime_ns
    assert write_page(shown) == first
    assert Path(url).stat().st_mtime_ns == written


def test_it_is_checked_with_all_that_it_shows(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    shown = Shown("digits", made.manifests, made.root)
    first, url = write_page(shown), Path(page_url(shown))
    chain = [output for output in outputs(str(url.parent)) if isinstance(output, Manifest)]
    parents = {manifest.digest for manifest in (*made.manifests, *made.alike)}
    assert chain[0].stage == "reports" and parents < {output.digest for output in chain}
    url.write_bytes(first.replace(b"Distance", b"Distanze", 1) + b" ")
    assert faults(chain[0], full=True)
    assert write_page(shown) == first == url.read_bytes()
    assert "it is made again" in caplog.text


def test_without_metrics_there_is_a_page_too(made: Made) -> None:
    read = Reader(page(Shown("digits", made.manifests[:-1], made.root)))
    assert read.open == []
    assert "Samples by class" in read.words
    assert "Metrics" not in read.words


@pytest.mark.parametrize(
    ("recipe", "fid"),
    [
        *(("imagenet256-dit", 2.27), ("imagenet512-dit", 3.04)),
        *(("imagenet256-diffit", 1.73), ("imagenet512-diffit", 2.67)),
        *(("cifar10-diffit", 1.95), ("ffhq64-diffit", 2.22)),
        *(("imagenet256-sit", 2.06), ("imagenet256-lightning", 2.11)),
    ],
)
def test_the_papers_recipes_sample_as_their_rows_say(recipe: str, fid: float) -> None:
    (row,) = (row for row in ROWS if row.values[0] == fid)
    found = load_recipe(recipe)
    conditions = found.sample.model_dump(exclude={"guide"})
    if conditions["sampler"] == "heun":
        conditions["labels"] = "none"
    if interval := conditions["guidance_interval"]:
        conditions["guidance_interval"] = f"{interval[0]:g} to {interval[1]:g}"
    assert deviations(row, conditions) == []
    assert row.conditions.get("training_steps", found.train.steps) == found.train.steps


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALONE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


def browse(page: str, folder: Path) -> tuple[str, int]:
    """What a browser makes of a page, and how many requests the page itself makes; none leaves the machine."""
    log = folder / "net.json"
    command = [str(CHROMIUM), *ALONE, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    done = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=500)
    initiators = re.findall(r'"initiator":"([^"]*)"', log.read_text())
    return done.stdout, sum(found != "not an origin" for found in initiators)  # which is the browser itself


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
def test_a_browser_finds_its_sections_and_asks_nobody(made: Made, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(Shown(NAME, made.manifests, made.root)))
    dom, asked = browse(f"file://{tmp_path / 'page.html'}", tmp_path)
    read = Reader(dom)
    assert [word for word in read.words if word in SECTIONS] == list(SECTIONS)
    assert NAME in read.words
    assert asked == 0
    (tmp_path / "asks.html").write_text('<img src="http://elsewhere.invalid/a.png">')
    assert browse(f"file://{tmp_path / 'asks.html'}", tmp_path)[1] > 0
