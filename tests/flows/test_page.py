"""The report of a pipeline: whole, harmless, and the same each time."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small import Small

from dit.evaluate import MetricsManifest
from flows.page import page, place, write_page
from storage.manifest import Manifest

NAME = "<script>alert('digits & co')</script>"


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


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tracking_template: Path
) -> Iterator[tuple[Path, list[Manifest], MetricsManifest]]:
    root = tmp_path_factory.mktemp("root")
    shutil.copy(tracking_template, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        small = Small(root)
        latents = small.latents()
        checkpoint = small.checkpoint(latents)
        metrics = small.evaluated(checkpoint)
        stages = ("shard", "encode", "train", "sample", "evaluate")
        yield root, [Manifest.read(str(next((root / stage).iterdir()))) for stage in stages], metrics


@pytest.fixture(scope="module")
def read(made: tuple[Path, list[Manifest], MetricsManifest]) -> Reader:
    root, manifests, _ = made
    return Reader(page(NAME, manifests, str(root)))


def test_nothing_runs_and_nothing_is_fetched(read: Reader) -> None:
    assert read.open == []
    assert "script" not in read.tags
    assert all(source.startswith("data:image/png;base64,") for source in read.sources)
    assert NAME in read.words


def test_it_shows_every_stage(read: Reader, made: tuple[Path, list[Manifest], MetricsManifest]) -> None:
    _, manifests, metrics = made
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in read.sources]
    drawn = sum(entry.path.endswith(".png") for manifest in manifests for entry in manifest.files)
    assert len(pictures) == drawn + 1 >= 4
    assert pictures[-1].size == (6 * 16 + 5 * 2, 8 * 16 + 7 * 2)  # a sample and five neighbours, eight times
    text = " ".join(read.words)
    for manifest in manifests:
        assert manifest.digest[:16] in text
        assert str(manifest.provenance.mlflow_run_id) in text
    for name, value in metrics.metrics.items():
        assert f"{name} {value:.6g}" in text
    for name, condition in metrics.conditions.items():
        assert f"{name} {condition}" in text
    assert re.search(rf"{re.escape(metrics.distance)} [\d.]+ \([\d.]+ to [\d.]+\) from 30 samples", text)


def test_it_is_written_once_and_the_same(made: tuple[Path, list[Manifest], MetricsManifest]) -> None:
    root, manifests, _ = made
    url = write_page("digits", manifests, str(root))
    assert url == place(manifests, str(root))
    first = Path(url).read_bytes()
    assert page("digits", manifests, str(root)).encode() == first
    Path(url).write_text("kept")
    assert write_page("digits", manifests, str(root)) == url
    assert Path(url).read_text() == "kept"


def test_without_metrics_there_is_a_page_too(made: tuple[Path, list[Manifest], MetricsManifest]) -> None:
    root, manifests, _ = made
    read = Reader(page("digits", manifests[:-1], str(root)))
    assert read.open == []
    assert "Metrics" not in read.words
