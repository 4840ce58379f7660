"""The loss on held-out images: its numbers, and that it changes nothing else."""

import json
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import zarr
from forked import Faults, Job, Template
from pydantic import ValidationError

import dit
from dit.diffusion.build import build_process
from dit.diffusion.config import EDMConfig, FlowConfig
from dit.encode import held_out_config
from dit.export import CheckpointManifest, weights_file
from dit.random import Stream, normals
from dit.training.config import HeldOutLoss, TrainConfig
from dit.training.held_out import LEVELS, NEVER, SEED, HeldOut, held_out_latents, summary
from dit.vae import VaeRef
from storage.errors import InputError, PreemptedError, StorageError
from storage.latents import LatentManifest
from storage.shards.shard import ShardManifest

IMAGES = 7  # of 18, in batches of 4 and 3
MEASURED = tiny.TRAINING.model_copy(
    update={"steps": 6, "log_every": 2, "held_out": HeldOutLoss(every=3, images=IMAGES, batch_size=4)}
)
PLAIN = MEASURED.model_copy(update={"held_out": None})


def measured(**fields: Any) -> TrainConfig:
    return MEASURED.model_copy(update=fields)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, shards: ShardManifest, vae: VaeRef) -> LatentManifest:
    """Latents to train on, below the same root as those of the held-out images."""
    root, config = tmp_path_factory.mktemp("both"), tiny.encode_config(vae)
    tiny.run_encode(root, held_out_config(config), shards)
    return tiny.run_encode(root, config, shards)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, both: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(tmp_path_factory.mktemp("plain"), PLAIN, both)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, both: LatentManifest) -> tuple[tiny.Recorder, CheckpointManifest]:
    recorder = tiny.Recorder()
    return recorder, tiny.run_train(tmp_path_factory.mktemp("whole"), MEASURED, both, recorder)


def report(manifest: CheckpointManifest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest.read_object("artifacts/held_out_loss.json"))
    return found


def weights(manifest: CheckpointManifest) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in manifest.files if not entry.path.startswith("artifacts/")}


