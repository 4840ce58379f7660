import io
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from forked import Faults, Job, Template
from PIL import Image
from pydantic import ValidationError

import dit
from dit.export import RAW_WEIGHTS, CheckpointManifest
from dit.latent_scale import LatentScale
from dit.pixels import Rounding
from dit.sample import SampleManifest, check_process, draw
from dit.samplers.config import SampleConfig
from dit.samplers.noise import SampleNoise
from dit.vae import Vae, VaeRef, load_vae
from storage.errors import DitflowError, InputError, StorageError
from storage.latents import LatentManifest
from storage.rows.store import RowReader
from storage.verify import faults, uncommitted

COUNT = tiny.SAMPLING.count


def changed(**fields: object) -> SampleConfig:
    return SampleConfig.model_validate(tiny.SAMPLING.model_dump() | fields)


def images(manifest: SampleManifest) -> np.ndarray:
    return RowReader(manifest).array("image").astype(int)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for pixels that rounding pushes over a step."""
    gap = np.abs(found - expected)
    assert gap.max() <= 1
    assert (gap > 0).mean() < 0.01


def ddim_by_hand(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Song et al., equation 12 with sigma 0, straight from the definition of the schedule."""
    cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for place in reversed(range(len(kept))):
        now, then = cumprod[kept[place]], cumprod[kept[place - 1]] if place else 1.0
        with torch.no_grad():
            eps = model(x, torch.full((len(x),), kept[place]), y)[:, :4]
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = then**0.5 * x0 + (1 - then) ** 0.5 * eps
    return x.float()


