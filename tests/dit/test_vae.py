import json
import shutil
import types
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from dit.pixels import Rounding
from dit.vae import CONFIG, WEIGHTS, Vae, VaeRef, fetch, info, load_vae
from storage import uri
from storage.errors import InputError

SCALE, SHIFT = 0.7, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder with random weights, factor 2, three latent channels, a scale and a shift."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same autoencoder, to be spoiled."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def vae(folder: Path) -> Vae:
    return load_vae(VaeRef(source=str(folder)))


@pytest.fixture(scope="module")
def reference(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def refusal(ref: VaeRef) -> str:
    with pytest.raises(InputError) as caught:
        load_vae(ref)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_numbers_come_from_config_and_file(folder: Path, vae: Vae) -> None:
    digest = uri.sha256((folder / WEIGHTS).read_bytes())
    found = info(VaeRef(source=str(folder), sha256=digest.upper()))
    assert (found.sha256, found.downsample, found.channels) == (digest, 2, 3)
    assert (found.scaling_factor, found.shift_factor) == (SCALE, SHIFT)
    assert info(VaeRef(source=str(folder))).sha256 == digest
    assert (vae.sha256, vae.downsample, vae.channels) == (digest, 2, 3)
    assert (vae.scaling_factor, vae.shift_factor) == (SCALE, SHIFT)


def test_encode_is_the_posterior_of_diffusers(vae: Vae, reference: AutoencoderKL) -> None:
    mean, std = vae.encode(images())
    with torch.no_grad():
        expected = reference.encode(images().permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert mean.shape == std.shape == (3, 3, 8, 12)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, expected.std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rounding", "offset"), [("nearest", 128.0), ("down", 127.5)])
def test_decode_unscales_then_quantises(vae: Vae, reference: AutoencoderKL, rounding: Rounding, offset: float) -> None:
    latents = 3 * torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = reference.decode(latents / SCALE + SHIFT).sample.permute(0, 2, 3, 1).numpy()
    exact = np.clip(127.5 * raw.astype(np.float64) + offset, 0, 255)
    found = vae.decode(latents, rounding).numpy()
    assert found.shape == (2, 16, 24, 3)
    assert found.dtype == np.uint8
    away_from_step = np.abs(exact - np.rint(exact)) > 1e-3  # rounding of the network itself may cross a step
    assert away_from_step.mean() > 0.9
    np.testing.assert_array_equal(found[away_from_step], np.trunc(exact[away_from_step]).astype(np.uint8))


SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
KINDS = {  # what sets the published ones apart, and the numbers that are expected of each
    "sd": (AutoencoderKL, {}, (4, 0.18215, 0.0)),
    "sdxl": (AutoencoderKL, {"scaling_factor": 0.13025, "force_upcast": True}, (4, 0.13025, 0.0)),
    "sd3": (
        AutoencoderKL,
        {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, **NO_QUANT},
        (16, 1.5305, 0.0609),
    ),
    "flux": (
        AutoencoderKL,
        {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **NO_QUANT},
        (16, 0.3611, 0.1159),
    ),
    "vq": (VQModel, {"num_vq_embeddings": 32}, (3, 0.18215, 0.0)),
    "vq-narrow": (
        VQModel,
        {"num_vq_embeddings": 32, "latent_channels": 8, "vq_embed_dim": 5, "scaling_factor": 1.0},
        (5, 1.0, 0.0),
    ),
    "movq": (
        VQModel,
        {"num_vq_embeddings": 32, "latent_channels": 4, "norm_type": "spatial", "block_out_channels": (32, 32)},
        (4, 0.18215, 0.0),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_there_and_back_as_in_diffusers(kind: str, tmp_path: Path) -> None:
    cls, fields, (channels, scale, shift) = KINDS[kind]
    torch.manual_seed(0)
    reference = cls(**SMALL | fields).eval()
    if isinstance(reference, VQModel):
        torch.nn.init.normal_(reference.quantize.embedding.weight)  # far apart, or rounding decides
    reference.save_pretrained(tmp_path)
    ours = load_vae(VaeRef(source=str(tmp_path)))
    found = info(VaeRef(source=str(tmp_path)))
    for numbers in (found, ours):
        assert (numbers.channels, numbers.scaling_factor, numbers.shift_factor) == (channels, scale, shift)
    mean, std = ours.encode(images())
    assert mean.shape == std.shape == (3, channels, 8, 12)
    with torch.no_grad():
        encoded = reference.encode(images().permute(0, 3, 1, 2) / 127.5 - 1)
        posterior = None if isinstance(reference, VQModel) else encoded.latent_dist
        expected = encoded.latents if posterior is None else posterior.mean
        decoded = reference.decode(expected).sample.permute(0, 2, 3, 1).double().numpy()
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, torch.zeros_like(std) if posterior is None else posterior.std, rtol=1e-4, atol=1e-5)
    back = ours.decode((mean - shift) * scale).numpy()
    assert np.abs(back - np.clip(127.5 * decoded + 128, 0, 255)).max() <= 1.01


def test_white_does_not_wrap_around(vae: Vae) -> None:
    class White:
        device, dtype = torch.device("cpu"), torch.float32

        @staticmethod
        def decode(z: torch.Tensor) -> object:
            return type("Output", (), {"sample": torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 2, 2)})

    found = Vae(White(), vae.sha256, 2, 3, SCALE, SHIFT).decode(torch.zeros(1, 3, 1, 1))  # type: ignore[arg-type]
    assert found.flatten().tolist() == [0, 0, 255, 255]


def test_half_precision_returns_float32(folder: Path, vae: Vae) -> None:
    half = load_vae(VaeRef(source=str(folder)), dtype=torch.bfloat16)
    mean, std = half.encode(images())
    assert half.model.dtype == torch.bfloat16
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, vae.encode(images())[0], rtol=0.1, atol=0.05)


def test_weights_stored_in_half_are_computed_in_full(copy: Path) -> None:
    AutoencoderKL.from_pretrained(copy, low_cpu_mem_usage=False).half().save_pretrained(copy)
    assert load_vae(VaeRef(source=str(copy))).model.dtype == torch.float32


def test_network_is_frozen(vae: Vae) -> None:
    assert not vae.model.training
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())


