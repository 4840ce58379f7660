"""Files of SiT, REPA and LightningDiT, made by their published names and computed step by step by `plain_dit`."""

from pathlib import Path
from typing import Any

import plain_dit
import pytest
import torch
from other_checkpoints import Weights, options, refusal, same, saved
from random_dit import pretrained, random_dit
from safetensors.torch import load_file

from dit.convert import described, read, write
from dit.convert.flow import reversed_time, without_variance
from dit.convert.layout import TABLE, tables
from dit.convert.pretrained import infer
from dit.diffusion.config import FlowConfig
from dit.models.build import build
from dit.models.config import dit_config, lightning_config
from dit.vae import VaeRef
from storage.errors import InputError

FLOW: Any = {"process": "flow"}
REVERSED: Any = {"process": "reversed-flow"}
ASK = "pass --process flow if its time is 0 at the noise (SiT, LightningDiT), or reversed-flow if it is 1 there (REPA)"


@pytest.fixture(scope="module")
def sit() -> Weights:
    return plain_dit.random_file(16, width=64, depth=3, channels=4, outputs=8, patch=2)


@pytest.fixture(scope="module")
def repa() -> Weights:
    """With projectors for two encoders, and only as many outputs as are used."""
    found = plain_dit.random_file(16, width=64, depth=3, channels=4, outputs=4, patch=2)
    projectors = {f"projectors.{i}.{j}.weight": torch.ones(2, 2) for i in range(2) for j in (0, 2, 4)}
    return found | projectors


@pytest.fixture(scope="module")
def lightning() -> Weights:
    return plain_dit.random_file(8, width=64, depth=2, channels=8, outputs=8, patch=1, lightning=True)


def batch(channels: int = 4, side: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 9, 10])


def same_numbers(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=float(2e-5 * expected.abs().max()))


@torch.no_grad()
def test_sit_is_the_flow_of_its_first_channels(tmp_path: Path, sit: Weights) -> None:
    found = read(saved(tmp_path, sit, "SiT-XL-2-256x256.pt"), heads=4, **FLOW)
    assert found.diffusion == FlowConfig(path="linear", predict="velocity")
    assert (found.config.learn_variance, found.config.out_channels) == (False, 4)
    x, t, y = batch()
    same_numbers(found.build()(x, t, y), plain_dit.forward(sit, x, t, y, heads=4)[:, :4])
    assert described(found) == [
        "DiT of depth 3, width 64, 4 heads, patches of 2, latents 4x16x16, 10 classes, null label 10, "
        "velocity of a flow on the linear path",
        "assumed: path_type linear, as the published SiT, REPA and LightningDiT",
        "assumed: prediction velocity, as the published SiT, REPA and LightningDiT",
        "left out: the second half of the outputs, which flows do not use",
    ]


@torch.no_grad()
def test_repa_has_its_time_turned_round(tmp_path: Path, repa: Weights) -> None:
    found = read(saved(tmp_path, {"ema": repa, "steps": 400_000}), heads=4, **REVERSED)
    x, t, y = batch()
    same_numbers(found.build()(x, t, y), -plain_dit.forward(repa, x, 1 - t, y, heads=4))
    assert found.notes[0] == "read from ema"
    assert found.notes[-2:] == (
        "left out: 6 tensors of REPA's projectors",
        "its time was turned round, so that it is 0 at the noise: in the first and the last Linear layer",
    )


def test_repas_older_files_count_blocks_from_its_projection_again(tmp_path: Path, repa: Weights) -> None:
    places = {"blocks.1.": "decoder_blocks.0.", "blocks.2.": "decoder_blocks.1."}
    older = {places.get(name[:9], name[:9]) + name[9:]: tensor for name, tensor in repa.items()}
    expected = read(saved(tmp_path, repa), heads=4, **REVERSED).state
    assert older.keys() != repa.keys()
    assert same(read(saved(tmp_path, older), heads=4, **REVERSED).state, expected)