def decoded(vae: VaeRef, latents: torch.Tensor) -> np.ndarray:
    decoder = AutoencoderKL.from_pretrained(vae.source, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        raw = decoder.decode(latents / tiny.SCALE + tiny.SHIFT).sample.permute(0, 2, 3, 1).double().numpy()
    return np.clip(127.5 * raw + 128, 0, 255).astype(int)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_samples_are_the_sampler_then_the_decoder(
    tmp_path: Path, checkpoint: CheckpointManifest, vae: VaeRef, weights: str
) -> None:
    config = changed(sampler="ddim", steps=5, guidance_scale=1.0, weights=weights)
    found = images(tiny.run_sample(tmp_path, config, checkpoint))
    file = "model.safetensors" if weights == "ema" else RAW_WEIGHTS
    model = dit.load(checkpoint.uri, weights=file).model
    noise = SampleNoise(config.seed, range(COUNT), (4, 8, 8)).initial()
    latents = ddim_by_hand(model, noise, torch.arange(COUNT) % 3, [0, 250, 500, 749, 999])
    assert_near(found, decoded(vae, latents))


def dpm_by_hand(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        with torch.no_grad():
            eps = model(x, t.repeat(len(x)), labels)[:, :4]
        x = scheduler.step(eps, t, x).prev_sample
    return x


def test_dpm_is_diffusers_scheduler(tmp_path: Path, checkpoint: CheckpointManifest, vae: VaeRef) -> None:
    config = changed(sampler="dpm++", steps=20, guidance_scale=1.0)
    samples = tiny.run_sample(tmp_path, config, checkpoint)
    noise = SampleNoise(config.seed, range(COUNT), (4, 8, 8)).initial()
    latents = dpm_by_hand(dit.load(checkpoint.uri).model, noise, torch.arange(COUNT) % 3, 20)
    assert_near(images(samples), decoded(vae, latents))
    assert samples.conditions["sampler"] == "dpm++"
    assert "eta" not in samples.conditions
    with pytest.raises(InputError, match=r"sample.steps: dpm\+\+ takes 2 to 999 steps"):
        check_process(changed(sampler="dpm++", steps=1000), checkpoint.card)


def test_manifest_says_how_they_were_made(samples: SampleManifest, checkpoint: CheckpointManifest) -> None:
    assert samples.counts == {"images": COUNT}
    assert (samples.resolution, samples.class_names) == (tiny.SIDE, tiny.CLASSES)
    assert samples.parent("checkpoint", CheckpointManifest).digest == checkpoint.digest
    assert samples.conditions == {
        "count": COUNT,
        "labels": "balanced",
        "sampler": "ddpm",
        "steps": 4,
        "guidance_scale": 9,
        "guidance_channels": "all",
        "guidance_schedule": "constant",
        "rounding": "nearest",
        "weights": "ema",
        "precision": "float32",
        "seed": 0,
        "decoder_sha256": checkpoint.card.vae.sha256,
        "training_steps": 12,
    }
    assert not faults(samples, full=True)


@pytest.mark.parametrize(("block_rows", "batch_size"), [(11, 11), (2, 64), (7, 2), (64, 5)])
def test_a_sample_does_not_depend_on_its_batch(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest, block_rows: int, batch_size: int
) -> None:
    other = tiny.run_sample(tmp_path, changed(block_rows=block_rows, batch_size=batch_size), checkpoint)
    assert_near(images(other), images(samples))
    assert images(other)[3].tolist() != images(other)[6].tolist()  # of the same class


def test_more_samples_begin_with_the_fewer(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest
) -> None:
    more = images(tiny.run_sample(tmp_path, changed(count=14), checkpoint))
    assert_near(more[:COUNT], images(samples))


def spoil_nothing(folder: Path) -> None:
    pass


def lose_first_object(folder: Path) -> None:
    (folder / "data/image/c/0/0/0/0").unlink()


def lose_second_record(folder: Path) -> None:
    (folder / "records/rows-00001.json").unlink()


@pytest.mark.parametrize(
    ("when", "fault", "drawn_again"),
    [
        (3, spoil_nothing, 3),  # within the first block
        (10, spoil_nothing, 11),  # within the third
        (10, lose_first_object, 7),
        (10, lose_second_record, 7),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path,
    checkpoint: CheckpointManifest,
    samples: SampleManifest,
    when: int,
    fault: Callable[[Path], None],
    drawn_again: int,
) -> None:
    with pytest.raises(tiny.Killed):
        tiny.run_sample(tmp_path, tiny.SAMPLING, checkpoint, tiny.Killer(when))
    fault(Path(tiny.output(tmp_path, SampleManifest, tiny.SAMPLING, checkpoint=checkpoint).uri))
    recorder = tiny.Recorder()
    resumed = tiny.run_sample(tmp_path, tiny.SAMPLING, checkpoint, recorder)
    assert recorder.steps[0][0] == drawn_again
    assert recorder.steps[-1] == (COUNT, COUNT, "images")
    assert tiny.objects(resumed) == tiny.objects(samples)
    picture = Image.open(io.BytesIO(resumed.read_object("artifacts/samples.png")))
    assert picture.size == (3 * tiny.SIDE + 4, 2 * tiny.SIDE + 2)


def test_two_ranks_share_the_blocks_and_make_the_same_bytes_through_a_kill(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest, template: Template
) -> None:
    out = tiny.output(tmp_path, SampleManifest, tiny.SAMPLING, checkpoint=checkpoint)
    job = Job(out, tiny.SAMPLING, checkpoint)
    killed = template.run(job._replace(faults=Faults(kills=[(0, 8)])))
    assert killed.codes[0][0] == -signal.SIGKILL
    assert [line for line in killed.progress if line[0] == 0] == [
        [0, 5, COUNT],
        [0, 6, COUNT],
        [0, 11, COUNT],
    ]  # 3, 4, 7 of its 7
    assert out.committed(SampleManifest) is None
    template.finish(job)
    assert tiny.objects(SampleManifest.read(out.uri)) == tiny.objects(samples)


def test_the_picture_shows_the_first_samples(samples: SampleManifest) -> None:
    picture = np.asarray(Image.open(io.BytesIO(samples.read_object("artifacts/samples.png"))))
    first = images(samples)
    assert np.array_equal(picture[: tiny.SIDE, tiny.SIDE + 2 : 2 * tiny.SIDE + 2], first[1])
    assert np.array_equal(picture[tiny.SIDE + 2 :, : tiny.SIDE], first[3])


def test_balanced_labels_take_every_class_in_turn(samples: SampleManifest) -> None:
    assert RowReader(samples).array("label").tolist() == [index % 3 for index in range(COUNT)]


def test_random_labels_depend_on_the_number_alone(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    drawn = [
        RowReader(tiny.run_sample(tmp_path, changed(labels="random", count=40, steps=2, **cut), checkpoint))
        for cut in ({"block_rows": 64, "batch_size": 64}, {"block_rows": 9, "batch_size": 4}, {"seed": 1})
    ]
    labels = [reader.array("label").tolist() for reader in drawn]
    assert labels[0] == labels[1] != labels[2]
    assert labels[0] != sorted(labels[0])
    assert all(5 <= labels[0].count(label) <= 23 for label in range(3))  # 13.3 +- 3 each


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"guidance_scale": 1.0}, {"guidance_channels": "first3"}, {"steps": 5}, {"sampler": "ddim"}],
)
def test_every_choice_matters(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest, change: dict[str, object]
) -> None:
    assert np.abs(images(tiny.run_sample(tmp_path, changed(**change), checkpoint)) - images(samples)).max() > 1


def test_half_precision_is_near(tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest) -> None:
    half = images(tiny.run_sample(tmp_path, changed(precision="bfloat16"), checkpoint))
    gap = np.abs(half - images(samples))
    assert 0 < gap.mean() < 3


@pytest.mark.parametrize(("size", "passes"), [(2, [2, 1, 1, 2, 1, 1, 2, 1]), (64, [3, 1, 3, 1, 3])])
def test_the_decoder_has_batches_of_its_own(
    tmp_path: Path,
    checkpoint: CheckpointManifest,
    samples: SampleManifest,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    passes: list[int],
) -> None:
    seen, real = list[int](), Vae.decode

    def noting(self: Vae, latents: torch.Tensor, rounding: Rounding, scale: LatentScale) -> torch.Tensor:
        seen.append(len(latents))
        return real(self, latents, rounding, scale)

    monkeypatch.setattr(Vae, "decode", noting)
    found = tiny.run_sample(tmp_path, changed(decode_batch_size=size), checkpoint)
    assert seen == passes
    assert_near(images(found), images(samples))


def test_a_compiled_model_is_another_work_and_makes_the_same_samples(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **options: asked.append(options))
    found = tiny.run_sample(tmp_path, changed(compile=True), checkpoint)
    assert asked == [{"dynamic": False}]
    assert found.digest != samples.digest
    assert found.conditions == samples.conditions
    assert np.array_equal(images(found), images(samples))


def test_chosen_classes(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    """The sample of an index and a label is the same whatever chose the label."""
    values = {name: value for name, value in tiny.SAMPLING.model_dump().items() if name != "count"}
    config = SampleConfig.model_validate(values | {"labels": {"7": 2, "1": 3}})
    samples = tiny.run_sample(tmp_path, config, checkpoint)
    assert RowReader(samples).array("label").tolist() == [1, 1, 1, 2, 2]
    assert (samples.conditions["labels"], samples.conditions["count"]) == ("3 x 1, 2 x 7", 5)
    balanced = tiny.run_sample(tmp_path, changed(count=5), checkpoint)
    same = RowReader(balanced).array("label") == [1, 1, 1, 2, 2]
    assert same.any()
    assert_near(images(samples)[same], images(balanced)[same])


def test_a_class_that_the_model_has_not_is_named(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    with pytest.raises(InputError, match="sample.labels: the model has no class '9'; classes have a name"):
        tiny.run_sample(tmp_path, changed(labels={"9": 11}), checkpoint)


def test_an_unconditional_model_has_no_labels_and_no_guidance(tmp_path: Path, latents: LatentManifest) -> None:
    model = tiny.MODEL.model_copy(update={"conditional": False})
    checkpoint = tiny.run_train(tmp_path, tiny.TRAINING.model_copy(update={"model": model}), latents)
    samples = tiny.run_sample(tmp_path, changed(guidance_scale=4.0), checkpoint)
    assert RowReader(samples).array("label").tolist() == [-1] * COUNT
    assert (samples.conditions["labels"], samples.conditions["guidance_scale"]) == ("none", 1.0)
    plain = tiny.run_sample(tmp_path, changed(guidance_scale=1.0), checkpoint)
    assert np.array_equal(images(plain), images(samples))
    with pytest.raises(InputError, match="sample.labels: the model is unconditional"):
        tiny.run_sample(tmp_path, changed(labels={"2": COUNT}), checkpoint)


def test_another_decoder_of_the_same_latents_may_decode(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest, vae: VaeRef
) -> None:
    """Its config may tell another scale: how the model's latents are scaled is the card's to say."""
    other = tiny.save_vae(tmp_path / "other", scale=0.1)
    same = Path(other.source, "diffusion_pytorch_model.safetensors")
    same.write_bytes(Path(vae.source, same.name).read_bytes())
    found = tiny.run_sample(tmp_path, changed(vae=other), checkpoint)
    assert np.array_equal(images(found), images(samples))
    different = tiny.save_vae(tmp_path / "different", seed=1)
    manifest = tiny.run_sample(tmp_path / "root", changed(vae=different), checkpoint)
    assert not np.array_equal(images(manifest), images(samples))
    assert manifest.conditions["decoder_sha256"] != samples.conditions["decoder_sha256"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"channels": 3}, "sample.vae: the autoencoder has 3 latent channels, the model 4; use the"),
        ({"halvings": 1}, "sample.vae: the autoencoder makes images of 16 px, not of 32; use the"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(
    tmp_path: Path, checkpoint: CheckpointManifest, shape: dict[str, int], reason: str
) -> None:
    other = tiny.save_vae(tmp_path / "other", **shape)
    with pytest.raises(InputError, match=reason):
        tiny.run_sample(tmp_path, changed(vae=other), checkpoint)


def test_a_further_average_is_drawn_from_by_its_name(tmp_path: Path, latents: LatentManifest) -> None:
    """And refused by the name of one that was not trained."""
    config = tiny.TRAINING.model_copy(update={"ema_decay": 0.9, "ema_decays": (0.5,), "ema_power": (0.05,)})
    checkpoint = tiny.run_train(tmp_path, config, latents)
    found = tiny.run_sample(tmp_path, changed(weights="ema-0.5"), checkpoint)
    alone = tiny.run_train(tmp_path, tiny.TRAINING, latents)
    assert np.array_equal(images(found), images(tiny.run_sample(tmp_path, tiny.SAMPLING, alone)))
    assert found.conditions["weights"] == "ema-0.5"
    assert not np.array_equal(
        images(tiny.run_sample(tmp_path, changed(weights="power-0.05"), checkpoint)), images(found)
    )
    with pytest.raises(
        InputError, match=r"sample\.weights: the model has no model-ema-0\.7\.safetensors for ema-0\.7; it has"
    ):
        tiny.run_sample(tmp_path, changed(weights="ema-0.7"), checkpoint)
    for name in ("../../model", "power-../model", "power"):
        with pytest.raises(ValidationError, match="weights"):
            changed(weights=name)


def test_more_steps_than_the_process_has_are_refused(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    with pytest.raises(InputError, match="steps: '1001' is neither a number from 2 to 1000"):
        tiny.run_sample(tmp_path, changed(steps=1001), checkpoint)


@pytest.mark.parametrize(
    ("name", "was", "made"),
    [
        ("model.json", b'"scaling_factor": 0.7', b'"scaling_factor": 0.9'),
        ("model.json", b'"steps": 1000', b'"steps": 2000'),
        ("model.json", b'"heads": 2', b'"heads": 4'),
        ("model.json", b'  "2",\n  "5"', b'  "5",\n  "2"'),
        ("model.safetensors", b"adaLN", b"adaLM"),
    ],
)
def test_an_altered_model_is_refused(
    tmp_path: Path, checkpoint: CheckpointManifest, name: str, was: bytes, made: bytes
) -> None:
    folder = Path(shutil.copytree(checkpoint.uri, tmp_path / "train" / checkpoint.folder_name))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data.replace(was, made, 1))
    assert (folder / name).read_bytes() != data
    with pytest.raises(StorageError, match=rf"{name}: does not hold the bytes that were committed; run `ditflow ver"):
        tiny.run_sample(tmp_path, tiny.SAMPLING, CheckpointManifest.read(str(folder)))


def test_another_autoencoder_in_the_place_of_the_first_is_refused(
    tmp_path: Path, shards: object, checkpoint: CheckpointManifest
) -> None:
    other = tiny.save_vae(tmp_path / "other", seed=1)
    card = json.loads(checkpoint.card.model_dump_json())
    card["vae"]["source"] = other.source
    moved = checkpoint.model_copy(update={"card": type(checkpoint.card).model_validate(card)})
    with pytest.raises(InputError, match="its sha256 is"):
        tiny.run_sample(tmp_path, tiny.SAMPLING, moved)


def test_samples_that_are_no_numbers_are_refused(checkpoint: CheckpointManifest) -> None:
    trained = dit.load(checkpoint.uri)
    with torch.no_grad():
        trained.model.get_parameter("final_layer.linear.bias").fill_(float("nan"))
    vae = load_vae(checkpoint.card.vae_ref)
    with pytest.raises(DitflowError, match="samples 5 to 6 are not finite"):
        draw(tiny.SAMPLING, replace(trained), vae, range(5, 7), torch.tensor([0, 1]))


def test_all_that_stages_leave_is_committed(
    latents: LatentManifest, checkpoint: CheckpointManifest, samples: SampleManifest
) -> None:
    assert [uncommitted(manifest) for manifest in (latents, checkpoint, samples)] == [[], [], []]
