import json
import shutil
from pathlib import Path

import fsspec
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import dit
from dit.export import EMA_WEIGHTS, MODEL, RAW_WEIGHTS, CheckpointManifest, ModelCard
from dit.models.build import build
from dit.models.config import BackboneOptions
from storage import uri
from storage.errors import DitflowError
from storage.manifest import MANIFEST
from storage.seal import sealed


@pytest.fixture
def folder(tmp_path: Path, checkpoint: CheckpointManifest) -> Path:
    """The three files and their manifest alone, to be spoiled."""
    for name in (MANIFEST, MODEL, EMA_WEIGHTS, RAW_WEIGHTS):
        shutil.copy(Path(checkpoint.uri) / name, tmp_path)
    return tmp_path


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])


def refusal(folder: Path | str, weights: str = EMA_WEIGHTS) -> str:
    with pytest.raises(DitflowError) as caught:
        dit.load(str(folder), weights=weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("weights", [EMA_WEIGHTS, RAW_WEIGHTS])
def test_the_files_alone_make_the_model(folder: Path, checkpoint: CheckpointManifest, weights: str) -> None:
    trained = dit.load(str(folder), weights=weights)
    assert trained.card == checkpoint.card
    expected = build(trained.card.model)
    expected.load_state_dict(load_file(folder / weights))
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(trained.model(x, t, y), expected(x, t, y))
    assert trained.model(x, t, y).any()
    assert not trained.model.training
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())


def test_the_two_sets_of_weights_differ(folder: Path) -> None:
    ema, raw = (dit.load(str(folder), weights=name).model.state_dict() for name in (EMA_WEIGHTS, RAW_WEIGHTS))
    assert ema.keys() == raw.keys()
    assert torch.equal(ema["pos_embed"], raw["pos_embed"])
    assert not torch.equal(ema["final_layer.linear.weight"], raw["final_layer.linear.weight"])


def test_loading_draws_nothing_from_the_generator(folder: Path) -> None:
    before = torch.random.get_rng_state()
    dit.load(str(folder))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_any_file_system_will_do(folder: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in (MANIFEST, MODEL, EMA_WEIGHTS):
        fs.pipe_file(f"/export-test/{name}", (folder / name).read_bytes())
    x, t, y = inputs()
    assert torch.equal(dit.load("memory://export-test").model(x, t, y), dit.load(str(folder)).model(x, t, y))


def test_card_holds_the_hashes(folder: Path) -> None:
    weights = json.loads((folder / MODEL).read_text())["weights"]
    assert weights == {name: uri.sha256((folder / name).read_bytes()) for name in (EMA_WEIGHTS, RAW_WEIGHTS)}


@pytest.mark.parametrize("weights", [EMA_WEIGHTS, RAW_WEIGHTS])
def test_altered_weights_are_refused(folder: Path, weights: str) -> None:
    tensors = load_file(folder / weights)
    tensors["final_layer.linear.bias"] += 1e-6
    save_file(tensors, folder / weights)
    assert f"{folder}/{weights}: does not hold the bytes that were committed" in refusal(folder, weights)


@pytest.mark.parametrize("data", [b"", b"no weights at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_weights_that_do_not_load_are_refused(folder: Path, data: bytes) -> None:
    (folder / EMA_WEIGHTS).write_bytes(data)
    tiny.reseal(folder)
    assert f"{folder}/{EMA_WEIGHTS}: does not load" in refusal(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    card = json.loads((folder / MODEL).read_text())
    card["model"]["width"] = 64
    (folder / MODEL).write_text(json.dumps(card))
    tiny.reseal(folder)
    assert f"{folder}/{EMA_WEIGHTS}: does not load" in refusal(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, folder / EMA_WEIGHTS)
    tiny.reseal(folder)
    assert "does not load" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "Invalid"), ("{}", "model"), ('{"model": {"kind": "unet"}}', "model: Input tag 'unet'")]
)
def test_a_broken_card_names_the_field(folder: Path, text: str, reason: str) -> None:
    (folder / MODEL).write_text(text)
    tiny.reseal(folder)
    assert f"{folder}/{MODEL}: not a trained model: {reason}" in refusal(folder)


@pytest.mark.parametrize("name", [MODEL, EMA_WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{folder}/{name}: is missing" in refusal(folder)


def test_a_folder_without_a_manifest_is_no_model(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    for none in (folder, folder / "none"):
        assert "a trained model is a folder with manifest.json, model.json and weights" in refusal(none)


@pytest.mark.parametrize("size", [10**6, 2**26 + 1])
def test_a_card_of_endless_depth_is_refused(folder: Path, size: int) -> None:
    with (folder / MODEL).open("wb") as file:
        file.write(b'{"model":' + b"[" * 10**6)
        file.truncate(size)
    assert f"{folder}/{MODEL}: has {size:,} bytes instead of" in refusal(folder)
    manifest = CheckpointManifest.read(str(folder))
    entries = [
        entry.model_copy(update={"size": size, "sha256": uri.file_sha256(str(folder / MODEL))})
        if entry.path == MODEL
        else entry
        for entry in manifest.files
    ]
    text = manifest.model_copy(update={"files": tuple(entries)}).model_dump_json()
    (folder / MANIFEST).write_bytes(sealed(text.encode()))
    said = refusal(folder)
    assert ("recursion limit" if size < uri.MAX_TEXT else "more than the 67,108,864 that such a file may have") in said
    assert len(said) < 1000


def test_a_card_has_no_fields_of_later_versions_at_their_defaults(checkpoint: CheckpointManifest) -> None:
    """Else a model that an earlier version made would be repaired with other bytes, and its children refused."""
    whole = json.loads(checkpoint.model_dump_json())["card"]
    assert whole == json.loads(checkpoint.read_object(MODEL))
    assert whole["model"].keys().isdisjoint(BackboneOptions.model_fields)
    model = checkpoint.card.model.model_copy(update={"rope": True})
    other = checkpoint.card.model_copy(update={"model": model})
    assert json.loads(other.model_dump_json())["model"]["rope"] is True
    assert ModelCard.model_validate_json(other.model_dump_json()) == other
