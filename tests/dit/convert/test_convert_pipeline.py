"""The exported diffusers pipeline, loaded by diffusers alone, against our own samplers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.utils import dynamic_modules_utils
from random_dit import pretrained, random_dit

from dit.convert import Pretrained, read, write
from dit.diffusion.config import DiffusionConfig
from dit.diffusion.gaussian import GaussianDiffusion
from dit.models.dit import DiT
from dit.samplers.ddpm import ddpm
from dit.samplers.guidance import Channels, Guided
from dit.samplers.state import last
from dit.vae import VaeRef, info, load_vae
from storage.errors import InputError
from storage.latents import VaeInfo

LABELS = [3, 0, 9]
SHAPE = (len(LABELS), 4, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """diffusers copies a folder's module before it runs it: not into the home of whoever tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_dit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: DiT, vae: VaeRef) -> Path:
    place = tmp_path_factory.mktemp("export") / "pipeline"
    write(pretrained(model), str(place), "pipeline", vae=vae.source)
    return place


def loaded(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return loaded(folder)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(model: DiT, scale: float, channels: Channels, steps: int, diffusion: DiffusionConfig) -> torch.Tensor:
    """Latents of our own sampler, from the numbers that the pipeline draws from its generator."""
    process = GaussianDiffusion.from_config(diffusion).respaced(steps)
    guided = Guided(model, scale, model.num_classes, channels)
    generator = noise(1)
    x = torch.randn(SHAPE, generator=generator)
    return last(ddpm(process, guided, x, torch.tensor(LABELS), lambda step: torch.randn(SHAPE, generator=generator)))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("scale", "channels"), [(1.0, "first3"), (1.5, "first3"), (4.0, "first3"), (4.0, "all")])
@pytest.mark.parametrize("steps", [2, 25])
def test_latents_are_those_of_our_sampler(
    pipeline: Any, model: DiT, scale: float, channels: Channels, steps: int
) -> None:
    found = pipeline(LABELS, scale, channels, steps, generator=noise(1), output_type="latent").images
    assert error(found, ours(model, scale, channels, steps, DiffusionConfig())) < 1e-5


def test_what_guidance_does_shows(pipeline: Any, model: DiT) -> None:
    found = pipeline(LABELS, 4.0, "first3", 25, generator=noise(1), output_type="latent").images
    assert error(found, ours(model, 4.0, "all", 25, DiffusionConfig())) > 1e-2
    assert error(found, ours(model, 3.9, "first3", 25, DiffusionConfig())) > 1e-4


def test_a_process_and_a_variance_of_its_own(tmp_path: Path, vae: VaeRef) -> None:
    model, diffusion = random_dit(learn_variance=False, num_classes=12), DiffusionConfig(steps=500, beta_end=0.03)
    write(Pretrained(model.config, model.state_dict(), diffusion), str(tmp_path / "p"), "pipeline", vae=vae.source)
    found = loaded(tmp_path / "p")(LABELS, 2.0, "all", 20, generator=noise(1), output_type="latent").images
    assert error(found, ours(model, 2.0, "all", 20, diffusion)) < 1e-5


def test_given_latents_and_a_generator_an_image(pipeline: Any) -> None:
    generator = noise(1)
    first = torch.randn(SHAPE, generator=generator)
    given = pipeline(LABELS, num_inference_steps=5, latents=first, generator=generator, output_type="latent").images
    drawn = pipeline(LABELS, num_inference_steps=5, generator=noise(1), output_type="latent").images
    assert torch.equal(given, drawn)
    each = pipeline(LABELS, num_inference_steps=5, generator=[noise(i) for i in range(3)], output_type="latent").images
    alone = pipeline(LABELS[1:2], num_inference_steps=5, generator=[noise(1)], output_type="latent").images
    assert error(each[1:2], alone) < 1e-5


