"""Checkpoints as other projects save them: where the weights are, and what lies beside them."""

import pathlib
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from other_checkpoints import Weights, options, refusal, same, saved
from random_dit import pretrained, random_dit
from safetensors.torch import load_file, save_file
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dit.convert import Layout, described, read, write
from dit.models.dit import DiT
from dit.vae import VaeRef
from storage.errors import InputError


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_dit()


@pytest.fixture
def weights(model: DiT) -> Weights:
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("prefix", "inner"),
    [
        ("module.", "blocks."),
        ("_orig_mod.", "blocks."),
        ("module._orig_mod.", "blocks."),
        ("_fsdp_wrapped_module.", "blocks.0._checkpoint_wrapped_module."),
        ("net.diffusion_model.", "blocks.0._orig_mod."),
        ("", "blocks.0._orig_mod."),
    ],
)
@pytest.mark.parametrize("key", [None, "state_dict", "model", "ema", "model_ema", "ema_state_dict"])
def test_names_that_are_wrapped(tmp_path: Path, weights: Weights, prefix: str, inner: str, key: str | None) -> None:
    wrapped = {prefix + name.replace("blocks.0.", inner, 1): tensor for name, tensor in weights.items()}
    if inner == "blocks.":  # names that change only in front
        wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    found = read(saved(tmp_path, {key: wrapped, "epoch": 3} if key else wrapped), heads=4)
    assert same(found.state, weights)
    assert any(note == f"read from {key}" or note.startswith(f"read from {key}.") for note in found.notes) == bool(key)


def test_the_average_is_preferred_and_two_are_refused(tmp_path: Path, weights: Weights) -> None:
    raw = {name: tensor + 1 for name, tensor in weights.items()}
    flat = {
        f"{root}.{name}": tensor for root, of in (("model", raw), ("ema_model", weights)) for name, tensor in of.items()
    }
    found = read(saved(tmp_path, {"state_dict": flat}), heads=4)
    assert same(found.state, weights)
    assert found.notes[0] == "read from state_dict.ema_model"
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in weights.items()}}
    assert same(read(saved(tmp_path, averaged), heads=4).state, weights)
    both = saved(tmp_path, {"ema1": weights, "ema2": weights | {}})
    assert "has weights under ema1 and ema2; save one of them alone" in refusal(both)


@pytest.mark.parametrize("legacy", [False, True])
def test_paths_and_arrays_beside_the_weights(tmp_path: Path, weights: Weights, legacy: bool) -> None:
    beside = {
        "args": options(out=pathlib.Path("/nowhere"), pure=pathlib.PureWindowsPath("c:/x"), model="DiT-S/2"),
        "loss": np.float32(0.1),
        "step": np.int64(3),
        "history": np.arange(5),
        "names": np.array(["a", None], dtype=object),
        "dtype": np.dtype("f4"),
        "rng": np.random.get_state(),
    }
    torch.save({"ema": weights} | beside, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert same(read(str(tmp_path / "x.pt"), heads=4).state, weights)


def test_other_objects_are_named_with_the_way_to_strip_them(tmp_path: Path, weights: Weights) -> None:
    message = refusal(saved(tmp_path, {"ema": weights, "config": types.SimpleNamespace(a=1)}))
    assert "x.pt: contains types.SimpleNamespace, which is not loaded" in message
    assert "torch.save(torch.load('x.pt', weights_only=False)['ema'], 'weights.pt')" in message


def test_a_file_without_the_position_table(tmp_path: Path, weights: Weights) -> None:
    source = saved(tmp_path, {name: tensor for name, tensor in weights.items() if name != "pos_embed"})
    assert "no tensor pos_embed, which shows the latents' side; pass --latent-size" in refusal(source)
    assert same(read(source, heads=4, latent_size=16).state, weights)
    assert "has latents of side 16, not 32" in refusal(saved(tmp_path, weights), latent_size=32)


TABLE = "y_embedder.embedding_table.weight"


def test_a_label_table_without_a_null_label(tmp_path: Path, weights: Weights, model: DiT) -> None:
    source = saved(tmp_path, weights | {TABLE: weights[TABLE][:10]})
    assert "9 classes, null label 9" in described(read(source, heads=4))[0]
    found = read(source, heads=4, classes=10)
    assert "10 classes, null label 10 (not trained, so sample with guidance_scale 1)" in described(found)[0]
    assert (found.config.num_classes, found.config.label_dropout) == (10, 0)
    assert torch.equal(found.state[TABLE][:10], weights[TABLE][:10])
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([3, 999]), torch.tensor([1, 9])
    assert torch.equal(found.build()(x, t, y), model(x, t, y))
    write(found, str(tmp_path / "back.safetensors"), "reference")
    assert read(str(tmp_path / "back.safetensors"), heads=4).config == found.config


def test_options_tell_the_classes_unless_the_user_does(tmp_path: Path, weights: Weights) -> None:
    args = options(model="DiT-S/2", num_classes=11)
    source = saved(tmp_path, {"ema": weights, "args": args})
    assert read(source, heads=4).config.num_classes == 11
    assert read(source, heads=4, classes=10).config.num_classes == 10
    args.num_classes = 1000
    message = refusal(saved(tmp_path, {"ema": weights, "args": args}))
    assert "the label table of 11 rows does not fit 1000 classes; pass --classes 11, or 10 if" in message
    assert "label table of 11 rows does not fit 12 classes" in refusal(source, classes=12)
    bare = {name: tensor for name, tensor in weights.items() if name != TABLE}
    assert "so it has no classes; remove --classes" in refusal(saved(tmp_path, bare), classes=10)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty; fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
        (b"nothing of the kind", "damaged"),
        (b"PK\x03\x04 cut short", "fetch it again"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "safetensors", "PT"])