def by_hand(manifest: CheckpointManifest, config: TrainConfig, held_out: LatentManifest, kind: str) -> Any:
    """Losses (N, 4) of exported weights, one image at a time."""
    model = dit.load(manifest.uri, weights=weights_file(kind)).model
    process, store = build_process(config.diffusion, torch.device("cpu")), zarr.open_group(held_out.uri + "/data")
    count, shape = min(IMAGES, held_out.count), held_out.latent_shape
    losses = np.empty((count, 4))
    for image in range(count):
        for level, u in enumerate((1 / 8, 3 / 8, 5 / 8, 7 / 8)):
            noise, sample = (
                torch.from_numpy(normals(SEED, stream, NEVER + level, [image], int(np.prod(shape)))).reshape(1, *shape)
                for stream in (Stream.NOISE, Stream.POSTERIOR)
            )
            if held_out.vae:
                mean, std = (torch.from_numpy(store[name][image, 0].astype(np.float32)) for name in ("mean", "std"))
                x0 = (mean + std * sample - tiny.SHIFT) * tiny.SCALE
            else:
                x0 = torch.from_numpy(store["image"][image].astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            label = torch.from_numpy(store["label"][image : image + 1]).long()
            with torch.no_grad():
                terms = process.training_terms(model, x0, noise, process.sample_t(torch.tensor([u])), label)
            losses[image, level] = terms["loss"].item()
    return losses


def assert_numbers(values: dict[str, float], losses: Any, name: str) -> None:
    per_image = losses.mean(1)
    expected = {name: per_image.mean(), f"{name}_se": scipy.stats.sem(per_image)}
    for level in range(4):
        expected[f"{name}_level_{level + 1}"] = losses[:, level].mean()
        expected[f"{name}_level_{level + 1}_se"] = scipy.stats.sem(losses[:, level])
    assert {key: value for key, value in values.items() if key in expected} == pytest.approx(expected, rel=1e-4)


def test_numbers_are_those_of_a_plain_loop_over_exported_weights(
    whole: tuple[tiny.Recorder, CheckpointManifest], both: LatentManifest
) -> None:
    """Of the average and of the weights themselves, with the standard error over images."""
    recorder, manifest = whole
    held_out = held_out_latents(both)
    for kind, name in (("ema", "held_out_loss"), ("raw", "held_out_loss_raw")):
        assert_numbers(recorder.values[6], by_hand(manifest, MEASURED, held_out, kind), name)
    assert recorder.values[6]["held_out_loss"] != recorder.values[6]["held_out_loss_raw"]
    assert [step for step, values in recorder.values.items() if "held_out_loss" in values] == [3, 6]
    assert list(recorder.values) == [2, 3, 4, 6]


@pytest.mark.parametrize("diffusion", [PLAIN.diffusion, EDMConfig(), FlowConfig(cosine=1.0)])
def test_pixels_and_other_processes(tmp_path: Path, shards: ShardManifest, diffusion: Any) -> None:
    config = tiny.encode_config(None)
    held_out = tiny.run_encode(tmp_path, held_out_config(config), shards)
    images = tiny.run_encode(tmp_path, config, shards)
    model = tiny.MODEL.model_copy(update={"patch_size": 8})
    training, recorder = measured(model=model, diffusion=diffusion, steps=1), tiny.Recorder()
    manifest = tiny.run_train(tmp_path, training, images, recorder)
    assert_numbers(recorder.values[1], by_hand(manifest, training, held_out, "ema"), "held_out_loss")


def test_the_report_says_of_what(whole: tuple[tiny.Recorder, CheckpointManifest], both: LatentManifest) -> None:
    recorder, manifest = whole
    found, held_out = report(manifest), held_out_latents(both)
    conditions = found["conditions"]
    assert (conditions["latents"], conditions["content"]) == (held_out.digest, held_out.content)
    assert (conditions["images"], conditions["times"]) == (IMAGES, [125, 375, 625, 875])
    assert [point["step"] for point in found["points"]] == [3, 6]
    assert found["points"][0].items() <= (recorder.values[3] | {"step": 3}).items()
    assert recorder.artifacts["held_out_loss.json"] == manifest.read_object("artifacts/held_out_loss.json")
    assert len(LEVELS) == 4


def test_it_changes_no_bit_of_the_run(
    whole: tuple[tiny.Recorder, CheckpointManifest], plain: CheckpointManifest
) -> None:
    _, manifest = whole
    assert (manifest.digest, manifest.content) == (plain.digest, plain.content)
    assert weights(manifest) == weights(plain)
    assert not [entry for entry in plain.files if "held_out" in entry.path]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_it_changes_no_bit_of_a_run_on_two_ranks(
    tmp_path: Path, template: Template, both: LatentManifest, parallel: str
) -> None:
    """Although ranks that share the parameters compute with the average, and then again with the weights."""
    found = []
    for config in (
        measured(parallel=parallel, micro_batch=2),
        measured(parallel=parallel, micro_batch=2, held_out=None),
    ):
        root = tmp_path / str(len(found))
        out = tiny.output(root, CheckpointManifest, config, latents=both)
        template.finish(Job(out, config, both))
        found.append(CheckpointManifest.read(out.uri))
    assert weights(found[0]) == weights(found[1])
    assert [point["step"] for point in report(found[0])["points"]] == [3, 6]


def test_numbers_have_the_same_bits_on_any_number_of_ranks(
    tmp_path: Path, template: Template, both: LatentManifest
) -> None:
    """Also where the ranks share the parameters, and when it is measured again."""
    found = []
    for ranks, parallel in ((1, "ddp"), (2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")):
        config = measured(parallel=parallel, ema_decay=0.25)
        out = tiny.output(tmp_path / f"{ranks}{parallel}", CheckpointManifest, config, latents=both)
        out = out.model_copy(update={"header": out.header.model_copy(update={"stage": "measure"})})
        template.finish(Job(out, config, both, ranks=ranks))
        found += json.loads(Path(out.uri, measuring.NUMBERS).read_bytes())
    assert len(found) == 10
    assert all(numbers == found[0] for numbers in found)
    assert found[0]["held_out_loss"] != found[0]["held_out_loss_raw"]


def test_a_killed_run_has_the_numbers_of_an_undisturbed_one(
    tmp_path: Path, both: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, MEASURED, both, tiny.Killer(4))
    assert report(tiny.run_train(tmp_path, MEASURED, both)) == report(whole[1])


class Preempter(tiny.Recorder):
    """SIGTERM arrives before the measurement after step 3, and no time is left for it."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        super().metrics(values, step=step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("more", [{}, {"milestones": 3}])
def test_the_save_goes_before_a_measurement_when_sigterm_has_come(
    tmp_path: Path,
    both: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    """The measurement is made up for before training goes on, and a milestone of that step has it."""
    config = measured(**more)
    with monkeypatch.context() as patch:
        patch.delattr(HeldOut, "measure")
        with pytest.raises(PreemptedError, match="stopped by SIGTERM at step 3"):
            tiny.run_train(tmp_path, config, both, stopped := Preempter())
    assert list(stopped.values) == [2]
    recorder = tiny.Recorder()
    manifest = tiny.run_train(tmp_path, config, both, recorder)
    assert report(manifest) == report(whole[1])
    assert list(recorder.values) == [3, 4, 6]
    assert recorder.values[3].items() <= whole[0].values[3].items()
    assert manifest.content == whole[1].content
    for path in (tmp_path / "train").iterdir():
        assert report(CheckpointManifest.read(str(path)))["points"][0] == report(whole[1])["points"][0]


def test_killed_ranks_have_the_numbers_of_undisturbed_ones(
    tmp_path: Path, template: Template, both: LatentManifest
) -> None:
    config, found = measured(steps=8, checkpoint_every=4, parallel="fsdp"), []
    for faults in (Faults(), Faults(kills=[(1, 6)], restarts=1)):
        out = tiny.output(tmp_path / str(len(found)), CheckpointManifest, config, latents=both)
        template.finish(Job(out, config, both, faults=faults))
        found.append(CheckpointManifest.read(out.uri))
    assert report(found[0]) == report(found[1])
    assert weights(found[0]) == weights(found[1])


def test_a_run_of_more_steps_keeps_the_curve_of_the_shorter_one(
    tmp_path: Path, both: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    shutil.copytree(Path(whole[1].uri), tmp_path / "train" / Path(whole[1].uri).name)
    recorder = tiny.Recorder()
    longer = report(tiny.run_train(tmp_path, measured(steps=9), both, recorder))
    assert [point["step"] for point in longer["points"]] == [3, 6, 9]
    assert longer["points"][:2] == report(whole[1])["points"]
    assert [step for step, values in recorder.values.items() if "held_out_loss" in values] == [3, 6, 9]


def test_numbers_of_other_images_are_no_points_of_the_curve(
    tmp_path: Path, both: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    shutil.copytree(Path(whole[1].uri), tmp_path / "train" / Path(whole[1].uri).name)
    fewer = HeldOutLoss(every=3, images=IMAGES - 1, batch_size=4)
    recorder = tiny.Recorder()
    found = report(tiny.run_train(tmp_path, measured(steps=9, held_out=fewer), both, recorder))
    assert [point["step"] for point in found["points"]] == [9]
    assert [step for step, values in recorder.values.items() if "held_out_loss" in values] == [9]
    assert found["conditions"]["images"] == IMAGES - 1


def test_a_milestone_has_the_curve_up_to_its_step(tmp_path: Path, both: LatentManifest) -> None:
    tiny.run_train(tmp_path, measured(milestones=4), both)
    (shorter,) = (
        manifest
        for manifest in (CheckpointManifest.read(str(path)) for path in (tmp_path / "train").iterdir())
        if manifest.counts["steps"] == 4
    )
    assert [point["step"] for point in report(shorter)["points"]] == [3]


@pytest.mark.full
def test_a_compiled_run_keeps_its_bits(tmp_path: Path, both: LatentManifest) -> None:
    found = [
        tiny.run_train(tmp_path / str(number), config, both)
        for number, config in enumerate((measured(compile=True), measured(compile=True, held_out=None)))
    ]
    assert weights(found[0]) == weights(found[1])


def test_a_last_step_that_is_left_out_has_no_final_numbers(
    tmp_path: Path, template: Template, both: LatentManifest
) -> None:
    """So the content does not depend on the steps that were logged before it."""
    found = []
    for number, config in enumerate((MEASURED, PLAIN)):
        out = tiny.output(tmp_path / str(number), CheckpointManifest, config, latents=both)
        template.finish(Job(out, config, both, faults=Faults(spoilt=[(1, 5)])))
        found.append(CheckpointManifest.read(out.uri))
    assert found[0].content == found[1].content
    assert found[0].metrics == {}


def test_a_step_that_is_left_out_is_no_point(tmp_path: Path, template: Template, both: LatentManifest) -> None:
    out = tiny.output(tmp_path, CheckpointManifest, MEASURED, latents=both)
    template.finish(Job(out, MEASURED, both, faults=Faults(spoilt=[(1, 2)])))
    assert [point["step"] for point in report(CheckpointManifest.read(out.uri))["points"]] == [6]


def test_without_latents_of_held_out_images_a_line_says_how_to_make_them(
    tmp_path: Path, latents: LatentManifest
) -> None:
    sets = "--set train.held_out=null --set encode.split=held_out --set encode.flips=false"
    tars = latents.parent("shards", ShardManifest).url
    said = "^train.held_out: no latents of held-out images in .*/encode/[0-9a-f]{16}; run the whole recipe, or "
    said += re.escape(f"`ditflow encode RECIPE --from {tars} {sets} --root {latents.root}`") + "$"
    with pytest.raises(InputError, match=said):
        tiny.run_train(tmp_path, MEASURED, latents)
    assert not list(tmp_path.rglob("*"))


def test_a_model_is_not_measured_on_what_it_is_trained_on(tmp_path: Path, both: LatentManifest) -> None:
    with pytest.raises(InputError, match=r"^train.held_out: the model is trained on the held-out images"):
        tiny.run_train(tmp_path, measured(flips=False), held_out_latents(both))


def test_latents_of_another_version_are_refused(both: LatentManifest) -> None:
    other = both.model_copy(update={"config": {}})
    with pytest.raises(InputError, match=r"has another config than encode \(vae: Field required\)"):
        held_out_latents(other)


def test_a_moved_root_is_searched(tmp_path: Path, both: LatentManifest) -> None:
    shutil.copytree(Path(both.root), tmp_path / "moved")
    moved = LatentManifest.read(str(tmp_path / "moved" / "encode" / both.folder_name))
    assert held_out_latents(moved).uri.startswith(str(tmp_path / "moved"))
    assert held_out_latents(moved).digest == held_out_latents(both).digest


def test_held_out_latents_of_other_tars_are_refused(tmp_path: Path, both: LatentManifest) -> None:
    shutil.copytree(Path(both.root), tmp_path / "moved")
    moved = LatentManifest.read(str(tmp_path / "moved" / "encode" / both.folder_name))
    parents = {name: parent.model_copy(update={"content": "0" * 64}) for name, parent in moved.parents.items()}
    other = moved.model_copy(update={"parents": parents})
    with pytest.raises(InputError, match="was made from other bytes than its shards has now"):
        held_out_latents(other)


def test_damage_is_named_before_the_first_step(tmp_path: Path, both: LatentManifest) -> None:
    shutil.copytree(Path(both.root), tmp_path / "moved")
    moved = LatentManifest.read(str(tmp_path / "moved" / "encode" / both.folder_name))
    held_out = held_out_latents(moved)
    path = next(entry.path for entry in held_out.files if entry.path.startswith("data/mean/c/"))
    damaged = Path(held_out.uri, path)
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    recorder = tiny.Recorder()
    with pytest.raises(StorageError, match=str(damaged)):
        tiny.run_train(tmp_path, MEASURED, moved, recorder)
    assert not recorder.values


def test_streamed_images_have_the_same_numbers(tmp_path: Path, both: LatentManifest) -> None:
    found = []
    for reading in ("auto", "streamed"):
        config, recorder = measured(steps=3, order="pooled", reading=reading), tiny.Recorder()
        found.append(report(tiny.run_train(tmp_path / reading, config, both, recorder)))
    assert found[0] == found[1]


def test_one_image_has_no_standard_error() -> None:
    found = summary("loss", np.array([[1.0, 2.0, 3.0, 6.0]]))
    assert (found["loss"], found["loss_level_4"]) == (3, 6)
    assert np.isnan(found["loss_se"])


def test_the_levels_of_an_image_are_no_independent_numbers() -> None:
    """With levels that go together, the mean over levels is no more certain than one level."""
    losses = np.repeat(np.arange(5.0)[:, None], 4, axis=1)
    assert summary("loss", losses)["loss_se"] == summary("loss", losses)["loss_level_1_se"]


def test_no_images_are_refused() -> None:
    with pytest.raises(ValidationError):
        HeldOutLoss(images=0)