def test_images_are_decoded_as_ours_are(pipeline: Any, vae: VaeRef) -> None:
    def images(kind: str) -> Any:
        return pipeline(LABELS, num_inference_steps=5, generator=noise(1), output_type=kind, return_dict=False)[0]

    expected = load_vae(vae).decode(images("latent")).numpy()
    found = images("np")
    assert found.dtype == np.uint8
    gap = np.abs(found.astype(int) - expected)  # the order of a sum may move a number over the border of two bytes
    assert gap.max() <= 1 and gap.mean() < 1e-3
    assert np.array_equal(np.stack([np.asarray(image) for image in images("pil")]), found)
    assert expected.std() > 1


def test_latents_are_unscaled_as_the_model_knows_them(tmp_path: Path, model: DiT, vae: VaeRef) -> None:
    scales = VaeInfo(source="", sha256="", downsample=4, channels=4, scaling_factor=0.5, shift_factor=-1.0)
    found = Pretrained(model.config, model.state_dict(), DiffusionConfig(), scales)
    write(found, str(tmp_path / "p"), "pipeline", vae=vae.source)
    config = loaded(tmp_path / "p").vae.config
    assert (config.scaling_factor, config.shift_factor) == (0.5, -1.0)
    changed = json.loads((tmp_path / "p" / "vae" / "config.json").read_text())
    original = json.loads((Path(vae.source) / "config.json").read_text())
    assert changed == original | {"scaling_factor": 0.5, "shift_factor": -1.0}


def test_without_an_autoencoder(folder: Path, tmp_path: Path, model: DiT) -> None:
    pipeline = loaded(folder)
    pipeline.register_modules(vae=None)
    assert pipeline(LABELS, num_inference_steps=2, output_type="latent").images.shape == SHAPE
    with pytest.raises(ValueError, match="pass vae= to from_pretrained"):
        pipeline(LABELS, num_inference_steps=2)
    with pytest.raises(InputError, match=r"p: the checkpoint does not name its autoencoder; pass --vae"):
        write(pretrained(model), str(tmp_path / "p"), "pipeline")
    assert not (tmp_path / "p").exists()


def test_the_autoencoder_that_the_card_names_is_the_default(tmp_path: Path, model: DiT, vae: VaeRef) -> None:
    known = info(vae)
    scales = VaeInfo(source=vae.source, sha256=known.sha256, downsample=4, channels=4, scaling_factor=0.5)
    found = Pretrained(model.config, model.state_dict(), DiffusionConfig(), scales)
    write(found, str(tmp_path / "p"), "pipeline")
    assert loaded(tmp_path / "p")(LABELS, num_inference_steps=2).images[0].size == (64, 64)
    gone = replace(found, scales=scales.model_copy(update={"source": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="gone"):
        write(gone, str(tmp_path / "q"), "pipeline")
    assert not (tmp_path / "q").exists()


def test_an_autoencoder_of_other_latents_is_refused(tmp_path: Path, vae: VaeRef) -> None:
    with pytest.raises(InputError, match="the autoencoder has 4 latent channels, the model 3"):
        write(pretrained(random_dit(in_channels=3)), str(tmp_path / "p"), "pipeline", vae=vae.source)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_channels": "first4"},
        {"output_type": "pt"},
        {"num_inference_steps": 1},
        {"num_inference_steps": 1001},
    ],
)
def test_calls_that_are_refused(pipeline: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        pipeline(LABELS, **options)


def test_the_folder_is_read_back(folder: Path, model: DiT) -> None:
    found = read(str(folder))
    assert found.config == model.config
    assert all(torch.equal(found.state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_stock_pipeline_knows_one_null_label(pipeline: Any) -> None:
    stock = DiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)
    stock.set_progress_bar_config(disable=True)
    with pytest.raises(IndexError):
        stock(LABELS, guidance_scale=1.5, num_inference_steps=2)


def test_it_runs_where_this_package_is_not(tmp_path: Path, folder: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('dit', 'storage', 'flows')));"  # so that importing them fails
        "from diffusers import DiffusionPipeline;"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "print(pipeline([1], num_inference_steps=2).images[0].size)"
    )
    cache = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=cache)
    assert (done.returncode, done.stdout) == (0, "(64, 64)\n"), done.stderr
