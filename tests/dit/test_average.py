"""Averages made afterwards: against those that the same run tracks, and a plain sum."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load

import dit
from dit import average, train
from dit.average import AverageConfig, AverageManifest
from dit.export import EMA_WEIGHTS, CheckpointManifest
from dit.training.config import Init
from dit.training.origin import open_origin
from storage import uri
from storage.errors import InputError, StorageError
from storage.estimate import PlanContext
from storage.latents import LatentManifest
from storage.manifest import Manifest, StageOutput
from storage.seal import sealed
from storage.tracker import NullTracker
from storage.verify import outputs

STEPS, EVERY = 40, 2
PLAIN = tiny.TRAINING.model_copy(update={"steps": STEPS, "log_every": 10, "checkpoint_every": 20})
CONFIG = PLAIN.model_copy(update={"ema_power": (0.05, 0.1), "milestones": EVERY})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def trained(place: Path, latents: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(place, CONFIG, latents)


@pytest.fixture(scope="module")
def directly(tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest) -> CheckpointManifest:
    """The same run, which tracks other widths."""
    config = PLAIN.model_copy(update={"ema_power": (0.075, 0.15)})
    return tiny.run_train(tmp_path_factory.mktemp("directly"), config, latents)


def output(root: Path, config: AverageConfig, checkpoint: CheckpointManifest) -> StageOutput:
    parents = average.parents(config, checkpoint)
    return tiny.output(root, AverageManifest, config, checkpoint=checkpoint, **parents)


def made(root: Path, checkpoint: CheckpointManifest, std: float, step: int | None = None) -> AverageManifest:
    config = AverageConfig(std=std, step=step)
    return average.run(config, checkpoint, out=output(root, config, checkpoint), tracker=NullTracker())


def weights(manifest: CheckpointManifest, name: str = EMA_WEIGHTS) -> dict[str, torch.Tensor]:
    return load(manifest.read_object(name))


def vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def milestone(root: Path, latents: LatentManifest, step: int) -> CheckpointManifest:
    config = CONFIG.model_copy(update={"steps": step, "milestones": None})
    return CheckpointManifest.read(tiny.output(root, CheckpointManifest, config, latents=latents).uri)


@pytest.mark.parametrize("std", [0.075, 0.15])
def test_another_width_is_that_which_the_run_would_have_tracked(
    place: Path, trained: CheckpointManifest, directly: CheckpointManifest, std: float
) -> None:
    """Also apart from what all averages have in common, the way from the weights of the last step."""
    ours, theirs = (
        vector(weights(made(place, trained, std))),
        vector(weights(directly, f"model-power-{std}.safetensors")),
    )
    raw, near = (vector(weights(trained, f"model-{name}.safetensors")) for name in ("raw", "power-0.1"))
    assert torch.cosine_similarity(ours, theirs, 0) > 0.999
    assert torch.cosine_similarity(ours - raw, theirs - raw, 0) > 0.999
    assert (ours - theirs).norm() < 0.01 * (near - theirs).norm()


@pytest.mark.parametrize("std", CONFIG.ema_power)
@pytest.mark.parametrize("step", [None, 24])
def test_a_tracked_width_at_a_snapshot_is_the_snapshot(
    place: Path, trained: CheckpointManifest, latents: LatentManifest, std: float, step: int | None
) -> None:
    snapshot = milestone(place, latents, step) if step else trained
    found, expected = weights(made(place, trained, std, step)), weights(snapshot, f"model-power-{std}.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
    assert torch.equal(found["pos_embed"], expected["pos_embed"])  # not trained


def test_the_sum_of_the_files_with_the_published_coefficients(
    place: Path, trained: CheckpointManifest, latents: LatentManifest
) -> None:
    found = made(place, trained, 0.12, 24)
    told = json.loads(found.read_object("artifacts/coefficients.json"))
    assert told["profile_error"] == found.metrics["profile_error"] < 0.1
    rows = told["snapshots"]
    assert [(row["step"], row["std"]) for row in rows] == [
        (step, std) for step in range(EVERY, 25, EVERY) for std in CONFIG.ema_power
    ]
    assert sum(row["coefficient"] for row in rows) == pytest.approx(1)
    name, total = "final_layer.linear.weight", 0.0
    for row in rows:
        snapshot = milestone(place, latents, row["step"])
        total += row["coefficient"] * weights(snapshot, f"model-power-{row['std']}.safetensors")[name].double().numpy()
    np.testing.assert_allclose(weights(found)[name].numpy(), total, rtol=1e-5, atol=1e-8)


def test_it_is_a_model_with_its_lineage(place: Path, trained: CheckpointManifest, latents: LatentManifest) -> None:
    found = made(place, trained, 0.075, 24)
    assert (found.card.steps, found.card.ema_std, list(found.card.weights)) == (24, 0.075, [EMA_WEIGHTS])
    assert dit.load(found.uri).card == found.card
    assert found.counts == {"steps": 24, "images_seen": 24 * 8, "averages": 24} | {
        "parameters": trained.counts["parameters"]
    }
    assert set(found.parents) == {"checkpoint", *(f"snapshot {step}" for step in range(EVERY, 25, EVERY))}
    assert found.latents().digest == latents.digest
    stages = [each.stage for each in outputs(found.uri) if isinstance(each, Manifest)]
    assert Counter(stages) == {"average": 1, "train": 13, "encode": 1, "shard": 1}
    sampled = tiny.run_sample(place, tiny.SAMPLING, found)
    assert (sampled.conditions["ema_std"], sampled.conditions["training_steps"]) == (0.075, 24)
    assert "ema_std" not in tiny.run_sample(place, tiny.SAMPLING, trained).conditions
    with pytest.raises(InputError, match=r"it has model\.safetensors; it is an average itself, whose name is ema"):
        tiny.run_sample(place, tiny.SAMPLING.model_copy(update={"weights": "power-0.05"}), found)
    origin = open_origin(Init(source=found.uri), found.card.model)
    assert torch.equal(vector(dict(origin.read())), vector(weights(found)))


def test_the_name_follows_from_width_step_and_snapshots(
    place: Path, trained: CheckpointManifest, latents: LatentManifest
) -> None:
    configs = [AverageConfig(std=std, step=step) for std in (0.075, 0.12) for step in (None, 24)]
    names = {output(place, config, trained).uri for config in configs}
    names.add(output(place, configs[1], milestone(place, latents, 24)).uri)
    assert len(names) == 5
    assert output(place, configs[1], trained).uri in names


def test_a_forced_repetition_of_a_milestone_changes_no_name(
    place: Path, trained: CheckpointManifest, latents: LatentManifest
) -> None:
    """And comes before and after it in the order of names, one of several times."""
    wanted = AverageConfig(std=0.075, step=4)
    before = output(place, wanted, trained)
    first = milestone(place, latents, 4)
    forced = []
    for rerun in range(1, 5):
        header = {"rerun": rerun, "digest": uri.sha256(str(rerun).encode()), "created": first.created}
        again = first.model_copy(update=header)
        folder = Path(first.uri).with_name(again.folder_name)
        folder.mkdir()
        (folder / "manifest.json").write_bytes(sealed(again.model_dump_json().encode()))
        forced.append(folder)
    try:
        assert output(place, wanted, trained) == before
    finally:
        for folder in forced:
            shutil.rmtree(folder)


def test_a_run_that_goes_on_has_the_snapshots_of_the_shorter_one(tmp_path: Path, latents: LatentManifest) -> None:
    """And one that is trained still, of its last milestone."""
    short = CONFIG.model_copy(update={"steps": 12})
    tiny.run_train(tmp_path, short, latents)
    longer = tiny.run_train(tmp_path, CONFIG.model_copy(update={"steps": 16}), latents)
    whole = tiny.run_train(tmp_path / "whole", CONFIG.model_copy(update={"steps": 16}), latents)
    ours, theirs = made(tmp_path, longer, 0.08), made(tmp_path / "whole", whole, 0.08)
    assert ours.digest == theirs.digest
    assert ours.read_object(EMA_WEIGHTS) == theirs.read_object(EMA_WEIGHTS)


def test_a_run_whose_learning_rate_falls_takes_no_run_of_fewer_steps(tmp_path: Path, latents: LatentManifest) -> None:
    falling = CONFIG.model_copy(update={"milestones": None, "decay": "linear"})
    for steps in (4, 6):
        checkpoint = tiny.run_train(tmp_path, falling.model_copy(update={"steps": steps}), latents)
    assert average.parents(AverageConfig(std=0.05), checkpoint) == {}
    assert made(tmp_path, checkpoint, 0.05).counts["averages"] == len(CONFIG.ema_power)


def test_a_damaged_snapshot_is_named(tmp_path: Path, latents: LatentManifest) -> None:
    trained = tiny.run_train(tmp_path, CONFIG.model_copy(update={"steps": 8}), latents)
    file = Path(milestone(tmp_path, latents, 4).uri, "model-power-0.1.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=f"{file}: does not hold the bytes that were committed"):
        made(tmp_path, trained, 0.08)
    config = AverageConfig(std=0.08)
    out = output(tmp_path, config, trained)
    file.unlink()
    with pytest.raises(StorageError, match=f"{file}: is missing"):
        average.run(config, trained, out=out, tracker=NullTracker())


@pytest.mark.parametrize(
    ("std", "step", "reason"),
    [
        (0.075, 41, r"average\.step: 41 is after the last step of the run, 40"),
        (0.075, 1, r"average\.step: the run has no snapshot up to step 1; train\.milestones keeps them"),
        (
            0.075,
            25,
            r"average\.std: at step 25 .* only to within .*, not 10%; choose widths near 0\.05 and 0\.1",
        ),
        (0.005, 40, r"average\.std: at step 40 the snapshots give a width of 0\.005 only to within"),
        (0.288, 40, r"average\.std: at step 40 the snapshots give a width of 0\.288 only to within"),
    ],
)
def test_what_cannot_be_made_is_refused(
    place: Path, trained: CheckpointManifest, std: float, step: int, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        made(place, trained, std, step)
    with pytest.raises(InputError, match=reason):
        average.check(AverageConfig(std=std, step=step), trained, context(place, trained))


def test_only_a_run_with_tracked_averages(
    place: Path, trained: CheckpointManifest, tmp_path: Path, latents: LatentManifest
) -> None:
    without = tiny.run_train(tmp_path, tiny.TRAINING, latents)
    with pytest.raises(InputError, match=r"has tracked no averages to make others from; train with train\.ema_power"):
        made(tmp_path, without, 0.075)
    found = made(place, trained, 0.075)
    with pytest.raises(InputError, match=f"average: {found.uri} is an average itself; name the training run"):
        made(place, found, 0.075)
    with pytest.raises(InputError, match="one of 'average' is needed"):
        AverageManifest.read(trained.uri)


def test_a_run_that_is_not_trained_yet_is_checked_by_its_milestones(tmp_path: Path, latents: LatentManifest) -> None:
    """Its manifest is an estimate. Without milestones the last step alone gives widths between the tracked ones."""
    for milestones, error in ((EVERY, None), (None, "only to within")):
        config = CONFIG.model_copy(update={"milestones": milestones})
        out = tiny.output(tmp_path, CheckpointManifest, config, latents=latents)
        coming = out.manifest(CheckpointManifest, card=train.card_for(config, latents))
        wanted = AverageConfig(std=0.2)
        if error is None:
            average.check(wanted, coming, context(tmp_path, coming))
            cost = average.estimate(wanted, coming, context(tmp_path, coming))
            assert cost.leaves["card"].weights.keys() == {EMA_WEIGHTS}
            assert cost.size > 0 and cost.seconds > 0
        else:
            with pytest.raises(InputError, match=error):
                average.check(wanted, coming, context(tmp_path, coming))


def context(root: Path, checkpoint: CheckpointManifest) -> PlanContext:
    out = tiny.output(root, AverageManifest, AverageConfig(std=0.1), checkpoint=checkpoint)
    return PlanContext(out, {}, 1, 1, {"train": checkpoint})