@torch.no_grad()
def test_lightningdit_has_its_norms_mlps_and_rotation(tmp_path: Path, lightning: Weights) -> None:
    found = read(saved(tmp_path, {"ema": {f"module.{name}": of for name, of in lightning.items()}}), **FLOW)
    config = found.config
    assert config.options == {"norm": "rms", "mlp": "swiglu", "rope": True}  # type: ignore[union-attr]
    assert (config.heads, config.mlp_ratio, config.in_channels, config.patch_size) == (4, 4, 8, 1)
    x, t, y = batch(8, 8)
    same_numbers(found.build()(x, t, y), plain_dit.forward(lightning, x, t, y, heads=4))
    assert "norm rms, mlp swiglu, rope True" in described(found)[0]
    assert "assumed: latents on the autoencoder's scale; those of LightningDiT are normalised" in found.notes[-1]
    torch.save({"mean": torch.zeros(1, 8, 1, 1), "std": torch.ones(1, 8, 1, 1)}, tmp_path / "latents_stats.pt")
    told: Any = FLOW | {"latent_statistics": str(tmp_path / "latents_stats.pt")}
    assert not any("autoencoder's scale" in note for note in read(str(tmp_path / "x.pt"), **told).notes)


def test_without_its_table_the_rotation_is_not_known(tmp_path: Path, lightning: Weights) -> None:
    bare = {name: tensor for name, tensor in lightning.items() if not name.startswith("feat_rope.")}
    found = read(saved(tmp_path, bare), heads=4, **FLOW)
    assert found.config.options == {"norm": "rms", "mlp": "swiglu"}  # type: ignore[union-attr]
    assert "assumed: no RoPE, since the file has no feat_rope" in found.notes


@pytest.mark.parametrize("name", ["feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_a_rotation_of_another_convention_is_refused(tmp_path: Path, lightning: Weights, name: str) -> None:
    halves = torch.cat([lightning[name][:, ::2], lightning[name][:, 1::2]], dim=1)  # pairs of channels far apart
    assert f"{name} is " in (message := refusal(saved(tmp_path, lightning | {name: halves}), **FLOW))
    assert message.endswith("off the fixed table of this layout, and learned ones are not read")


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("sit", {"channels": 4, "outputs": 8, "patch": 2}, 675_129_632 - 294_912),
        ("lightning", {"channels": 32, "outputs": 32, "patch": 1, "lightning": True}, 674_961_824),
    ],
)
def test_the_published_sizes(name: str, fields: Any, count: int) -> None:
    """SiT-XL/2 has 292 tensors; LightningDiT-XL/1 has its count, and tables beside it."""
    shapes = plain_dit.shapes(width=1152, depth=28, classes=1000, **fields)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    shapes["pos_embed"] = (1, 256, 1152)
    assert name != "sit" or len(shapes) == 292
    if name == "lightning":
        shapes |= {"feat_rope.freqs_cos": (256, 72), "feat_rope.freqs_sin": (256, 72)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = infer(tensors | {TABLE: torch.ones(1001, 1152)}, {}, name)
    assert config == (dit_config("XL/2") if name == "sit" else lightning_config("XL/1"))
    with torch.device("meta"):
        ours = build(config).state_dict() | tables(config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
def test_time_turned_round_twice_is_as_it_was(sit: Weights, predict: Any) -> None:
    flow = FlowConfig(predict=predict)
    once = reversed_time(sit, flow)
    changed = {name for name in sit if not torch.equal(once[name], sit[name])}
    head = {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert changed == {"t_embedder.mlp.0.weight"} | (head if predict == "velocity" else set())
    for name, tensor in reversed_time(once, flow).items():
        torch.testing.assert_close(tensor, sit[name], rtol=0, atol=1e-7)


def test_outputs_are_left_out_pixel_by_pixel() -> None:
    model = random_dit(in_channels=3, patch_size=4)
    config, state = without_variance(model.config, model.state_dict())
    other = build(config)
    other.load_state_dict(state)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 999.0]), torch.tensor([1, 10])
    torch.testing.assert_close(other(x, t, y), model(x, t, y)[:, :3])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"path_type": "Linear", "prediction": "velocity"}, FlowConfig()),
        ({"path_type": "linear", "prediction": "v"}, FlowConfig()),
        ({"path_type": "GVP", "prediction": "noise"}, FlowConfig(path="gvp", predict="noise")),
        ({"path_type": "cosine", "prediction": "v"}, FlowConfig(path="gvp")),
        ({"path_type": "VP", "prediction": "velocity"}, FlowConfig(path="vp")),
    ],
)
def test_options_name_path_and_prediction(tmp_path: Path, sit: Weights, args: Any, expected: FlowConfig) -> None:
    found = read(saved(tmp_path, {"ema": sit, "args": options(model="SiT-XL/2", **args)}), heads=4, **FLOW)
    assert found.diffusion == expected
    assert not [note for note in found.notes if note.startswith("assumed")]


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"args": options(prediction="score")}, "its prediction is score, and not one of velocity, v, data"),
        ({"args": options(path_type="edm")}, "its path_type is edm, and not one of linear, gvp, cosine, vp"),
        (
            {"a": {"path_type": "GVP"}, "b": {"path_type": "Linear"}},
            "names more than one path_type: gvp, linear; save one model alone",
        ),
    ],
)
def test_flows_that_do_not_exist_here(tmp_path: Path, sit: Weights, beside: Any, reason: str) -> None:
    assert reason in refusal(saved(tmp_path, {"ema": sit} | beside), **FLOW)


