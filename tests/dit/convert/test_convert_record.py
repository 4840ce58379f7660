"""What weights cannot say: recorded in what we write, or told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from other_checkpoints import refusal, same, saved
from random_dit import pretrained, random_dit
from safetensors.torch import save_file

from dit.convert import Layout, read, write
from dit.convert.record import KEY
from dit.diffusion.config import DiffusionConfig
from dit.draw import open_checkpoint
from dit.vae import VaeRef
from storage import uri
from storage.channels import ChannelScale
from storage.errors import InputError

NAMES = tuple(f"n{number:02}" for number in range(10))


@pytest.fixture
def names(tmp_path: Path) -> str:
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    return str(tmp_path / "names.txt")


def test_names_are_told_once(tmp_path: Path, names: str) -> None:
    source = saved(tmp_path, random_dit().state_dict())
    assert read(source, heads=4).class_names is None
    found = read(source, heads=4, class_names=names)
    assert found.class_names == NAMES
    write(found, str(tmp_path / "x.safetensors"), "reference")
    again = read(str(tmp_path / "x.safetensors"), heads=4)
    assert (again.class_names, again.diffusion, again.notes) == (NAMES, DiffusionConfig(), ())
    assert same(again.state, found.state)
    message = refusal(tmp_path / "x.safetensors", class_names=names)
    assert message.endswith("x.safetensors: has the names of its classes; remove --class-names")


@pytest.mark.parametrize("layout", ["diffusers", "pipeline"])
def test_a_folder_of_diffusers_is_told_the_names(tmp_path: Path, names: str, layout: Layout, vae: VaeRef) -> None:
    write(pretrained(random_dit()), str(tmp_path / "theirs"), layout, vae=vae.source if layout == "pipeline" else None)
    assert read(str(tmp_path / "theirs"), class_names=names).class_names == NAMES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"a\nb\n", "names.txt: has the names of 2 classes, and the model has 10"),
        (b"", "names.txt: has the names of 0 classes, and the model has 10"),
        (b"\n".join(b"%d" % (number % 9) for number in range(10)), "names.txt: names two classes '0'"),
        (b"\xff\xfe\n", "names.txt is no text in UTF-8"),
        (None, "names.txt: no such object"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, text: bytes | None, reason: str) -> None:
    place = tmp_path / "names.txt"
    if text is not None:
        place.write_bytes(text)
    assert reason in refusal(saved(tmp_path, random_dit().state_dict()), class_names=str(place))


def scaled(mean: list[float], deviation: list[float]) -> str:
    channels = {"mean": mean, "deviation": deviation}
    return json.dumps({"process": {"kind": "gaussian"}, "channels": channels})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("", "ditflow in its metadata is not a record of ours: "),
        ("{}", "record of ours: process: "),
        ('{"process": {"kind": "edm"}}', "record of ours: process: "),
        ('{"process": {"kind": "flow", "path": "round"}}', "record of ours: process.flow.path: "),
        ('{"process": {"kind": "gaussian"}, "class_names": ["a"]}', "has the names of 1 classes, and the model has 10"),
        (scaled([0], [1]), "has the statistics of 1 latent channels, not of 4"),
        (scaled([0] * 4, [1, 1, 1, 0]), "a std is not above 0"),
    ],
)
def test_records_that_are_none(tmp_path: Path, record: str, reason: str) -> None:
    save_file(random_dit().state_dict(), tmp_path / "x.safetensors", {KEY: record})
    assert reason in refusal(tmp_path / "x.safetensors")


def test_a_record_counts_on_any_file_system(tmp_path: Path, names: str) -> None:
    hints: Any = {"heads": 4, "class_names": names}
    url = "memory://convert-record/x.safetensors"
    write(read(saved(tmp_path, random_dit().state_dict()), **hints), url, "reference")
    assert read(url, heads=4).class_names == NAMES
    assert uri.exists(url)


MEAN, STD = torch.tensor([0.5, -1.0, 0.25, 2.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])


@pytest.mark.parametrize("name", ["latents_stats.pt", "stats.safetensors"])
def test_statistics_of_latents_are_told_once(tmp_path: Path, name: str) -> None:
    """In the shape that LightningDiT's have, which broadcasts over a batch of latents."""
    statistics = {"mean": MEAN[None, :, None, None], "std": STD[None, :, None, None]}
    torch.save(statistics, tmp_path / name) if name.endswith("pt") else save_file(statistics, tmp_path / name)
    hints: Any = {"heads": 4, "latent_statistics": str(tmp_path / name)}
    found = read(saved(tmp_path, random_dit().state_dict()), **hints)
    assert found.channels == ChannelScale(mean=tuple(MEAN.tolist()), deviation=tuple(STD.tolist()))
    write(found, str(tmp_path / "x.safetensors"), "reference")
    assert read(str(tmp_path / "x.safetensors"), heads=4).channels == found.channels
    message = refusal(tmp_path / "x.safetensors", latent_statistics=str(tmp_path / name))
    assert message.endswith("x.safetensors: has the statistics of its latents; remove --latent-statistics")
    with pytest.raises(InputError, match="which only --to reference records, in a .safetensors file"):
        write(found, str(tmp_path / "bare.pt"), "reference")


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        ({"mean": MEAN}, "needs tensors mean and std, each with a number for 4 latent channels"),
        ({"mean": MEAN, "std": STD[:3]}, "needs tensors mean and std, each with a number for 4 latent channels"),
        ({"mean": MEAN * torch.nan, "std": STD}, "needs tensors mean and std, each with a number for 4 latent"),
        ({"mean": MEAN, "std": STD - 0.5}, "a std is not above 0"),
        ([MEAN, STD], "needs tensors mean and std"),
        ({"mean": MEAN.to_sparse(), "std": STD}, "needs tensors mean and std, each with a number for 4 latent"),
        ({"mean": MEAN.to("meta"), "std": STD}, "needs tensors mean and std, each with a number for 4 latent"),
        ({"mean": MEAN.to(torch.complex64), "std": STD}, "needs tensors mean and std, each with a number for 4"),
    ],
)
def test_statistics_that_do_not_fit(tmp_path: Path, statistics: Any, reason: str) -> None:
    told = saved(tmp_path, statistics, "stats.pt")
    message = refusal(saved(tmp_path, random_dit().state_dict()), latent_statistics=told)
    assert message.startswith(f"{told}: ")
    assert reason in message


def test_a_model_is_sampled_on_the_scale_of_its_statistics(tmp_path: Path, vae: VaeRef) -> None:
    told = saved(tmp_path, {"mean": MEAN, "std": STD}, "stats.pt")
    source = saved(tmp_path, random_dit().state_dict())
    trained = open_checkpoint(source, heads=4, vae=vae.source, latent_statistics=told)
    assert trained.card.channels == ChannelScale(mean=tuple(MEAN.tolist()), deviation=tuple(STD.tolist()))
