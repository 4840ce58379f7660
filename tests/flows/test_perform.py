"""Where a stage runs."""

import html
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import markdown_it
import pytest
from faults import dead_address

from flows import perform
from flows.contract import STAGES
from flows.launch.spec import LocalLaunch
from flows.tracking.spec import TrackingSpec
from storage.config import Config
from storage.manifest import Manifest, StageOutput, stage_output
from storage.stage import StageDefinition


@pytest.mark.parametrize(
    ("name", "launcher", "ranks"),
    [
        ("encode", None, 0),
        ("encode", LocalLaunch(nproc=1), 0),
        ("encode", LocalLaunch(nproc=2), 2),
        ("train", LocalLaunch(nproc=1), 1),
        ("train", LocalLaunch(nproc=3), 3),
    ],
)
def test_torchrun_is_for_several_ranks_and_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, launcher: LocalLaunch | None, ranks: int
) -> None:
    kind = type("Made", (Manifest,), {"STAGE": name})
    started: list[int] = []

    def launched(job: Any, launch: LocalLaunch, **_: Any) -> None:
        started.append(launch.nproc)
        job.output.commit(kind, [])

    def here(config: Config, source: Manifest, *, out: StageOutput, tracker: Any) -> Manifest:
        return out.commit(kind, [])

    monkeypatch.setattr(perform.start, "run", launched)
    monkeypatch.setattr(perform, "get_run_logger", logging.getLogger)
    stage = STAGES[name]
    monkeypatch.setattr(import_module(stage.module), "DEFINITION", StageDefinition(Config, kind, 1, here))
    source = stage_output(str(tmp_path), "before", 1, Config(), parents={}, inputs={}).commit(Manifest, [])
    output = stage_output(str(tmp_path), name, 1, Config(), parents={}, inputs={})
    tracking = TrackingSpec(uri=dead_address(), run_id=None)
    made = perform._run(stage, Config(), source, output, tracking, launcher, stage.run)
    assert made.stage == name
    assert started == ([ranks] if ranks else [])


def test_a_path_has_no_meaning_in_prefects_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(perform, "create_markdown_artifact", lambda text, **_: sent.append(text))
    root = str(tmp_path / "`<script>alert(1)<" / "script>[a](b)*&lt;")
    manifest = stage_output(root, "shard", 1, Config(), parents={}, inputs={}).commit(Manifest, [])
    perform._create_artifacts(STAGES["shard"], manifest)
    page = markdown_it.MarkdownIt().render(sent[0])
    assert "<script" not in page
    assert html.unescape(page).startswith(f"<p>{manifest.url}</p>")


def test_stages_that_ranks_share() -> None:
    assert {name for name, stage in STAGES.items() if stage.ranked} >= {"encode", "train", "sample", "evaluate"}