@pytest.mark.parametrize("name", ["repa", "lightning"])
def test_who_does_not_say_which_flow_is_asked(tmp_path: Path, request: Any, name: str) -> None:
    message = refusal(saved(tmp_path, {"ema": request.getfixturevalue(name)}))
    assert "tensor " in message
    assert message.endswith(f"{ASK}, or gaussian if it predicts noise")


@pytest.mark.parametrize("hints", [FLOW, REVERSED])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
@pytest.mark.parametrize("name", ["sit", "repa", "lightning"])
def test_wrapped_weights_beside_an_optimizer(
    tmp_path: Path, request: Any, hints: Any, prefix: str, key: str, name: str
) -> None:
    tensors = request.getfixturevalue(name)
    whole = {
        key: {prefix + name: tensor for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{}]},
        "opt": {"state": {}},
    }
    bare = read(saved(tmp_path, tensors), heads=4, **hints)
    assert same(read(saved(tmp_path, whole), heads=4, **hints).state, bare.state)


@pytest.mark.parametrize("name", ["sit", "repa", "lightning"])
def test_a_file_that_we_write_records_its_process(tmp_path: Path, request: Any, name: str) -> None:
    first = read(saved(tmp_path, request.getfixturevalue(name)), heads=4, **REVERSED)
    write(first, str(tmp_path / "x.safetensors"), "reference")
    again = read(str(tmp_path / "x.safetensors"), heads=4)
    assert (again.config, again.diffusion) == (first.config, first.diffusion)
    assert same(again.state, first.state)
    for told in ("reversed-flow", "gaussian"):
        message = refusal(tmp_path / "x.safetensors", process=told)
        assert message.endswith(f"has the process flow, not {told}; remove --process")
    tables_of = {"feat_rope.freqs_cos", "feat_rope.freqs_sin"} if name == "lightning" else set()
    assert load_file(tmp_path / "x.safetensors").keys() == first.state.keys() | tables_of


@pytest.mark.parametrize("layout", ["diffusers", "pipeline"])
def test_diffusers_has_no_such_flow(tmp_path: Path, sit: Weights, layout: Any) -> None:
    found = read(saved(tmp_path, sit), heads=4, **FLOW)
    with pytest.raises(InputError, match="diffusers has no DiT of the process flow; use --to reference"):
        write(found, str(tmp_path / "theirs"), layout)
    assert not (tmp_path / "theirs").exists()


def test_a_pipeline_knows_its_process(tmp_path: Path, vae: VaeRef) -> None:
    write(pretrained(random_dit()), str(tmp_path / "pipeline"), "pipeline", vae=vae.source)
    assert "has the process gaussian, not flow; remove --process" in refusal(tmp_path / "pipeline", **FLOW)