def test_what_is_found_in_place_of_a_file(tmp_path: Path, data: bytes, reason: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    assert f"{path}: " in (message := refusal(path))
    assert reason in message


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_was_cut_short(tmp_path: Path, weights: Weights, name: str) -> None:
    write(pretrained(random_dit()), str(tmp_path / name), "reference")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert "fetch it again" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "PTH"])
def test_safetensors_by_another_name(tmp_path: Path, weights: Weights, suffix: str) -> None:
    save_file(weights, tmp_path / f"x.{suffix}")
    assert same(read(str(tmp_path / f"x.{suffix}"), heads=4).state, weights)


def test_pickles_that_torch_wrote_otherwise(tmp_path: Path, weights: Weights) -> None:
    torch.save(weights, tmp_path / "x.pt", pickle_protocol=4)
    assert "not as torch.save writes it with its own pickle protocol" in refusal(tmp_path / "x.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.ones(1)), str(tmp_path / "x.pt"))
    assert "is a TorchScript archive; save the state_dict of the module" in refusal(tmp_path / "x.pt")


def test_shards_are_named(tmp_path: Path, weights: Weights) -> None:
    for name in ("model-00001-of-00003.safetensors", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (torch.save if name.endswith("pt") else save_file)(weights, tmp_path / name)
        assert f"{name}: is one shard of a checkpoint" in refusal(tmp_path / name)
    whole = saved(tmp_path, weights, "model-00001-of-00001.bin")
    assert same(read(whole, heads=4).state, weights)
    empty = saved(tmp_path, {"module": {name: torch.zeros(0) for name in weights}})
    assert "is empty; the file is a shard of DeepSpeed's; run the zero_to_fp32.py" in refusal(empty)
    for name, tool in ((".metadata", "torch.distributed.checkpoint"), ("zero_to_fp32.py", "DeepSpeed")):
        folder = tmp_path / tool
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        assert f"{folder}: holds the shards of {tool}; python" in refusal(folder)


def test_a_file_of_the_optimizer_alone(tmp_path: Path, weights: Weights) -> None:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert "contains no tensors by name" in refusal(saved(tmp_path, optimizer.state_dict()))


def test_numbers_that_are_not_finite(tmp_path: Path, weights: Weights) -> None:
    name = "blocks.1.attn.proj.weight"
    assert f"{name} is not finite" in refusal(saved(tmp_path, weights | {name: weights[name] * torch.nan}))


def test_patches_in_another_order(tmp_path: Path, weights: Weights) -> None:
    name = "x_embedder.proj.weight"
    transposed = weights[name].permute(2, 3, 1, 0).contiguous()
    assert "so it may be transposed" in refusal(saved(tmp_path, weights | {name: transposed}))
    assert "not 4 dimensions" in refusal(saved(tmp_path, weights | {name: weights[name].flatten(1)}))
    last = weights[name].to(memory_format=torch.channels_last)
    assert same(read(saved(tmp_path, weights | {name: last}), heads=4).state, weights)


@pytest.mark.parametrize("name", ["y.pt", "y.safetensors"])
def test_tensors_that_share_memory(tmp_path: Path, weights: Weights, name: str) -> None:
    """Views of one buffer, as some optimizers keep parameters, and one tensor in two places."""
    buffer = torch.cat([tensor.flatten() for tensor in weights.values()])
    parts = buffer.split([tensor.numel() for tensor in weights.values()])
    views = {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
    views["blocks.1.attn.proj.bias"] = views["blocks.0.attn.proj.bias"]
    write(read(saved(tmp_path, views), heads=4), str(tmp_path / name), "reference")
    back = torch.load(tmp_path / name, weights_only=True) if name == "y.pt" else load_file(tmp_path / name)
    assert same(back, views)
    assert (tmp_path / name).stat().st_size < 1.1 * buffer.nbytes


def test_a_folder_is_checked_against_the_hints(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write(pretrained(random_dit()), str(folder), "diffusers")
    for hint, value in (("heads", 2), ("classes", 9), ("latent_size", 8)):
        with pytest.raises(InputError, match=f"not {value}; remove --{hint.replace('_', '-')}"):
            read(str(folder), **{hint: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp16.safetensors", "bin", "fp16.bin"])
def test_other_weights_of_a_diffusers_folder(tmp_path: Path, weights: Weights, name: str) -> None:
    folder = tmp_path / "theirs"
    write(pretrained(random_dit()), str(folder), "diffusers")
    tensors = load_file(path := folder / "diffusion_pytorch_model.safetensors")
    path.unlink()
    place = folder / f"diffusion_pytorch_model.{name}"
    save_file(tensors, place) if name.endswith("safetensors") else torch.save(tensors, place)
    assert same(read(str(folder)).state, weights)
    place.rename(folder / "diffusion_pytorch_model.safetensors.index.json")
    with pytest.raises(InputError, match="says that the weights are in shards; save_pretrained"):
        read(str(folder))


def test_an_average_that_cannot_be_read_is_named(tmp_path: Path, weights: Weights) -> None:
    """As torch_ema and diffusers keep it, a list; and as CompVis does, with names without dots."""
    listed = {"model": weights, "ema": {"decay": 0.9999, "shadow_params": list(weights.values())}}
    dotless = {f"model.{name}": tensor for name, tensor in weights.items()}
    dotless |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in weights.items()}
    for content, place, average in ((listed, "model", "ema"), (dotless, "model", "model_ema")):
        note = read(saved(tmp_path, content), heads=4).notes[0]
        assert note == f"read from {place}, not from the average under {average}, whose tensors have no names of a DiT"
    quiet = saved(tmp_path, {"model": weights, "args": options(ema_decay=0.9999)})
    assert read(quiet, heads=4).notes[0] == "read from model"


def test_tensors_that_are_not_plain(tmp_path: Path, weights: Weights) -> None:
    name = "blocks.0.attn.qkv.weight"
    for other in (weights[name].to_sparse(), weights[name].to("meta")):
        assert f"{name} is sparse, a part of a tensor, or without values" in refusal(
            saved(tmp_path, weights | {name: other})
        )
    eighth = weights[name].to(torch.float8_e4m3fn)
    assert torch.equal(read(saved(tmp_path, weights | {name: eighth}), heads=4).state[name], eighth.float())


def test_a_tensor_that_is_there_twice(tmp_path: Path, weights: Weights) -> None:
    name = "blocks.0._orig_mod.attn.qkv.weight"
    twice = weights | {name: weights[name.replace("_orig_mod.", "")]}
    assert "has a tensor twice" in refusal(saved(tmp_path, twice))


@pytest.mark.parametrize("name", ["x.pth.tar", "checkpoint"])
def test_files_of_other_suffixes(tmp_path: Path, weights: Weights, name: str) -> None:
    assert refusal(saved(tmp_path, weights, name)).endswith("or .safetensors; rename it")


def test_a_shard_of_early_fsdp(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, {"x_embedder.proj.weight": ShardedTensor}))
    assert "ShardedTensor, so it is one rank's shard; save the full state_dict" in message


@pytest.mark.full
def test_a_shard_of_fsdp(tmp_path: Path) -> None:
    """Read in a process of its own: whoever has imported DTensor could unpickle one."""
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh\n"
        "dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}.store', rank=0, world_size=1)\n"
        "part = distribute_tensor(torch.ones(4, 4), init_device_mesh('cpu', (1,)), [Shard(0)])\n"
        "torch.save({'x_embedder.proj.weight': part}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pt")], check=True)
    found = [
        sys.executable,
        "-c",
        "import sys; from dit.convert import read; read(sys.argv[1])",
        str(tmp_path / "x.pt"),
    ]
    done = subprocess.run(found, capture_output=True, text=True, check=False)
    assert "contains torch.distributed" in done.stderr
    assert "so it is one rank's shard; save the full state_dict" in done.stderr


@pytest.mark.parametrize("layout", ["reference", "diffusers", "pipeline"])
def test_a_null_label_without_training_stays_one_in_every_layout(tmp_path: Path, layout: Layout, vae: VaeRef) -> None:
    model = random_dit(label_dropout=0.0)
    place = str(tmp_path / ("x.safetensors" if layout == "reference" else "x"))
    write(pretrained(model), place, layout, vae=vae.source if layout == "pipeline" else None)
    found = read(place, heads=4)
    assert found.config == model.config
    assert torch.equal(found.state[TABLE][:-1], model.state_dict()[TABLE][:-1])
    assert "null label 10 (not trained, so sample with guidance_scale 1)" in described(found)[0]