def test_any_file_system_will_do(folder: Path, vae: Vae) -> None:
    memory = fsspec.filesystem("memory")
    for name in (CONFIG, WEIGHTS):
        memory.pipe_file(f"/vae-test/{name}", (folder / name).read_bytes())
    remote = load_vae(VaeRef(source="memory://vae-test", sha256=vae.sha256))
    torch.testing.assert_close(remote.encode(images())[0], vae.encode(images())[0], rtol=0, atol=0)


def test_location_is_no_part_of_the_identity(folder: Path) -> None:
    assert VaeRef(source=str(folder), sha256="0" * 64).identity() == {}


def test_fetch_copies_the_bytes(folder: Path, tmp_path: Path) -> None:
    fetch(VaeRef(source=str(folder)), tmp_path / "new" / "vae")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "new" / "vae" / name).read_bytes() == (folder / name).read_bytes()


def test_wrong_hash_names_file_and_both_hashes(folder: Path, vae: Vae) -> None:
    message = refusal(VaeRef(source=str(folder), sha256="0" * 64))
    assert str(folder / WEIGHTS) in message
    assert vae.sha256 in message
    assert "0" * 64 in message


def test_flipped_bit_is_caught_by_the_hash(copy: Path, vae: Vae) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    assert uri.sha256(bytes(data)) in refusal(VaeRef(source=str(copy), sha256=vae.sha256))
    with pytest.raises(InputError, match=vae.sha256):
        info(VaeRef(source=str(copy), sha256=vae.sha256))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{copy / name}: no such object" in refusal(VaeRef(source=str(copy)))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(VaeRef(source=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSON"),
        ('{"_class_name": "AutoencoderOobleck"}', "_class_name AutoencoderOobleck is none of AutoencoderKL, Auto"),
        ('{"_class_name": "AutoencoderTiny", "upsampling_scaling_factor": 4}', "upsampling_scaling_factor"),
        ('{"_class_name": "AutoencoderTiny", "decoder_block_out_channels": [8]}', "as many as the encoder's"),
        ('{"_class_name": "AutoencoderKLFlux2", "patch_size": [2, 1]}', "patch_size: [2, 1] is not square"),
        ('{"_class_name": "AutoencoderKL", "block_out_channels": "wide"}', "block_out_channels"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": 0}', "scaling_factor"),
        ('{"_class_name": "AutoencoderKL", "latents_mean": [0, 0, 0]}', "latents_mean"),
    ],
)
def test_broken_config_names_the_field(copy: Path, text: str, reason: str) -> None:
    (copy / CONFIG).write_text(text)
    message = refusal(VaeRef(source=str(copy)))
    assert f"{copy / CONFIG}: " in message
    assert reason in message


def test_config_that_diffusers_refuses_is_one_line(copy: Path) -> None:
    edit_config(copy, down_block_types=["NoSuchBlock", "NoSuchBlock"])
    assert f"{copy}: {CONFIG} or {WEIGHTS} is damaged" in refusal(VaeRef(source=str(copy)))


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    edit_config(copy, block_out_channels=[8, 8])
    assert str(copy) in refusal(VaeRef(source=str(copy)))


def test_missing_tensors_are_refused_not_made_up(copy: Path) -> None:
    edit_config(copy, layers_per_block=2)
    assert "does not fit" in refusal(VaeRef(source=str(copy)))


def test_file_that_is_no_safetensors_is_refused(copy: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, copy / WEIGHTS)
    assert "is damaged" in refusal(VaeRef(source=str(copy)))


def test_only_the_hashed_file_is_loaded(copy: Path, vae: Vae) -> None:
    index = {"metadata": {}, "weight_map": {"encoder.conv_in.weight": "elsewhere.safetensors"}}
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    found = load_vae(VaeRef(source=str(copy), sha256=vae.sha256))
    torch.testing.assert_close(found.encode(images())[0], vae.encode(images())[0], rtol=0, atol=0)


def test_hub_id_offline_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(VaeRef(source="nobody/no-such-vae"))
    assert "nobody/no-such-vae" in message
    assert CONFIG in message
    assert "local folder" in message


def test_hub_id_reads_what_the_hub_gives(folder: Path, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit.vae.hf_hub_download", lambda source, name: str(folder / name))
    assert info(VaeRef(source="somebody/vae")).sha256 == vae.sha256


def renamed(copy: Path, name: str) -> Path:
    """The autoencoder with its weights in another file."""
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    if "fp16" in name:
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(tensors, copy / name) if name.endswith("safetensors") else torch.save(tensors, copy / name)
    return copy / name


@pytest.mark.parametrize("suffix", ["bin", "fp16.safetensors", "fp16.bin"])
def test_weights_of_other_names(copy: Path, vae: Vae, tmp_path: Path, suffix: str) -> None:
    weights = renamed(copy, f"diffusion_pytorch_model.{suffix}")
    digest, ref = uri.sha256(weights.read_bytes()), VaeRef(source=str(copy))
    found = load_vae(ref)
    assert info(ref).sha256 == found.sha256 == digest
    assert load_vae(VaeRef(source=str(copy), sha256=digest)).sha256 == digest
    assert found.model.dtype == torch.float32
    error = (found.encode(images())[0] - vae.encode(images())[0]).abs().max()
    assert float(error) < (1e-2 if "fp16" in suffix else 1e-5)
    fetch(ref, tmp_path / "fetched")
    again = load_vae(VaeRef(source=str(tmp_path / "fetched")))
    assert torch.equal(again.encode(images())[0], found.encode(images())[0])


def test_full_precision_safetensors_are_preferred(copy: Path, vae: Vae) -> None:
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (copy / name).write_bytes(b"other")
    assert info(VaeRef(source=str(copy))).sha256 == vae.sha256


def test_a_whole_pipeline_has_its_autoencoder_in_a_folder(folder: Path, vae: Vae, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    found = load_vae(VaeRef(source=str(tmp_path / "pipeline")))
    assert found.sha256 == vae.sha256
    assert torch.equal(found.encode(images())[0], vae.encode(images())[0])


@pytest.mark.parametrize("name", ["diffusion_flax_model.msgpack", "model.ckpt"])
def test_needed_weights_are_named_with_the_way_to_make_them(copy: Path, name: str) -> None:
    (copy / WEIGHTS).rename(copy / name)
    message = refusal(VaeRef(source=str(copy)))
    assert f"{copy / WEIGHTS}: no such object; needed is {WEIGHTS}, which AutoencoderKL" in message


def test_one_file_is_no_autoencoder_folder(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"x")
    message = refusal(VaeRef(source=str(tmp_path / "vae.safetensors")))
    assert "is a file; name a folder of diffusers, as AutoencoderKL.from_single_file(file)" in message


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), (b"<html>", "HTML page")],
)
def test_what_is_found_in_place_of_weights(copy: Path, data: bytes, reason: str) -> None:
    (copy / WEIGHTS).write_bytes(data)
    assert f"{copy / WEIGHTS}: " in (message := refusal(VaeRef(source=str(copy))))
    assert reason in message


def test_a_pickle_of_other_things_is_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    torch.save({"vae": types.SimpleNamespace()}, copy / "diffusion_pytorch_model.bin")
    assert "contains types.SimpleNamespace, which is not loaded" in refusal(VaeRef(source=str(copy)))
    torch.save([1], copy / "diffusion_pytorch_model.bin")
    assert "is damaged" in refusal(VaeRef(source=str(copy)))


def test_a_hub_pipeline_gives_its_autoencoder(folder: Path, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str, name: str) -> str:
        if not name.startswith("vae/") or name.endswith(".fp16.bin"):
            raise LocalEntryNotFoundError(f"no {name}")
        return str(folder / name.removeprefix("vae/"))

    monkeypatch.setattr("dit.vae.hf_hub_download", download)
    assert info(VaeRef(source="somebody/pipeline")).sha256 == vae.sha256
